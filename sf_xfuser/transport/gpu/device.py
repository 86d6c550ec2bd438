"""One-sided transfers between GPUs, shared by ``nccl_put``, ``nvshmem`` and ``symm_mem``. A subclass adds how to allocate
memory, and how to reach a peer whose memory is not mapped. ``transfer.py`` enqueues the rounds.

The protocol resembles that of ``shm.py``, in stream order instead of program order. Each rank owns one *block* of
memory that its peers write to (``Block``). A *window* has two halves that calls use in turn. There is no barrier. An
*epoch* is the number of a call.

| region | writer | reader | memory order | value |
|---|---|---|---|---|
| ``expected``, low half | this rank, at the start of a call | the checks of flags; copies of flags to peers | stream order | identity of the call, 32 bits |
| ``poison``, its high half | this rank, or any peer that fails | as ``expected``; the end of each call | before the writer releases its own waits | float32 1; NaN after a failure |
| ``flag(s, k, e mod 2)`` | rank ``s`` raises it, this rank resets it | waits and checks of call e | after the data of the k-th round from ``s`` in epoch e | int64 0, or as ``expected`` |
| ``ready(s)`` | rank ``s`` raises it, this rank resets it | the start of a call | after the end of the last call of ``s`` | int64 0 or not |
| ``begun``, ``ended``, ``checked``, ``others`` | this rank | watchdog | stream order | int64 counters |
| ``half(e mod 2)`` | peers, in epoch e | this rank, after the flag | after all reads of epoch e-1 on the writer | chunks |
| scratch | this rank | its own puts | puts of a call complete before its end | chunks to send, partial results |

**Flags.** The k-th round of a call with a peer raises the peer's flag k, after all chunks of the round. Its value is the
*identity* of the call. If a rank makes another call, its flags do not match: the wait fails, and so does the group. At
the end of a call, ``check_flags`` compares its flags once more and resets them. Rounds have flags of their own, since a
fabric such as EFA does not order the puts of one stream: a counter could read 2 when only the second round has arrived.
Flags are 8 bytes without padding: copy engines, stream memory operations and network cards write them, a stream's front
end reads them, so no two processors share their cache lines.

**Why no half is overwritten, and no flag reset, too early.** As in ``shm.py``, but "has finished epoch e" refers to
streams. Let ``s`` put a chunk into ``r``'s half, or raise its flag, in epoch e+2. The put waits for the compute stream
of ``s``, which by then holds every wait of epoch e+1. One of them waits for a chunk that ``r`` put in e+1, or that was
forwarded from ``r``. That put of ``r`` waited for the compute stream of ``r``, which by then had ended epoch e: it had
read the half and reset the flags of e. So the flag of e+2 is raised after the reset of e. It is not reset too late
either: waits of e+2 are enqueued after the host has seen the end of e. A reset of e deletes no flag of e+1, which has
the other parity. The compute stream ends a call with a wait for all puts, so scratch memory needs one region only.

**Waits** run on a separate stream, and the caller's stream waits for an event of it. A chunk that is forwarded is also
awaited by the stream that forwards it. xDiT computes on CUDA's legacy stream, where a wait unknown to the driver would
block every blocking stream. The host runs at most two calls ahead. It therefore sees a failure soon, and never fills a
launch queue while it holds the GIL.

**Graphs.** Waits and flags in a CUDA graph hold no value, so that it can be replayed. A wait expects any value but 0,
and ``check_flags`` follows it at once: it turns ``poison`` into NaN if the flag does not match, and resets the flag. To
raise a flag is to copy ``expected``. So the flags of a poisoned rank do not match either, and a wrong chunk spoils
every result that depends on it. Waits go to the caller's stream, after all puts so far. In any order in which a GPU may
run the nodes, each wait then follows the puts that precede it in the program, so no rank waits for a peer that waits
for it. There are two kinds.

- ``capture``: the host begins each call, and replays the graph in place of posting. Parity and identity are those of
  the call, and all of the above holds.
- A user captures whole calls. Parity and identity are fixed in the graph, so a call may have the parity of the one
  before it. From the first capture on, every call of this transport starts with a *meeting*, in graphs or not: each rank
  raises ``ready`` on its peers, waits for theirs, and resets them. A peer raises ``ready`` after it has ended all
  earlier calls. So when a rank puts, all flags of its peers are reset and no half is read, in any order of replays and
  other calls. ``s`` raises ``ready`` of the next call only after it has received a chunk that ``r`` put after it had
  reset ``ready`` of this call. The stream of waits starts a meeting after all earlier calls, so it sees no flags of
  them.

``tests/unit/test_protocol.py`` covers each case.

**Failure** (``watchdog.py``). A failing rank sets ``poison`` to NaN on itself and on every rank whose memory it can
write, and then releases its waits. Its later results are invalid: every result that depends on them becomes NaN, and
data that leaves over another transport is poisoned first.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NoReturn

import torch

from sf_xfuser.config import QUEUES_VARIABLE, environment, launch_environment
from sf_xfuser.kernels.flags import check_flags, poison_result
from sf_xfuser.transport.base import CallMismatch, Parcel, Transfer, TransportError
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.gpu.block import MAX_ROUNDS, Block
from sf_xfuser.transport.gpu.driver import CopyBatch, Driver, WordBatch, acquire_streams, release_streams
from sf_xfuser.transport.gpu.memory import DeviceMemory, closed_windows, completes, kept_windows
from sf_xfuser.transport.gpu.transfer import Chunk, DeviceTransfer, DeviceWait, NetworkPut
from sf_xfuser.transport.gpu.watchdog import AwaitedFlag, Head, PendingCall, RoundWait, Watchdog

_NOTIFY_LIMIT_S = 5.0  # time limit for notifying the peers of a failure
_NAN = 0x7FC00000  # as float32
_VALID = 0x3F800000 << 32  # 1 as float32, in the high half of a word
_RELEASED = 1  # value of a flag in a graph that the watchdog raises
_MIN_QUEUES = 16


class DeviceWindow(DeviceMemory):
    """A transport of the rank at ``position`` of ``members``, which exchanges chunks with the positions ``peers``.
    ``control`` connects all members, which all make the collective calls. Parcels name peers by position.

    A call is ``begin_call``, ``begin``, posts and waits of recorded transfers, and the function of ``record_end``. It
    must wait for every receive. Sources of recorded sends are ``scratch`` or the window, or any memory for mapped
    peers."""

    halves = 2
    enqueues = True
    other_hosts: Collection[int] = ()
    """Mapped peers on other hosts of an NVLink domain. Copies reach their memory, stream memory operations do not."""

    def __init__(
        self, control: ControlPlane, members: Sequence[int], position: int, peers: Sequence[int], timeout_s: float
    ) -> None:
        """Collective. Raises TransportError on every rank if one of them fails, ValueError during a graph capture."""
        self._require_no_capture()
        super().__init__(control, members, position, timeout_s)
        self._peers = tuple(peers)
        self._check_queues()
        self.driver = Driver()
        self.streams = acquire_streams(self.driver, self.device)
        self.capturing = False  # whether operations of the current call go into a CUDA graph
        self.value = 0  # of the flags of the current call
        self.waits: list[tuple[RoundWait, ...]] = []  # of the current call, or of all calls in users' graphs
        self.sending: set[int] = set()  # streams with puts of the current call
        self._epoch = 0  # of the current or last call
        self._running = False
        self._call: PendingCall | None = None
        self._calls = [PendingCall(0, 0), PendingCall(0, 0)]  # the last ones, by half
        self._graph_waits: list[tuple[RoundWait, ...]] = []
        self._checks = 0  # number of waits and ends in replays so far
        self._meeting: _Meeting | None = None
        self._sent: dict[int, int] = {}  # recorded rounds of this call, by peer
        self._awaited: dict[int, int] = {}
        self.checked: set[RoundWait] = set()  # of the current call, in a CUDA graph
        self._held: list[Transfer] = []  # one-off transfers of this call, which keep their tensors alive
        self._packed_bytes = 0  # of scratch memory, by one-off transfers of this call
        self._indices: dict[frozenset[tuple[int, int]], list[torch.Tensor]] = {}
        self._watchdog = Watchdog(
            members,
            position,
            timeout_s,
            abort_reason=control.abort_reason,
            late_ranks=control.late_ranks,
            on_start=self._start_watchdog_thread,
            read_head=self._read_head,
            notify_peers=self._notify_peers,
            release=self._release,
        )
        try:
            self.reserve(1, 1)
            self.index_of(())  # of a call without receives
            self._try_batches()
        except BaseException:
            self._watchdog.close()
            release_streams(self.streams, self.device)
            raise

    # -- calls --------------------------------------------------------------------------------------------------------

    def begin(self) -> torch.Tensor:
        """As ``OneSided.begin``: start the next epoch in its half of the window. Waits for the call before last.
        During a capture by a user, this call becomes part of the graph."""
        self.require_usable()
        assert self._block is not None and not self._running, "the last call has not ended"
        self._epoch += 1
        half = self._epoch % 2
        self.value = _VALID | self._identity
        self.capturing = torch.cuda.is_current_stream_capturing()
        stream = self.driver.current_stream(self.device)
        self._sent.clear()
        self._awaited.clear()
        self.checked.clear()
        self._packed_bytes = 0
        self._running = True
        if self.capturing:
            self._begin_in_graph()
        else:
            self._begin_on_host(half, stream)
        try:
            self.driver.write_32(self.expected_address, self._identity, stream)
            if self._in_graph:
                self._meet(stream)
        except BaseException as error:
            self.fail("could not begin a call", error)
        return self._halves[half]

    def _begin_on_host(self, half: int, stream: int) -> None:
        self.driver.synchronize(self.streams.call_ends[half])
        self._calls[half].done = _completed  # its event is about to be recorded again
        self._require_valid()
        self.driver.wait_event(stream, self.streams.call_ends[1 - half])  # if the caller changed streams
        self._call = self._calls[half] = PendingCall(self._epoch, self.value)
        self.waits = self._call.waits
        self._watchdog.watch(self._call)

    def _begin_in_graph(self) -> None:
        self._call = None
        self.waits = self._graph_waits
        self._in_graph = True
        self._watchdog.watch_graphs()
        add_one(self._begun)

    def _meet(self, stream: int) -> None:
        if self._meeting is None:
            self._meeting = _Meeting(self)
        self._meeting.transfer.post()
        if not self.capturing:  # else its waits could see flags of earlier calls
            self._order(stream, self.streams.wait)
        self._meeting.wait()
        self.driver.run(self._meeting.reset, stream)

    def record(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> DeviceTransfer:
        """As ``Transport.record``."""
        assert self._block is not None
        half = self._epoch % 2
        chunks: dict[int, list[Chunk]] = {}
        flags: dict[int, int] = {}
        held: list[torch.Tensor] = []
        for parcel in sends:
            if parcel.peer not in flags:
                number = self._next_number(self._sent, parcel.peer)
                flags[parcel.peer] = self._block.flags + 8 * Block.flag(self._position, number, half)
            if parcel.data is not None and parcel.nbytes:
                assert parcel.data.is_contiguous() and (self.maps(parcel.peer) or self._in_block(parcel.data))
                chunk = Chunk(self._block.half(half) + parcel.offset, parcel.data.data_ptr(), parcel.nbytes)
                chunks.setdefault(parcel.peer, []).append(chunk)
                held.append(parcel.data)
        awaited = []
        for peer in dict.fromkeys(parcel.peer for parcel in receives):
            number = self._next_number(self._awaited, peer)
            awaited.append(AwaitedFlag(peer, number, Block.flag(peer, number, half)))
        return DeviceTransfer(self, round, chunks, flags, RoundWait(round, tuple(awaited)), held)

    def record_wait(self, transfers: Sequence[Transfer]) -> DeviceWait:
        """As ``Transport.record_wait``: one driver call for all flags of mapped peers."""
        recorded = [each for each in transfers if isinstance(each, DeviceTransfer)]
        return DeviceWait(self, [each.awaited for each in recorded], parts=[each.alone for each in recorded])

    def record_post(self, transfer: Transfer, after: Sequence[Transfer]) -> Callable[[], None]:
        """As ``Transport.record_post``. The current stream does not wait."""
        assert isinstance(transfer, DeviceTransfer)
        return partial(transfer.post, self.record_wait(after)) if after else transfer.post

    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> DeviceTransfer:
        """As ``Transport.exchange``. Chunks for peers that are not mapped are copied into ``scratch`` first, from its
        start: a call that uses ``scratch`` otherwise must not send other tensors to such peers."""
        transfer = self.record(round, [replace(p, data=self._sendable(p)) for p in sends], receives)
        transfer.post()
        self._held.append(transfer)
        return transfer

    def record_end(self) -> Callable[[torch.Tensor | None], None]:
        """As ``Transport.record_end``: two kernels."""
        return partial(self._end, self.index_of([(w, n) for w, count in self._awaited.items() for n in range(count)]))

    def _end(self, index: torch.Tensor, result: torch.Tensor | None) -> None:
        self.require_usable()
        try:
            stream = self.driver.current_stream(self.device)
            self.join_puts(stream)
            done = self._ended if self._call is None else self._checked if self.capturing else self._others
            check_flags(self._flags, index[:0] if self.capturing else index, self._expected, self._poison, done)
            if result is not None:
                poison_result(result, self._poison)
            self.driver.copy(self._host_poison.data_ptr(), self._base + Block.poison, 4, stream)
            if not self.capturing:
                self._finish(stream)
        except BaseException as error:
            self.fail("could not end a call", error)
        self._running = False
        self._held.clear()

    def check(self, index: torch.Tensor) -> None:
        """In a CUDA graph: check and reset flags that have arrived."""
        done = self._others if self._call is None else self._checked
        check_flags(self._flags, index, self._expected, self._poison, done)

    def _finish(self, stream: int) -> None:
        """The current call ends when ``stream`` arrives here."""
        assert self._call is not None
        event = self.streams.call_ends[self._epoch % 2]
        self.driver.record(event, stream)
        self._call.done = partial(self.driver.query, event)

    def drain(self) -> None:
        """As ``Transport.drain``: end the call, if it has not ended."""
        if self._running:
            self.record_end()(None)

    def poison(self, chunk: torch.Tensor) -> None:
        """As ``Transport.poison``."""
        poison_result(chunk, self._poison)

    @contextlib.contextmanager
    def capture(self) -> Iterator[Callable[[], None]]:
        """The context in which the owner of a program captures it as a CUDA graph, inside a call: posts, waits, and the
        function of ``record_end``. Nothing runs. Yields a function that ends a call, this one or a later one in the
        same half, which has replayed the graph after ``begin``. ::

            with window.capture() as end_replay, torch.cuda.graph(graph):
                run(program)
            graph.replay()
            end_replay()
        """
        assert self._running and not self.capturing
        outer, self.waits, self.capturing = self.waits, [], True
        self.checked.clear()
        try:
            yield partial(self._end_replay, self._epoch % 2, self.waits)
        finally:
            self.waits, self.capturing, self._running = outer, False, True
            self.sending.clear()

    def _end_replay(self, half: int, waits: Sequence[tuple[RoundWait, ...]]) -> None:
        assert half == self._epoch % 2 and self._call is not None, "the graph uses the other half"
        self._call.checked = self._checks
        self._checks += len(waits) + 1
        self.waits.extend(waits)
        try:
            self._finish(self.driver.current_stream(self.device))
        except BaseException as error:
            self.fail("could not end a call", error)
        self._running = False

    def close(self) -> None:
        """As ``Transport.close``. During an incomplete call, peers that wait for this rank fail."""
        if self._closed:
            return
        self._closed = True
        if self._running:
            rank = self._members[self._position]
            self._watchdog.fail(TransportError(f"rank {rank}: closed {self.name} during call {self._epoch}"))
            self._abandon_call()
        self._watchdog.close()
        (kept_windows if self._in_graph else closed_windows).append(self)

    # -- implemented by each transport --------------------------------------------------------------------------------

    _address: Mapping[int, int]
    """The address of each mapped peer's block. Set by ``_allocate``."""

    @property
    def _reachable(self) -> Sequence[int]:
        """The other positions whose memory this rank can write: its peers, and ranks that use their results."""
        return [peer for peer in range(len(self._members)) if peer != self._position]

    # Only for transports with peers that are not mapped; never called by others.

    def _put(self, peer: int, offset: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy from this rank's block to ``offset`` in the block of a peer that is not mapped."""
        raise NotImplementedError

    def record_network(self, puts: Sequence[NetworkPut]) -> tuple[Callable[[], None], int]:
        """The function that enqueues the chunks of a round for peers that are not mapped, each before the flag of its
        peer, on ``streams.network``; and its launches."""
        raise NotImplementedError

    def await_network_flag(self, address: int, stream: int) -> None:
        """Block the stream until the word at this local address, for which ``sees_flags`` is False, is not 0."""
        raise NotImplementedError

    # -- addresses and streams, for transfers -------------------------------------------------------------------------

    def maps(self, peer: int) -> bool:
        """Whether this GPU can write to the peer's memory directly. Then any memory may be the source of a put."""
        return peer in self._address

    def sees_flags(self, peer: int) -> bool:
        """Whether a stream memory operation may wait for the flags of the peer."""
        return self.maps(peer)

    wait_flags = 0
    """Of these operations: see ``Driver.flush_flag``."""

    def address_of(self, peer: int) -> int:
        return self._address[peer]

    def flag_address(self, index: int) -> int:
        assert self._block is not None
        return self._base + self._block.flags + 8 * index

    @property
    def expected_address(self) -> int:
        return self._base + Block.expected

    def join_puts(self, stream: int) -> None:
        """Make ``stream`` wait for all puts of this call so far."""
        for sending in self.sending:
            self._order(sending, stream)
        self.sending.clear()

    def _order(self, first: int, then: int) -> None:
        """Make one stream wait for the work that is already on another one."""
        self.driver.record(self.streams.handoff, first)
        self.driver.wait_event(then, self.streams.handoff)

    # ------------------------------------------------------------------------------------------------------------------

    def _next_number(self, counts: dict[int, int], peer: int) -> int:
        number = counts.get(peer, 0)
        if number == MAX_ROUNDS:
            raise RuntimeError(f"a call has more than {MAX_ROUNDS} rounds with rank {self._members[peer]}")
        counts[peer] = number + 1
        return number

    def index_of(self, flags: Sequence[tuple[int, int]]) -> torch.Tensor:
        """These flags, as (peer, number), of a call in the current half: int64 [k] on the GPU. Raises ValueError during
        a capture, unless a call used the same flags before, in any half."""
        key = frozenset(flags)
        if key not in self._indices:
            self._require_no_capture()
            numbers = [[Block.flag(peer, number, half) for peer, number in sorted(key)] for half in (0, 1)]
            with torch.inference_mode(False):
                host = torch.tensor(numbers, dtype=torch.int64, pin_memory=self._flags.is_cuda)
                self._indices[key] = list(host.to(self._flags.device, non_blocking=True).unbind())
        return self._indices[key][self._epoch % 2]

    def _in_block(self, data: torch.Tensor) -> bool:
        assert self._block is not None
        return self._base <= data.data_ptr() < self._base + self._block.nbytes

    def _sendable(self, parcel: Parcel) -> torch.Tensor | None:
        """The contiguous data of a parcel, in memory that can be sent."""
        if parcel.data is None:
            return None
        data = parcel.data.contiguous()
        if self.maps(parcel.peer) or self._in_block(data):
            return data
        start, self._packed_bytes = self._packed_bytes, self._packed_bytes + data.nbytes
        if self._packed_bytes > self._scratch.nbytes:
            raise ValueError(f"the chunks for other machines need {self._packed_bytes} bytes of scratch memory")
        packed = self._scratch[start : self._packed_bytes].view(data.dtype).view(data.shape)
        return packed.copy_(data)

    def _check_queues(self) -> None:
        queues = environment([QUEUES_VARIABLE]).get(QUEUES_VARIABLE, "unset")  # unset: CUDA uses 8
        problem = f"{QUEUES_VARIABLE}={queues}: --sp-transport {self.name} can deadlock if a wait for a peer shares a "
        problem += "hardware queue with work that the peer waits for; set it to 32 before CUDA starts"
        if queues == "1":
            self._refusal = problem
        elif (not queues.isdecimal() or int(queues) < _MIN_QUEUES) and not launch_environment().local_rank:
            warnings.warn(problem, stacklevel=3)  # once per machine

    def _try_batches(self) -> None:
        """Find out whether the driver copies to peers in batches, with words that no call uses yet."""
        assert self._block is not None
        targets = [start + self._block.ready(self._position) for start in self._address.values()]
        source = self._base + self._block.ready(self._position)
        copies = CopyBatch([(target, source, 8) for target in targets if target != source])
        if copies.copies:
            self.driver.try_batches(copies, self.streams.put)
        self.driver.record(self.streams.handoff, self.streams.put)
        completes(self.driver, self.streams.handoff, _NOTIFY_LIMIT_S)

    # -- failure ------------------------------------------------------------------------------------------------------

    def _require_valid(self) -> None:
        """Raise if a call that has ended on the GPU had no valid result."""
        self.require_usable()
        poison = self._host_poison_value[0]
        if poison == poison:
            return
        rank = self._members[self._position]
        if (reason := self._control.abort_reason(self._peers)) is not None:
            error = TransportError(f"rank {rank}: {reason}")
        else:
            error = CallMismatch(
                f"rank {rank}: a rank of its group has made another call than this rank, or has aborted, so the result "
                f"of call {self._epoch - 1} or {self._epoch - 2} is NaN ({self.name})"
            )
        self._running = False
        self._watchdog.fail(error)
        raise error

    def fail(self, problem: str, error: BaseException) -> NoReturn:
        """Fail the transport because of an exception in a call, and raise. An exception in ``capture`` fails nothing,
        since nothing has run."""
        if self.capturing and self._call is not None and isinstance(error, Exception):
            raise RuntimeError(f"{problem} ({self.name}): {error}") from error
        failure = TransportError(f"rank {self._members[self._position]}: {problem} ({self.name}): {error}")
        self._watchdog.fail(failure)
        self._abandon_call()
        if not isinstance(error, Exception) or error is self._watchdog.error:
            raise error
        raise failure from error

    def _abandon_call(self) -> None:
        """No more waits of this call follow."""
        self._running = False
        call = self._call
        if call is not None and call.done is None:
            try:
                event = self.driver.new_event()
                self.driver.record(event, self.streams.wait)
                call.done = partial(self.driver.query, event)
            except RuntimeError:  # the GPU itself has failed
                call.done = _completed

    def _start_watchdog_thread(self) -> None:
        torch.cuda.set_device(self.device)
        self.driver.allow_queries_during_capture()

    def _read_head(self) -> Head | None:
        block = self._block
        if block is None:
            return None
        self.driver.copy(self._host_head.data_ptr(), self._base, block.head_bytes, self.streams.rescue)
        self.driver.record(self.streams.rescued, self.streams.rescue)
        if not completes(self.driver, self.streams.rescued, _NOTIFY_LIMIT_S):
            return None
        words = self._host_head.view(torch.int64)
        poison = self._host_head[block.poison : block.poison + 4].view(torch.float32)
        flags = words[block.flags // 8 : block.flags // 8 + block.num_flags].tolist()
        begun, ended, checked = (int(words[at // 8]) for at in (block.begun, block.ended, block.checked))
        return Head(flags, bool(poison.isnan()), begun, ended, checked)

    def _notify_peers(self, suspects: Sequence[int]) -> None:
        """Poison this rank and its peers. Launches no kernel, since it might queue behind one that never ends."""
        if self._block is None:
            return
        driver, streams = self.driver, self.streams
        word = self._base + Block.poison
        driver.write_32(word, _NAN, streams.rescue)
        driver.record(streams.notified, streams.rescue)
        driver.wait_event(streams.notify, streams.notified)
        for peer in sorted(self._reachable, key=lambda peer: (not self.maps(peer), peer in suspects)):
            if self.maps(peer):
                driver.copy(self._address[peer] + Block.poison, word, 4, streams.notify)
            else:
                self._put(peer, Block.poison, word, 4, streams.notify)
        # Network puts run in order: a peer that is late to receive the poison receives it before any later chunk.
        driver.record(streams.notified, streams.notify)
        completes(driver, streams.notified, _NOTIFY_LIMIT_S)

    def _release(self, calls: Sequence[PendingCall]) -> None:
        values: dict[int, int] = {}
        if self._in_graph and self._block is not None:
            values = {self._base + self._block.ready(peer): _RELEASED for peer in self._peers}
        in_graphs = [each for wait in tuple(self._graph_waits) for each in wait]
        values |= {self.flag_address(flag.word): _RELEASED for each in in_graphs for flag in each.flags}
        for call in calls:
            values |= {self.flag_address(flag.word): call.value for each in call.rounds() for flag in each.flags}
        if values:
            batch = WordBatch.writes(list(values))
            batch.values[:] = list(values.values())
            self.driver.run(batch, self.streams.rescue)


class _Meeting:
    """The start of a call at which all ranks wait until their peers have ended all earlier calls."""

    def __init__(self, window: DeviceWindow) -> None:
        block, peers = window._block, window._peers
        assert block is not None
        ready = dict.fromkeys(peers, block.ready(window._position))
        self.transfer = DeviceTransfer(window, 0, {}, ready, RoundWait(0, ()))
        self.wait = DeviceWait(window, (), [(peer, window._base + block.ready(peer)) for peer in peers])
        self.reset = WordBatch.writes([window._base + block.ready(peer) for peer in peers])


def add_one(word: torch.Tensor) -> None:
    word += 1


def _completed() -> bool:
    return True
