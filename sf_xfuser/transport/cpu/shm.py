"""One-sided transfers between CPU ranks of one host, through POSIX shared memory.

A sender writes its chunk into the receiver's window and then raises a flag there; the receiver does nothing for data to
arrive. Each rank has one *segment*: flags, then its window.

**Flags.** ``flag[s]`` in the segment of rank ``r`` has one writer, ``s``: its value says how many chunks ``s`` has put
into ``r``'s window, as ``epoch * 2**16 + chunks of this epoch``, where an epoch is one attention call or one
all-to-all. Both ends know the order of a pair's chunks from the schedule, so "the k-th chunk of epoch e is here" is
``flag >= e * 2**16 + k``. Values only grow, and nobody resets them.

**Identity.** Beside the flag stands which call the writer is in, for epochs of either parity, written before the first
flag of the epoch. A reader compares it once the flag says that its chunk is here. The word of epoch e is written again
in e+2, which the writer begins after the reader has ended e, as below. Where shapes differ a chunk may have been
written beyond its place, but inside the window's mapping, and nobody uses that window again.

**Why nothing is overwritten too early.** A window has two halves, and epoch e uses half ``e mod 2``. Let ``s`` put into
``r``'s window in epoch e. It has finished epoch e-1, in which it waited for every chunk that was due to it. One of
those was put by ``r`` in epoch e-1 or passed on from one that was (in a Ulysses group every pair exchanges in both
directions; in a ring ``s`` receives every member's chunk, ``r``'s included, and in an all-to-all a chunk of no tokens
from each), and chunks of no tokens raise their flag like others. ``r`` put that chunk after it had finished epoch e-2,
the last that read half ``e mod 2``. So no rank waits for another before it writes, and there is no barrier. Where ``r``
sends ``s`` something after it last read what ``s`` had put but O, as inside the machines of a group without a ring (the
last is O), a single half will do as long as calls have the same places, O's apart from the others'; before one that has
not, ranks meet (``Mesh.begin``). ``tests/unit/test_protocol.py`` checks both for small groups in every interleaving.

**Order of memory.** Chunk before flag is two stores; a reader that sees the flag must see the chunk. x86-64 keeps
stores in order. Weaker processors are refused, since nothing here could make theirs keep it.

**Nothing is left behind.** A segment is a file in /dev/shm (mode 0600) that has a name only while the peers open it;
it is locked by its owner for as long as the owner lives, whatever ends it (a record lock: forked children do not share
it). So a peer can tell that the owner is gone,
and what a job that was killed in that moment left there is found by its missing lock and removed at the next start.
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
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from sf_xfuser.transport.base import OneSided, OtherCall, Parcel, Ticket, TransportError, raise_together, window_view
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.gpu.block import round_up_window

_FOLDER = "/dev/shm"
_PREFIX = "sf-xfuser-"
_CHUNKS = 1 << 16  # of one epoch between two ranks, at most
_LINE = 64  # bytes between the flags of two writers: a cache line
_GAVE_UP = 8  # offset in a line: not 0 once the writer has given up
_IDENTITY = 16  # two words, by parity of the epoch
_MAGIC_AT, _MAGIC = 40, b"sf-xfuser shm window 1"  # in the first line: a file of another kind is not removed
_PLACES_KEPT = 4096  # views of the peers' windows, 64 shapes' or so
_LOOK_S = 0.1  # how often a waiting rank looks whether its peers still live
_FUTEX = 202  # of x86-64
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1


_linked: set[str] = set()  # of this process's segments, those that have a name


def unavailable() -> str | None:
    """Why this process cannot use it, whatever its peers can; None where it can. Local."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"shm needs Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    if not os.access(_FOLDER, os.W_OK):
        return f"{_FOLDER} cannot be written to"
    return None


