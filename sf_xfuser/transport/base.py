"""The interface between the schedule and the wire."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch


class TransportError(RuntimeError):
    """A transfer did not complete in time or its peer is gone. The group cannot be used any more."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """One contiguous tensor on its way to, or from, ``peer`` (index in the lane's group).

    ``slot`` numbers the parcel among those of one round between the same two ranks, alike at both ends.
    """

    tensor: torch.Tensor
    peer: int
    slot: int


class Ticket(ABC):
    """A started exchange. ``arrived_s``: when all that it receives was here (``time.perf_counter``), where the
    transport knows; for traces."""

    arrived_s: float | None = None

    @abstractmethod
    def wait(self) -> None:
        """Until everything received is usable on the current stream. Bounded; raises TransportError. Idempotent."""


class Transport(ABC):
    """One lane of one sequence-parallel group."""

    @abstractmethod
    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        """Start moving ``sends`` and filling ``receives``; returns at once.

        The k-th exchange of a call on one rank matches the k-th on every peer. Tensors must be contiguous, of equal
        size at both ends and untouched until the ticket (receives) or ``drain`` (sends) has returned.
        """

    @abstractmethod
    def drain(self) -> None:
        """Until every send of this call has left its tensor: nothing stays posted across calls. Bounded."""

    def close(self) -> None:  # noqa: B027  (nothing to close is a legal implementation)
        """Let go of what the lane holds; idempotent. Local. No exchange may follow."""
