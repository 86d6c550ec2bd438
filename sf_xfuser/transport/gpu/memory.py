"""Allocates, grows and frees the GPU memory of one rank that its peers write to.

A rank may free this memory only once every rank has arrived at the same point with no transfer pending. ``close``
therefore keeps it until the next transport of the same group is created or the process ends.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from sf_xfuser.transport.base import OneSided, TransportError, raise_if_unavailable
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.gpu.block import Block, Staging, round_up_window
from sf_xfuser.transport.gpu.watchdog import Watchdog

_PAGE = 2 << 20  # bytes: CUDA maps memory in pages of this size


def is_capturing() -> bool:
    """Whether the current stream captures a CUDA graph. Local."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class DeviceMemory(OneSided):
    """The memory of the rank at ``position`` of ``members``, on the current device. A subclass sets ``_watchdog`` and
    ``_streams`` before the first ``reserve``."""

    name: ClassVar[str]
    _ranks_on_gpu = 1  # ranks of the group on this GPU, which all allocate at once
    _watchdog: Watchdog
    _streams: Sequence[torch.cuda.Stream]

    def __init__(self, control: ControlPlane, members: Sequence[int], position: int, timeout_s: float) -> None:
        self._control, self._members, self._position, self._timeout_s = control, members, position, timeout_s
        self._device = torch.cuda.current_device()
        self._closed = False
        self._block: Block | None = None
        self._memory: torch.Tensor | None = None  # uint8 [block.nbytes]

    @property
    def window_bytes(self) -> int:
        """Size of both halves of this rank's window."""
        return 0 if self._block is None else 2 * self._block.half_bytes

    def reserve(self, nbytes: int) -> None:
        """As ``OneSided.reserve``. Reallocates only if a half is too small. Synchronizes the GPU. Raises ValueError
        during a graph capture."""
        self._require_usable()
        self._require_no_capture()
        if self._block is not None and nbytes <= self._block.half_bytes:
            return
        block = Block(ranks=len(self._members), half_bytes=round_up_window(nbytes, _PAGE))
        earlier = [window for window in closed_windows if window._key == self._key]
        replaced = [window for window in (self, *earlier) if window._memory is not None]
        freed_bytes = sum(window._memory.nbytes for window in replaced if window._memory is not None)
        problem = self._busy_reason(replaced) or self._out_of_memory_reason(block.nbytes, freed_bytes)
        answers = self._control.gather(f"{self.name} window", [block.half_bytes, len(replaced), problem])
        self._raise_if_unavailable([reason for *_, reason in answers])
        if len({(size, count) for size, count, _ in answers}) > 1:
            self._raise_if_unavailable(
                [f"requests {size} bytes and frees {count} windows, other ranks differ" for size, count, _ in answers]
            )
        # All ranks have reached this point without a pending transfer, so earlier windows can be freed.
        self._block = None
        _free_windows([self, *earlier])
        if replaced:
            self._control.gather(f"{self.name} freed", None)  # memory that a peer still maps is not free
        try:
            with torch.inference_mode(False):  # the watchdog and later calls write to it in any mode
                memory = self._allocate(block.nbytes)
                memory[: block.head_bytes].zero_()
                self._poison_view(memory).fill_(1)
                self._host_head = torch.empty(block.head_bytes, dtype=torch.uint8, pin_memory=memory.is_cuda)
            torch.cuda.synchronize()
        except Exception as error:
            problem = f"cannot allocate {block.nbytes} bytes that peers can write to: {error}"
        self._raise_if_unavailable(self._control.gather(f"{self.name} memory", problem))
        self._block, self._memory = block, memory
        self._base = memory.data_ptr()
        self._staging = Staging(block.half_bytes)

    @abstractmethod
    def _allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate memory that peers can write to, uint8 [nbytes], the same size on every rank. Collective. May raise
        any exception."""

    @abstractmethod
    def _free(self) -> None:
        """Free the memory. Collective."""

    @property
    def _key(self) -> tuple[object, ...]:
        """Equal for transports of one kind and group. All ranks create and close these in the same order."""
        return type(self), tuple(self._members), self._position

    @staticmethod
    def _poison_view(memory: torch.Tensor) -> torch.Tensor:
        """A float32 scalar."""
        return memory[Block.poison : Block.poison + 4].view(torch.float32)[0]

    def _busy_reason(self, windows: Sequence[DeviceMemory]) -> str | None:
        """Wait until this rank has no transfer pending in ``windows``. Returns why that fails, or None."""
        deadline = time.monotonic() + self._timeout_s
        while not all(window._watchdog.idle for window in windows) and time.monotonic() < deadline:
            time.sleep(1e-3)
        streams = [torch.cuda.current_stream(), *(stream for window in windows for stream in window._streams)]
        for event in [stream.record_event() for stream in streams]:
            if not completes(event, deadline - time.monotonic()):
                return f"its GPU did not finish within {self._timeout_s:g} s"
        return str(self._watchdog.error) if self._watchdog.error else None

    def _out_of_memory_reason(self, nbytes: int, freed_bytes: int) -> str | None:
        needed = self._ranks_on_gpu * self._growth(nbytes, freed_bytes)
        if torch.cuda.mem_get_info()[0] < needed:
            torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        return None if free >= needed else f"the GPU has {free} bytes free, and a window needs {needed} more"

    def _growth(self, nbytes: int, freed_bytes: int) -> int:
        """Bytes by which the memory of this process grows."""
        return nbytes - freed_bytes

    def _require_usable(self) -> None:
        if self._watchdog.error is not None:
            raise self._watchdog.error
        if self._closed:
            raise TransportError(f"rank {self._members[self._position]}: the {self.name} transport is closed")

    def _require_no_capture(self) -> None:
        if is_capturing():
            raise ValueError(
                f"attention over {self.name} cannot be captured in a CUDA graph, since its flags count calls; capture "
                f"without it, or use --sp-transport two_sided"
            )

    def _raise_if_unavailable(self, reasons: Sequence[str | None]) -> None:
        raise_if_unavailable(self.name, self._members, reasons)


closed_windows: list[DeviceMemory] = []
"""Closed transports, with memory that a peer may still write to."""


def free_closed_windows(control: ControlPlane, members: Sequence[int], position: int) -> bool:
    """Free the memory of closed transports of a group, of any kind. Returns False and frees nothing if a rank still
    uses it. Collective."""
    windows = [window for window in closed_windows if window._key[1:] == (tuple(members), position)]
    if windows and any(control.gather("windows", windows[0]._busy_reason(windows))):
        return False
    _free_windows(windows)
    return True


def _free_windows(windows: Sequence[DeviceMemory]) -> None:
    """Collective, with no transfer pending."""
    for window in windows:
        if window._memory is not None:
            window._memory = None
            window._free()
    closed_windows[:] = [window for window in closed_windows if window not in windows]


def completes(event: torch.cuda.Event, limit_s: float) -> bool:
    """Whether the event completes within the limit."""
    deadline = time.monotonic() + limit_s
    while not event.query():  # type: ignore[no-untyped-call]
        if time.monotonic() >= deadline:
            return False
        time.sleep(1e-3)
    return True