def identity() -> str:
    """The same on two ranks if they share memory: host, kernel and file system. Local."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat(_FOLDER).st_dev}"
    except OSError:
        return socket.gethostname()


def remove_leftovers() -> list[str]:
    """Remove the segments of this user whose owners are gone; their names. Local."""
    removed = []
    name = re.compile(rf"{re.escape(_PREFIX)}{os.geteuid()}-[0-9a-f]{{32}}")
    for entry in os.scandir(_FOLDER):
        if not name.fullmatch(entry.name) or entry.path in _linked:
            continue  # to close any file that leads to a segment of this process's own would end its lock
        with contextlib.suppress(OSError):  # another user's, in use, or somebody was faster
            file = os.open(entry.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                ours = os.fstat(file).st_uid == os.geteuid() and os.pread(file, len(_MAGIC), _MAGIC_AT) == _MAGIC
                if ours and _unlocked(file):
                    os.unlink(entry.path)
                    removed.append(entry.name)
            finally:
                os.close(file)
    return removed


class Shm(OneSided):
    """``control`` joins the ranks of ``members``, all of which make the collective calls; this one is at ``position``
    and exchanges chunks with the positions ``peers``. Parcels name peers by position.

    ``pause(where)``, where set, is called between any two accesses to shared memory: a test's chance to delay them.
    """

    pause: Callable[[str], None] | None = None

    def __init__(
        self,
        control: ControlPlane,
        members: Sequence[int],
        position: int,
        peers: Sequence[int],
        timeout_s: float,
        halves: int = 2,
    ) -> None:
        """Collective. Raises TransportError on every rank if one of them cannot."""
        self._control = control
        self._members = members
        self._position = position
        self._peers = tuple(peers)
        self._timeout_s = timeout_s
        self.halves = halves
        self._half_bytes = 0
        self._own: _Segment | None = None
        self._of: dict[int, _Segment] = {}
        self._epoch = 0  # of the call that is running, or ran last
        self._kept: dict[Any, list[torch.Tensor]] = {}
        self._put: dict[int, int] = {}
        self._due: dict[int, int] = {}
        self._error: TransportError | None = None
        self.reserve(1)

    @property
    def window_bytes(self) -> int:
        """As ``OneSided.window_bytes``."""
        return self.halves * self._half_bytes

    def reserve(self, nbytes: int) -> None:
        """As ``OneSided.reserve``. Makes new segments only where a half of the present ones is too small."""
        self._usable()
        if nbytes <= self._half_bytes:
            return
        half_bytes = round_up_window(nbytes, mmap.PAGESIZE)
        own: _Segment | None = None
        try:
            with contextlib.ExitStack() as failed:
                refusal = unavailable()
                if refusal is None:
                    remove_leftovers()
                    try:
                        own = _Segment.create(_LINE * len(self._members), half_bytes, self.halves)
                        failed.callback(own.close)
                    except OSError as error:
                        refusal = _creation_error(error, self.halves * half_bytes)
                said = self._control.gather("shm segment", [own.path if own else "", refusal, half_bytes])
                self._raise_together([refusal for _, refusal, _ in said])
                if len({size for *_, size in said}) > 1:
                    self._raise_together([f"wants {size} bytes, others do not" for *_, size in said])
                found: dict[int, _Segment] = {}
                for peer in self._peers:
                    try:
                        path = said[peer][0]
                        found[peer] = _Segment.open(path, _LINE * len(self._members), half_bytes, self.halves)
                        failed.callback(found[peer].close)
                    except OSError as error:
                        refusal = (
                            f"the segment of rank {self._members[peer]} cannot be opened here ({error}): shm joins "
                            f"ranks of one host that share {_FOLDER} and a user"
                        )
                        break
                self._raise_together(self._control.gather("shm opened", refusal))
                failed.pop_all()
        except RuntimeError:
            remove_leftovers()  # a peer may have been killed meanwhile
            raise
        finally:
            if own is not None:
                own.unlink()
        self._let_go()
        self._own, self._of, self._half_bytes = own, found, half_bytes

    def begin(self) -> torch.Tensor:
        """As ``OneSided.begin``: the next epoch, with its half of the window."""
        self._usable()
        assert self._own is not None
        self._epoch += 1
        self._put = dict.fromkeys(self._peers, self._epoch * _CHUNKS)
        self._due = dict(self._put)
        return self._own.half(self._epoch)

    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        """Chunks are in their places, with their flags raised, when this returns."""
        self._usable()
        for at, parcel in enumerate(sends):
            peer = parcel.peer
            self._pause("put")
            if parcel.parts[0].numel():
                for part, place in zip(parcel.parts, self._places(parcel), strict=True):
                    place.copy_(part)
            self._put[peer] += 1
            if at + 1 == len(sends) or sends[at + 1].peer != peer:  # all of a round is waited for together
                self._pause("flag")
                self._of[peer].raise_flag(self._position, self._put[peer], self._identity)
        for parcel in receives:
            self._due[parcel.peer] += 1
        return _Arrival(self, round, {parcel.peer: self._due[parcel.peer] for parcel in receives})

    def _places(self, parcel: Parcel) -> Sequence[torch.Tensor]:
        """Of its parts in the peer's window. Kept: a call of the same shapes finds them where they were."""
        first = parcel.parts[0]
        parts = len(parcel.parts)
        key = parcel.peer, self._epoch % self.halves, parcel.offset, parcel.pitch, parts, first.shape, parcel.dtype
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) == _PLACES_KEPT:
                self._kept.clear()
            half = self._of[parcel.peer].half(self._epoch)
            with torch.inference_mode(False):  # later calls write into them in whatever mode
                chunk = window_view(half, parcel.offset, parcel.shape, parcel.dtype, parcel.pitch)
                found = self._kept[key] = [chunk] if parts == 1 else list(chunk.unbind(1))
        return found

    def drain(self) -> None:
        """Nothing is ever posted."""

    def wait(self, round: int, peer: int, due: int) -> None:
        """For a chunk of this round: until ``flag[peer]`` has reached ``due``. Raises TransportError after the timeout,
        or when the peer is gone, has given up, or makes calls without this rank."""
        self._usable()
        assert self._own is not None
        self._pause("wait")
        if self._own.flag(peer) < due:
            with self._control.waiting():
                self._await(round, peer, due)
        seen = self._own.flag(peer)
        if seen // _CHUNKS > due // _CHUNKS + 1:  # a peer ends its next call with this rank's help only
            self._fail(round, peer, due, seen, "it is calls ahead")
        if (identity := self._own.identity(peer, due // _CHUNKS)) != self._identity:
            text = f"it makes another call ({identity:08x}, not {self._identity:08x})"
            self._fail(round, peer, due, seen, text, OtherCall)
        self._pause("read")

    def _await(self, round: int, peer: int, due: int) -> None:
        assert self._own is not None
        started = time.monotonic()
        gone = False
        while (seen := self._own.flag(peer)) < due:
            waited = time.monotonic() - started
            if self._own.gave_up(peer):
                self._fail(round, peer, due, seen, f"it gave up; waited {waited:.1f} s")
            if gone:
                self._fail(round, peer, due, seen, f"its process is gone; waited {waited:.1f} s")
            if (why := self._control.hopeless()) is not None:
                self._fail(round, peer, due, seen, why)
            if waited >= self._timeout_s:
                self._fail(round, peer, due, seen, f"waited {waited:.1f} s")
            self._own.sleep(peer, seen, min(_LOOK_S, self._timeout_s - waited))
            gone = self._of[peer].owner_is_gone()  # and then look at its flag once more

    def close(self) -> None:
        self._error = self._error or TransportError(
            f"rank {self._members[self._position]}: the shm transport was closed; no call may follow"
        )
        self._give_up()
        self._let_go()

    # ------------------------------------------------------------------------------------------------------------------

    def _usable(self) -> None:
        if self._error is not None:
            raise self._error

    def _pause(self, where: Literal["put", "flag", "wait", "read"]) -> None:
        if self.pause is not None:
            self.pause(where)

    def _fail(
        self, round: int, peer: int, due: int, seen: int, why: str, kind: type[TransportError] = TransportError
    ) -> None:
        self._error = kind(
            f"rank {self._members[self._position]} on {socket.gethostname()}: nothing came from rank "
            f"{self._members[peer]} in round {round}: {why}. Expected flag (call={due // _CHUNKS}, "
            f"chunk={due % _CHUNKS}), got (call={seen // _CHUNKS}, chunk={seen % _CHUNKS}) (shm, limit "
            f"{self._timeout_s:g} s)"
        )
        self._give_up()
        raise self._error

    def _give_up(self) -> None:
        """Tell the peers, who may be waiting for this rank."""
        for segment in self._of.values():
            segment.give_up(self._position)

    def _let_go(self) -> None:
        for segment in (*self._of.values(), *([self._own] if self._own else [])):
            segment.close()
        self._own, self._of = None, {}
        self._kept.clear()

    def _raise_together(self, refusals: Sequence[str | None]) -> None:
        raise_together("shm", self._members, refusals)


class _Arrival(Ticket):
    def __init__(self, transport: Shm, round: int, due: dict[int, int]) -> None:
        self._transport = transport
        self._round = round
        self._due = due

    def wait(self) -> None:
        while self._due:
            peer, due = next(iter(self._due.items()))
            self._transport.wait(self._round, peer, due)
            del self._due[peer]


class _Segment:
    """Shared memory of one rank as one process sees it: a line for each writer, then the halves of the window."""

    def __init__(self, file: int, path: str, head_bytes: int, half_bytes: int, halves: int) -> None:
        self._file = file
        self.path = path
        pages = -(-head_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(file, pages + halves * half_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._flags = [ctypes.c_uint64.from_buffer(memory, at) for at in range(0, head_bytes, _LINE)]
        self._identities = [
            (ctypes.c_uint64 * 2).from_buffer(memory, at + _IDENTITY) for at in range(0, head_bytes, _LINE)
        ]
        self._ends = [ctypes.c_uint64.from_buffer(memory, at + _GAVE_UP) for at in range(0, head_bytes, _LINE)]
        window = torch.frombuffer(memory, dtype=torch.uint8)[pages:]
        self._halves = [window[n * half_bytes : (n + 1) * half_bytes] for n in range(halves)]

    @classmethod
    def create(cls, head_bytes: int, half_bytes: int, halves: int) -> _Segment:
        """Raises OSError, also where memory is short: a page that is missing later would end the process."""
        file = os.open(_FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
            free = os.fstatvfs(file)
            total = -(-head_bytes // mmap.PAGESIZE) * mmap.PAGESIZE + halves * half_bytes
            if total > free.f_bavail * free.f_frsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(file, 0, total)
            os.pwrite(file, _MAGIC, _MAGIC_AT)
            path = f"{_FOLDER}/{_PREFIX}{os.geteuid()}-{secrets.token_hex(16)}"
            _linked.add(path)
            os.link(f"/proc/self/fd/{file}", path, src_dir_fd=file, follow_symlinks=True)  # a link of the file itself
            return cls(file, path, head_bytes, half_bytes, halves)
        except BaseException:
            os.close(file)
            raise

    @classmethod
    def open(cls, path: str, head_bytes: int, half_bytes: int, halves: int) -> _Segment:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return cls(file, path, head_bytes, half_bytes, halves)
        except BaseException:
            os.close(file)
            raise

    def unlink(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        _linked.discard(self.path)

    def close(self) -> None:
        """Idempotent. Views that are still held keep the memory, not the lock."""
        file, self._file = self._file, -1
        if file >= 0:
            fcntl.lockf(file, fcntl.LOCK_UN)
            os.close(file)

    def half(self, epoch: int) -> torch.Tensor:
        return self._halves[epoch % len(self._halves)]

    def flag(self, writer: int) -> int:
        return self._flags[writer].value

    def raise_flag(self, writer: int, value: int, identity: int) -> None:
        self._identities[writer][value // _CHUNKS % 2] = identity
        self._flags[writer].value = value
        _futex(self._flags[writer], _FUTEX_WAKE, 1, None)

    def identity(self, writer: int, epoch: int) -> int:
        return self._identities[writer][epoch % 2]

    def give_up(self, writer: int) -> None:
        self._ends[writer].value = 1
        _futex(self._flags[writer], _FUTEX_WAKE, 1, None)

    def gave_up(self, writer: int) -> bool:
        return bool(self._ends[writer].value)

    def sleep(self, writer: int, seen: int, seconds: float) -> None:
        """Until the writer's flag is no longer ``seen``, or a little longer than ``seconds``."""
        _futex(self._flags[writer], _FUTEX_WAIT, seen & 0xFFFFFFFF, max(seconds, 1e-4))

    def owner_is_gone(self) -> bool:
        return _unlocked(self._file)


def _unlocked(file: int) -> bool:
    """Whether nobody holds the lock of an open segment that another process made."""
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    fcntl.lockf(file, fcntl.LOCK_UN)
    return True


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None, use_errno=True)


def _futex(flag: ctypes.c_uint64, operation: int, value: int, seconds: float | None) -> None:
    """On the low half of ``flag``, between processes. Lets other threads run; a signal or a change ends a wait."""
    limit = None if seconds is None else ctypes.byref(_Timespec(int(seconds), int(seconds % 1 * 1e9)))
    _libc.syscall(_FUTEX, ctypes.byref(flag), operation, ctypes.c_uint32(value), limit, None, 0)


def _creation_error(error: OSError, window_bytes: int) -> str:
    if error.errno == errno.ENOSPC:
        free = os.statvfs(_FOLDER)
        return (
            f"{_FOLDER} has {free.f_bavail * free.f_frsize} bytes left, a window needs {window_bytes}; enlarge it "
            f"(docker run --shm-size=8g), or use --sp-transport tcp"
        )
    return f"no shared memory: {error}"
