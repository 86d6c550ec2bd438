"""Matched sends and receives over torch.distributed (NCCL or gloo): runs everywhere, and is the ablation
"Torus without one-sided transfers"."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.transport.base import OtherCall, Parcel, Ticket, Transport, TransportError
from sf_xfuser.transport.control_plane import ControlPlane

_LOOK_S = 0.05  # how often a waiting rank looks whether the call has failed elsewhere


class TwoSided(Transport):
    """``group``: the link's process group, among whose ranks are the peers; ``members[w]`` is the global rank at
    position ``w``. ``link`` is for messages only.

    NCCL runs a link's rounds in order on its own stream. gloo moves data on a thread of its own as soon as both ends
    have posted, and whatever is posted shares the wire.

    **The call's identity.** gloo matches messages by a tag, which carries it: what belongs to another call is never
    received, and the wait runs out (gloo ends a process that receives another size than it asked for). NCCL has no tags
    and matches by order alone: there the first chunk to each peer in a call has a label beside it, in the same group of
    sends and receives. The receiver compares it on the stream, turns its result into NaN where it differs (``poison``),
    and raises at its next call. Chunks of other sizes under NCCL do not match at all, and its watchdog ends the job.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        members: Sequence[int],
        link: str,
        timeout_s: float,
        control: ControlPlane,
        *,
        labels: bool | None = None,
    ) -> None:
        """``labels``: beside chunks, in place of tags; None: unless the backend is gloo."""
        self._group = group
        self._ranks = members
        self._link = link
        self._timeout_s = timeout_s
        self._control = control
        self.enqueues = dist.get_backend(group) != "gloo"  # NCCL's watchdog bounds its waits
        self._labels = self.enqueues if labels is None else labels
        self._labelled: set[tuple[str, int]] = set()  # in this call: directions and peers
        self._arrived: list[torch.Tensor] = []  # labels, int64 [1]
        self._differs: torch.Tensor | None = None  # bool []: some label of the last call did
        self._posted: list[_Transfer] = []
        self._waiter: threading.Thread | None = None
        self._to_wait_for: queue.SimpleQueue[dist.Work | None] = queue.SimpleQueue()
        self._waited_for: queue.SimpleQueue[RuntimeError | None] = queue.SimpleQueue()

    def begin_call(self, identity: int) -> None:
        """As ``Transport.begin_call``. Raises TransportError where the call before took chunks of another."""
        super().begin_call(identity)
        self._labelled.clear()
        if self._differs is None or _captured(self._differs):  # a capture waits for nothing: a later call asks
            return
        differs, self._differs = self._differs, None
        if bool(differs):
            raise OtherCall(
                f"rank {dist.get_rank()} on {socket.gethostname()}: chunks of another call came in the last one, whose "
                f"result is NaN (link {self._link}): ranks have made different calls"
            )

    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        """Without a group call around a round, two ranks that both send first would block each other on NCCL."""
        ops = [(dist.irecv, "receive from", parcel, parcel.packed()) for parcel in receives if parcel.nbytes]
        ops += [(dist.isend, "send to", parcel, parcel.packed()) for parcel in sends if parcel.nbytes]  # type: ignore[misc]
        if self._labels:
            ops += self._labels_of(ops)
        tag = 0 if self._labels else self._identity & 0x7FFFFFFF
        p2p = [dist.P2POp(op, tensor, self._ranks[parcel.peer], self._group, tag) for op, _, parcel, tensor in ops]
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

    def _labels_of(self, ops: Sequence[_Op]) -> list[_Op]:
        """A label for the first chunk in either direction between this rank and each peer."""
        found: list[_Op] = []
        for op, direction, parcel, tensor in ops:
            if (direction, parcel.peer) in self._labelled:
                continue
            self._labelled.add((direction, parcel.peer))
            label = tensor.new_full((1,), self._identity if op is dist.isend else 0, dtype=torch.int64)
            if op is dist.irecv:
                self._arrived.append(label)
            found.append((op, direction, Parcel((label,), torch.int64, parcel.peer, parcel.slot), label))
        return found

    def poison(self, result: torch.Tensor) -> None:
        """As ``Transport.poison``; the labels of the call have been waited for with its chunks."""
        labels, self._arrived = self._arrived, []
        if labels:
            differs = (torch.cat(labels) != self._identity).any()
            result.masked_fill_(differs, float("nan"))
            if not _captured(differs):  # else nothing has been compared yet, and each replay compares
                self._differs = differs

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
            with self._control.waiting():
                if self.enqueues:
                    work.wait()
                else:
                    self._wait_for_gloo(work)
        except RuntimeError as error:
            parcel = transfer.parcel
            what = (
                f"{transfer.direction} rank {self._ranks[parcel.peer]} failed (round {transfer.round}, slot "
                f"{parcel.slot}, {parcel.nbytes} bytes)"
            )
            raise self._failure(what, error) from error

    def _wait_for_gloo(self, work: dist.Work) -> None:
        """Nothing ends a wait of gloo's but its time-out: another thread waits, so that this one hears of a failure."""
        if self._waiter is None:
            self._waiter = threading.Thread(target=self._run_waits, name="sf-xfuser gloo", daemon=True)
            self._waiter.start()
        self._to_wait_for.put(work)
        while True:
            try:
                error = self._waited_for.get(timeout=_LOOK_S)
            except queue.Empty:
                if (why := self._control.hopeless()) is not None:
                    raise RuntimeError(why) from None
                continue
            if error is not None:
                raise error
            return

    def _run_waits(self) -> None:
        while (work := self._to_wait_for.get()) is not None:
            error: RuntimeError | None = None
            try:
                work.wait(timedelta(seconds=self._timeout_s))
            except RuntimeError as raised:
                error = raised
            del work
            self._waited_for.put(error)

    def close(self) -> None:
        """As ``Transport.close``. The process group stays; ``links.Group`` ends it."""
        self._posted.clear()
        self._arrived.clear()
        self._to_wait_for.put(None)

    def _failure(self, what: str, error: Exception) -> TransportError:
        return TransportError(
            f"rank {dist.get_rank()} on {socket.gethostname()}: {what} (link {self._link}, limit "
            f"{self._timeout_s:g} s): {str(error).splitlines()[0]}"
        )


def _captured(tensor: torch.Tensor) -> bool:
    """Whether what is done with it now goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


_Op = tuple[Any, str, Parcel, torch.Tensor]  # the function, its name in errors, the chunk, its tensor


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
