"""Matched sends and receives over torch.distributed (NCCL or gloo). Runs everywhere. In benchmarks it is the ablation
"Torus without one-sided transfers"."""

from __future__ import annotations

import queue
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sf_xfuser.transport.base import CALL_TIMEOUT_FACTOR, CallMismatch, Parcel, Transfer, Transport, TransportError
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.patience import Patience

_RECEIVE, _SEND = "receive from", "send to"  # in errors
_POLL_S = 0.05  # interval at which a waiting rank checks whether the call has failed elsewhere


def connect(
    group: dist.ProcessGroup, members: Sequence[int], link: str, timeout_s: float, control: ControlPlane
) -> TwoSided:
    """The transport over ``group``, the link's process group, which contains the peers. ``members[w]`` is the global
    rank at position ``w``. ``link`` is the link's name in errors. Local."""
    make = Gloo if dist.get_backend(group) == "gloo" else Nccl
    return make(group, members, link, timeout_s, control)


class TwoSided(Transport):
    """Created by :func:`connect`."""

    def __init__(
        self, group: dist.ProcessGroup, members: Sequence[int], link: str, timeout_s: float, control: ControlPlane
    ) -> None:
        self._group = group
        self._members = members
        self._link = link
        self._timeout_s = timeout_s
        self._control = control
        ranks = dist.get_process_group_ranks(group)
        self._index = {w: ranks.index(rank) for w, rank in enumerate(members) if rank in ranks}

    @abstractmethod
    def record(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> _Exchange: ...

    def _error(self, problem: str, error: Exception) -> TransportError:
        return TransportError(
            f"rank {dist.get_rank()} on {socket.gethostname()}: {problem} (link {self._link}, timeout "
            f"{self._timeout_s:g} s): {str(error).splitlines()[0]}"
        )

    def _failed(self, doing: str, exchange: _Exchange, error: Exception) -> TransportError:
        peers = [self._members[peer] for peer in exchange.peers]
        return self._error(f"{doing} round {exchange.round} with rank(s) {peers} failed", error)


class _Exchange(Transfer):
    """Keeps the tensors of its chunks alive, as gloo and NCCL require."""

    def __init__(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        self.round = round
        self.sends = [parcel for parcel in sends if parcel.nbytes]
        self.receives = [parcel for parcel in receives if parcel.nbytes]
        self.peers = sorted({parcel.peer for parcel in (*self.sends, *self.receives)})


# -- gloo -------------------------------------------------------------------------------------------------------------


class Gloo(TwoSided):
    """gloo moves data in its own thread as soon as both ends have posted. All posted transfers share the network.

    gloo matches messages by tag, and the tag is the call's identity: data of another call is never received, and the
    wait times out. gloo aborts a process that receives another size than posted."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._patience = Patience(self._timeout_s)
        self._posted: list[_GlooExchange] = []
        self._waiter: threading.Thread | None = None
        self._wait_requests: queue.SimpleQueue[dist.Work | None] = queue.SimpleQueue()
        self._wait_results: queue.SimpleQueue[RuntimeError | None] = queue.SimpleQueue()

    def begin_call(self, identity: int) -> None:
        super().begin_call(identity)
        self._patience.begin_call()

    def record(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> _GlooExchange:
        return _GlooExchange(self, round, sends, receives)

    def operation(self, name: str, parcel: Parcel) -> _Operation:
        assert parcel.data is not None
        function = self._group.recv if name == _RECEIVE else self._group.send
        return _Operation(partial(function, [parcel.data], self._index[parcel.peer]), parcel, name)

    def post(self, exchange: _GlooExchange) -> None:
        tag = self._identity & 0x7FFFFFFF
        self._posted.append(exchange)
        try:
            exchange.received = [(operation, operation.start(tag)) for operation in exchange.to_receive]
            exchange.sent = [(operation, operation.start(tag)) for operation in exchange.to_send]
        except RuntimeError as error:
            raise self._failed("starting", exchange, error) from error

    def wait(self, started: list[_Started], round: int) -> None:
        """Wait for the operations, and remove them from the list."""
        while started:
            operation, work = started[0]
            parcel = operation.parcel
            try:
                with self._control.waiting():
                    self._wait_for(work, parcel.peer)
            except RuntimeError as error:
                details = f"(round {round}, slot {parcel.slot}, {parcel.nbytes} bytes)"
                raise self._error(
                    f"{operation.name} rank {self._members[parcel.peer]} failed {details}", error
                ) from error
            if operation.name == _RECEIVE:
                self._patience.arrived(parcel.peer)
            del started[0]

    def drain(self) -> None:
        posted, self._posted = self._posted, []
        for exchange in posted:
            exchange.wait()
            self.wait(exchange.sent, exchange.round)

    def close(self) -> None:
        """As ``Transport.close``. ``links.Group`` owns the process group."""
        self._posted.clear()
        self._wait_requests.put(None)

    def _wait_for(self, work: dist.Work, peer: int) -> None:
        """Wait in another thread: a gloo wait ends only by its timeout, and this thread has to notice a failure, and to
        end the wait before gloo does."""
        if self._waiter is None:
            self._waiter = threading.Thread(target=self._run_waits, name="sf-xfuser gloo", daemon=True)
            self._waiter.start()
        started_at = time.monotonic()
        self._wait_requests.put(work)
        while True:
            try:
                error = self._wait_results.get(timeout=_POLL_S)
            except queue.Empty:
                if (reason := self._control.abort_reason()) is not None:
                    raise RuntimeError(reason) from None
                if (limit := self._patience.exceeded([peer], started_at)) is not None:
                    raise RuntimeError(f"not within {limit}") from None
                continue
            if error is not None:
                raise error
            return

    def _run_waits(self) -> None:
        while (work := self._wait_requests.get()) is not None:
            error: RuntimeError | None = None
            try:
                work.wait(timedelta(seconds=2 * CALL_TIMEOUT_FACTOR * self._timeout_s))
            except RuntimeError as raised:
                error = raised
            del work
            self._wait_results.put(error)


class _Operation(NamedTuple):
    """A send or receive of a parcel. ``start`` takes the tag; ``name``: in errors."""

    start: Callable[[int], dist.Work]
    parcel: Parcel
    name: str


_Started = tuple[_Operation, dist.Work]


class _GlooExchange(_Exchange):
    def __init__(self, transport: Gloo, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        super().__init__(round, sends, receives)
        self._transport = transport
        self.to_receive = [transport.operation(_RECEIVE, parcel) for parcel in self.receives]
        self.to_send = [transport.operation(_SEND, parcel) for parcel in self.sends]
        self.received: list[_Started] = []  # since the last post, and not waited for
        self.sent: list[_Started] = []

    def post(self) -> None:
        self._transport.post(self)

    def wait(self) -> None:
        self._transport.wait(self.received, self.round)


# -- NCCL -------------------------------------------------------------------------------------------------------------


class Nccl(TwoSided):
    """NCCL runs a link's rounds in order on its own stream, each as one batch of sends and receives. Its watchdog
    bounds its waits.

    NCCL has no tags and matches by order alone, so a label, the call's identity, goes with the first chunk to each peer
    in a call, in the same batch. The receiver compares it on the stream, turns its result into NaN if it differs, and
    raises at its next call. Chunks of different sizes do not match at all, and NCCL's watchdog ends the job."""

    enqueues = True

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._num_recorded = 0
        self._posted: list[_NcclExchange] = []
        self._label = torch.empty(0)  # int64 [1]: the identity of this call
        self._received = torch.empty(0)  # int64 [ranks of the group]: labels, in the order of their receives
        self._labelled: tuple[list[int], list[int]] = [], []  # in this call: peers of sent and of received labels
        self._num_received = 0  # labels of this call that have been waited for
        self._mismatch: torch.Tensor | None = None  # bool []: a label of the last call differed

    def begin_call(self, identity: int) -> None:
        """As ``Transport.begin_call``. Raises CallMismatch if the last call has received data of another one."""
        super().begin_call(identity)
        self._labelled = [], []
        self._num_received = 0
        if self._mismatch is None or _captured(self._mismatch):  # a capture cannot read it; a later call will
            return
        mismatch, self._mismatch = self._mismatch, None
        if bool(mismatch):
            raise CallMismatch(
                f"rank {dist.get_rank()} on {socket.gethostname()}: ranks have made different calls. This rank's last "
                f"call received chunks of another call, and its result is NaN (link {self._link})"
            )

    def record(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> _NcclExchange:
        exchange = _NcclExchange(self, round, sends, receives)
        if exchange.peers:
            exchange.device = next(p.data.device for p in (*exchange.sends, *exchange.receives) if p.data is not None)
            self._make_labels(exchange.device)
        sent_to, received_from = self._labelled
        exchange.fills_label = bool(exchange.sends) and not sent_to
        for parcel in exchange.sends:
            exchange.add(self._group.send, parcel.data, self._index[parcel.peer])
            if parcel.peer not in sent_to:
                sent_to.append(parcel.peer)
                exchange.add(self._group.send, self._label, self._index[parcel.peer])
        for parcel in exchange.receives:
            exchange.add(self._group.recv, parcel.data, self._index[parcel.peer])
            if parcel.peer not in received_from:
                label = self._received[len(received_from) :][:1]
                received_from.append(parcel.peer)
                exchange.add(self._group.recv, label, self._index[parcel.peer])
        exchange.num_received = len(received_from)
        self._num_recorded += bool(exchange.operations)
        exchange.number = self._num_recorded * bool(exchange.operations)
        return exchange

    def record_wait(self, transfers: Sequence[Any]) -> Callable[[], None]:
        """As ``Transport.record_wait``. Rounds complete in order, so the wait for the last one is a wait for all."""
        return max(transfers, key=attrgetter("number")).wait  # type: ignore[no-any-return]

    def record_end(self) -> Callable[[torch.Tensor | None], None]:
        return self._end

    def post(self, exchange: _NcclExchange) -> None:
        if not exchange.operations:
            return
        self._posted.append(exchange)
        try:
            if exchange.fills_label:
                self._label.fill_(self._identity)
            self._group._start_coalescing(exchange.device)
            for start in exchange.operations:
                start()
            exchange.work = self._group._end_coalescing(exchange.device)
        except RuntimeError as error:
            raise self._failed("starting", exchange, error) from error

    def wait(self, exchange: _NcclExchange) -> None:
        """Make the current stream wait."""
        work, exchange.work = exchange.work, None
        if work is not None:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._failed("waiting for", exchange, error) from error
            self._num_received = max(self._num_received, exchange.num_received)

    def drain(self) -> None:
        posted, self._posted = self._posted, []
        if posted:
            posted[-1].wait()
        for exchange in posted:
            exchange.work = None

    def poison(self, chunk: torch.Tensor) -> None:
        if self._num_received:
            chunk.masked_fill_(self._differ(), float("nan"))

    def close(self) -> None:
        """As ``Transport.close``. ``links.Group`` owns the process group."""
        self._posted.clear()

    def _end(self, result: torch.Tensor | None) -> None:
        self.drain()
        if self._num_received:
            mismatch = self._differ()
            if result is not None:
                result.masked_fill_(mismatch, float("nan"))
            if not _captured(mismatch):  # a capture compares nothing; each replay does
                self._mismatch = mismatch

    def _differ(self) -> torch.Tensor:
        """Whether a label that this rank has waited for in this call is another call's: bool []."""
        return (self._received[: self._num_received] != self._label).any()

    def _make_labels(self, device: torch.device) -> None:
        if self._label.device != device or not self._label.numel():
            self._label = torch.empty(1, dtype=torch.int64, device=device)
            self._received = torch.empty(len(self._index), dtype=torch.int64, device=device)


class _NcclExchange(_Exchange):
    """``operations``: start the sends and receives, inside a batch. ``number``: in the order of records; 0 without
    operations. ``num_received``: labels of the call that have arrived with it."""

    device: torch.device
    number = 0
    fills_label = False  # it sends the first label of the call
    num_received = 0
    work: dist.Work | None = None  # None after a wait, which covers the batch

    def __init__(self, transport: Nccl, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        super().__init__(round, sends, receives)
        self._transport = transport
        self.operations: list[Callable[[], object]] = []

    def add(self, start: Callable[..., object], tensor: torch.Tensor | None, index: int) -> None:
        self.operations.append(partial(start, [tensor], index, 0))

    def post(self) -> None:
        self._transport.post(self)

    def wait(self) -> None:
        self._transport.wait(self)


def _captured(tensor: torch.Tensor) -> bool:
    """Whether the current stream records operations on this tensor in a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
