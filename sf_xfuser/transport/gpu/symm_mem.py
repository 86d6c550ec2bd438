"""One-sided transfers between GPUs of one NVLink domain, without extra packages. PyTorch's symmetric memory (its CUDA
backend) maps the memory of peers, copy engines write into it, and stream memory operations raise the flags. No kernel
takes part in a transfer. ``device.py`` describes the protocol.

PyTorch's own signals are not used: they are spinning kernels, and each signal waits until the last one is consumed.
The PyTorch module is private and changes, so ``probe`` checks for the functions needed here, not for a version.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.layout import topology
from sf_xfuser.transport.base import raise_if_unavailable
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.gpu.device import DeviceWindow
from sf_xfuser.transport.gpu.driver import Driver
from sf_xfuser.transport.gpu.facts import DriverFacts, gpu_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts(DriverFacts):
    """``backend``: the selected backend of PyTorch's symmetric memory."""

    backend: str | None = None


def probe() -> Facts:
    """Probe this process. Local; never raises, creates no CUDA context."""
    facts: dict[str, Any] = {"cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
    if facts["cuda"] is None or not facts["gpus"]:
        return Facts(**facts)
    try:
        import torch.distributed._symmetric_memory as symmetric

        facts |= Driver().facts()
        facts["backend"] = getattr(symmetric, "get_backend", lambda device: "CUDA")(torch.device("cuda"))
        absent = [] if hasattr(symmetric, "rendezvous") else ["rendezvous"]
        if not hasattr(getattr(symmetric, "_SymmetricMemory", None), "empty_strided_p2p"):
            absent.append("empty_strided_p2p")
        if absent:
            facts["problem"] = f"PyTorch's symmetric memory has no {' and no '.join(absent)}"
    except Exception as error:
        facts["problem"] = str(error)
    return Facts(**facts)


def unsupported_reason(facts: Facts) -> str | None:
    """Why a process with these facts cannot use symmetric memory, or None. Pure."""
    if reason := facts.no_gpu_reason() or facts.problem or facts.old_driver_reason():
        return reason
    if facts.backend != "CUDA":
        return f"PyTorch's symmetric memory uses its {facts.backend} backend; unset TORCH_SYMMMEM or set it to CUDA"
    return None


def unavailable() -> str | None:
    """Why this process cannot use symmetric memory, regardless of its peers, or None. Local."""
    return unsupported_reason(probe())


def identity() -> str:
    """The NVLink domain, or the host without one. Equal on ranks with GPUs that NVLink may connect. Local."""
    facts = topology.probe()
    return facts.nvlink_domain or facts.host


def _context_problem() -> str | None:
    """Create this GPU's CUDA context, which the driver calls need. Returns why that fails, or None. Local."""
    try:
        torch.zeros(1, device=torch.cuda.current_device())
    except RuntimeError as error:
        return f"no CUDA context: {error}"
    return None


class SymmMem(DeviceWindow):
    """``group``: a process group of this rank and its peers. ``rank_of``: each position's rank in ``group``."""

    name = "symm_mem"

    def __init__(
        self,
        control: ControlPlane,
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
        self._handle: Any = None  # keeps the peers' memory mapped
        self._address: dict[int, int] = {}
        problem = unavailable() or _context_problem()
        gpu = None if problem else gpu_name(torch.cuda.current_device())
        answers = control.gather("symm_mem", [problem, socket.gethostname(), gpu])
        raise_if_unavailable(self.name, members, [reason for reason, *_ in answers])
        self.other_hosts = {peer for peer in peers if answers[peer][1] != answers[position][1]}
        self._ranks_on_gpu = answers.count(answers[position])
        super().__init__(control, members, position, peers, timeout_s)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        import torch.distributed._symmetric_memory as symmetric

        # Not ``symmetric.empty``: its memory pool never returns freed memory.
        device = torch.device("cuda", self.device)
        allocator: Any = symmetric._SymmetricMemory  # type: ignore[attr-defined]
        memory: torch.Tensor = allocator.empty_strided_p2p((nbytes,), [1], torch.uint8, device)
        self._handle = symmetric.rendezvous(memory, self._group)
        starts = self._handle.buffer_ptrs
        if memory.data_ptr() != starts[self._handle.rank]:
            raise RuntimeError("PyTorch's symmetric memory maps this rank's own buffer to another address")
        self._address = {peer: starts[rank] for peer, rank in self._rank_of.items()}
        return memory

    def _free(self) -> None:
        self._handle = None

    @property
    def _reachable(self) -> Sequence[int]:
        return [peer for peer in self._address if peer != self._position]
