"""One-sided transfers between CPU ranks of one host, through POSIX shared memory.

A sender copies its chunk into the receiver's window, then raises a flag there. The receiver takes no part in the
transfer. Each rank owns one *segment* (``segment``): flags, then its window.

**Flags.** ``flag[s]`` in the segment of rank ``r`` has one writer, ``s``. Its value is the number of chunks that ``s``
has put into ``r``'s window, as ``epoch * 2**16 + chunks of this epoch``; an epoch is one attention call or one
all-to-all. Both ranks know the order of their chunks from the schedule, so chunk k of epoch e has arrived when
``flag >= e * 2**16 + k``. Values only grow and are never reset.

**Identity.** Next to the flag the writer stores which call it is in, one word for epochs of each parity, before the
first flag of the epoch. A reader compares it once the flag shows that its chunk has arrived. The word of epoch e is
written again in e+2, which the writer begins after the reader has finished e (see below). If two ranks use different
shapes, a chunk may be written to a wrong offset, but still inside the window's mapping, and the window is not used
again.

**Why nothing is overwritten too early.** A window has two halves, and epoch e uses half ``e mod 2``. Let ``s`` put a
chunk into ``r``'s window in epoch e. Then ``s`` has finished epoch e-1, in which it waited for all of its chunks. One
of them was put by ``r`` in epoch e-1, or was forwarded from ``r``: in a Ulysses group every pair exchanges in both
directions, in a ring ``s`` receives every member's chunk, and in an all-to-all a chunk from each. Empty chunks raise
their flag like others. ``r`` put that chunk after it had finished epoch e-2, the last epoch that read half ``e mod 2``.
So no rank waits before it writes, and there is no barrier.

One half is enough on two conditions. First, ``r`` sends ``s`` a chunk after it has read all chunks of ``s`` except O.
This holds inside the machines of a group without a ring, where O is last. Second, consecutive calls use the same
offsets, and O has a region of its own. Before a call with other offsets, ranks synchronize (``Mesh.begin``).
``tests/unit/test_protocol.py`` checks one and two halves for small groups in every interleaving.

**Memory order.** Chunk and flag are two stores, and a reader that sees the flag must see the chunk. x86-64 keeps stores
in order. Processors with a weaker order are refused, since Python has no memory barrier for them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from sf_xfuser.layout.topology import host_id
from sf_xfuser.transport.base import (
    CallMismatch,
    OneSided,
    Parcel,
    Transfer,
    TransportError,
    raise_if_unavailable,
    window_view,
)
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.cpu.segment import (
    CHUNKS,
    FOLDER,
    Segment,
    creation_error,
    remove_stale_segments,
    unavailable,
)
from sf_xfuser.transport.gpu.block import round_up_window
from sf_xfuser.transport.patience import Patience

_POLL_S = 0.1  # interval at which a waiting rank checks whether its peers are alive


def identity() -> str:
    """Host, kernel and file system: equal on ranks that can share memory. Local."""
    return f"{host_id()} {os.stat(FOLDER).st_dev if os.path.isdir(FOLDER) else 'none'}"


class Shm(OneSided):
    """``control`` connects the ranks of ``members``, which make the collective calls. This rank is at ``position`` and
    exchanges chunks with the positions ``peers``. Parcels name peers by position.

    ``pause(where)`` is called after the chunks of a round are written, and before each flag, wait and read, so that a
    test can replace it with a delay.
    """

    host_writes = True
    pause: Callable[[Literal["put", "flag", "wait", "read"]], object] = staticmethod(lambda where: None)

    def __init__(
        self,
        control: ControlPlane,
        members: Sequence[int],
        position: int,
        peers: Sequence[int],
        timeout_s: float,
        halves: int = 2,
    ) -> None:
        """Collective. Raises TransportError on every rank if one of them cannot use shared memory."""
        self._control = control
        self._members = members
        self._position = position
        self._peers = tuple(peers)
        self._timeout_s = timeout_s
        self._patience = Patience(timeout_s, control.late_ranks)
        self.halves = halves
        self._half_bytes = 0
        self._own: Segment | None = None
        self._segments: dict[int, Segment] = {}  # of the peers
        self._epoch = 0  # of the current or last call
        self._sent: dict[int, int] = {}  # flag value after the last send to each peer
        self._expected: dict[int, int] = {}  # flag value after the last receive from each peer
        self._error: TransportError | None = None
        self.reserve(1, 0)

    @property
    def window_bytes(self) -> int:
        """As ``OneSided.window_bytes``."""
        return self.halves * self._half_bytes

    def reserve(self, nbytes: int, scratch_bytes: int) -> None:
        """As ``OneSided.reserve``, without scratch memory. New segments only if the halves are too small."""
        self._check_usable()
        if nbytes <= self._half_bytes:
            return
        half_bytes = round_up_window(nbytes, mmap.PAGESIZE)
        own: Segment | None = None
        try:
            with contextlib.ExitStack() as opened:
                reason = unavailable()
                if reason is None:
                    remove_stale_segments()
                    try:
                        own = Segment.create(len(self._members), half_bytes, self.halves)
                        opened.callback(own.close)
                    except OSError as error:
                        reason = creation_error(error, self.halves * half_bytes)
                gathered = self._control.gather("shm segment", [own.path if own else "", reason, half_bytes])
                raise_if_unavailable("shm", self._members, [reason for _, reason, _ in gathered])
                if len({size for *_, size in gathered}) > 1:
                    reasons = [f"requests {size} bytes, other ranks differ" for *_, size in gathered]
                    raise_if_unavailable("shm", self._members, reasons)
                segments: dict[int, Segment] = {}
                for peer in self._peers:
                    try:
                        path = gathered[peer][0]
                        segments[peer] = Segment.open(path, len(self._members), half_bytes, self.halves)
                        opened.callback(segments[peer].close)
                    except OSError as error:
                        reason = (
                            f"the segment of rank {self._members[peer]} cannot be opened here ({error}): shm "
                            f"needs ranks of one user and host with the same {FOLDER}"
                        )
                        break
                raise_if_unavailable("shm", self._members, self._control.gather("shm opened", reason))
                opened.pop_all()
        except RuntimeError:
            remove_stale_segments()  # a peer may have been killed
            raise
        finally:
            if own is not None:
                own.unlink()
        self._close_segments()
        self._own, self._segments, self._half_bytes = own, segments, half_bytes

    def begin(self) -> torch.Tensor:
        """As ``OneSided.begin``: the next epoch, with its half of the window."""
        self._check_usable()
        assert self._own is not None
        self._epoch += 1
        self._patience.begin_call()
        self._sent = dict.fromkeys(self._peers, self._epoch * CHUNKS)
        self._expected = dict(self._sent)
        return self._own.half(self._epoch)

    def record(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Transfer:
        copies = []
        for parcel in sends:
            if parcel.data is not None and parcel.data.numel():
                window = self._segments[parcel.peer].half(self._epoch)
                copies.append((window_view(window, parcel.offset, parcel.data.shape, parcel.data.dtype), parcel.data))
        return _ShmTransfer(self, round, copies, _counts(sends), _counts(receives))

    def post(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], sent: Mapping[int, int]) -> None:
        """Send in this thread: all chunks are written and all flags raised when this returns."""
        self._check_usable()
        self.pause("put")
        for view, data in copies:
            view.copy_(data)
        for peer, chunks in sent.items():  # a receiver waits for whole rounds
            self.pause("flag")
            self._sent[peer] += chunks
            self._segments[peer].raise_flag(self._position, self._sent[peer], self._identity)

    def expect(self, received: Mapping[int, int]) -> dict[int, int]:
        """The flag to wait for, by peer, after these numbers of further chunks."""
        for peer, chunks in received.items():
            self._expected[peer] += chunks
        return {peer: self._expected[peer] for peer in received}

    def peer_window(self, peer: int) -> torch.Tensor | None:
        """As ``OneSided.peer_window``."""
        return self._segments[peer].half(self._epoch) if peer in self._segments else None

    def drain(self) -> None:
        """Sends are complete when ``exchange`` returns."""

    def wait(self, round: int, peer: int, expected: int) -> None:
        """Wait until ``flag[peer]`` reaches ``expected``. Raises TransportError after the timeout, or if the peer is
        gone, has aborted, or makes other calls than this rank."""
        self._check_usable()
        assert self._own is not None
        self.pause("wait")
        if self._own.flag(peer) < expected:
            with self._control.waiting():
                self._wait_for_flag(round, peer, expected)
        flag = self._own.flag(peer)
        if flag // CHUNKS > expected // CHUNKS + 1:  # a peer cannot finish its next call without this rank
            self._fail(round, peer, expected, "it is more than one call ahead")
        if (identity := self._own.identity(peer, expected // CHUNKS)) != self._identity:
            reason = f"it makes another call ({identity:08x}, not {self._identity:08x})"
            self._fail(round, peer, expected, reason, CallMismatch)
        self.pause("read")

    def _wait_for_flag(self, round: int, peer: int, expected: int) -> None:
        assert self._own is not None
        started = time.monotonic()
        gone = False
        while (flag := self._own.flag(peer)) < expected:
            waited = time.monotonic() - started
            if self._own.aborted(peer):
                self._fail(round, peer, expected, f"it has aborted; waited {waited:.1f} s")
            if gone:
                self._fail(round, peer, expected, f"its process is gone; waited {waited:.1f} s")
            if (reason := self._control.abort_reason()) is not None:
                self._fail(round, peer, expected, reason)
            if flag > expected // CHUNKS * CHUNKS:  # it has sent a chunk in this call
                self._patience.arrived(peer, started)
            if self._patience.exceeded([peer], started) is not None:
                self._fail(round, peer, expected, f"waited {waited:.1f} s")
            self._own.sleep(peer, flag, min(_POLL_S, self._timeout_s))
            gone = self._segments[peer].owner_is_gone()  # its flag is read once more before this fails

    def close(self) -> None:
        self._error = self._error or TransportError(
            f"rank {self._members[self._position]}: the shm transport was closed; no call may follow"
        )
        self._abort()
        self._close_segments()

    # ------------------------------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._error is not None:
            raise self._error

    def _fail(
        self, round: int, peer: int, expected: int, reason: str, kind: type[TransportError] = TransportError
    ) -> None:
        assert self._own is not None
        flag = self._own.flag(peer)
        self._error = kind(
            f"rank {self._members[self._position]} on {socket.gethostname()}: no data from rank "
            f"{self._members[peer]} in round {round}: {reason}. Expected flag (call={expected // CHUNKS}, "
            f"chunk={expected % CHUNKS}), got (call={flag // CHUNKS}, chunk={flag % CHUNKS}) (shm, timeout "
            f"{self._timeout_s:g} s)"
        )
        self._abort()
        raise self._error

    def _abort(self) -> None:
        """Notify the peers, which may be waiting for this rank."""
        for segment in self._segments.values():
            segment.abort(self._position)

    def _close_segments(self) -> None:
        for segment in (*self._segments.values(), *([self._own] if self._own else [])):
            segment.close()
        self._own, self._segments = None, {}


def _counts(parcels: Sequence[Parcel]) -> dict[int, int]:
    """The number of chunks, by peer."""
    return dict(Counter(parcel.peer for parcel in parcels))


class _ShmTransfer(Transfer):
    """``copies``: (in a peer's window, data). ``sent``, ``received``: numbers of chunks, by peer."""

    def __init__(
        self,
        transport: Shm,
        round: int,
        copies: Sequence[tuple[torch.Tensor, torch.Tensor]],
        sent: Mapping[int, int],
        received: Mapping[int, int],
    ) -> None:
        self._transport, self._round = transport, round
        self._copies, self._sent, self._received = copies, sent, received
        self._expected: dict[int, int] = {}  # flag values to wait for, by peer

    def post(self) -> None:
        self._transport.post(self._copies, self._sent)
        self._expected = self._transport.expect(self._received)

    def wait(self) -> None:
        while self._expected:
            peer, expected = next(iter(self._expected.items()))
            self._transport.wait(self._round, peer, expected)
            del self._expected[peer]
