"""Matched sends and receives over torch.distributed (NCCL or gloo): runs everywhere, and is the ablation
"Torus without one-sided transfers"."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from sf_xfuser.transport.base import Parcel, Ticket, Transport, TransportError


class TwoSided(Transport):
    """``group``: the lane's process group, among whose ranks are the peers; ``members[w]`` is the global rank at
    position ``w``. ``lane`` is for messages only.

    NCCL runs a lane's rounds in order on its own stream. gloo moves data on a thread of its own as soon as both ends
    have posted, and whatever is posted shares the wire.
    """

    def __init__(self, group: dist.ProcessGroup, members: Sequence[int], lane: str, timeout_s: float) -> None:
        self._group = group
        self._ranks = members
        self._lane = lane
        self._timeout_s = timeout_s
        self._bounds_itself = dist.get_backend(group) != "gloo"  # NCCL's watchdog does
        self._posted: list[_Transfer] = []

    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        """Without a group call around a round, two ranks that both send first would block each other on NCCL."""
        ops = [(dist.irecv, "receive from", parcel, parcel.packed()) for parcel in receives if parcel.nbytes]
        ops += [(dist.isend, "send to", parcel, parcel.packed()) for parcel in sends if parcel.nbytes]  # type: ignore[misc]
        p2p = [dist.P2POp(op, tensor, self._ranks[parcel.peer], self._group) for op, _, parcel, tensor in ops]
        try:
            works = dist.batch_isend_irecv(p2p) if p2p else []
        except RuntimeError as refused:
            peers = sorted({self._ranks[parcel.peer] for _, _, parcel, _ in ops})
            raise self._failure(f"starting round {round} with rank(s) {peers} failed", refused) from refused
        # NCCL coalesces the round into fewer Works than parcels: waiting for any of the round waits for all.
        transfers = [
            _Transfer(direction, parcel, tensor, round, work)
            for (_, direction, parcel, tensor), work in zip(ops, works, strict=False)
        ]
        self._posted += transfers
        return _Received(self, transfers)

    def drain(self) -> None:
        posted, self._posted = self._posted, []
        for transfer in posted:
            self.wait(transfer)

    def wait(self, transfer: _Transfer) -> None:
        """Bounded wait for one transfer; on CUDA it orders the current stream. Once: gloo would wait for another."""
        work, transfer.work = transfer.work, None
        if work is None:
            return
        try:
            if self._bounds_itself:
                work.wait()
            else:
                work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            parcel = transfer.parcel
            what = (
                f"{transfer.direction} rank {self._ranks[parcel.peer]} failed (round {transfer.round}, slot "
                f"{parcel.slot}, {parcel.nbytes} bytes)"
            )
            raise self._failure(what, error) from error

    def _failure(self, what: str, error: Exception) -> TransportError:
        return TransportError(
            f"rank {dist.get_rank()} on {socket.gethostname()}: {what} (lane {self._lane}, limit "
            f"{self._timeout_s:g} s): {str(error).splitlines()[0]}. The peer died, hangs, or makes a different call; "
            f"see its log, or raise --sp-timeout"
        )


@dataclass(slots=True)
class _Transfer:
    """A send or receive. Holds the tensor: gloo and NCCL both need it alive until the work is done."""

    direction: str
    parcel: Parcel
    tensor: torch.Tensor
    round: int
    work: dist.Work | None  # None: waited for


class _Received(Ticket):
    def __init__(self, transport: TwoSided, transfers: list[_Transfer]) -> None:
        self._transport = transport
        self._transfers = transfers

    def wait(self) -> None:
        transfers, self._transfers = self._transfers, []
        for transfer in transfers:
            self._transport.wait(transfer)
