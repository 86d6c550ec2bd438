"""The interface between the schedule and the transports."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sf_xfuser.kernels import pack_unchecked


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
    """A chunk to send to, or to receive from, ``peer`` (a position).

    Send: ``parts`` are views of equal shape [S, ...] with any strides. The chunk stores them as ``dtype``. Several
    parts are stored as [S, parts, ...]. Receive: one contiguous part, the destination.

    ``slot`` numbers the parcels of one round between two ranks. Both ends use the same number. A one-sided transport
    writes the chunk into the receiver's window at byte ``offset``. ``pitch``: see ``window_view``; only shared memory
    has chunks that are not contiguous.
    """

    parts: tuple[torch.Tensor, ...]
    dtype: torch.dtype
    peer: int
    slot: int
    offset: int = 0
    pitch: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return tuple(first) if len(self.parts) == 1 else (first[0], len(self.parts), *first[1:])

    @property
    def nbytes(self) -> int:
        return sum(part.numel() for part in self.parts) * self.dtype.itemsize

    def write(self, into: torch.Tensor) -> None:
        """Copy the parts into a tensor of ``shape``."""
        pack_unchecked(self.parts, into)

    def packed(self) -> torch.Tensor:
        """The chunk as one contiguous tensor. A single contiguous part is returned without a copy."""
        first = self.parts[0]
        if len(self.parts) == 1 and first.dtype == self.dtype and first.is_contiguous():
            return first
        into = first.new_empty(self.shape, dtype=self.dtype)
        self.write(into)
        return into


def window_view(
    window: torch.Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype, pitch: int | None = None
) -> torch.Tensor:
    """View the chunk [S, ..., H, D] at byte ``offset`` of a window. It is contiguous without ``pitch``. With ``pitch``,
    memory holds [..., H, S, D] with that many elements from one head to the next."""
    if pitch is None:
        nbytes = math.prod(shape) * dtype.itemsize
        return window[offset : offset + nbytes].view(dtype).view(tuple(shape))
    *outer, head_size = shape[1:]
    strides = [pitch * math.prod(outer[n + 1 :]) for n in range(len(outer))]
    start = (window.storage_offset() + offset) // dtype.itemsize
    return window.view(dtype).as_strided(shape, (head_size, *strides, 1), start)


class Ticket(ABC):
    """An exchange that has started. ``arrived_s``: when its last receive completed (``time.perf_counter``), for traces;
    None if the transport does not measure it."""

    arrived_s: float | None = None

    @abstractmethod
    def wait(self) -> None:
        """Wait until all receives are usable on the current stream. Bounded; raises TransportError. Idempotent."""


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
    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        """Start to send and receive; return at once.

        The k-th exchange of a call on one rank matches the k-th on every peer, with chunks of equal size on both ends.
        Do not use the tensors of ``receives`` before the ticket's wait returns. Do not change those of ``sends`` before
        ``drain`` returns.
        """

    @abstractmethod
    def drain(self) -> None:
        """Wait until every send of this call has completed, so that no transfer outlives its call. Bounded."""

    def poison(self, result: torch.Tensor) -> None:  # noqa: B027  (a transport that waits on the host raises instead)
        """Turn ``result`` into NaN, on the current stream, if data of this call was lost or belongs to another call.

        For transports that enqueue their waits. ``result``: floating point, any shape. Call it after ``drain`` for the
        tensor that the call returns, and earlier for a tensor that is sent on over another transport, since its
        receivers are not notified of the failure."""

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

    last_call: object = None
    """The last argument of ``Mesh.begin``, which compares it with the next one."""

    @property
    @abstractmethod
    def window_bytes(self) -> int:
        """Size of this rank's window, which stays allocated between calls."""

    @abstractmethod
    def reserve(self, nbytes: int) -> None:
        """Grow the window to at least ``nbytes`` per call, equal on all ranks. Collective over the group, between
        calls. Raises TransportError on every rank if one of them cannot."""

    @abstractmethod
    def begin(self) -> torch.Tensor:
        """Start the call of the last ``begin_call``. Returns this rank's window as bytes [nbytes], valid until the next
        call."""

    def unavailable_reason(self) -> str | None:
        """Why this transport cannot start a call now, or None. Equal on all ranks. Local."""
        return None
