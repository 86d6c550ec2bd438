"""One-sided transfers between GPUs of one NVLink domain, with nothing to install: PyTorch's symmetric memory (its CUDA
backend) maps the memory of peers; copy engines write into it and stream memory operations raise the flags. No kernel
runs for a transfer but the one that packs a strided chunk. See ``device.py`` for the protocol.

PyTorch's own signals are kernels that spin, hold one value and wait for the last one to be taken, so they are not used.
The module is private to PyTorch and moves: what is needed of it is asked for, not its version.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.layout import topology
from sf_xfuser.transport.base import raise_if_unavailable
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.gpu.device import DeviceWindow
from sf_xfuser.transport.gpu.driver import OLDEST, Driver, gpu_name, supported


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a process knows of its means. ``missing``: names that PyTorch or the driver lacks."""

    cuda: str | None
    gpus: int
    missing: tuple[str, ...] = ()
    driver: int = OLDEST
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
        version = driver.version
        operations = driver.has_64_bit_stream_operations(0)
    except Exception as error:
        return Facts(cuda=cuda, gpus=gpus, missing=(str(error),))
    return Facts(
        cuda=cuda,
        gpus=gpus,
        missing=tuple(missing),
        driver=version,
        backend=asked,
        stream_operations=operations,
    )


def refusal(facts: Facts) -> str | None:
    """Why a process with these facts cannot use it; None where it can. Pure."""
    if facts.cuda is None:
        return "this PyTorch is built without CUDA"
    if not facts.gpus:
        return "no NVIDIA GPU is visible"
    if facts.missing:
        return "; ".join(facts.missing)
    if facts.driver < OLDEST:
        return f"{supported(facts.driver)}, flags need 12.5"
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


def _no_context() -> str | None:
    """Make this GPU's CUDA context, which the driver's calls need; else why there is none. Local."""
    try:
        torch.zeros(1, device=torch.cuda.current_device())
    except RuntimeError as error:
        return f"no CUDA context: {error}"
    return None


class SymmMem(DeviceWindow):
    """``group``: a process group of this rank and its peers; ``rank_of`` says which rank of it a position is."""

    name = "symm_mem"
    _elsewhere: Collection[int] = ()  # peers on other hosts of the NVLink domain

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
        self._handle: Any = None  # keeps the mappings
        self._address: dict[int, int] = {}
        self._words: dict[int, torch.Tensor] = {}  # by stream
        refused = unavailable() or _no_context()
        gpu = None if refused else gpu_name(torch.cuda.current_device())
        said = control.gather("symm_mem", [refused, socket.gethostname(), gpu])
        raise_if_unavailable(self.name, members, [refusal for refusal, *_ in said])
        self._elsewhere = {peer for peer in peers if said[peer][1] != said[position][1]}
        self._sharing = said.count(said[position])
        super().__init__(control, members, position, peers, timeout_s)

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
        self._address = {peer: starts[rank] for peer, rank in self._rank_of.items()}
        return memory

    def _free(self) -> None:
        self._handle = None

    @property
    def _reachable(self) -> Sequence[int]:
        return [peer for peer in self._address if peer != self._position]

    def _mapped(self, peer: int) -> bool:
        return True

    def _put(self, peer: int, offset: int, source: int, nbytes: int, stream: int) -> None:
        self._driver.copy(self._address[peer] + offset, source, nbytes, stream)

    def _put_and_raise(
        self, peer: int, offset: int, source: int, nbytes: int, flag: int, value: int, stream: int
    ) -> None:
        if nbytes:
            self._put(peer, offset, source, nbytes, stream)
        if peer in self._elsewhere:  # stream memory operations write to no other host's memory, copies do
            word = self._word_of(stream)
            self._driver.write_64(word, value, stream)
            self._put(peer, flag, word, 8, stream)
        else:
            self._driver.write_64(self._address[peer] + flag, value, stream)

    def _word_of(self, stream: int) -> int:
        """Address of a word of this rank's that only this stream uses."""
        if stream not in self._words:
            assert self._memory is not None
            self._words[stream] = torch.empty(1, dtype=torch.int64, device=self._memory.device)
        return self._words[stream].data_ptr()

    def _wait(self, peer: int, address: int, value: int, stream: int) -> None:
        self._driver.wait_64(address, value, stream)
