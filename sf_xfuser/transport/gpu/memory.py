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
from sf_xfuser.transport.gpu.block import Block, round_up_window
from sf_xfuser.transport.gpu.driver import Driver, StreamSet, release_streams
from sf_xfuser.transport.gpu.watchdog import Watchdog

_PAGE = 2 << 20  # bytes: CUDA maps memory in pages of this size


def is_capturing() -> bool:
    """Whether the current stream captures a CUDA graph. Local."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class DeviceMemory(OneSided):
    """The memory of the rank at ``position`` of ``members``, on the current device. A subclass sets ``_watchdog``,
    ``driver`` and ``streams`` before the first ``reserve``."""

    name: ClassVar[str]
    _ranks_on_gpu = 1  # ranks of the group on this GPU, which all allocate at once
    _watchdog: Watchdog
    driver: Driver
    streams: StreamSet

    def __init__(self, control: ControlPlane, members: Sequence[int], position: int, timeout_s: float) -> None:
        self._control, self._members, self._position, self._timeout_s = control, members, position, timeout_s
        self.device = torch.cuda.current_device()
        self._closed = False
        self._refusal: str | None = None  # why this rank cannot use the transport
        self._in_graph = False  # whether a user's CUDA graph refers to the memory
        self._block: Block | None = None
        self._memory: torch.Tensor | None = None  # uint8 [block.nbytes]

    @property
    def window_bytes(self) -> int:
        """Size of both halves of this rank's window."""
        return 0 if self._block is None else 2 * self._block.half_bytes

    @property
    def scratch(self) -> torch.Tensor | None:
        """As ``OneSided.scratch``. One region for both halves: the sends of a call complete before the next call."""
        return self._scratch

    def reserve(self, nbytes: int, scratch_bytes: int) -> None:
        """As ``OneSided.reserve``. Reallocates only if a half or the scratch memory is too small. Synchronizes the GPU
        then, and raises ValueError during a graph capture."""
        self.require_usable()
        old = self._block
        if old is not None and nbytes <= old.half_bytes and scratch_bytes <= old.scratch_bytes:
            return
        self._require_no_capture()
        half_bytes, scratch_bytes = round_up_window(nbytes, _PAGE), round_up_window(scratch_bytes, _PAGE)
        if old is not None:
            half_bytes, scratch_bytes = max(half_bytes, old.half_bytes), max(scratch_bytes, old.scratch_bytes)
        block = Block(ranks=len(self._members), half_bytes=half_bytes, scratch_bytes=scratch_bytes)
        earlier = [window for window in closed_windows if window._key == self._key]
        replaced = [window for window in (self, *earlier) if window._memory is not None]
        freed_bytes = sum(window._memory.nbytes for window in replaced if window._memory is not None)
        problem = self._refusal or self._busy_reason(replaced) or self._out_of_memory_reason(block.nbytes, freed_bytes)
        if self._in_graph:
            problem = "a CUDA graph refers to its window, which is too small now: make the largest calls first"
        sizes = [block.half_bytes, block.scratch_bytes]
        answers = self._control.gather(f"{self.name} window", [sizes, len(replaced), problem])
        self._raise_if_unavailable([reason for *_, reason in answers])
        if any(answer[:2] != answers[0][:2] for answer in answers):
            self._raise_if_unavailable(
                [
                    f"requests {half} + {scratch} bytes and frees {count} windows, other ranks differ"
                    for (half, scratch), count, _ in answers
                ]
            )
        # All ranks have reached this point without a pending transfer, so earlier windows can be freed.
        self._block = None
        _free_windows([self, *earlier])
        if replaced:
            self._control.gather(f"{self.name} freed", None)  # memory that a peer still maps is not free
        try:
            with torch.inference_mode(False):  # the watchdog and later calls write to it in any mode
                memory = self._allocate(block.nbytes)
                self._make_views(block, memory)
                memory[: block.head_bytes].zero_()
                self._poison.fill_(1)
            torch.cuda.synchronize()
        except Exception as error:
            problem = f"cannot allocate {block.nbytes} bytes that peers can write to: {error}"
        self._raise_if_unavailable(self._control.gather(f"{self.name} memory", problem))
        self._block, self._memory = block, memory
        self._base = memory.data_ptr()

    def _make_views(self, block: Block, memory: torch.Tensor) -> None:
        """Views of the regions of a block, and memory of the host for copies of its head."""

        def word(offset: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return memory[offset : offset + dtype.itemsize].view(dtype)[0]

        self._poison = word(block.poison, torch.float32)
        self._expected, self._begun = word(block.expected), word(block.begun)
        self._ended, self._checked, self._others = word(block.ended), word(block.checked), word(block.others)
        self._flags = memory[block.flags : block.flags + 8 * block.num_flags].view(torch.int64)
        self._halves = [memory[block.half(h) : block.half(h) + block.half_bytes] for h in (0, 1)]
        self._scratch = memory[block.scratch : block.scratch + block.scratch_bytes]
        self._host_head = torch.empty(block.head_bytes, dtype=torch.uint8, pin_memory=memory.is_cuda)
        self._host_poison = torch.ones(1, pin_memory=memory.is_cuda)
        self._host_poison_value = self._host_poison.numpy()

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

    def _busy_reason(self, windows: Sequence[DeviceMemory]) -> str | None:
        """Wait until this rank has no transfer pending in ``windows``. Returns why that fails, or None."""
        deadline = time.monotonic() + self._timeout_s
        while not all(window._watchdog.idle for window in windows) and time.monotonic() < deadline:
            time.sleep(1e-3)
        current = self.driver.current_stream(self.device)
        for stream in [current, *(stream for window in windows for stream in window.streams.all)]:
            self.driver.record(self.streams.handoff, stream)
            if not completes(self.driver, self.streams.handoff, deadline - time.monotonic()):
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

    def require_usable(self) -> None:
        if self._watchdog.error is not None:
            raise self._watchdog.error
        if self._closed:
            raise TransportError(f"rank {self._members[self._position]}: the {self.name} transport is closed")

    def _require_no_capture(self) -> None:
        if is_capturing():
            raise ValueError(
                f"the {self.name} transport cannot allocate memory while a CUDA graph is captured: make the same calls "
                f"once before the capture"
            )

    def _raise_if_unavailable(self, reasons: Sequence[str | None]) -> None:
        raise_if_unavailable(self.name, self._members, reasons)


closed_windows: list[DeviceMemory] = []
"""Closed transports, with memory that a peer may still write to."""

kept_windows: list[DeviceMemory] = []
"""Closed transports with memory that a user's CUDA graph refers to. It is never freed: a replay may write to it."""


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
        if window._closed:
            release_streams(window.streams, window.device)
    closed_windows[:] = [window for window in closed_windows if window not in windows]


def completes(driver: Driver, event: int, limit_s: float) -> bool:
    """Whether the event completes within the limit."""
    deadline = time.monotonic() + limit_s
    while not driver.query(event):
        if time.monotonic() >= deadline:
            return False
        time.sleep(1e-3)
    return True
