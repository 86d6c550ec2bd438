"""Matched sends and receives over torch.distributed (NCCL or gloo): runs everywhere, and is the ablation
"Torus without one-sided transfers"."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue

import torch
import torch.distributed as dist

from sf_xfuser.transport.base import Parcel, Ticket, Transport, TransportError

WINDOW_BYTES = 512 << 10
"""How much a paced lane asks for ahead of what it is waiting for."""

SEGMENT_BYTES = 256 << 10
"""Parcels on a paced lane travel in segments of this size, so that the window stays full."""

_SLOTS_PER_ROUND = 4
_SEGMENTS_PER_PARCEL = 1 << 12


class TwoSided(Transport):
    """``group``: the lane's process group; parcels name peers by their rank in it. ``lane`` is for messages only.

    gloo moves data on its own thread, as soon as both ends have posted, and everything that is posted shares the wire:
    what is needed first would arrive last. A lane of gloo therefore *paces* itself: sends are posted at once, receives
    by a thread of this rank, in order, ``WINDOW_BYTES`` ahead. gloo sends nothing that the receiver has not asked for,
    so the receivers' order is the order on the wire. NCCL runs a lane's rounds in order on its own stream.
    """

    def __init__(self, group: dist.ProcessGroup, lane: str, timeout_s: float) -> None:
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self._lane = lane
        self._timeout_s = timeout_s
        self._posted: list[_Transfer] = []
        self._pacer = _Pacer(self) if dist.get_backend(group) == "gloo" else None

    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        if self._pacer is None:
            return self._exchange_grouped(round, sends, receives)
        self._pacer.let_go()
        arrival = _Arrival(self._pacer)
        self._pacer.receive([x for p in receives for x in self._segments("receive from", p, round)], arrival)
        for transfer in (x for p in sends for x in self._segments("send to", p, round)):
            try:
                transfer.work = self._group.send([transfer.tensor], transfer.parcel.peer, transfer.tag)
            except RuntimeError as refused:
                raise self.failure(transfer, refused) from refused
            self._pacer.sending(transfer)
        return arrival

    def start_receive(self, transfer: _Transfer) -> None:
        transfer.work = self._group.recv([transfer.tensor], transfer.parcel.peer, transfer.tag)

    def _segments(self, direction: str, parcel: Parcel, round: int) -> Iterator[_Transfer]:
        """The parts in which both ends move a parcel; equal, as its size is."""
        flat = parcel.tensor.view(-1)
        length = max(SEGMENT_BYTES // flat.element_size(), -(-flat.numel() // _SEGMENTS_PER_PARCEL))
        tag = (round * _SLOTS_PER_ROUND + parcel.slot) * _SEGMENTS_PER_PARCEL
        for n, segment in enumerate(torch.split(flat, length)):
            yield _Transfer(direction, parcel, round, segment, tag + n)

    def _exchange_grouped(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        """Without a group call around a round, two ranks that both send first would block each other on NCCL."""
        ops = [(dist.irecv, "receive from", parcel) for parcel in receives]
        ops += [(dist.isend, "send to", parcel) for parcel in sends]  # type: ignore[misc]
        p2p = [dist.P2POp(op, parcel.tensor, self._ranks[parcel.peer], self._group) for op, _, parcel in ops]
        works = dist.batch_isend_irecv(p2p) if p2p else []
        # NCCL coalesces the round into fewer Works than parcels: waiting for any of the round waits for all.
        transfers = [
            _Transfer(direction, parcel, round, parcel.tensor, 0, work)
            for (_, direction, parcel), work in zip(ops, works, strict=False)
        ]
        self._posted += transfers
        return _Received(self, transfers)

    def drain(self) -> None:
        if self._pacer is not None:
            self._pacer.drain()
        posted, self._posted = self._posted, []
        for transfer in posted:
            self.wait(transfer)

    def close(self) -> None:
        if self._pacer is not None:
            self._pacer.stop()

    def wait(self, transfer: _Transfer) -> None:
        """Bounded wait for one transfer; on CUDA it orders the current stream and NCCL's watchdog does the bounding."""
        assert transfer.work is not None, "waiting for a transfer that was not started"
        try:
            if self._pacer is None:
                transfer.work.wait()
            else:
                transfer.work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise self.failure(transfer, error) from error

    def failure(self, transfer: _Transfer, error: Exception) -> TransportError:
        parcel = transfer.parcel
        return TransportError(
            f"rank {dist.get_rank()}: {transfer.direction} rank {self._ranks[parcel.peer]} failed (lane {self._lane}, "
            f"round {transfer.round}, slot {parcel.slot}, {parcel.tensor.nbytes} bytes, limit {self._timeout_s:g} s): "
            f"{str(error).splitlines()[0]}. The peer died, hangs, or makes a different call; see its log, or raise "
            f"--sp-timeout"
        )


