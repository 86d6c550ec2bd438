"""One-sided transfers between GPUs, shared by ``nvshmem`` and ``symm_mem``. A subclass adds how to allocate memory, and
how data and flags reach a peer.

The protocol is that of ``shm.py``, in stream order instead of program order. Each rank owns one *block* of memory that
its peers write to (``Block``). A *window* has two halves that calls use in turn. There is no barrier. An *epoch* is the
number of a call.

| region | writer | reader | memory order | value |
|---|---|---|---|---|
| ``poison`` | this rank, or any peer that fails | the end of each call, as a factor | before the writer releases its own waits | float32 1; NaN after a failure |
| ``flag(s, k, e)`` | rank ``s`` | waits of this rank | after the data of the k-th chunk of ``s`` in epoch e | uint64 ``(e << 32) + identity`` |
| ``half(e)`` | peers, in epoch e | this rank, after the flag | after all reads of epoch e-1 on the writer | chunks |
| staging | this rank, when packing | its own puts | puts of a call complete before the next call packs | packed chunks |

**Flags.** A wait expects exactly ``e << 32 | identity``, where ``identity`` describes the call. If a rank makes another
call, its flags do not match, the wait times out, and the group fails. Each chunk has two flags, for even and odd epochs,
since ``s`` may raise flags of e+1 before this rank has read those of e. It raises those of e+2 only afterwards. One
counter per pair, as in ``shm.py``, would be wrong: chunks to one peer use several streams, and a fabric such as EFA does
not order the puts of one stream. The counter could read 2 when only the second chunk has arrived, or drop back to 1.
``tests/unit/test_protocol.py`` covers each case. Flags are 8 bytes without padding: a copy engine or network card writes
them and the front end of a stream reads them, so no two processors share their cache lines.

**Why no half is overwritten too early.** As in ``shm.py``, but "has finished epoch e-1" refers to streams: a put waits
for an event of the compute stream, which by then holds every wait of epoch e-1 and every read of its chunks. The compute
stream ends a call with a wait for all puts (``drain``). So the values of one flag arrive in order of epochs, and one
staging area is enough.

**Waits** run on a separate stream, and the caller's stream waits for an event of it. xDiT computes on CUDA's legacy
stream, where a wait unknown to the driver would block every blocking stream. The host runs at most two calls ahead. It
therefore sees a failure soon, and never fills a launch queue while it holds the GIL.

**Failure** (``watchdog.py``). A failing rank sets ``poison`` to NaN on itself and on every rank whose memory it can
write, and then releases its waits. Its later results are invalid: every result that depends on them becomes NaN, and
data that leaves over another transport is multiplied by ``poison`` first.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch

from sf_xfuser.config import QUEUES_VARIABLE, environment
from sf_xfuser.transport.base import Parcel, TransportError, window_view

Ticket = object
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.gpu.block import MAX_CHUNKS
from sf_xfuser.transport.gpu.driver import Driver
from sf_xfuser.transport.gpu.memory import DeviceMemory, closed_windows, completes, is_capturing
from sf_xfuser.transport.gpu.watchdog import FlagSnapshot, PendingWait, Watchdog

_PUT_STREAMS = 2  # to pack while copying; more streams would share hardware queues
_NOTIFY_LIMIT_S = 5.0  # time limit for notifying the peers of a failure
_NAN = 0x7FC00000  # as float32
_MIN_QUEUES = 16


class DeviceWindow(DeviceMemory):
    """A transport of the rank at ``position`` of ``members``, which exchanges chunks with the positions ``peers``.
    ``control`` connects all members, which all make the collective calls. Parcels name peers by position."""

    halves = 2
    enqueues = True

    def __init__(
        self, control: ControlPlane, members: Sequence[int], position: int, peers: Sequence[int], timeout_s: float
    ) -> None:
        """Collective. Raises TransportError on every rank if one of them fails, ValueError during a graph capture."""
        self._require_no_capture()
        super().__init__(control, members, position, timeout_s)
        self._peers = tuple(peers)
        queues = environment([QUEUES_VARIABLE]).get(QUEUES_VARIABLE, "unset")  # unset: CUDA uses 8
        if not queues.isdecimal() or int(queues) < _MIN_QUEUES:
            warnings.warn(
                f"{QUEUES_VARIABLE}={queues}: --sp-transport {self.name} can deadlock if a wait for a peer shares a "
                f"hardware queue with work that the peer waits for; set it to 32 before CUDA starts",
                stacklevel=2,
            )
        self._driver = Driver()
        self._put_streams = [self._driver.new_stream() for _ in range(min(_PUT_STREAMS, len(self._peers)))]
        self._wait_stream, self._rescue_stream, self._notify_stream = (self._driver.new_stream() for _ in range(3))
        self._streams = [*self._put_streams, self._wait_stream, self._rescue_stream, self._notify_stream]
        self._stream_of = {peer: self._put_streams[n % len(self._put_streams)] for n, peer in enumerate(self._peers)}
        self._epoch = 0  # of the current or last call
        self._running = False
        self._sent: dict[int, int] = {}  # chunks of this call, by peer
        self._expected: dict[int, int] = {}
        self._held: list[Parcel] = []  # keeps tensors alive until their puts have completed
        self._call_ends = [_new_event(), _new_event()]  # by parity of the epoch
        self._watchdog = Watchdog(
            members,
            position,
            timeout_s,
            abort_reason=control.abort_reason,
            on_start=self._start_watchdog_thread,
            read_flags=self._read_flags,
            notify_peers=self._notify_peers,
            release=self._release,
        )
        try:
            self.reserve(1)
        except BaseException:
            self._watchdog.close()
            raise

    def begin(self) -> torch.Tensor:
        """As ``OneSided.begin``: start the next epoch in its half of the window. Waits for the call before last."""
        self._require_usable()
        self._require_no_capture()
        assert self._block is not None and self._memory is not None
        self.drain()  # in case an exception ended the last call
        self._epoch += 1
        self._call_ends[self._epoch % 2].synchronize()
        self._require_usable()
        torch.cuda.current_stream().wait_event(self._call_ends[1 - self._epoch % 2])  # if the caller changed streams
        self._sent = dict.fromkeys(self._peers, 0)
        self._expected = dict.fromkeys(self._peers, 0)
        self._staging.reset()
        self._running = True
        start = self._block.half(self._epoch)
        return self._memory[start : start + self._block.half_bytes]

    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        """As ``Transport.exchange``. Puts start after the work that is already on the current stream."""
        self._require_usable()
        with self._fail_on_error(f"could not enqueue round {round}"):
            if sends:
                ready = torch.cuda.current_stream().record_event()
                for stream in self._put_streams:
                    stream.wait_event(ready)
            for parcel in sends:
                self._send(parcel)
        chunks = []
        for parcel in receives:
            chunks.append((parcel.peer, self._expected[parcel.peer]))
            self._expected[parcel.peer] += 1
        return _DeviceTicket(self, round, tuple(chunks))

    def enqueue_wait(self, round: int, chunks: tuple[tuple[int, int], ...]) -> None:
        """Make the current stream wait for these chunks, as (peer, chunk number). Returns at once."""
        self._require_usable()
        assert self._block is not None
        wait = PendingWait(self._epoch, round, chunks, value=self._flag_value)
        self._watchdog.watch(wait)
        with self._fail_on_error(f"could not enqueue the wait of round {round}", wait):
            for peer, chunk in chunks:
                flag = self._base + self._block.flag(peer, chunk, self._epoch)
                self._wait(peer, flag, self._flag_value, self._wait_stream.cuda_stream)
            arrived = self._wait_stream.record_event()
            wait.done = arrived.query
            torch.cuda.current_stream().wait_event(arrived)

    def drain(self) -> None:
        """Make the current stream wait for all puts. Returns at once; the watchdog bounds the wait."""
        if not self._running:
            return
        self._require_usable()
        self._running = False
        wait = PendingWait(self._epoch)
        self._watchdog.watch(wait)
        with self._fail_on_error("could not enqueue the end of a call", wait):
            for stream in self._put_streams:
                torch.cuda.current_stream().wait_event(stream.record_event())
            wait.done = self._record_call_end().query
        self._held.clear()

    def unavailable_reason(self) -> str | None:
        """As ``OneSided.unavailable_reason``. All ranks must capture the same calls."""
        return f"a CUDA graph is being captured, and the flags of {self.name} count calls" if is_capturing() else None

    def poison(self, result: torch.Tensor) -> None:
        """As ``OneSided.poison``: one kernel, which multiplies by 1 or NaN."""
        assert self._memory is not None
        result.mul_(self._poison_view(self._memory))
        if not self._running:
            self._record_call_end()

    def close(self) -> None:
        """As ``Transport.close``. During an incomplete call, peers that wait for this rank fail."""
        if self._closed:
            return
        self._closed = True
        if self._running:
            rank = self._members[self._position]
            self._watchdog.fail(TransportError(f"rank {rank}: closed {self.name} during call {self._epoch}"))
        self._watchdog.close()
        closed_windows.append(self)

    # -- implemented by each transport --------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _reachable(self) -> Sequence[int]:
        """The other positions whose memory this rank can write: its peers, and ranks that use their results."""

    @abstractmethod
    def _mapped(self, peer: int) -> bool:
        """Whether this GPU can write to the peer's memory directly. Then any memory may be the source of a put."""

    @abstractmethod
    def _put(self, peer: int, offset: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy from the address ``source`` to ``offset`` in the peer's block."""

    @abstractmethod
    def _put_with_flag(
        self, peer: int, offset: int, source: int, nbytes: int, flag: int, value: int, stream: int
    ) -> None:
        """As ``_put``, then write ``value`` at the offset ``flag``. With 0 bytes, only the flag."""

    @abstractmethod
    def _wait(self, peer: int, address: int, value: int, stream: int) -> None:
        """Block the stream until the flag of ``peer`` at this local address equals ``value``."""

    # -- sends --------------------------------------------------------------------------------------------------------

    @property
    def _flag_value(self) -> int:
        return self._epoch << 32 | self._identity

    def _send(self, parcel: Parcel) -> None:
        assert self._block is not None
        chunk = self._sent[parcel.peer]
        if chunk == MAX_CHUNKS:
            raise RuntimeError(f"a call sends more than {MAX_CHUNKS} chunks to rank {self._members[parcel.peer]}")
        self._sent[parcel.peer] += 1
        stream = self._stream_of[parcel.peer]
        self._held.append(parcel)
        self._put_with_flag(
            parcel.peer,
            self._block.half(self._epoch) + parcel.offset,
            self._source(parcel, stream) if parcel.nbytes else 0,
            parcel.nbytes,
            self._block.flag(self._position, chunk, self._epoch),
            self._flag_value,
            stream.cuda_stream,
        )

    def _source(self, parcel: Parcel, stream: torch.cuda.Stream) -> int:
        """Address of the contiguous chunk: the tensor itself if it can be sent directly, else packed on ``stream``."""
        assert self._block is not None and self._memory is not None
        first = parcel.parts[0]
        if len(parcel.parts) == 1 and first.dtype == parcel.dtype and first.is_contiguous():
            in_block = self._base <= first.data_ptr() < self._base + self._block.nbytes
            if in_block or self._mapped(parcel.peer):
                return first.data_ptr()
        offset, wrapped = self._staging.allocate(parcel.nbytes)
        if wrapped:
            sent = [put_stream.record_event() for put_stream in self._put_streams]
            for put_stream in self._put_streams:
                for event in sent:
                    put_stream.wait_event(event)
        offset += self._block.staging
        with torch.cuda.stream(stream):
            parcel.write(window_view(self._memory, offset, parcel.shape, parcel.dtype))
        return self._base + offset

    def _record_call_end(self) -> torch.cuda.Event:
        event = _new_event()
        event.record()
        self._call_ends[self._epoch % 2] = event
        return event

    # -- failure ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _fail_on_error(self, problem: str, wait: PendingWait | None = None) -> Iterator[None]:
        """Fail the transport on any exception inside."""
        try:
            yield
        except BaseException as error:
            if wait is not None and wait.done is None:
                wait.done = lambda: True  # it was never enqueued
            failure = TransportError(f"rank {self._members[self._position]}: {problem} ({self.name}): {error}")
            self._watchdog.fail(failure)
            if not isinstance(error, Exception):
                raise
            raise failure from error

    def _start_watchdog_thread(self) -> None:
        torch.cuda.set_device(self._device)
        self._driver.allow_queries_during_capture()

    def _read_flags(self) -> FlagSnapshot | None:
        block, memory = self._block, self._memory
        if block is None or memory is None:
            return None
        with torch.cuda.stream(self._rescue_stream):
            self._host_head.copy_(memory[: block.head_bytes], non_blocking=True)
        if not completes(self._rescue_stream.record_event(), _NOTIFY_LIMIT_S):
            return None
        flags = self._host_head[block.flags : block.flags + 8 * 2 * MAX_CHUNKS * block.ranks].view(torch.int64)
        aborted = bool(self._poison_view(self._host_head).isnan())
        return FlagSnapshot(flags.view(block.ranks, 2, MAX_CHUNKS).tolist(), aborted)

    def _notify_peers(self, suspects: Sequence[int]) -> None:
        """Poison this rank and its peers. Launches no kernel, since it might queue behind one that never ends."""
        if self._block is None:
            return
        word = self._base + self._block.poison
        self._driver.write_32(word, _NAN, self._rescue_stream.cuda_stream)
        self._notify_stream.wait_event(self._rescue_stream.record_event())
        for peer in sorted(self._reachable, key=lambda peer: (not self._mapped(peer), peer in suspects)):
            self._put(peer, self._block.poison, word, 4, self._notify_stream.cuda_stream)
        # Network puts run in order: a peer that is late to receive the poison receives it before any later chunk.
        completes(self._notify_stream.record_event(), _NOTIFY_LIMIT_S)

    def _release(self, waits: Sequence[PendingWait]) -> None:
        assert self._block is not None
        for wait in waits:
            for peer, chunk in wait.chunks:
                flag = self._base + self._block.flag(peer, chunk, wait.epoch)
                self._driver.write_64(flag, wait.value, self._rescue_stream.cuda_stream)


class _DeviceTicket(Ticket):
    def __init__(self, window: DeviceWindow, round: int, chunks: tuple[tuple[int, int], ...]) -> None:
        self._window, self._round, self._chunks = window, round, chunks

    def wait(self) -> None:
        chunks, self._chunks = self._chunks, ()
        if chunks:
            self._window.enqueue_wait(self._round, chunks)


def _new_event() -> torch.cuda.Event:
    """An event that the host waits for without spinning."""
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
