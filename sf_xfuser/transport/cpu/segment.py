"""Shared memory segments of ``shm``: files in /dev/shm that hold a line of flags per writer, then a window.

A segment has a name only while the peers open it (mode 0600). Its owner holds a record lock on it. The kernel releases
the lock when the owner's process ends, and forked children do not inherit it. So a peer can detect that the owner is
gone, and the next start can remove the segments of a killed job.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import re
import secrets
import sys
from io import FileIO

import torch

FOLDER = "/dev/shm"
PREFIX = "sf-xfuser-"
CHUNKS = 1 << 16  # maximum number of chunks per epoch between two ranks
_MAGIC = b"sf-xfuser shm window 1"  # in the first line: files without it are not removed
_FUTEX = 202  # system call number on x86-64
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1

_named: set[str] = set()  # paths of this process's own segments that still have a name


class _Line(ctypes.Structure):
    """The 64 bytes (a cache line) of a segment that one writer writes."""

    _fields_ = (
        ("flag", ctypes.c_uint64),
        ("aborted", ctypes.c_uint64),  # not 0 once the writer has aborted
        ("identities", ctypes.c_uint64 * 2),  # of its calls, by parity of the epoch
        ("unused", ctypes.c_uint64),
        ("magic", ctypes.c_char * 24),
    )


def unavailable() -> str | None:
    """Why this process cannot use shared memory, regardless of its peers, or None. Local."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"shm needs Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    if not os.access(FOLDER, os.W_OK):
        return f"{FOLDER} cannot be written to"
    return None


def remove_stale_segments() -> list[str]:
    """Remove this user's segments without a living owner. Returns their names. Local."""
    removed = []
    name = re.compile(rf"{re.escape(PREFIX)}{os.geteuid()}-[0-9a-f]{{32}}")
    for entry in os.scandir(FOLDER):
        if not name.fullmatch(entry.name) or entry.path in _named:
            continue  # closing any descriptor of a segment of this process would release its lock
        # OSError: the segment belongs to another user, or another process has removed it.
        with contextlib.suppress(OSError), _open(entry.path, os.O_NONBLOCK) as file:
            magic = os.pread(file.fileno(), len(_MAGIC), _Line.magic.offset)
            if os.fstat(file.fileno()).st_uid == os.geteuid() and magic == _MAGIC and _unlocked(file):
                os.unlink(entry.path)
                removed.append(entry.name)
    return removed


class Segment:
    """The shared memory of one rank, mapped into this process."""

    def __init__(self, file: FileIO, path: str, num_writers: int, half_bytes: int, halves: int) -> None:
        self._file = file
        self.path = path
        offset = _window_offset(num_writers)
        memory = mmap.mmap(file.fileno(), offset + halves * half_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._lines = list((_Line * num_writers).from_buffer(memory))
        with torch.inference_mode(False):  # calls in any mode write to it
            window = torch.frombuffer(memory, dtype=torch.uint8)[offset:]
        self._halves = [window[n * half_bytes : (n + 1) * half_bytes] for n in range(halves)]

    @classmethod
    def create(cls, num_writers: int, half_bytes: int, halves: int) -> Segment:
        """Allocate all pages at once, since a write to a missing page would kill the process. Raises OSError if memory
        is short."""
        file = _open(FOLDER, os.O_TMPFILE)
        number = file.fileno()
        fcntl.lockf(file, fcntl.LOCK_EX)
        free = os.fstatvfs(number)
        total = _window_offset(num_writers) + halves * half_bytes
        if total > free.f_bavail * free.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(number, 0, total)
        os.pwrite(number, _MAGIC, _Line.magic.offset)
        path = f"{FOLDER}/{PREFIX}{os.geteuid()}-{secrets.token_hex(16)}"
        _named.add(path)
        os.link(f"/proc/self/fd/{number}", path, src_dir_fd=number, follow_symlinks=True)  # names the unnamed file
        return cls(file, path, num_writers, half_bytes, halves)

    @classmethod
    def open(cls, path: str, num_writers: int, half_bytes: int, halves: int) -> Segment:
        return cls(_open(path), path, num_writers, half_bytes, halves)

    def unlink(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        _named.discard(self.path)

    def close(self) -> None:
        """Release the lock. Idempotent. The memory stays mapped until its last view is freed."""
        self._file.close()

    def half(self, epoch: int) -> torch.Tensor:
        return self._halves[epoch % len(self._halves)]

    def flag(self, writer: int) -> int:
        return int(self._lines[writer].flag)

    def raise_flag(self, writer: int, value: int, identity: int) -> None:
        line = self._lines[writer]
        line.identities[value // CHUNKS % 2] = identity
        line.flag = value
        _futex(line, _FUTEX_WAKE, 1, None)

    def identity(self, writer: int, epoch: int) -> int:
        return int(self._lines[writer].identities[epoch % 2])

    def abort(self, writer: int) -> None:
        self._lines[writer].aborted = 1
        _futex(self._lines[writer], _FUTEX_WAKE, 1, None)

    def aborted(self, writer: int) -> bool:
        return bool(self._lines[writer].aborted)

    def sleep(self, writer: int, flag: int, seconds: float) -> None:
        """Wait until the writer's flag differs from ``flag``, or for slightly longer than ``seconds``."""
        _futex(self._lines[writer], _FUTEX_WAIT, flag & 0xFFFFFFFF, max(seconds, 1e-4))

    def owner_is_gone(self) -> bool:
        return _unlocked(self._file)


def creation_error(error: OSError, window_bytes: int) -> str:
    if error.errno == errno.ENOSPC:
        free = os.statvfs(FOLDER)
        return (
            f"{FOLDER} has {free.f_bavail * free.f_frsize} bytes left, a window needs {window_bytes}; enlarge it "
            f"(docker run --shm-size=8g), or use --sp-transport tcp"
        )
    return f"cannot create shared memory: {error}"


def _open(path: str, flags: int = 0) -> FileIO:
    """Open a file that closes with its last reference, even when a caller fails."""
    return FileIO(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600), "r+")


def _window_offset(num_writers: int) -> int:
    return -(-num_writers * ctypes.sizeof(_Line) // mmap.PAGESIZE) * mmap.PAGESIZE


def _unlocked(file: FileIO) -> bool:
    """Whether the lock of an open segment of another process is free."""
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    fcntl.lockf(file, fcntl.LOCK_UN)
    return True


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None, use_errno=True)


def _futex(line: _Line, operation: int, value: int, seconds: float | None) -> None:
    """Futex on the low half of the flag, between processes. Releases the GIL. A signal or a change ends a wait."""
    timeout = None if seconds is None else ctypes.byref(_Timespec(int(seconds), int(seconds % 1 * 1e9)))
    _libc.syscall(_FUTEX, ctypes.byref(line), operation, ctypes.c_uint32(value), timeout, None, 0)
