"""Matched sends and receives over torch.distributed (NCCL or gloo): runs everywhere, and is the ablation
"Torus without one-sided transfers"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from sf_xfuser.transport.base import Parcel, Ticket, Transport, TransportError

_SLOTS_PER_ROUND = 8


class TwoSided(Transport):
    """``group``: the lane's process group; parcels name peers by their rank in it. ``lane`` is for messages only."""

    def __init__(self, group: dist.ProcessGroup, lane: str, timeout_s: float) -> None:
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self._lane = lane
        self._timeout_s = timeout_s
        # gloo moves data on its own thread and matches by tag in any order. NCCL runs a lane's rounds in order on one
        # stream, and without a group call around a round two ranks that both send first would block each other.
        self._grouped = dist.get_backend(group) != "gloo"
        self._posted: list[_Transfer] = []

    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        if self._grouped:
            return self._exchange_grouped(round, sends, receives)
        transfers: dict[str, list[_Transfer]] = {}
        for direction, start, parcels in (("receive from", dist.irecv, receives), ("send to", dist.isend, sends)):
            transfers[direction] = []
            for parcel in parcels:
                work = start(
                    parcel.tensor,
                    self._ranks[parcel.peer],
                    group=self._group,
                    tag=round * _SLOTS_PER_ROUND + parcel.slot,
                )
                assert work is not None, "this rank is not in the lane's group"
                transfers[direction].append(_Transfer(work, direction, parcel, round))
        self._posted += transfers["send to"]
        return _Received(self, transfers["receive from"])

    def _exchange_grouped(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        ops = [(dist.irecv, "receive from", parcel) for parcel in receives]
        ops += [(dist.isend, "send to", parcel) for parcel in sends]  # type: ignore[misc]
        p2p = [dist.P2POp(op, parcel.tensor, self._ranks[parcel.peer], self._group) for op, _, parcel in ops]
        works = dist.batch_isend_irecv(p2p) if p2p else []
        # NCCL coalesces the round into fewer Works than parcels: waiting for any of the round waits for all.
        transfers = [_Transfer(w, *ops[i][1:], round) for i, w in enumerate(works)]
        self._posted += transfers
        return _Received(self, transfers)

    def drain(self) -> None:
        posted, self._posted = self._posted, []
        for transfer in posted:
            self.wait(transfer)

    def wait(self, transfer: _Transfer) -> None:
        """Bounded wait for one transfer; on CUDA it orders the current stream and NCCL's watchdog does the bounding."""
        try:
            if self._grouped:
                transfer.work.wait()
            else:
                transfer.work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            parcel = transfer.parcel
            raise TransportError(
                f"rank {dist.get_rank()}: {transfer.direction} rank {self._ranks[parcel.peer]} failed (lane "
                f"{self._lane}, round {transfer.round}, slot {parcel.slot}, {parcel.tensor.nbytes} bytes, limit "
                f"{self._timeout_s:g} s): {str(error).splitlines()[0]}. The peer died, hangs, or makes a different "
                f"call; see its log, or raise --sp-timeout"
            ) from error


@dataclass(frozen=True, slots=True)
class _Transfer:
    """A posted send or receive. Holds the tensor: gloo and NCCL both need it alive until the work is done."""

    work: dist.Work
    direction: str
    parcel: Parcel
    round: int


class _Received(Ticket):
    def __init__(self, transport: TwoSided, transfers: list[_Transfer]) -> None:
        self._transport = transport
        self._transfers = transfers

    def wait(self) -> None:
        transfers, self._transfers = self._transfers, []
        for transfer in transfers:
            self._transport.wait(transfer)
