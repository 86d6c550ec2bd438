"""One-sided transfers between GPUs of one NVLink domain, with nothing to install: PyTorch's symmetric memory (its CUDA
backend) maps the memory of peers; copy engines write into it and stream memory operations raise the flags. No kernel
runs for a transfer but the one that packs a strided chunk. See ``device.py`` for the protocol.

PyTorch's own signals are kernels that spin, hold one value and wait for the last one to be taken, so they are not used.
The module is private to PyTorch and moves: what is needed of it is asked for, not its version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser import topology
from sf_xfuser.agreement import Agreement
from sf_xfuser.transport.base import raise_together
from sf_xfuser.transport.device import DeviceWindow
from sf_xfuser.transport.driver import Driver


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a process knows of its means. ``missing``: names that PyTorch or the driver lacks."""

    cuda: str | None
    gpus: int
    missing: tuple[str, ...] = ()
    backend: str | None = "CUDA"
    stream_operations: bool = True


def look() -> Facts:
    """Local; never raises, makes no CUDA context."""
    cuda, gpus = torch.version.cuda, torch.cuda.device_count()
    if cuda is None or not gpus:
        return Facts(cuda=cuda, gpus=gpus)
    try:
        import torch.distributed._symmetric_memory as symmetric

        driver = Driver()
        missing = [] if hasattr(symmetric, "rendezvous") else ["PyTorch's symmetric memory has no rendezvous"]
        if not hasattr(getattr(symmetric, "_SymmetricMemory", None), "empty_strided_p2p"):
            missing.append("PyTorch's symmetric memory has no empty_strided_p2p")
        missing += [f"the driver has no {name}" for name in driver.missing()]
        asked = getattr(symmetric, "get_backend", lambda device: "CUDA")(torch.device("cuda"))
        operations = driver.has_64_bit_stream_operations(0)
    except Exception as error:
        return Facts(cuda=cuda, gpus=gpus, missing=(str(error),))
    return Facts(cuda=cuda, gpus=gpus, missing=tuple(missing), backend=asked, stream_operations=operations)


def refusal(facts: Facts) -> str | None:
    """Why a process with these facts cannot use it; None where it can. Pure."""
    if facts.cuda is None:
        return "this PyTorch is built without CUDA"
    if not facts.gpus:
        return "no NVIDIA GPU is visible"
    if facts.missing:
        return "; ".join(facts.missing)
    if facts.backend != "CUDA":
        return f"PyTorch's symmetric memory uses its {facts.backend} backend; unset TORCH_SYMMMEM or set it to CUDA"
    if not facts.stream_operations:
        return "the GPU has no 64-bit stream memory operations"
    return None


def unavailable() -> str | None:
    """Why this process cannot use it, whatever its peers can; None where it can. Local."""
    return refusal(look())


def identity() -> str:
    """The same on two ranks if NVLink may join their GPUs: the domain, or the host. Local."""
    facts = topology.probe()
    return facts.nvlink_domain or facts.host


class SymmMem(DeviceWindow):
    """``group``: a process group of this rank and its peers; ``rank_of`` says which rank of it a position is."""

    name = "symm_mem"

    def __init__(
        self,
        agreement: Agreement,
        members: Sequence[int],
        position: int,
        peers: Sequence[int],
        timeout_s: float,
        group: dist.ProcessGroup,
        rank_of: Mapping[int, int],
    ) -> None:
        """As ``DeviceWindow``."""
        self._group = group
        self._rank_of = rank_of
        self._handle: Any = None  # keeps the mappings
        self._address: dict[int, int] = {}
        raise_together(self.name, members, agreement.gather("symm_mem", unavailable()))
        super().__init__(agreement, members, position, peers, timeout_s)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        import torch.distributed._symmetric_memory as symmetric

        # Not ``symmetric.empty``, which takes memory from a pool that keeps what is let go.
        device = torch.device("cuda", self._device)
        allocator: Any = symmetric._SymmetricMemory  # type: ignore[attr-defined]
        memory: torch.Tensor = allocator.empty_strided_p2p((nbytes,), [1], torch.uint8, device)
        self._handle = symmetric.rendezvous(memory, self._group)
        starts = self._handle.buffer_ptrs
        if memory.data_ptr() != starts[self._handle.rank]:
            raise RuntimeError("PyTorch did not put the memory where it says")
        self._address = {peer: starts[self._rank_of[peer]] for peer in self._peers}
        return memory

    def _free(self) -> None:
        self._handle = None

    def _mapped(self, peer: int) -> bool:
        return True

    def _put(self, peer: int, offset: int, source: int, nbytes: int, stream: int) -> None:
        self._driver.copy(self._address[peer] + offset, source, nbytes, stream)

    def _put_and_raise(
        self, peer: int, offset: int, source: int, nbytes: int, flag: int, value: int, stream: int
    ) -> None:
        if nbytes:
            self._put(peer, offset, source, nbytes, stream)
        self._driver.write_64(self._address[peer] + flag, value, stream)

    def _wait(self, peer: int, address: int, value: int, stream: int) -> None:
        self._driver.wait_64(address, value, stream)
