"""One-sided transfers between GPUs: what ``nvshmem`` and ``symm_mem`` share. Both add how memory is had, and how bytes
and flags reach a peer.

The protocol is that of ``shm.py``, in stream order instead of program order: each rank has one *block* of memory into
which its peers write (``Block``), a window has two halves that take turns, and there is no barrier.

| in the block | written by | read by | order |
|---|---|---|---|
| ``poison`` | any rank that gave up: NaN | the end of each call, as a factor | before the writer releases its waits |
| ``flag(s, k, e)`` | rank ``s``: epoch and identity | waits of this rank | after the k-th chunk of ``s`` in epoch e |
| ``half(e)`` | peers, in epoch e | this rank, after the flag | see below |
| staging | this rank, packing | the copies of its sends | a call's copies end before the next call packs |

**Flags.** ``flag(s, k, e)`` says that the k-th chunk from ``s`` in epoch e has arrived: it holds ``e << 32`` plus the
identity of the call that ``s`` makes, and a wait wants just that value. So a rank that makes another call is never
mistaken: its flags do not match, the wait runs out, and the group fails. There is one for epochs of either parity,
since ``s`` may raise those of e+1 before this rank has looked at those of e; those of e+2 it raises after that, as
below. A counter for each pair, as in ``shm.py``, would not do: chunks to one peer travel on several streams, and a
fabric such as EFA keeps no order even between puts of one stream. A counter could then say 2 when only the second chunk
is here, or fall back to 1. With a flag for each chunk nothing is concluded from one about another.
(``tests/unit/test_protocol.py`` has all of these.) Eight bytes each, without padding: no two processors share their cache
lines, a flag is written by a copy engine or network card and read by the front end of a stream.

**Why nothing is overwritten too early.** As in ``shm.py``, where "has finished epoch e-1" is now said of streams: a put
waits for an event of the compute stream, which has by then been given every wait of epoch e-1 and all that reads what
arrived. The compute stream ends a call with a wait for all its sends (``drain``), so flags of one slot come in the
order of epochs, and staging needs one copy only.

**Waits** are given to a stream of their own, and the caller's stream waits for an event of that one: xDiT computes on
CUDA's legacy stream, where a wait that the driver does not know of would hold up every blocking stream. The host runs
at most two calls ahead, so it hears of a failure soon and never fills a launch queue while it holds Python's lock.

**Failure.** See ``watchdog.py``. A rank that gives up makes ``poison`` NaN on itself and on all whose memory it reaches
before it releases its waits. What it then computes and sends is of no use: whoever receives any of it, or of what
others made of it, has a result of NaN; what leaves over another transport is made NaN first.

**Memory** that a peer can write to is let go only where all ranks have come and none has anything on its way; so
``close`` keeps it until the next transport is made, or the process ends.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from sf_xfuser.config import QUEUES_VARIABLE, environment
from sf_xfuser.transport.base import OneSided, Parcel, Ticket, TransportError, raise_together, window_view
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.gpu.block import CHUNKS, Block, Staging, grown
from sf_xfuser.transport.gpu.driver import Driver
from sf_xfuser.transport.gpu.watchdog import Awaited, Seen, Watchdog

_STEP = 2 << 20  # bytes: CUDA maps memory in pages of this size
_STREAMS = 2  # for puts: one packs while the other copies; streams share few hardware queues
_TELL_S = 5.0  # for a peer to be told of a failure
_NAN = 0x7FC00000  # as float32
_ENOUGH_QUEUES = 16


def captures() -> bool:
    """Whether a CUDA graph is being captured. Local."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class DeviceWindow(OneSided):
    """``control`` joins the ranks of ``members``, all of which make the collective calls; this one is at ``position``
    and exchanges chunks with the positions ``peers``. Parcels name peers by position. On the current device."""

    name: ClassVar[str]
    halves = 2
    enqueues = True
    _sharing = 1  # ranks of the group on this GPU, all of which need room at once

    def __init__(
        self, control: ControlPlane, members: Sequence[int], position: int, peers: Sequence[int], timeout_s: float
    ) -> None:
        """Collective. Raises TransportError on every rank if one of them cannot, ValueError during a capture."""
        self._not_captured()
        self._control = control
        self._members = members
        self._position = position
        self._peers = tuple(peers)
        self._timeout_s = timeout_s
        queues = environment([QUEUES_VARIABLE]).get(QUEUES_VARIABLE, "unset")  # 8, then
        if not queues.isdecimal() or int(queues) < _ENOUGH_QUEUES:
            warnings.warn(
                f"{QUEUES_VARIABLE}={queues}: where streams share a hardware queue a wait for another rank can hold up "
                f"what that rank waits for; set 32 before anything uses CUDA, for --sp-transport {self.name}",
                stacklevel=2,
            )
        self._device = torch.cuda.current_device()
        self._driver = Driver()
        self._puts = [self._driver.new_stream() for _ in range(min(_STREAMS, len(self._peers)))]
        self._waits, self._rescue, self._telling = (self._driver.new_stream() for _ in range(3))
        self._stream_of = {peer: self._puts[n % len(self._puts)] for n, peer in enumerate(self._peers)}
        self._block: Block | None = None
        self._memory: torch.Tensor | None = None  # uint8 [block.nbytes]
        self._epoch = 0  # of the call that is running, or ran last
        self._running = False
        self._sent: dict[int, int] = {}
        self._due: dict[int, int] = {}
        self._held: list[Parcel] = []  # until their copies have ended
        self._ended = [_new_event(), _new_event()]  # by parity of the epoch
        self._closed = False
        self._watchdog = Watchdog(
            members,
            position,
            timeout_s,
            hopeless=control.hopeless,
            enter=self._enter,
            look=self._look,
            tell=self._tell,
            release=self._release,
        )
        try:
            self.reserve(1)
        except BaseException:
            self._watchdog.close()
            raise

    @property
    def window_bytes(self) -> int:
        """Of this rank's window, both halves."""
        return 0 if self._block is None else 2 * self._block.half_bytes

    def _ends(self) -> tuple[object, ...]:
        """Equal for transports of the same group, all of whose ranks make and close them alike."""
        return type(self), tuple(self._members), self._position

    @property
    def _value(self) -> int:
        """What the flags of this call hold."""
        return self._epoch << 32 | self._identity

    @property
    def _nbytes(self) -> int:
        return 0 if self._memory is None else self._memory.nbytes

    def reserve(self, nbytes: int) -> None:
        """As ``OneSided.reserve``. Makes new memory only where a half of the present one is too small. Waits for the
        GPU, and, as every call that may, raises ValueError while a CUDA graph is being captured."""
        self._usable()
        self._not_captured()
        if self._block is not None and nbytes <= self._block.half_bytes:
            return
        block = Block(ranks=len(self._members), half_bytes=grown(nbytes, _STEP))
        earlier = [window for window in _kept if window._ends() == self._ends()]
        going = [window for window in (self, *earlier) if window._memory is not None]
        refusal = self._still(going) or self._no_room(block.nbytes, sum(window._nbytes for window in going))
        said = self._control.gather(f"{self.name} window", [block.half_bytes, len(going), refusal])
        self._raise_together([text for *_, text in said])
        if len({(size, count) for size, count, _ in said}) > 1:
            self._raise_together(
                [f"wants {size} bytes and lets go of {count} windows, others do not" for size, count, _ in said]
            )
        # Every rank has come, and none has anything on its way: the memory of earlier windows may go.
        self._block = None
        _drop([self, *earlier])
        if going:
            self._control.gather(f"{self.name} let go", None)  # what a peer still maps is not free
        try:
            with torch.inference_mode(False):  # the watchdog and later calls write into it, in whatever mode
                memory = self._allocate(block.nbytes)
                memory[: block.head_bytes].zero_()
                self._poison_of(memory).fill_(1)
                self._seen = torch.empty(block.head_bytes, dtype=torch.uint8, pin_memory=memory.is_cuda)
            torch.cuda.synchronize()
        except Exception as error:
            refusal = f"no memory of {block.nbytes} bytes that peers can write to: {error}"
        self._raise_together(self._control.gather(f"{self.name} memory", refusal))
        self._block, self._memory = block, memory
        self._base = memory.data_ptr()
        self._staging = Staging(block.half_bytes)

    def begin(self) -> torch.Tensor:
        """As ``OneSided.begin``: the next epoch, with its half of the window. Waits for the call before the last."""
        self._usable()
        self._not_captured()
        assert self._block is not None and self._memory is not None
        self.drain()  # where something else ended the last call
        self._epoch += 1
        self._ended[self._epoch % 2].synchronize()
        self._usable()
        torch.cuda.current_stream().wait_event(self._ended[1 - self._epoch % 2])  # where the caller has changed streams
        self._sent = dict.fromkeys(self._peers, 0)
        self._due = dict.fromkeys(self._peers, 0)
        self._staging.restart()
        self._running = True
        start = self._block.half(self._epoch)
        return self._memory[start : start + self._block.half_bytes]

    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        """Puts start once the current stream has come to this point."""
        self._usable()
        with self._fatal(f"round {round} could not be enqueued"):
            if sends:
                ready = torch.cuda.current_stream().record_event()
                for stream in self._puts:
                    stream.wait_event(ready)
            for parcel in sends:
                self._send(parcel)
        chunks = []
        for parcel in receives:
            chunks.append((parcel.peer, self._due[parcel.peer]))
            self._due[parcel.peer] += 1
        return _Arrival(self, round, tuple(chunks))

    def wait(self, round: int, chunks: tuple[tuple[int, int], ...]) -> None:
        """The current stream goes on once these chunks, as (peer, number), are here. Returns at once."""
        self._usable()
        assert self._block is not None
        awaited = Awaited(self._epoch, round, chunks, value=self._value)
        self._watchdog.watch(awaited)
        with self._fatal(f"the wait of round {round} could not be enqueued", awaited):
            for peer, number in chunks:
                flag = self._base + self._block.flag(peer, number, self._epoch)
                self._wait(peer, flag, self._value, self._waits.cuda_stream)
            here = self._waits.record_event()
            awaited.done = here.query
            torch.cuda.current_stream().wait_event(here)

    def drain(self) -> None:
        """The current stream goes on once all sends have left. Returns at once; the watchdog bounds it."""
        if not self._running:
            return
        self._usable()
        self._running = False
        awaited = Awaited(self._epoch)
        self._watchdog.watch(awaited)
        with self._fatal("the end of a call could not be enqueued", awaited):
            for stream in self._puts:
                torch.cuda.current_stream().wait_event(stream.record_event())
            ended = self._end_here()
            awaited.done = ended.query
        self._held.clear()

    def unavailable_reason(self) -> str | None:
        """As ``OneSided.unavailable_reason``: ranks capture their graphs alike."""
        return f"a CUDA graph is being captured, and the flags of {self.name} count calls" if captures() else None

    def poison(self, result: torch.Tensor) -> None:
        """As ``OneSided.poison``: one kernel, times 1 or times NaN."""
        assert self._memory is not None
        result.mul_(self._poison_of(self._memory))
        if not self._running:
            self._end_here()

    def close(self) -> None:
        """Peers that wait for this rank fail, where a call is not complete."""
        if self._closed:
            return
        self._closed = True
        who = f"rank {self._members[self._position]}"
        if self._running:
            self._watchdog.fail(TransportError(f"{who}: gave up in call {self._epoch} over {self.name}"))
        self._watchdog.close()
        _kept.append(self)

    # -- what a subclass adds -----------------------------------------------------------------------------------------

    @abstractmethod
    def _allocate(self, nbytes: int) -> torch.Tensor:
        """Memory of this rank that its peers can write to, uint8 [nbytes], the same size on every rank. Collective. May
        raise anything."""

    @abstractmethod
    def _free(self) -> None:
        """Let go of it. Collective."""

    @property
    @abstractmethod
    def _reachable(self) -> Sequence[int]:
        """The other positions to whose memory this rank can write: its peers, and those that use what they compute."""

    @abstractmethod
    def _mapped(self, peer: int) -> bool:
        """Whether this GPU can write to the peer's memory itself, so that any memory may be the source of a put."""

    @abstractmethod
    def _put(self, peer: int, offset: int, source: int, nbytes: int, stream: int) -> None:
        """Bytes from the address ``source`` to ``offset`` in the peer's block, in stream order."""

    @abstractmethod
    def _put_and_raise(
        self, peer: int, offset: int, source: int, nbytes: int, flag: int, value: int, stream: int
    ) -> None:
        """As ``_put``, and then ``value`` at the offset ``flag``; 0 bytes: only that."""

    @abstractmethod
    def _wait(self, peer: int, address: int, value: int, stream: int) -> None:
        """The stream goes on once the flag of ``peer`` at this local address is ``value``."""

    # -- sends --------------------------------------------------------------------------------------------------------

    def _send(self, parcel: Parcel) -> None:
        assert self._block is not None
        number = self._sent[parcel.peer]
        if number == CHUNKS:
            raise RuntimeError(f"a call sends more than {CHUNKS} chunks to rank {self._members[parcel.peer]}")
        self._sent[parcel.peer] += 1
        stream = self._stream_of[parcel.peer]
        self._held.append(parcel)
        self._put_and_raise(
            parcel.peer,
            self._block.half(self._epoch) + parcel.offset,
            self._source(parcel, stream) if parcel.nbytes else 0,
            parcel.nbytes,
            self._block.flag(self._position, number, self._epoch),
            self._value,
            stream.cuda_stream,
        )

    def _source(self, parcel: Parcel, stream: torch.cuda.Stream) -> int:
        """Address of the chunk in one piece: where it lies, if it can be sent from there, else packed by ``stream``."""
        assert self._block is not None and self._memory is not None
        first = parcel.parts[0]
        if len(parcel.parts) == 1 and first.dtype == parcel.dtype and first.is_contiguous():
            inside = self._base <= first.data_ptr() < self._base + self._block.nbytes
            if inside or self._mapped(parcel.peer):
                return first.data_ptr()
        at, over = self._staging.take(parcel.nbytes)
        if over:
            left = [each.record_event() for each in self._puts]
            for each in self._puts:
                for event in left:
                    each.wait_event(event)
        at += self._block.staging
        with torch.cuda.stream(stream):
            parcel.write(window_view(self._memory, at, parcel.shape, parcel.dtype))
        return self._base + at

    def _end_here(self) -> torch.cuda.Event:
        ended = _new_event()
        ended.record()
        self._ended[self._epoch % 2] = ended
        return ended

    # -- failure ------------------------------------------------------------------------------------------------------

    def _usable(self) -> None:
        if self._watchdog.error is not None:
            raise self._watchdog.error
        if self._closed:
            who = f"rank {self._members[self._position]}"
            raise TransportError(f"{who}: the {self.name} transport was closed; no call may follow")

    def _not_captured(self) -> None:
        if captures():
            raise ValueError(
                f"attention over {self.name} cannot be captured in a CUDA graph, since its flags count calls; capture "
                f"without it, or use --sp-transport two_sided"
            )

    @contextlib.contextmanager
    def _fatal(self, what: str, awaited: Awaited | None = None) -> Iterator[None]:
        """Whatever is raised inside ends the transport."""
        try:
            yield
        except BaseException as error:
            if awaited is not None and awaited.done is None:
                awaited.done = lambda: True  # it was never enqueued
            failure = TransportError(f"rank {self._members[self._position]}: {what} ({self.name}): {error}")
            self._watchdog.fail(failure)
            if not isinstance(error, Exception):
                raise
            raise failure from error

    def _raise_together(self, refusals: Sequence[str | None]) -> None:
        raise_together(self.name, self._members, refusals)

    def _enter(self) -> None:
        """The watchdog's thread begins."""
        torch.cuda.set_device(self._device)
        self._driver.allow_queries_during_capture()

    def _look(self) -> Seen | None:
        block, memory = self._block, self._memory
        if block is None or memory is None:
            return None
        with torch.cuda.stream(self._rescue):
            self._seen.copy_(memory[: block.head_bytes], non_blocking=True)
        if not _done(self._rescue.record_event(), _TELL_S):
            return None
        numbers = self._seen[block.flags : block.flags + 8 * 2 * CHUNKS * block.ranks].view(torch.int64)
        poison = float(self._poison_of(self._seen))
        return Seen(numbers.view(block.ranks, 2, CHUNKS).tolist(), gave_up=poison != poison)

    def _tell(self, suspects: Sequence[int]) -> None:
        """By memory operations and copies alone: a kernel might have to wait for a stuck one."""
        if self._block is None:
            return
        word = self._base + self._block.poison
        self._driver.write_32(word, _NAN, self._rescue.cuda_stream)
        self._telling.wait_event(self._rescue.record_event())
        for peer in sorted(self._reachable, key=lambda peer: (not self._mapped(peer), peer in suspects)):
            self._put(peer, self._block.poison, word, 4, self._telling.cuda_stream)
        # Puts over a network are served in order: whoever has not heard by then hears before anything sent later.
        _done(self._telling.record_event(), _TELL_S)

    def _release(self, stuck: Sequence[Awaited]) -> None:
        assert self._block is not None
        for awaited in stuck:
            for peer, number in awaited.chunks:
                address = self._base + self._block.flag(peer, number, awaited.epoch)
                self._driver.write_64(address, awaited.value, self._rescue.cuda_stream)

    def _still(self, windows: Sequence[DeviceWindow]) -> str | None:
        """Wait until nothing of this rank is on its way, nor of its earlier transports; else why not."""
        deadline = time.monotonic() + self._timeout_s
        while not all(window._watchdog.idle for window in windows) and time.monotonic() < deadline:
            time.sleep(1e-3)
        streams = [torch.cuda.current_stream()]
        for window in windows:
            streams += [*window._puts, window._waits, window._rescue, window._telling]
        for event in [stream.record_event() for stream in streams]:
            if not _done(event, deadline - time.monotonic()):
                return f"its GPU was not done after {self._timeout_s:g} s"
        return str(self._watchdog.error) if self._watchdog.error else None

    def _no_room(self, nbytes: int, going: int) -> str | None:
        """Why this GPU cannot hold that much when ``going`` bytes of other windows are gone; None where it can."""
        needed = self._sharing * self._footprint(nbytes, going)
        if torch.cuda.mem_get_info()[0] < needed:
            torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        return None if free >= needed else f"the GPU has {free} bytes left, and a window needs {needed} more"

    def _footprint(self, nbytes: int, going: int) -> int:
        """By how much the memory of this process grows."""
        return nbytes - going

    @staticmethod
    def _poison_of(memory: torch.Tensor) -> torch.Tensor:
        """A float32 scalar."""
        return memory[Block.poison : Block.poison + 4].view(torch.float32)[0]


