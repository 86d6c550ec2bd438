"""Matched sends and receives over torch.distributed (NCCL or gloo). Runs everywhere. In benchmarks it is the ablation
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

from sf_xfuser.transport.base import CallMismatch, Parcel, Transport, TransportError
Ticket = object
from sf_xfuser.transport.control_plane import ControlPlane

_POLL_S = 0.05  # interval at which a waiting rank checks whether the call has failed elsewhere


class TwoSided(Transport):
    """``group``: the link's process group, which contains the peers; ``members[w]`` is the global rank at position
    ``w``. ``link`` is the link's name in errors.

    NCCL runs a link's rounds in order on its own stream. gloo moves data in its own thread as soon as both ends have
    posted, and all posted transfers share the network.

    **The call's identity.** gloo matches messages by tag, and the tag is the identity: data of another call is never
    received, and the wait times out (gloo aborts a process that receives another size than posted). NCCL has no tags
    and matches by order alone, so a label goes with the first chunk to each peer in a call, in the same batch of sends
    and receives. The receiver compares it on the stream, turns its result into NaN if it differs (``poison``), and
    raises at its next call. Under NCCL chunks of different sizes do not match at all, and its watchdog ends the job.
    """

    def __init__(
        self, group: dist.ProcessGroup, members: Sequence[int], link: str, timeout_s: float, control: ControlPlane
    ) -> None:
        self._group = group
        self._members = members
        self._link = link
        self._timeout_s = timeout_s
        self._control = control
        self.enqueues = dist.get_backend(group) != "gloo"  # NCCL's watchdog bounds its waits
        self._labels = self.enqueues  # labels instead of tags
        self._labelled: set[tuple[str, int]] = set()  # in this call: direction, peer
        self._received_labels: list[torch.Tensor] = []  # int64 [1]
        self._mismatch: torch.Tensor | None = None  # bool []: a label of the last call differed
        self._posted: list[_Transfer] = []
        self._waiter: threading.Thread | None = None
        self._wait_requests: queue.SimpleQueue[dist.Work | None] = queue.SimpleQueue()
        self._wait_results: queue.SimpleQueue[RuntimeError | None] = queue.SimpleQueue()

    def begin_call(self, identity: int) -> None:
        """As ``Transport.begin_call``. Raises CallMismatch if the last call has received data of another one."""
        super().begin_call(identity)
        self._labelled.clear()
        if self._mismatch is None or _captured(self._mismatch):  # a capture cannot read it; a later call will
            return
        mismatch, self._mismatch = self._mismatch, None
        if bool(mismatch):
            raise CallMismatch(
                f"rank {dist.get_rank()} on {socket.gethostname()}: ranks have made different calls. This rank's last "
                f"call received chunks of another call, and its result is NaN (link {self._link})"
            )

    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        """All transfers are one batch: on NCCL, two ranks that both send first would otherwise deadlock."""
        ops = [(dist.irecv, "receive from", parcel, parcel.packed()) for parcel in receives if parcel.nbytes]
        ops += [(dist.isend, "send to", parcel, parcel.packed()) for parcel in sends if parcel.nbytes]  # type: ignore[misc]
        if self._labels:
            ops += self._label_ops(ops)
        tag = 0 if self._labels else self._identity & 0x7FFFFFFF
        p2p = [dist.P2POp(op, tensor, self._members[parcel.peer], self._group, tag) for op, _, parcel, tensor in ops]
        try:
            works = dist.batch_isend_irecv(p2p) if p2p else []
        except RuntimeError as error:
            peers = sorted({self._members[parcel.peer] for _, _, parcel, _ in ops})
            raise self._error(f"starting round {round} with rank(s) {peers} failed", error) from error
        # NCCL coalesces a round into fewer Works than parcels: waiting for one of them waits for the round.
        transfers = [
            _Transfer(direction, parcel, tensor, round, work)
            for (_, direction, parcel, tensor), work in zip(ops, works, strict=False)
        ]
        self._posted += transfers
        return _Exchange(self, transfers)

    def _label_ops(self, ops: Sequence[_Op]) -> list[_Op]:
        """A label for the first chunk of this call to and from each peer."""
        label_ops: list[_Op] = []
        for op, direction, parcel, tensor in ops:
            if (direction, parcel.peer) in self._labelled:
                continue
            self._labelled.add((direction, parcel.peer))
            label = tensor.new_full((1,), self._identity if op is dist.isend else 0, dtype=torch.int64)
            if op is dist.irecv:
                self._received_labels.append(label)
            label_ops.append((op, direction, Parcel((label,), torch.int64, parcel.peer, parcel.slot), label))
        return label_ops

    def poison(self, result: torch.Tensor) -> None:
        """As ``Transport.poison``. Call it after the waits for the chunks, which are also waits for their labels."""
        labels, self._received_labels = self._received_labels, []
        if labels:
            mismatch = (torch.cat(labels) != self._identity).any()
            result.masked_fill_(mismatch, float("nan"))
            if not _captured(mismatch):  # a capture compares nothing; each replay does
                self._mismatch = mismatch

    def drain(self) -> None:
        posted, self._posted = self._posted, []
        for transfer in posted:
            self.wait(transfer)

    def wait(self, transfer: _Transfer) -> None:
        """Bounded wait for one transfer; on CUDA it orders the current stream. Only the first call waits."""
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
            problem = (
                f"{transfer.direction} rank {self._members[parcel.peer]} failed (round {transfer.round}, slot "
                f"{parcel.slot}, {parcel.nbytes} bytes)"
            )
            raise self._error(problem, error) from error

    def _wait_for_gloo(self, work: dist.Work) -> None:
        """Wait in another thread: a gloo wait ends only by its timeout, and this thread has to notice a failure."""
        if self._waiter is None:
            self._waiter = threading.Thread(target=self._run_waits, name="sf-xfuser gloo", daemon=True)
            self._waiter.start()
        self._wait_requests.put(work)
        while True:
            try:
                error = self._wait_results.get(timeout=_POLL_S)
            except queue.Empty:
                if (reason := self._control.abort_reason()) is not None:
                    raise RuntimeError(reason) from None
                continue
            if error is not None:
                raise error
            return

    def _run_waits(self) -> None:
        while (work := self._wait_requests.get()) is not None:
            error: RuntimeError | None = None
            try:
                work.wait(timedelta(seconds=self._timeout_s))
            except RuntimeError as raised:
                error = raised
            del work
            self._wait_results.put(error)

    def close(self) -> None:
        """As ``Transport.close``. ``links.Group`` owns the process group."""
        self._posted.clear()
        self._received_labels.clear()
        self._wait_requests.put(None)

    def _error(self, problem: str, error: Exception) -> TransportError:
        return TransportError(
            f"rank {dist.get_rank()} on {socket.gethostname()}: {problem} (link {self._link}, timeout "
            f"{self._timeout_s:g} s): {str(error).splitlines()[0]}"
        )


def _captured(tensor: torch.Tensor) -> bool:
    """Whether the current stream records operations on this tensor in a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


_Op = tuple[Any, str, Parcel, torch.Tensor]  # function, its name in errors, chunk, tensor of the chunk


@dataclass(slots=True)
class _Transfer:
    """A send or receive. Keeps the tensor alive until the work is done, as gloo and NCCL require."""

    direction: str
    parcel: Parcel
    tensor: torch.Tensor
    round: int
    work: dist.Work | None  # None after the wait


class _Exchange(Ticket):
    def __init__(self, transport: TwoSided, transfers: list[_Transfer]) -> None:
        self._transport = transport
        self._transfers = transfers

    def wait(self) -> None:
        transfers, self._transfers = self._transfers, []
        for transfer in transfers:
            self._transport.wait(transfer)
