"""What a process finds out about its GPU, driver and host before it connects. Gathered from all ranks, so that each of
them decides alike whether the group can use a transport."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from sf_xfuser.transport.control_plane import ControlPlane

_MIN_VERSION = 12050  # older drivers do not support stream memory operations on memory that peers map


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverFacts:
    """Capabilities of one process, as plain values.

    ``cuda``: PyTorch's CUDA version. ``gpus``: number of visible GPUs. ``problem``: why probing failed. ``driver``: the
    CUDA version that the driver supports (12050: CUDA 12.5). ``missing``: required functions that the driver lacks.
    ``stream_operations``: support for 64-bit stream memory operations.
    """

    cuda: str | None = None
    gpus: int = 0
    problem: str | None = None
    driver: int = 0
    missing: Sequence[str] = ()
    stream_operations: bool = False

    def no_gpu_reason(self) -> str | None:
        if self.cuda is None:
            return "this PyTorch is built without CUDA"
        return None if self.gpus else "no NVIDIA GPU is visible"

    def old_driver_reason(self) -> str | None:
        if self.driver < _MIN_VERSION or self.missing:
            version = f"{self.driver // 1000}.{self.driver % 1000 // 10}"
            return f"the driver supports CUDA {version}, stream memory operations on peer memory need 12.5"
        return None if self.stream_operations else "the GPU has no 64-bit stream memory operations"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts(DriverFacts):
    """Those of one rank. ``host``, ``gpu``: where it runs. ``environment``: the variables that the transport checks."""

    host: str = ""
    gpu: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


_F = TypeVar("_F", bound=RankFacts)


def gather(control: ControlPlane, name: str, facts: _F) -> list[_F]:
    """The facts of all ranks by position, with their GPUs. Creates the context of this rank's GPU. Collective."""
    if facts.gpus:
        device = torch.cuda.current_device()
        torch.zeros(1, device=device)  # without a current CUDA context NVSHMEM starts only partially
        facts = replace(facts, gpu=gpu_name(device))
    return [type(facts)(**values) for values in control.gather(name, asdict(facts))]


def ranks_on_gpu(ranks: Sequence[RankFacts], position: int) -> int:
    """How many of the ranks use the GPU of the rank at ``position``, this one included."""
    own = ranks[position]
    return sum((facts.host, facts.gpu) == (own.host, own.gpu) for facts in ranks)


def other_hosts(ranks: Sequence[RankFacts], position: int) -> set[int]:
    """The positions of the ranks on other hosts than that of ``position``."""
    return {w for w, facts in enumerate(ranks) if facts.host != ranks[position].host}


def has_efa() -> bool:
    """Whether this machine has AWS EFA cards. Local."""
    cards = Path("/sys/class/infiniband").glob("*/device/driver")
    return any(driver.resolve().name == "efa" for driver in cards)


def gpu_name(device: int) -> str:
    """UUID of the GPU: equal in all processes of a host that use it, regardless of CUDA_VISIBLE_DEVICES."""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", device))


def version_numbers(version: str) -> tuple[int, ...]:
    """``(0, 4, 1)`` of ``"0.4.1.post2"``."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:3])
