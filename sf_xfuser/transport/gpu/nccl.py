"""Matched sends and receives over NCCL, and a watch over the calls that a GPU has not completed.

**Rounds.** NCCL runs the rounds of a link in order on its own stream. Each round is one batch, which is one launch. If
every other rank of the group is a peer, a round posts one ``alltoall`` per slot, which costs the host less than a send
and a receive for each peer. Otherwise it would not do: since NCCL 2.13 PyTorch's ``alltoall`` also sends empty chunks,
so a round would wait for ranks that are no peers.

**Labels.** NCCL has no tags and matches by order alone. So a label, the call's identity, goes before the first chunk to
each peer in a call, in the same batch. Chunks of different sizes do not match at all: such a call does not complete.

**The end of a call.** ``work.wait()`` only orders streams, so the host learns later how a call ended, from words in its
memory. All writers but the watch are copies on the stream:

| word | writer | readers | meaning |
|---|---|---|---|
| ``_LOST`` | the watch | the end of each call | 1: data was lost, so results become NaN |
| ``_GRAPH`` | the end of a call in a CUDA graph | the next call | 1: its result is NaN |
| the others | the host: ``_RUNNING``; the end of a call | the watch, the next call | 0 or 1: its result is NaN |

**Failure.** If a rank has failed, or a call makes no progress, the watch of each rank does this in order:

1. It reports the failure to the control plane, so that the watch of every rank acts.
2. It sets ``_LOST``. Results of calls that end later are NaN.
3. It waits, so that all ranks reach step 2 before a stream continues with undefined data and sends it on.
4. It aborts the communicator. The streams continue, and the next call raises.

If NCCL detects the failure first, PyTorch's own watchdog ends the process: see docs/failures.md.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.transport.base import CALL_TIMEOUT_FACTOR, CallMismatch, Parcel, TransportError
from sf_xfuser.transport.two_sided import Exchange, TwoSided

_POLL_S = 0.1  # interval between looks at the oldest call
_LOST_GRACE_S = 2.0  # time for the calls of a GPU that is behind, after a rank has ended or failed
_ALL_NOTICE_S = 1.0  # time for the watch of every rank to act on a failure
_LOST, _GRAPH, _FIRST = 0, 1, 2
_MAX_CALLS = 256  # words for calls; more than a host is ahead of its GPU
_RUNNING = 255


class Nccl(TwoSided):
    """See the module. ``group`` is an NCCL group, or in tests one that behaves like it."""

    enqueues = True
    _device: torch.device

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._others = sorted(set(range(self._group.size())) - {self._group.rank()})  # in the group
        self._num_recorded = 0
        self._posted: list[_NcclExchange] = []
        self._labelled: tuple[list[int], list[int]] = [], []  # in this call: peers of sent and of received labels
        self._num_received = 0  # labels of this call that have been waited for
        self._failure: TransportError | None = None  # of an earlier call
        self._watch: CallWatch | None = None

    def begin_call(self, identity: int) -> None:
        """As ``Transport.begin_call``. Raises the error of an earlier call that has failed on the GPU; CallMismatch if
        it received data of another call."""
        super().begin_call(identity)
        self._labelled = [], []
        self._num_received = 0
        if self._failure is not None:
            raise self._failure
        if self._watch is not None and self._watch.differed:
            raise CallMismatch(
                f"rank {dist.get_rank()} on {socket.gethostname()}: ranks have made different calls. An earlier "
                f"call of this rank received chunks of another call, and its result is NaN (link {self._link})"
            )

    def record(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> _NcclExchange:
        exchange = _NcclExchange(self, round, sends, receives)
        if not exchange.peers:
            return exchange
        if self._watch is None:
            self._make_words(next(p.data.device for p in (*sends, *receives) if p.data is not None))
        sent_to, received_from = self._labelled
        exchange.fills_label = not sent_to and not received_from
        outgoing: list[_Chunk] = [(p.slot, p.peer, p.data) for p in exchange.sends]
        incoming: list[_Chunk] = [(p.slot, p.peer, p.data) for p in exchange.receives]
        for peer in dict.fromkeys(p.peer for p in exchange.sends if p.peer not in sent_to):
            sent_to.append(peer)
            outgoing.append((_LABEL_SLOT, peer, self._label))
        for peer in dict.fromkeys(p.peer for p in exchange.receives if p.peer not in received_from):
            incoming.append((_LABEL_SLOT, peer, self._received[len(received_from) :][:1]))
            received_from.append(peer)
        exchange.num_received = len(received_from)
        self._num_recorded += 1
        exchange.number = self._num_recorded
        exchange.operations = self._all_to_alls(outgoing, incoming) or [
            partial(start, [data], self._index[peer], 0)
            for start, chunks in ((self._group.send, outgoing), (self._group.recv, incoming))
            for _, peer, data in sorted(chunks, key=itemgetter(0))  # by slot, as all_to_alls
        ]
        return exchange

    def record_wait(self, transfers: Sequence[Any]) -> Callable[[], None]:
        """As ``Transport.record_wait``. Rounds complete in order, so the wait for the last one is a wait for all."""
        return max(transfers, key=attrgetter("number")).wait  # type: ignore[no-any-return]

    def record_end(self) -> Callable[[torch.Tensor | None], None]:
        return self._end

    def post(self, exchange: _NcclExchange) -> None:
        if not exchange.operations:
            return
        if self._failure is not None:
            raise self._failure
        assert self._watch is not None
        if not self._posted:
            self._watch.begin(captured=self._captured())
        self._posted.append(exchange)
        try:
            if exchange.fills_label:
                self._label.fill_(self._identity)
            self._group._start_coalescing(self._device)
            for start in exchange.operations:
                start()
            exchange.work = self._group._end_coalescing(self._device)
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
        if not posted:
            return
        posted[-1].wait()
        for exchange in posted:
            exchange.work = None
        self._check()
        assert self._watch is not None
        self._watch.word.copy_(self._bad, non_blocking=True)

    def poison(self, chunk: torch.Tensor) -> None:
        if self._num_received:
            self._check()
            chunk.masked_fill_(self._bad[0], float("nan"))

    def close(self) -> None:
        """As ``Transport.close``. ``links.Group`` owns the process group."""
        self._posted.clear()
        if self._watch is not None:
            self._watch.close(self._timeout_s)

    # ------------------------------------------------------------------------------------------------------------------

    def _end(self, result: torch.Tensor | None) -> None:
        ran = bool(self._posted)
        self.drain()
        if ran and result is not None:
            result.masked_fill_(self._bad[0], float("nan"))

    def _check(self) -> None:
        """Compute whether data of this call was lost, or a label that has been waited for is another call's."""
        assert self._watch is not None
        count = self._num_received
        self._checks[:1].copy_(self._watch.lost, non_blocking=True)
        torch.ne(self._received[:count], self._label, out=self._checks[1 : 1 + count])
        torch.any(self._checks[: 1 + count], dim=0, keepdim=True, out=self._bad)

    def _make_words(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # calls in any mode write to them
            self._device = device
            self._label = torch.empty(1, dtype=torch.int64, device=device)  # the identity of this call
            self._received = torch.empty(len(self._others), dtype=torch.int64, device=device)  # in order of receives
            self._checks = torch.empty(1 + len(self._others), dtype=torch.bool, device=device)
            self._bad = torch.empty(1, dtype=torch.bool, device=device)
            words = torch.zeros(_FIRST + _MAX_CALLS, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._watch = CallWatch(words, self._why_stopped, self._fail)

    def _all_to_alls(self, outgoing: Sequence[_Chunk], incoming: Sequence[_Chunk]) -> list[Callable[[], object]]:
        """One ``alltoall`` per slot, if each has a chunk to and from every other rank of the group; else none."""
        empty = torch.empty(0, dtype=torch.uint8, device=self._device)
        calls: list[Callable[[], object]] = []
        for slot in sorted({slot for slot, *_ in (*outgoing, *incoming)}):
            lists = []
            for chunks in (incoming, outgoing):
                of_rank = {self._index[p]: data.view(-1).view(torch.uint8) for at, p, data in chunks if at == slot}
                if sorted(of_rank) != self._others:
                    return []
                lists.append([of_rank.get(rank, empty) for rank in range(self._group.size())])
            calls.append(partial(self._group.alltoall, *lists))
        return calls

    def _captured(self) -> bool:
        """Whether the current stream records a CUDA graph."""
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _why_stopped(self, stalled_s: float) -> str | None:
        """Why the oldest call, which has been so for ``stalled_s``, cannot complete; None if it can."""
        limit_s = CALL_TIMEOUT_FACTOR * self._timeout_s
        if stalled_s >= limit_s:
            return f"a call did not complete on the GPU within {limit_s:g} s, {CALL_TIMEOUT_FACTOR} x --sp-timeout"
        return self._control.abort_reason(self._index) if stalled_s >= min(_LOST_GRACE_S, limit_s) else None

    def _fail(self, reason: str) -> None:
        assert self._watch is not None
        text = f"rank {dist.get_rank()} on {socket.gethostname()}: {reason} (link {self._link})"
        self._failure = TransportError(self._control.report_failure(text, is_cause=False))
        self._watch.lost.fill_(True)
        if not self._watch.closing.wait(_ALL_NOTICE_S):  # else the group is aborted next
            self._group.abort()


class _NcclExchange(Exchange):
    """``operations``: start the sends and receives, inside a batch. ``number``: in the order of records; 0 without
    operations. ``num_received``: labels of the call that have arrived with it."""

    number = 0
    fills_label = False  # it sends the first label of the call
    num_received = 0
    work: dist.Work | None = None  # None after a wait, which covers the batch

    def __init__(self, transport: Nccl, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        super().__init__(round, sends, receives)
        self._transport = transport
        self.operations: list[Callable[[], object]] = []

    def post(self) -> None:
        self._transport.post(self)

    def wait(self) -> None:
        self._transport.wait(self)


class CallWatch:
    """Watches the calls of one link, in a thread. ``words``: uint8, see the module. ``why_stopped(stalled_s)``: why the
    oldest call cannot complete, or None. ``fail(reason)`` is called once, in the thread."""

    def __init__(
        self, words: torch.Tensor, why_stopped: Callable[[float], str | None], fail: Callable[[str], None]
    ) -> None:
        self.lost = words[_LOST : _LOST + 1].view(torch.bool)
        self.word = self.lost
        """Of the running call, bool [1]."""
        self.closing = threading.Event()
        self._words, self._values = words, words.numpy()
        self._why_stopped, self._fail = why_stopped, fail
        self._num_calls = 0
        self._captured = False
        self._running: deque[int] = deque()  # words of calls that may not have completed
        self._thread = threading.Thread(target=self._run, name="sf-xfuser nccl", daemon=True)
        self._thread.start()

    @property
    def differed(self) -> bool:
        """Whether the result of a completed call is NaN."""
        return bool((self._values[_GRAPH:] == 1).any())

    def begin(self, *, captured: bool) -> None:
        """Start a call, before anything of it is enqueued. ``captured``: in a CUDA graph. The host does not see when it
        runs again, so only failures of ranks end it."""
        at = _GRAPH
        if captured:
            self._captured = True
        else:
            at = _FIRST + self._num_calls % _MAX_CALLS
            self._num_calls += 1
            self._values[at] = _RUNNING
            self._running.append(at)
        self.word = self._words[at : at + 1].view(torch.bool)

    def close(self, limit_s: float) -> None:
        self.closing.set()
        self._thread.join(limit_s)

    def _run(self) -> None:
        since = time.monotonic()
        while not self.closing.wait(_POLL_S):
            while self._running and self._values[self._running[0]] != _RUNNING:
                self._running.popleft()
                since = time.monotonic()
            if not self._running:
                since = time.monotonic()
            if self._running or self._captured:
                stalled_s = time.monotonic() - since if self._running else _LOST_GRACE_S
                if (reason := self._why_stopped(stalled_s)) is not None:
                    return self._fail(reason)


_LABEL_SLOT = -1
_Chunk = tuple[int, int, Any]  # slot, peer, tensor
