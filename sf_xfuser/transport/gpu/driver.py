"""CUDA driver calls that PyTorch does not expose, mainly stream memory operations and batches.

PyTorch can write 32 bits in stream order (symmetric memory's ``stream_write_value32``) but cannot wait for a value.
``cuda.bindings`` can, but is optional. ctypes calls ``libcuda`` directly, which exists wherever PyTorch sees a GPU, and
releases the GIL during each call. Streams, events and addresses are integers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int, c_uint32, c_uint64, c_void_p
from typing import Any

import numpy as np
import torch

_NON_BLOCKING = 1
_HIGH_PRIORITY = -1
_BLOCKING_SYNC, _NO_TIMING = 1, 2  # CUevent_flags
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_CAN_FLUSH_REMOTE_WRITES, _CAN_USE_64_BIT_STREAM_MEM_OPS = 98, 122
_REQUIRED = ("cuStreamBatchMemOp_v2", "cuStreamWriteValue32_v2")

_WAIT_64, _WRITE_64 = 4, 5  # CUstreamBatchMemOpType
_EQUAL, _AND = 1, 2  # CUstreamWaitValue_flags; and: until (word & value) != 0
_FLUSH = 1 << 30  # then make all remote writes visible that have arrived before
_MAX_BATCH = 255  # operations; the driver takes less than 256
# CUstreamBatchMemOpParams of waits and writes
_OPERATION = np.dtype(
    {
        "names": ["operation", "address", "value", "flags"],
        "formats": ["u4", "u8", "u8", "u4"],
        "offsets": [0, 8, 16, 24],
        "itemsize": 48,
    }
)
# CUmemcpyAttributes: the source is read in stream order (1), no locations, the copy may overlap with compute (1).
_COPY_ATTRIBUTES = (c_uint32 * 6)(1, 0, 0, 0, 0, 1)
_COPY_ATTRIBUTE_INDEX, _FAILED_COPY = c_uint64(), c_uint64()

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuEventCreate": (c_void_p, c_uint32),
    "cuEventRecord": (c_uint64, c_uint64),
    "cuEventQuery": (c_uint64,),
    "cuEventSynchronize": (c_uint64,),
    "cuStreamCreateWithPriority": (c_void_p, c_uint32, c_int),
    "cuStreamWaitEvent": (c_uint64, c_uint64, c_uint32),
    "cuStreamWriteValue32_v2": (c_uint64, c_uint64, c_uint32, c_uint32),
    "cuStreamBatchMemOp_v2": (c_uint64, c_uint32, c_void_p, c_uint32),
    "cuMemcpyAsync": (c_uint64, c_uint64, c_uint64, c_uint64),
    # targets, sources, sizes, count, attributes, index of each attribute, their number, stream: CUDA 13
    "cuMemcpyBatchAsync_v2": (c_void_p, c_void_p, c_void_p, c_uint64, c_void_p, c_void_p, c_uint64, c_uint64),
    # CUDA 12.8 also takes the address of the index of a failed copy, before the stream.
    "cuMemcpyBatchAsync": (c_void_p, c_void_p, c_void_p, c_uint64, c_void_p, c_void_p, c_uint64, c_void_p, c_uint64),
}


class WordBatch:
    """Prebuilt operations on 64-bit words. ``values``: the value of each. ``launches``: driver calls."""

    def __init__(self, operation: int, flags: int, addresses: Sequence[int]) -> None:
        self.table = np.zeros(len(addresses), _OPERATION)
        self.table["operation"], self.table["flags"], self.table["address"] = operation, flags, addresses
        self.values = self.table["value"]
        self.parts = [
            (self.table[start:].ctypes.data, min(_MAX_BATCH, len(addresses) - start))
            for start in range(0, len(addresses), _MAX_BATCH)
        ]
        self.launches = len(self.parts)

    @classmethod
    def writes(cls, addresses: Sequence[int]) -> WordBatch:
        """Writes with release semantics: earlier work of the stream is visible before each."""
        return cls(_WRITE_64, 0, addresses)

    @classmethod
    def waits(cls, addresses: Sequence[int], flags: int = 0) -> WordBatch:
        """Waits until each word equals its value. They occupy no multiprocessor. ``flags``: ``Driver.flush_flag``."""
        return cls(_WAIT_64, _EQUAL | flags, addresses)

    @classmethod
    def waits_for_any(cls, addresses: Sequence[int], flags: int = 0) -> WordBatch:
        """Waits until each word is not zero."""
        batch = cls(_WAIT_64, _AND | flags, addresses)
        batch.values.fill((1 << 64) - 1)
        return batch


class CopyBatch:
    """Prebuilt copies, as (target, source, bytes)."""

    def __init__(self, copies: Sequence[tuple[int, int, int]]) -> None:
        self.copies = tuple(copies)
        self.table = np.array(self.copies, np.uint64).reshape(-1, 3).T.copy()
        columns = (column.ctypes.data for column in self.table)
        attributes = ctypes.addressof(_COPY_ATTRIBUTES), ctypes.addressof(_COPY_ATTRIBUTE_INDEX), 1
        self.arguments = (*columns, len(self.copies), *attributes)


class Driver:
    """The constructor raises OSError without a CUDA driver. Every call raises RuntimeError if the driver returns an
    error. Creates no CUDA context."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", c_uint32(0))
        for name, types in _SIGNATURES.items():
            if hasattr(self._library, name):
                getattr(self._library, name).argtypes = types
        self._batch_copy: Callable[..., int] | None = None
        self._batch_extra: tuple[int, ...] = ()  # its arguments before the stream

    def facts(self) -> dict[str, Any]:
        """The driver's fields of ``facts.DriverFacts``, for device 0."""
        version, device, supported = c_int(), c_int(), c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        missing = [name for name in _REQUIRED if not hasattr(self._library, name)]
        if not missing:  # older drivers reject the query
            self._call("cuDeviceGet", ctypes.byref(device), 0)
            self._call("cuDeviceGetAttribute", ctypes.byref(supported), _CAN_USE_64_BIT_STREAM_MEM_OPS, device)
        return {"driver": version.value, "missing": missing, "stream_operations": bool(supported.value)}

    def flush_flag(self, device: int) -> int:
        """A flag of waits that makes writes by network cards visible, if the device supports it; else 0."""
        handle, supported = c_int(), c_int()
        self._call("cuDeviceGet", ctypes.byref(handle), device)
        self._call("cuDeviceGetAttribute", ctypes.byref(supported), _CAN_FLUSH_REMOTE_WRITES, handle)
        return _FLUSH if supported.value else 0

    def allow_queries_during_capture(self) -> None:
        """Allow event queries on this thread while another thread captures a CUDA graph."""
        mode = c_int(_RELAXED)
        self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    # -- streams and events -------------------------------------------------------------------------------------------

    def current_stream(self, device: int) -> int:
        """PyTorch's current stream."""
        stream: int = torch._C._cuda_getCurrentRawStream(device)
        return stream

    def new_stream(self) -> int:
        """A new high-priority stream in the current context. PyTorch's streams come from a pool of 32 that it reuses,
        and work on a stream shared with a wait would block behind that wait."""
        handle = c_void_p()
        self._call("cuStreamCreateWithPriority", ctypes.byref(handle), _NON_BLOCKING, _HIGH_PRIORITY)
        return handle.value or 0

    def new_event(self) -> int:
        """A new event in the current context. The host waits for it without spinning."""
        handle = c_void_p()
        self._call("cuEventCreate", ctypes.byref(handle), _BLOCKING_SYNC | _NO_TIMING)
        return handle.value or 0

    def record(self, event: int, stream: int) -> None:
        if status := self._library.cuEventRecord(event, stream):
            self._fail("cuEventRecord", status)

    def wait_event(self, stream: int, event: int) -> None:
        if status := self._library.cuStreamWaitEvent(stream, event, 0):
            self._fail("cuStreamWaitEvent", status)

    def query(self, event: int) -> bool:
        """Whether the event has completed. True if it was never recorded."""
        status = self._library.cuEventQuery(event)
        if status not in (0, _NOT_READY):
            self._fail("cuEventQuery", status)
        return bool(status == 0)

    def synchronize(self, event: int) -> None:
        self._call("cuEventSynchronize", event)

    # -- memory -------------------------------------------------------------------------------------------------------

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy on a copy engine."""
        if status := self._library.cuMemcpyAsync(target, source, nbytes, stream):
            self._fail("cuMemcpyAsync", status)

    def copy_all(self, batch: CopyBatch, stream: int) -> None:
        """Enqueue all copies of a batch, in any order. Not for a stream that captures a graph."""
        if self._batch_copy is None or len(batch.copies) == 1:
            for target, source, nbytes in batch.copies:
                self.copy(target, source, nbytes, stream)
        elif status := self._batch_copy(*batch.arguments, *self._batch_extra, stream):
            self._fail("cuMemcpyBatchAsync", status)

    def copy_launches(self, batch: CopyBatch) -> int:
        """Driver calls of ``copy_all``."""
        return len(batch.copies) if self._batch_copy is None else min(1, len(batch.copies))

    def try_batches(self, batch: CopyBatch, stream: int) -> None:
        """Make ``copy_all`` one driver call, if the driver copies this batch so."""
        for name, extra in (("cuMemcpyBatchAsync_v2", ()), ("cuMemcpyBatchAsync", (ctypes.addressof(_FAILED_COPY),))):
            function = getattr(self._library, name, None)
            if function is not None and function(*batch.arguments, *extra, stream) == 0:
                self._batch_copy, self._batch_extra = function, extra
                return

    def write_32(self, target: int, value: int, stream: int) -> None:
        """Enqueue a write with release semantics: earlier work of the stream is visible before it."""
        if status := self._library.cuStreamWriteValue32_v2(stream, target, value, 0):
            self._fail("cuStreamWriteValue32_v2", status)

    def run(self, batch: WordBatch, stream: int) -> None:
        """Enqueue the operations of a batch, in order."""
        for address, count in batch.parts:
            if status := self._library.cuStreamBatchMemOp_v2(stream, count, address, 0):
                self._fail("cuStreamBatchMemOp_v2", status)

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, name)(*arguments):
            self._fail(name, status)

    def _fail(self, name: str, status: int) -> None:
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(status, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown').decode()} ({status})")


class StreamSet:
    """The streams and events of one window.

    ``put``, ``network``: sends to mapped and to other peers. ``forward``: sends to mapped peers of chunks that have to
    arrive first. ``wait``: waits for flags. ``rescue``, ``notify``: the
    watchdog. ``handoff``: orders two streams, on the host's thread. ``call_ends``: of the last calls, by half."""

    def __init__(self, driver: Driver) -> None:
        self.put, self.network, self.forward, self.wait, self.rescue, self.notify = (
            driver.new_stream() for _ in range(6)
        )
        self.handoff, self.rescued, self.notified, *call_ends = (driver.new_event() for _ in range(5))
        self.call_ends = tuple(call_ends)

    @property
    def all(self) -> tuple[int, ...]:
        return self.put, self.network, self.forward, self.wait, self.rescue, self.notify


_idle_sets: dict[int, list[StreamSet]] = {}


def acquire_streams(driver: Driver, device: int) -> StreamSet:
    """The streams of a window, on the current ``device``: those of an earlier one if possible. CUDA has few hardware
    queues, and never frees one that a stream used."""
    idle = _idle_sets.setdefault(device, [])
    return idle.pop() if idle else StreamSet(driver)


def release_streams(streams: StreamSet, device: int) -> None:
    """Offer the streams to later windows. They must have no pending work."""
    _idle_sets.setdefault(device, []).append(streams)