@dataclass(slots=True)
class _Transfer:
    """A send or receive. Holds the tensor: gloo and NCCL both need it alive until the work is done."""

    direction: str
    parcel: Parcel
    round: int
    tensor: torch.Tensor
    tag: int
    work: dist.Work | None = None


class _Received(Ticket):
    def __init__(self, transport: TwoSided, transfers: list[_Transfer]) -> None:
        self._transport = transport
        self._transfers = transfers

    def wait(self) -> None:
        transfers, self._transfers = self._transfers, []
        for transfer in transfers:
            self._transport.wait(transfer)


class _Arrival(Ticket):
    """Set when the last segment of a round is here, or the lane has failed."""

    def __init__(self, pacer: _Pacer) -> None:
        self._pacer = pacer
        self.event = threading.Event()
        self.error: TransportError | None = None

    def wait(self) -> None:
        self._pacer.let_go()
        self.event.wait()  # bounded: the pacer's own waits are, and after a failure it sets every arrival
        if self.error is not None:
            raise self.error


class _Pacer:
    """Two threads of a lane: one posts receives in order and waits for them; one waits for sends, in order, so that
    packed chunks live no longer than they have to. Tensors are let go by the thread that made them."""

    def __init__(self, transport: TwoSided) -> None:
        self._transport = transport
        self._receives: SimpleQueue[tuple[_Transfer, _Arrival | None] | None] = SimpleQueue()  # None: stop
        self._sends: SimpleQueue[_Transfer | _Arrival | None] = SimpleQueue()
        self._sent: deque[_Transfer] = deque()
        for run in (self._run_receives, self._run_sends):
            threading.Thread(target=run, name="sf-xfuser pacer", daemon=True).start()

    def receive(self, transfers: list[_Transfer], arrival: _Arrival) -> None:
        """Queue a round; ``arrival`` is set once all of it is here."""
        if not transfers:
            arrival.event.set()
        for transfer in transfers:
            self._receives.put((transfer, arrival if transfer is transfers[-1] else None))

    def sending(self, transfer: _Transfer) -> None:
        self._sends.put(transfer)

    def stop(self) -> None:
        self._receives.put(None)
        self._sends.put(None)

    def let_go(self) -> None:
        """Drop the tensors of sends that are done."""
        while self._sent:
            self._sent.popleft()

    def drain(self) -> None:
        """Until every send that was started before is done. Raises TransportError."""
        done = _Arrival(self)
        self._sends.put(done)
        done.wait()
        self.let_go()

    def _run_sends(self) -> None:
        error: TransportError | None = None
        while True:
            item = self._sends.get()
            if item is None:
                return
            if isinstance(item, _Arrival):
                item.error = error
                item.event.set()
            elif error is None:
                try:
                    self._transport.wait(item)
                except TransportError as failed:
                    error = failed
                self._sent.append(item)
            del item

    def _run_receives(self) -> None:
        asked: deque[tuple[_Transfer, _Arrival | None]] = deque()
        asked_bytes = 0
        error: TransportError | None = None
        while True:
            while not asked or (asked_bytes < WINDOW_BYTES and not self._receives.empty()):
                item = self._receives.get()
                if item is None:
                    return
                asked.append(item)
                transfer = item[0]
                asked_bytes += transfer.tensor.nbytes
                if error is None:
                    try:
                        self._transport.start_receive(transfer)
                    except RuntimeError as refused:
                        error = self._transport.failure(transfer, refused)
            transfer, arrival = asked.popleft()
            asked_bytes -= transfer.tensor.nbytes
            if error is None:
                try:
                    self._transport.wait(transfer)
                except TransportError as failed:
                    error = failed
            if arrival is not None:
                arrival.error = error
                arrival.arrived_s = time.perf_counter()
                arrival.event.set()
            del transfer, arrival
