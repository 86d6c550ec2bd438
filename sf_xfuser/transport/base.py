"""The interface between the schedule and the wire."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sf_xfuser.kernels import place


class TransportError(RuntimeError):
    """A transfer did not complete in time or its peer is gone. The group cannot be used any more."""


class OtherCall(TransportError):
    """A peer has sent what belongs to another call than this rank's."""


class Unusable(TransportError):
    """A transport cannot be set up here: raised alike on every rank, with nothing on its way, so that all of them can
    take another one."""


def raise_together(name: str, members: Sequence[int], refusals: Sequence[str | None]) -> None:
    """Unusable where there is a refusal; they are those of all ranks, so every rank raises alike."""
    words = [f"rank {members[w]}: {text}" for w, text in enumerate(refusals) if text]
    if len(words) > 1 and len(words) == len(refusals) and len(set(refusals)) == 1:
        words = [f"every rank: {refusals[0]}"]
    if words:
        raise Unusable(f"{name} cannot be used: {'; '.join(words)}")


@dataclass(frozen=True, slots=True)
class Parcel:
    """A chunk on its way to, or from, ``peer`` (a position).

    To be sent: ``parts`` are views of equal shape [S, ...], any strides; the chunk holds them as ``dtype``, several of
    them side by side as [S, parts, ...]. To be received: one contiguous part, where the chunk is to lie.

    ``slot`` numbers the parcel among those of one round between the same two ranks, alike at both ends. Where the
    transport writes into a window of the receiver, the chunk lies there from the byte ``offset`` on, ``pitch`` as in
    ``window_view``; only shared memory has other chunks than contiguous ones.
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
        place(self.parts, into)

    def packed(self) -> torch.Tensor:
        """The chunk as one contiguous tensor: the part itself where that is one."""
        first = self.parts[0]
        if len(self.parts) == 1 and first.dtype == self.dtype and first.is_contiguous():
            return first
        into = first.new_empty(self.shape, dtype=self.dtype)
        self.write(into)
        return into


def window_view(
    window: torch.Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype, pitch: int | None = None
) -> torch.Tensor:
    """A chunk [S, ..., H, D] in the bytes of a window, from ``offset`` on: contiguous, or, where ``pitch`` is given, as
    [..., H, S, D] with so many elements from one head to the next."""
    if pitch is None:
        nbytes = math.prod(shape) * dtype.itemsize
        return window[offset : offset + nbytes].view(dtype).view(tuple(shape))
    *outer, head_size = shape[1:]
    strides = [pitch * math.prod(outer[n + 1 :]) for n in range(len(outer))]
    start = (window.storage_offset() + offset) // dtype.itemsize
    return window.view(dtype).as_strided(shape, (head_size, *strides, 1), start)


class Ticket(ABC):
    """A started exchange. ``arrived_s``: when all that it receives was here (``time.perf_counter``), where the
    transport knows; for traces."""

    arrived_s: float | None = None

    @abstractmethod
    def wait(self) -> None:
        """Until everything received is usable on the current stream. Bounded; raises TransportError. Idempotent."""


class Transport(ABC):
    """One link of one sequence-parallel group."""

    @property
    def one_sided(self) -> OneSided | None:
        """This link, where its chunks are written into windows."""
        return None

    def begin_call(self, identity: int) -> None:
        """A call begins. ``identity``, 32 bits, is the same on all ranks that make the same call and goes with all that
        is sent in it: where a rank gets something of another call, the transport fails, or what was sent never arrives.
        Local."""
        self._identity = identity

    _identity = 0
    enqueues = False
    """Whether waits are enqueued on a GPU, so that a call may fail after its host has ended it."""

    @abstractmethod
    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        """Start moving ``sends`` and filling ``receives``; returns at once.

        The k-th exchange of a call on one rank matches the k-th on every peer, with chunks of equal size at both ends.
        What a parcel names must be untouched until the ticket (receives) or ``drain`` (sends) has returned.
        """

    @abstractmethod
    def drain(self) -> None:
        """Until every send of this call has left its tensor: nothing stays posted across calls. Bounded."""

    def poison(self, result: torch.Tensor) -> None:  # noqa: B027  (where the host waits, it has raised by then)
        """Where waits are enqueued and not waited for: let the current stream turn ``result``, which this call
        computed, into NaN if anything that it waited for did not arrive, or was of another call. Floating point, any
        shape. After ``drain`` for what the call returns; during it for what goes on over another transport, whose
        receivers hear of nothing."""

    def close(self) -> None:  # noqa: B027  (nothing to close is a legal implementation)
        """Let go of what the link holds; idempotent. Local. No exchange may follow."""


class OneSided(Transport):
    """Senders write into a window of the receiver, at ``Parcel.offset``, and raise a flag. One object serves all links
    of a group that move chunks that way, since they share the window."""

    @property
    def one_sided(self) -> OneSided:
        return self

    halves: int
    """Parts of a window that calls use in turn. With one, a rank may write to a peer as soon as that has sent it what
    it sends last in an attention call; ``Mesh.begin`` sees to what follows from that."""

    last_call: object = None
    """What ``Mesh.begin`` was given last."""

    @property
    @abstractmethod
    def window_bytes(self) -> int:
        """Memory that this rank's window holds, also between calls."""

    @abstractmethod
    def reserve(self, nbytes: int) -> None:
        """From now on a window has at least ``nbytes`` for each call, the same number on every rank. Collective over
        the group, between calls. Raises TransportError on every rank if one of them cannot."""

    @abstractmethod
    def begin(self) -> torch.Tensor:
        """Start a call, of the identity that ``begin_call`` was given. This rank's window in it, as bytes [nbytes]:
        valid until the next call."""

    def unavailable_reason(self) -> str | None:
        """Why no call can be made at this moment, alike on all ranks; None where one can. Local."""
        return None
