"""Matched sends and receives over torch.distributed: gloo here, NCCL in ``gpu/nccl.py``. Runs everywhere. In benchmarks
it is the ablation "Torus without one-sided transfers"."""

from __future__ import annotations

import queue
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist

from sf_xfuser.transport.base import CALL_TIMEOUT_FACTOR, Parcel, Transfer, Transport, TransportError
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.patience import Patience

_RECEIVE, _SEND = "receive from", "send to"  # in errors
_POLL_S = 0.05  # interval at which a waiting rank checks whether the call has failed elsewhere


class TwoSided(Transport):
    """``group``: the link's process group, which contains the peers; ``members[w]`` is the global rank at position
    ``w``. ``link`` is the link's name in errors."""

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
    def record(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Exchange: ...

    def _error(self, problem: str, error: Exception) -> TransportError:
        return TransportError(
            f"rank {dist.get_rank()} on {socket.gethostname()}: {problem} (link {self._link}, timeout "
            f"{self._timeout_s:g} s): {str(error).splitlines()[0]}"
        )

    def _failed(self, doing: str, exchange: Exchange, error: Exception) -> TransportError:
        peers = [self._members[peer] for peer in exchange.peers]
        return self._error(f"{doing} round {exchange.round} with rank(s) {peers} failed", error)


class Exchange(Transfer):
    """Keeps the tensors of its chunks alive, as gloo and NCCL require."""

    def __init__(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        self.round = round
        self.sends = [parcel for parcel in sends if parcel.nbytes]
        self.receives = [parcel for parcel in receives if parcel.nbytes]
        self.peers = sorted({parcel.peer for parcel in (*self.sends, *self.receives)})


class Gloo(TwoSided):
    """gloo moves data in its own thread as soon as both ends have posted. All posted transfers share the network.

    gloo matches messages by tag, and the tag is the call's identity: data of another call is never received, and the
    wait times out. gloo aborts a process that receives another size than posted."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._patience = Patience(self._timeout_s, self._control.late_ranks)
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


class _GlooExchange(Exchange):
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
