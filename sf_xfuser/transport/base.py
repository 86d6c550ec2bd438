"""The interface between the programs of calls and the transports."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

CALL_TIMEOUT_FACTOR = 5
"""Ranks may start a call, or ``build_mesh``, up to this many ``--sp-timeout`` apart, since they load a model first, or
write a video between two calls. While a rank has not started a call, this limits the waits in it. Otherwise each chunk
must arrive within one ``--sp-timeout``."""


class TransportError(RuntimeError):
    """A transfer timed out or a peer is lost. The transport cannot be used any more."""


class CallMismatch(TransportError):
    """A peer has sent data of a call that differs from this rank's."""


class TransportUnavailable(TransportError):
    """A transport cannot be set up here. Raised on every rank of the group, with no transfer active, so that all ranks
    can use another transport."""


def raise_if_unavailable(name: str, members: Sequence[int], reasons: Sequence[str | None]) -> None:
    """Raise TransportUnavailable if any rank has a reason. ``reasons`` holds those of all ranks, by position, so that
    every rank raises the same error."""
    texts = [f"rank {members[w]}: {reason}" for w, reason in enumerate(reasons) if reason]
    if len(texts) > 1 and len(texts) == len(reasons) and len(set(reasons)) == 1:
        texts = [f"every rank: {reasons[0]}"]
    if texts:
        raise TransportUnavailable(f"{name} cannot be used: {'; '.join(texts)}")


@dataclass(frozen=True, slots=True)
class Parcel:
    """A chunk to send to, or to receive from, ``peer`` (a position). ``slot`` numbers the parcels of one round between
    two ranks. Both ends use the same number, size and order.

    ``data``: contiguous, or any strides for ``Transport.exchange``. A one-sided transport writes it into the receiver's
    window at byte ``offset``, and ignores it in a receive. None in a send: the data is in the receiver's window already
    (see ``OneSided.peer_window``)."""

    data: torch.Tensor | None
    peer: int
    slot: int
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return 0 if self.data is None else self.data.nbytes


def window_view(window: torch.Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """View the contiguous chunk at byte ``offset`` of a window."""
    nbytes = math.prod(shape) * dtype.itemsize
    return window[offset : offset + nbytes].view(dtype).view(tuple(shape))


class Transfer(ABC):
    """A recorded exchange: a round of sends and receives. Each call posts it once.

    ``arrived_s``: when the last receive of the last post completed (``time.perf_counter``), for traces; None if the
    transport does not measure it."""

    arrived_s: float | None = None

    @abstractmethod
    def post(self) -> None:
        """Start to send and receive; return at once. The tensors of receives are undefined until ``wait`` returns.
        Those of sends must not change until ``drain`` returns."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until all receives are usable on the current stream. Bounded; raises TransportError. Idempotent after a
        post."""


class Transport(ABC):
    """Moves chunks on one link of one sequence-parallel group."""

    @property
    def one_sided(self) -> OneSided | None:
        """This transport if it writes into windows, else None."""
        return None

    def begin_call(self, identity: int) -> None:
        """Start a call. ``identity`` (32 bits) is equal on all ranks that make the same call, and is sent with the
        call's data. A rank that receives data of another call fails, or its receive times out. Local."""
        self._identity = identity

    _identity = 0
    enqueues = False
    """Whether waits are enqueued on a GPU, so that a call may fail after its host has returned."""

    @abstractmethod
    def record(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Transfer:
        """Prepare an exchange with everything bound that stays the same in later calls. Moves nothing. Local.

        A call posts transfers in the order in which they were recorded. The k-th transfer of a call on one rank matches
        the k-th on every peer, with chunks of equal size on both ends. Record the transfers of one program in one call,
        after ``begin_call`` and, for a window, ``begin``. Later calls may post them in place of recording: with a
        window, those calls that use the same half."""

    def record_wait(self, transfers: Sequence[Transfer]) -> Callable[[], None]:
        """A function that waits for all of these transfers of this transport, in one operation where possible."""
        if len(transfers) == 1:
            return transfers[0].wait

        def wait() -> None:
            for transfer in transfers:
                transfer.wait()

        return wait

    def record_post(self, transfer: Transfer, after: Sequence[Transfer]) -> Callable[[], None]:
        """A function that posts ``transfer``, whose sends forward what the transfers ``after`` receive, as soon as that
        has arrived. All are transfers of this transport."""
        if not after:
            return transfer.post
        wait = self.record_wait(after)

        def post() -> None:
            wait()
            transfer.post()

        return post

    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Transfer:
        """``record`` and ``post`` one exchange that is used once. Sends may have any strides."""
        packed = [p if p.data is None else replace(p, data=p.data.contiguous()) for p in sends]
        transfer = self.record(round, packed, receives)
        transfer.post()
        return transfer

    def record_end(self) -> Callable[[torch.Tensor | None], None]:
        """A function that ends each call which posts the transfers recorded since ``begin_call``. It waits until every
        send has completed, so that no transfer outlives its call; on a GPU it makes the current stream wait. Bounded.
        It turns its argument, the result of the call (floating point, any strides), into NaN if data of the call was
        lost or belongs to another call, where the host did not raise."""
        return lambda result: self.drain()

    @abstractmethod
    def drain(self) -> None:
        """Wait until every send of this call has completed. Bounded."""

    def poison(self, chunk: torch.Tensor) -> None:  # noqa: B027  (a transport that waits on the host raises instead)
        """Turn ``chunk`` into NaN, on the current stream, if data of this call was lost. For a chunk that is sent on
        over another transport before the call ends, since its receivers are not notified of the failure."""

    def close(self) -> None:  # noqa: B027  (not every transport owns resources)
        """Release all resources. Idempotent. Local. No exchange may follow."""


class OneSided(Transport):
    """Senders write into the receiver's window at ``Parcel.offset`` and raise a flag. One object handles all one-sided
    links of a group, since they share the window."""

    @property
    def one_sided(self) -> OneSided:
        return self

    halves: int
    """Number of buffers in a window, which calls use in turn: 1 or 2. With 1, a rank may write to a peer as soon as it
    has received the peer's last chunk of an attention call; ``Mesh.begin`` synchronizes ranks if that is too early."""

    host_writes = False
    """Whether the host of a rank writes to the windows of its peers itself: see ``peer_window``."""

    last_maps: object = None
    """The last argument of ``Mesh.begin``, which compares it with the next one."""

    @property
    @abstractmethod
    def window_bytes(self) -> int:
        """Size of this rank's window, which stays allocated between calls."""

    @abstractmethod
    def reserve(self, nbytes: int, scratch_bytes: int) -> None:
        """Grow the window to at least ``nbytes`` per call, and the scratch memory, both equal on all ranks. Collective
        over the group, between calls. Raises TransportError on every rank if one of them cannot."""

    @abstractmethod
    def begin(self) -> torch.Tensor:
        """Start the call of the last ``begin_call``. Returns this rank's window as bytes [nbytes], valid until the next
        call. Always the same tensor for the same half."""

    @property
    def scratch(self) -> torch.Tensor | None:
        """Bytes for data that this rank sends and for its partial results. None if any memory can be sent from."""
        return None

    def peer_window(self, peer: int) -> torch.Tensor | None:
        """The window of ``peer`` in this call, as bytes. None without ``host_writes``, and for other ranks."""
        return None

    def unavailable_reason(self) -> str | None:
        """Why this transport cannot start a call now, or None. Equal on all ranks. Local."""
        return None