_kept: list[DeviceWindow] = []  # closed, with memory into which a peer may still write


def let_go(control: ControlPlane, members: Sequence[int], position: int) -> bool:
    """Free the memory of closed transports of a group, whatever their kind; False where some rank is not done with it,
    and it stays. Collective."""
    mine = [window for window in _kept if window._ends()[1:] == (tuple(members), position)]
    if mine and any(control.gather("windows", mine[0]._still(mine))):
        return False
    _drop(mine)
    return True


def _drop(windows: Sequence[DeviceWindow]) -> None:
    """Their memory goes. Collective; nothing is on its way."""
    for window in windows:
        if window._memory is not None:
            window._memory = None
            window._free()
    _kept[:] = [window for window in _kept if window not in windows]


class _Arrival(Ticket):
    def __init__(self, transport: DeviceWindow, round: int, chunks: tuple[tuple[int, int], ...]) -> None:
        self._transport = transport
        self._round = round
        self._chunks = chunks

    def wait(self) -> None:
        chunks, self._chunks = self._chunks, ()
        if chunks:
            self._transport.wait(self._round, chunks)


def _new_event() -> torch.cuda.Event:
    """One for which a host waits without spinning."""
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def _done(event: torch.cuda.Event, limit_s: float) -> bool:
    """Whether it comes within the limit."""
    deadline = time.monotonic() + limit_s
    while not event.query():  # type: ignore[no-untyped-call]
        if time.monotonic() >= deadline:
            return False
        time.sleep(1e-3)
    return True
