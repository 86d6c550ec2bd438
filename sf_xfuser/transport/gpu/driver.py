"""CUDA driver calls that PyTorch does not expose, mainly stream memory operations.

PyTorch can write 32 bits in stream order (symmetric memory's ``stream_write_value32``) but cannot wait for a value.
``cuda.bindings`` can, but is optional. ctypes calls ``libcuda`` directly, which exists wherever PyTorch sees a GPU, and
releases the GIL during each call. Streams and addresses are integers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_u64 = ctypes.c_uint64  # also for handles and sizes, which have 64 bits on every supported platform
_NON_BLOCKING = 1
_HIGH_PRIORITY = -1
_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_CAN_USE_64_BIT_STREAM_MEM_OPS = 122
_REQUIRED = ("cuStreamWaitValue64_v2", "cuStreamWriteValue64_v2", "cuStreamWriteValue32_v2")
_MIN_VERSION = 12050  # older drivers do not support stream memory operations on memory that peers map


class Driver:
    """The constructor raises OSError without a CUDA driver. Every call raises RuntimeError if the driver returns an
    error. Creates no CUDA context."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)

    def facts(self) -> dict[str, Any]:
        """The driver's fields of ``DriverFacts``, for device 0."""
        version, device, supported = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        missing = [name for name in _REQUIRED if not hasattr(self._library, name)]
        if not missing:  # older drivers reject the query
            self._call("cuDeviceGet", ctypes.byref(device), 0)
            self._call("cuDeviceGetAttribute", ctypes.byref(supported), _CAN_USE_64_BIT_STREAM_MEM_OPS, device)
        return {"driver": version.value, "missing": missing, "stream_operations": bool(supported.value)}

    def allow_queries_during_capture(self) -> None:
        """Allow event queries on this thread while another thread captures a CUDA graph."""
        mode = ctypes.c_int(_RELAXED)
        self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def new_stream(self) -> torch.cuda.Stream:
        """A new high-priority stream in the current context, never destroyed. PyTorch's streams come from a pool of 32
        that it reuses, and work on a stream shared with a wait would block behind that wait."""
        handle = ctypes.c_void_p()
        self._call("cuStreamCreateWithPriority", ctypes.byref(handle), _NON_BLOCKING, ctypes.c_int(_HIGH_PRIORITY))
        return torch.cuda.ExternalStream(handle.value)  # type: ignore[no-untyped-call]

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy on a copy engine."""
        self._call("cuMemcpyAsync", _u64(target), _u64(source), _u64(nbytes), _u64(stream))

    def write_32(self, target: int, value: int, stream: int) -> None:
        """Enqueue a write with release semantics: earlier work of the stream is visible before it."""
        self._call("cuStreamWriteValue32_v2", _u64(stream), _u64(target), ctypes.c_uint32(value), 0)

    def write_64(self, target: int, value: int, stream: int) -> None:
        """As ``write_32``."""
        self._call("cuStreamWriteValue64_v2", _u64(stream), _u64(target), _u64(value), 0)

    def wait_64(self, address: int, value: int, stream: int) -> None:
        """Block the stream until the word at ``address`` equals ``value``. Occupies no multiprocessor."""
        self._call("cuStreamWaitValue64_v2", _u64(stream), _u64(address), _u64(value), _EQUAL)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown').decode()} ({status})")


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


def gpu_name(device: int) -> str:
    """UUID of the GPU: equal in all processes of a host that use it, regardless of CUDA_VISIBLE_DEVICES."""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", device))
