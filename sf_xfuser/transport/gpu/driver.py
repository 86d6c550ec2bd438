"""The few calls of the CUDA driver that PyTorch does not offer: stream memory operations above all.

PyTorch can write 32 bits in stream order (symmetric memory's ``stream_write_value32``) but cannot wait for a value;
``cuda.bindings`` can, where it is installed. The driver itself is there wherever PyTorch sees a GPU, so it is asked
directly; ctypes lets other threads run meanwhile. Streams and addresses are plain integers.
"""

from __future__ import annotations

import ctypes

import torch

_NON_BLOCKING = 1
_HIGH_PRIORITY = -1
_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_CAN_USE_64_BIT_STREAM_MEM_OPS = 122
_NEEDED = ("cuStreamWaitValue64_v2", "cuStreamWriteValue64_v2", "cuStreamWriteValue32_v2")


OLDEST = 12050
"""Older drivers do not do stream memory operations on memory that peers map."""


class Driver:
    """Raises OSError where there is no driver, RuntimeError where it refuses, as its methods do. Makes no context."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)

    @property
    def version(self) -> int:
        """For instance 12050 for CUDA 12.5."""
        found = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(found))
        return found.value

    def missing(self) -> list[str]:
        """Functions that this driver is too old for."""
        return [name for name in _NEEDED if not hasattr(self._library, name)]

    def has_64_bit_stream_operations(self, device: int) -> bool:
        handle, found = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(handle), device)
        self._call("cuDeviceGetAttribute", ctypes.byref(found), _CAN_USE_64_BIT_STREAM_MEM_OPS, handle)
        return bool(found.value)

    def allow_queries_during_capture(self) -> None:
        """In this thread: a look at an event must not break a CUDA graph that another thread captures."""
        mode = ctypes.c_int(_RELAXED)
        self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def new_stream(self) -> torch.cuda.Stream:
        """A stream of high priority in the current context, which nobody else has: PyTorch's own come from a pool of 32
        that it hands out again and again, and whatever shares a stream with a wait would wait, too. Lives as long as
        the process."""
        handle = ctypes.c_void_p()
        self._call("cuStreamCreateWithPriority", ctypes.byref(handle), _NON_BLOCKING, ctypes.c_int(_HIGH_PRIORITY))
        return torch.cuda.ExternalStream(handle.value)  # type: ignore[no-untyped-call]

    def copy(self, into: int, source: int, nbytes: int, stream: int) -> None:
        """By a copy engine."""
        self._call("cuMemcpyAsync", _address(into), _address(source), ctypes.c_size_t(nbytes), _pointer(stream))

    def write_32(self, into: int, bits: int, stream: int) -> None:
        """After everything that the stream was given before, which others then see, too."""
        self._call("cuStreamWriteValue32_v2", _pointer(stream), _address(into), ctypes.c_uint32(bits), 0)

    def write_64(self, into: int, value: int, stream: int) -> None:
        """As ``write_32``."""
        self._call("cuStreamWriteValue64_v2", _pointer(stream), _address(into), ctypes.c_uint64(value), 0)

    def wait_64(self, at: int, value: int, stream: int) -> None:
        """The stream goes on once the value there is this one. Occupies nothing on the GPU."""
        self._call("cuStreamWaitValue64_v2", _pointer(stream), _address(at), ctypes.c_uint64(value), _EQUAL)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown').decode()} ({status})")


def supported(version: int) -> str:
    """What a driver of this version supports, in words."""
    return f"the driver supports CUDA {version // 1000}.{version % 1000 // 10}"


def gpu_name(device: int) -> str:
    """The same in all processes of a host that use this GPU, whatever number they know it by."""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", device))


def _pointer(handle: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(handle)


def _address(value: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(value)
