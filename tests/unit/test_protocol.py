"""The flag protocol of one-sided transports (``transport/cpu/shm.py``, ``transport/gpu/device.py``), model-checked in
every interleaving of small groups.

The model turns each rank's real schedule, for four calls in a row, into a list of operations on shared memory. Variants
alternate attention calls with all-to-alls (``all_to_all.py``), or use calls of other shapes with other offsets. Each
region and each flag has one writer, so the progress of each rank determines the state of the memory.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import NamedTuple

import pytest

from sf_xfuser.layout.plan import Layout
from sf_xfuser.layout.schedule import Chunking, Exchange, Piece, build_schedule

EPOCHS = 4
ALL_TO_ALL = "all-to-all"


class Region(NamedTuple):
    """The memory of one chunk in a window."""

    half: int
    tensor: str
    pieces: tuple[Piece, ...]
    writer: int
    shape: int

    @property
    def kind(self) -> tuple[bool, int]:
        """Regions of calls of different kinds may overlap."""
        return self.tensor == ALL_TO_ALL, self.shape


@dataclass(frozen=True)
class Write:
    """Start to write a chunk on ``peer``. The next operation completes it."""

    peer: int
    region: Region
    epoch: int = field(compare=False)


@dataclass(frozen=True)
class Raise:
    """Add ``chunks`` to the flag on ``peer``: all chunks of one round at once."""

    peer: int
    chunks: int = 1


@dataclass(frozen=True)
class Wait:
    """Wait until the local flag of ``peer`` is at least ``count``."""

    peer: int
    count: int


@dataclass(frozen=True)
class Drain:
    """Wait until all puts have arrived: the end of a call with asynchronous puts."""


@dataclass(frozen=True)
class Read:
    """Read the chunks written into ``regions`` in ``epoch``."""

    regions: tuple[Region, ...]
    epoch: int


def program(
    layout,
    position,
    chunking,
    *,
    halves=2,
    links=("inside", "across"),
    short=0,
    silent=(),
    mixed=False,
    changing=False,
    syncs=True,
    flag_first=False,
    drains=False,
    epochs=EPOCHS,
):
    """The operations of attention.py on one rank, for the ``links`` in shared memory. Other links deliver at once.
    ``mixed``: every second call is all_to_all.py. ``changing``: calls alternate between three shapes. ``drains``: calls
    end with a Drain.

    Injected faults: another number of ``halves``; ``short``: every wait expects that many chunks too few; ``silent``:
    (sender, receiver) pairs that raise no flag; ``flag_first``: a round raises its flag before it writes its chunks;
    ``syncs=False``: all-to-alls do not flag ring neighbours, and ranks do not synchronize in ``Mesh.begin``."""
    schedule = build_schedule(layout, position, chunking=chunking)
    operations: list[Write | Raise | Wait | Read | Drain] = []
    due = dict.fromkeys(range(layout.world_size), 0)

    def call(epoch):
        arriving: dict[tuple, tuple] = {}  # (tensor, piece) -> (peer, expected flag, region)
        outputs = []

        def region_of(message, writer):
            return Region(epoch % halves, message.tensor, message.pieces, writer, epoch % 3 if changing else 0)

        def wait_for(chunks):
            operations.extend(Wait(peer, count - short) for peer, count, _ in chunks)
            if chunks:
                operations.append(Read(tuple(region for _, _, region in chunks), epoch))

        def use(tensor, pieces):
            return list(dict.fromkeys(arriving[tensor, piece] for piece in pieces if (tensor, piece) in arriving))

        for step in schedule.steps:
            if not isinstance(step, Exchange):
                wait_for(use("q", step.queries) + use("kv", step.keys))
                continue
            if step.link not in links:
                continue
            for message in step.sends:
                if message.tensor != "o" and layout.head_group(message.peer) == layout.head_group(position):
                    wait_for(use(message.tensor, message.pieces))  # a ring forwards received chunks
            for peer, messages in groupby(step.sends, key=lambda message: message.peer):
                if (position, peer) in silent:
                    continue
                regions = [region_of(message, position) for message in messages]
                count = Raise(peer, len(regions))
                written = [Write(peer, region, epoch) for region in regions]
                operations.extend([count, *written] if flag_first else [*written, count])
            for message in step.receives:
                if (message.peer, position) in silent:
                    continue
                due[message.peer] += 1
                chunk = (message.peer, due[message.peer], region_of(message, message.peer))
                if message.tensor == "o":
                    outputs.append(chunk)
                else:
                    arriving.update({(message.tensor, piece): chunk for piece in message.pieces})
        wait_for(outputs)
        if drains:
            operations.append(Drain())

    def peers(with_ring):
        found = sorted({*layout.ulysses_group(position), *(layout.ring_group(position) if with_ring else ())})
        here = [peer for peer in found if "across" in links or layout.machine(peer) == layout.machine(position)]
        return [peer for peer in here if peer != position]

    def synchronize(group):
        operations.extend(Raise(peer) for peer in group)
        for peer in group:
            due[peer] += 1
        operations.extend(Wait(peer, due[peer] - short) for peer in group)

    def all_to_all(epoch):
        def region(writer):
            return Region(epoch % halves, ALL_TO_ALL, (), writer, 0)

        group = peers(with_ring=syncs)
        for peer in group:
            operations.append(Write(peer, region(position), epoch))
            operations.append(Raise(peer))
            due[peer] += 1
        operations.extend(Wait(peer, due[peer] - short) for peer in group)
        operations.append(Read(tuple(region(peer) for peer in group), epoch))

    for epoch in range(1, epochs + 1):
        if halves == 1 and syncs and (mixed or changing):
            synchronize(peers(with_ring=True))
        (all_to_all if mixed and epoch % 2 == 0 else call)(epoch)
    return operations


def flag_increment(op, peer):
    """Increment of the flag on ``peer`` by an operation."""
    return op.chunks if isinstance(op, Raise) and op.peer == peer else 0


def search(start, step):
    """Visit all states reachable from ``start``. ``step(state)``: (following states, fault or None). Returns (states
    visited, fault or None)."""
    seen, todo = {start}, [start]
    while todo:
        following, fault = step(todo.pop())
        if fault:
            return len(seen), fault
        for state in following:
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return len(seen), None


def explore(programs):
    """``search`` over every interleaving. A state is the number of completed operations of each rank."""
    # raised[w][peer][n]: the flag of w on peer after n operations.
    raised = [
        [list(accumulate((flag_increment(op, peer) for op in operations), initial=0)) for peer in range(len(programs))]
        for operations in programs
    ]
    # The operation that writes each chunk, and the last one that reads chunks of each kind and epoch.
    writes: list[dict[Write, list[tuple[int, int]]]] = [{} for _ in programs]
    last_read: list[dict[tuple[tuple[bool, int], int, int], int]] = [{} for _ in programs]
    for w, operations in enumerate(programs):
        for at, op in enumerate(operations):
            if isinstance(op, Write):
                writes[w].setdefault(op, []).append((at, op.epoch))
            elif isinstance(op, Read):
                last_read[w][op.regions[0].kind, op.regions[0].half, op.epoch] = at

    def fault(state, w, op):
        if isinstance(op, Write):
            for (other, half, epoch), at in last_read[op.peer].items():
                if other != op.region.kind and half == op.region.half and epoch < op.epoch and state[op.peer] <= at:
                    return f"rank {w} starts to write {op.region} while rank {op.peer} reads it"
        for region in op.regions if isinstance(op, Read) else ():
            started = [x for x in writes[region.writer][Write(w, region, 0)] if x[0] < state[region.writer]]
            if not started or started[-1][1] != op.epoch or state[region.writer] < started[-1][0] + 2:
                return f"rank {w} reads {region} of call {op.epoch}: its started writes are {started}"
        return None

    def step(state):
        following = []
        for w, operations in enumerate(programs):
            if state[w] == len(operations):
                continue
            op = operations[state[w]]
            if isinstance(op, Wait) and raised[op.peer][w][state[op.peer]] < op.count:
                continue
            if found := fault(state, w, op):
                return [], found
            following.append((*state[:w], state[w] + 1, *state[w + 1 :]))
        if not following and any(n < len(operations) for n, operations in zip(state, programs, strict=True)):
            return [], f"deadlock at {state}"
        return following, None

    return search((0,) * len(programs), step)


GROUPS = {
    "two machines": (Layout(torus=2, ulysses=1, ring_across=1, ring_inside=1), Chunking(kv_parts=1, last_kv_parts=2)),
    "ulysses inside": (Layout(torus=1, ulysses=2, ring_across=1, ring_inside=1), Chunking()),
    "ring of two": (Layout(torus=1, ulysses=1, ring_across=1, ring_inside=2), Chunking()),
    "three machines": (Layout(torus=3, ulysses=1, ring_across=1, ring_inside=1), Chunking()),
    "ulysses of three": (Layout(torus=1, ulysses=3, ring_across=1, ring_inside=1), Chunking()),
    "ring of three": (Layout(torus=1, ulysses=1, ring_across=1, ring_inside=3), Chunking()),
    "ring across three": (
        Layout(torus=1, ulysses=1, ring_across=3, ring_inside=1),
        Chunking(kv_parts=2, last_kv_parts=2),
    ),
    "ulysses and ring": (Layout(torus=1, ulysses=2, ring_across=1, ring_inside=2), Chunking()),
    "two machines unstaged": (
        Layout(torus=2, ulysses=1, ring_across=1, ring_inside=1),
        Chunking(granularity="unstaged"),
    ),
    "ring unstaged": (Layout(torus=1, ulysses=1, ring_across=1, ring_inside=3), Chunking(granularity="unstaged")),
}


def explored(group, **faults):
    layout, chunking = GROUPS[group]
    return explore([program(layout, w, chunking, **faults) for w in range(layout.world_size)])


@pytest.mark.parametrize("group", GROUPS)
def test_two_halves_and_no_barrier_are_safe(group):
    visited, fault = explored(group)
    assert fault is None and visited > 50


# Without a ring, an unstaged call reads its inputs before it sends outputs, so a single half would be safe.
@pytest.mark.parametrize("group", [name for name in GROUPS if name != "two machines unstaged"])
def test_one_half_is_unsafe(group):
    assert "started writes" in explored(group, halves=1)[1]


def inside_a_machine(layout, chunking=Chunking(kv_parts=2, last_kv_parts=2), **faults):  # noqa: B008
    machine = range(layout.ranks_per_machine)
    return explore([program(layout, w, chunking, links=["inside"], **faults) for w in machine])


@pytest.mark.parametrize("torus", [2, 3, 4])
@pytest.mark.parametrize("ulysses", [2, 3])
@pytest.mark.parametrize(
    "chunking", [Chunking(kv_parts=2, last_kv_parts=2), Chunking(granularity="unstaged")], ids=["staged", "unstaged"]
)
def test_one_half_is_enough_inside_machines_without_a_ring(torus, ulysses, chunking):
    layout = Layout(torus=torus, ulysses=ulysses, ring_across=1, ring_inside=1)
    visited, fault = inside_a_machine(layout, chunking, halves=1)
    assert fault is None and visited > 50


def test_one_half_is_not_enough_on_a_single_machine():
    assert "started writes" in inside_a_machine(GROUPS["ulysses inside"][0], halves=1)[1]


@pytest.mark.parametrize("ulysses", [2, 3])
@pytest.mark.parametrize("other", ["mixed", "changing"])
@pytest.mark.parametrize(
    "chunking", [Chunking(kv_parts=2, last_kv_parts=2), Chunking(granularity="unstaged")], ids=["staged", "unstaged"]
)
def test_with_one_half_ranks_synchronize_before_a_call_of_another_kind(ulysses, other, chunking):
    layout = Layout(torus=2, ulysses=ulysses, ring_across=1, ring_inside=1)
    visited, fault = inside_a_machine(layout, chunking, halves=1, **{other: True})
    assert fault is None and visited > 50
    assert "while rank" in inside_a_machine(layout, chunking, halves=1, **{other: True}, syncs=False)[1]


@pytest.mark.parametrize("group", GROUPS)
def test_a_wait_for_too_few_chunks_is_detected(group):
    assert "started writes" in explored(group, short=1)[1]


@pytest.mark.parametrize("group", GROUPS)
def test_a_flag_before_its_chunks_is_detected(group):
    assert "started writes" in explored(group, flag_first=True)[1]


def test_empty_chunks_must_raise_their_flags():
    """Rank 0 sends to rank 1, which sends empty chunks. Only their flags show rank 0 the progress of rank 1."""
    assert "started writes" in explored("ring of two", silent={(1, 0)})[1]


@pytest.mark.parametrize("other", ["mixed", "changing"])
@pytest.mark.parametrize("group", GROUPS)
def test_alternating_kinds_of_calls_are_safe(group, other):
    visited, fault = explored(group, **{other: True})
    assert fault is None and visited > 50


def test_all_to_alls_must_flag_ring_neighbours():
    assert "started writes" in explored("ulysses and ring", mixed=True, syncs=False)[1]


# -- on a GPU ---------------------------------------------------------------------------------------------------------


class Flag(NamedTuple):
    """A flag of ``writer`` on ``reader``. ``number``: of the round in its call, or "ready"."""

    reader: int
    writer: int
    number: int | str
    parity: int = 0


@dataclass(frozen=True)
class GpuCall:
    """``kind``: "host"; "replay", of a graph that the host begins; or "graph", of a user, whose ``parity`` and
    ``identity`` are fixed. ``meets``: whether the call starts with a meeting."""

    kind: str
    parity: int
    identity: int
    meets: bool = False


@dataclass(frozen=True)
class Put:
    """Start a round: chunks, then the flag. They arrive at any time before the rank's next drain ends."""

    flag: Flag
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Await:
    """Wait for flags. ``after``: the operation that must be complete before the stream of waits does this. None: the
    compute stream itself waits."""

    flags: tuple[Flag, ...]
    exact: bool
    after: int | None


@dataclass(frozen=True)
class Check:
    """Poison this rank if a flag does not match, with ``compare``. Then reset the flags."""

    flags: tuple[Flag, ...]
    compare: bool = True


@dataclass(frozen=True)
class GpuRead:
    regions: tuple[Region, ...]


class End:
    """The result of a call is used, unless this rank is poisoned."""


class GpuOp(NamedTuple):
    call: int
    op: Put | Await | Check | GpuRead | Drain | End


def calls_of(kinds, parity_of_graphs=1):
    """The calls of these kinds, in order. Every call from the first "graph" on meets."""
    calls: list[GpuCall] = []
    for n, kind in enumerate(kinds, start=1):
        graph = kind == "graph"
        meets = graph or any(call.meets for call in calls)
        calls.append(GpuCall(kind, parity_of_graphs if graph else n % 2, 100 if graph else n, meets))
    return calls


def gpu_programs(layout, chunking, calls_by_rank, faults=()):
    """The operations of each rank on its compute stream: those of ``program``, with a flag for each round."""
    ranks = range(layout.world_size)
    of_shm = [program(layout, w, chunking, drains=True, epochs=len(calls_by_rank[w])) for w in ranks]
    rounds = {(w, peer): [] for w in ranks for peer in ranks}  # (chunks so far, epoch, number in its call)
    for w in ranks:
        epoch, numbers, chunks = 0, Counter(), Counter()
        for op in of_shm[w]:
            epoch = op.epoch if isinstance(op, Write) else epoch
            if isinstance(op, Raise):
                chunks[op.peer] += op.chunks
                rounds[w, op.peer].append((chunks[op.peer], epoch, numbers[op.peer, epoch]))
                numbers[op.peer, epoch] += 1
    return [_gpu_program(w, of_shm[w], rounds, layout, calls_by_rank[w], faults) for w in ranks]


def _gpu_program(w, operations, rounds, layout, calls, faults):
    made: list[GpuOp] = []
    peers = sorted({*layout.ulysses_group(w), *layout.ring_group(w)} - {w})
    ends: list[int] = []
    number, written, awaited, put = 0, [], [], Counter()

    def flag(reader, writer, n):
        return Flag(reader, writer, n, 0 if "one parity" in faults else calls[number].parity)

    def add(op):
        made.append(GpuOp(number, op))

    def begin():
        call, expected = calls[number], []
        for peer in peers:
            expected += [flag(w, peer, n) for _, epoch, n in rounds[peer, w] if epoch == number + 1]
        if "reset too early" in faults:
            add(Check(tuple(expected), compare=False))
        if call.meets and "no meeting" not in faults and f"no meeting of the {call.kind}" not in faults:
            ready = tuple(Flag(w, peer, "ready") for peer in peers)
            for peer in peers:
                add(Put(Flag(peer, w, "ready"), ()))
            after = -1 if "meeting out of order" in faults else len(made)
            add(Await(ready, exact=False, after=after if call.kind == "host" else None))
            add(Check(ready, compare=False))
        return call, expected

    def wait(flags):
        call = calls[number]
        fresh = tuple(f for f in flags if f not in awaited)
        if not fresh:
            return
        awaited.extend(fresh)
        if call.kind == "host":  # the host is at most two calls ahead
            add(Await(fresh, exact="any flag" not in faults, after=ends[number - 2] if number >= 2 else -1))
        else:
            add(Await(fresh, exact=False, after=None))
            add(Check(fresh, "no check in graphs" not in faults))

    call, expected = begin()
    flags: list[Flag] = []
    for op in operations:
        if isinstance(op, Wait):
            _, _, n = next(each for each in rounds[op.peer, w] if each[0] >= op.count)
            flags.append(flag(w, op.peer, n))
            continue
        if flags:
            wait(flags)
            flags = []
        if isinstance(op, Write):
            written.append(op.region._replace(half=0 if "one half" in faults else call.parity))
        elif isinstance(op, Raise):
            add(Put(flag(op.peer, w, put[op.peer]), tuple(written)))
            put[op.peer] += 1
            written = []
        elif isinstance(op, Read):
            add(GpuRead(tuple(r._replace(half=0 if "one half" in faults else call.parity) for r in op.regions)))
        elif isinstance(op, Drain):
            add(op)
            assert set(awaited) == set(expected)
            if call.kind == "host":
                add(Check(tuple(expected)))
            ends.append(len(made))
            add(End())
            number, awaited, put = number + 1, [], Counter()
            if number < len(calls):
                call, expected = begin()
    return made


class GpuState(NamedTuple):
    """``at``: operations that the compute stream of each rank has completed. ``waited``: those before which its stream
    of waits has done all. ``flying``: puts, as (rank, operation). ``early``: those of them with a raised flag.
    ``flags``: value of each that is not 0. ``poisoned``, ``released``: ranks. ``wrong``: (rank, operation) from which
    on its data is wrong. ``lost``: the one of ``flying`` that never arrives."""

    at: tuple[int, ...]
    waited: tuple[int, ...]
    flying: frozenset = frozenset()
    early: frozenset = frozenset()
    flags: frozenset = frozenset()
    poisoned: frozenset = frozenset()
    released: frozenset = frozenset()
    wrong: frozenset = frozenset()
    stopped: int | None = None
    lost: tuple[int, int] | None = None


def explore_gpu(programs, calls_by_rank, faults=(), may_stop=None, watchdogs=False, may_lose=None, stale=()):
    """``search`` over every order of streams, puts and failures. ``may_stop``: a rank that may stop at any point.
    ``watchdogs``: each wait may fail. Otherwise, and if all ranks make the same calls, no result may be NaN. Never may
    a result be wrong and not NaN. ``may_lose``: a rank, of which one put may never arrive. ``stale``: flags, with
    values, before the first call."""
    puts: dict[tuple[int, Region], list[int]] = {}
    for w, operations in enumerate(programs):
        for at, (_, op) in enumerate(operations):
            for region in op.regions if isinstance(op, Put) else ():
                puts.setdefault((op.flag.reader, region._replace(writer=w)), []).append(at)
    same_calls = len({tuple(call.identity for call in calls) for calls in calls_by_rank}) == 1

    def identity(w, n):
        return calls_by_rank[w][n].identity

    def satisfied(state, w, n, op):
        values = dict(state.flags)
        found = [values.get(flag) for flag in op.flags]
        return w in state.released or all(x is not None and (not op.exact or x == identity(w, n)) for x in found)

    def is_right(state, w, n, region):
        """Whether the region holds the chunk of call ``n``, complete and right."""
        started = [at for at in puts.get((w, region), []) if at < state.at[region.writer]]
        if not started or (region.writer, started[-1]) in state.flying:
            return False
        writer, at = region.writer, started[-1]
        is_wrong = any(rank == writer and at >= since for rank, since in state.wrong)
        return programs[writer][at].call == n and identity(writer, n) == identity(w, n) and not is_wrong

    def raised(state, w, at):
        """The flags after that of a put. Its value is a copy of ``expected`` in graphs."""
        n, op = programs[w][at]
        copied = calls_by_rank[w][n].kind != "host" and "flags by value" not in faults
        value = -1 if copied and w in state.poisoned else identity(w, n)
        flag = op.flag
        if "counter" in faults and flag.number != "ready":
            flag = flag._replace(number=sum(each[:2] == flag[:2] and each[3] == flag[3] for each, _ in state.flags))
        return frozenset({each for each in state.flags if each[0] != flag} | {(flag, value)})

    def compute(state, w):
        """(following state, fault) of the compute stream of a rank, or None if it is blocked."""
        at = state.at[w]
        n, op = programs[w][at]
        after = state._replace(at=(*state.at[:w], at + 1, *state.at[w + 1 :]))
        if isinstance(op, Put):
            return after._replace(flying=state.flying | {(w, at)}), None
        if isinstance(op, Await):
            if op.after is None and satisfied(state, w, n, op):
                return after._replace(waited=(*state.waited[:w], at + 1, *state.waited[w + 1 :])), None
            return (after, None) if state.waited[w] > at else None
        if isinstance(op, Drain):
            return None if any(rank == w for rank, _ in state.flying) and w not in state.released else (after, None)
        if isinstance(op, Check):
            values = dict(state.flags)
            if op.compare and any(values.get(flag) != identity(w, n) for flag in op.flags):
                after = after._replace(poisoned=state.poisoned | {w})
            if "no reset" in faults:
                return after, None
            return after._replace(flags=frozenset(each for each in state.flags if each[0] not in op.flags)), None
        wrong = any(rank == w for rank, _ in state.wrong)
        if isinstance(op, GpuRead):
            if not wrong and not all(is_right(state, w, n, region) for region in op.regions):
                return after._replace(wrong=state.wrong | {(w, at)}), None
            return after, None
        if wrong and w not in state.poisoned:
            return after, f"rank {w} accepts a wrong chunk in call {n}"
        if w in state.poisoned and not watchdogs and same_calls:
            return after, f"the result of rank {w} in call {n} is NaN"
        return after, None

    def waits(state, w):
        """The following state if the stream of waits of a rank can go on, else None."""
        todo = range(state.waited[w], len(programs[w]))
        at = next((i for i in todo if isinstance(programs[w][i].op, Await)), None)
        if at is None:
            return None
        n, op = programs[w][at]
        if op.after is None or state.at[w] <= op.after - (op.after == at) or not satisfied(state, w, n, op):
            return None
        return state._replace(waited=(*state.waited[:w], at + 1, *state.waited[w + 1 :]))

    def step(state):
        if len(state.poisoned) == len(programs):
            return [], None  # every result is NaN from now on
        following = []
        running = [w for w, n in enumerate(state.at) if n < len(programs[w]) and w != state.stopped]
        for w in running:
            done = compute(state, w)
            if done is not None:
                if done[1]:
                    return [], done[1]
                following.append(done[0])
            elif watchdogs:
                if w in state.poisoned and w not in state.released:
                    following.append(state._replace(released=state.released | {w}))
                if w not in state.poisoned:  # its watchdog fails
                    if "release before notification" in faults and w not in state.released:
                        following.append(state._replace(released=state.released | {w}))
                    notified = {w} if "release before peers are notified" in faults else range(len(programs))
                    following.append(state._replace(poisoned=state.poisoned.union(notified)))
            if (after := waits(state, w)) is not None:
                following.append(after)
            if w == may_stop and state.stopped is None:
                following.append(state._replace(stopped=w))
        for put in state.flying - {state.lost}:
            if put[0] == may_lose and state.lost is None:
                following.append(state._replace(lost=put))
            landed = state._replace(flying=state.flying - {put}, early=state.early - {put})
            following.append(landed if put in state.early else landed._replace(flags=raised(state, *put)))
            if "flag first" in faults and put not in state.early:
                following.append(state._replace(early=state.early | {put}, flags=raised(state, *put)))
        if not following and running:
            return [], f"deadlock at {state.at}"
        return following, None

    start = (0,) * len(programs)
    return search(GpuState(at=start, waited=start, flags=frozenset(stale)), step)


def explored_gpu(group, kinds, *faults, parity_of_graphs=1, of_rank_0=None, **failures):
    """``of_rank_0``: other kinds for rank 0. Each rank decides for itself whether to replay a call."""
    layout, chunking = GROUPS[group]
    calls_by_rank = [calls_of(kinds, parity_of_graphs)] * layout.world_size
    calls_by_rank[0] = calls_of(of_rank_0 or kinds, parity_of_graphs)
    programs = gpu_programs(layout, chunking, calls_by_rank, faults)
    return explore_gpu(programs, calls_by_rank, faults, **failures)


ORDERS = [
    ("host", "host", "host"),
    ("host", "replay", "replay"),
    ("host", "graph", "graph"),
    ("graph", "host", "graph"),
    ("graph", "host", "host", "graph"),
    ("replay", "graph", "replay", "host"),
]
PAIRS = ["two machines", "ulysses inside", "ring of two"]


@pytest.mark.parametrize("parity_of_graphs", [0, 1])
@pytest.mark.parametrize("kinds", ORDERS, ids=" ".join)
@pytest.mark.parametrize("group", PAIRS)
def test_calls_and_replays_in_any_order_are_safe(group, kinds, parity_of_graphs):
    visited, fault = explored_gpu(group, kinds, parity_of_graphs=parity_of_graphs)
    assert fault is None and visited > 50


@pytest.mark.parametrize("group", [*PAIRS, "ring of three"])
def test_a_rank_may_replay_calls_that_others_do_not(group):
    visited, fault = explored_gpu(group, ("host", "host", "replay"), of_rank_0=("host", "replay", "host"))
    assert fault is None and visited > 50


@pytest.mark.parametrize("kinds", ORDERS[:3], ids=" ".join)
@pytest.mark.parametrize("group", ["ulysses of three", "ring of three"])
def test_calls_of_three_ranks_are_safe(group, kinds):
    visited, fault = explored_gpu(group, kinds)
    assert fault is None and visited > 50


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        ("no reset", ("replay",) * 3),
        ("no reset", ("graph",) * 3),
        ("reset too early", ("host",) * 3),
        ("reset too early", ("replay",) * 3),
        ("no meeting", ("host", "graph", "graph")),
        ("no meeting of the host", ("host", "graph", "host")),
        ("flag first", ("host",) * 3),
        ("flag first", ("replay",) * 3),
        ("one half", ("host",) * 3),
        ("one parity", ("host",) * 3),
    ],
)
@pytest.mark.parametrize("group", ["ulysses inside", "ring of three"])
def test_faults_of_the_gpu_protocol_are_detected(group, fault, kinds):
    found = explored_gpu(group, kinds, fault)[1]
    assert re.search("accepts a wrong chunk|is NaN|deadlock", found or "")


def test_the_waits_of_a_meeting_must_follow_earlier_calls():
    """Otherwise they may see flags of the meeting before, which are not reset yet."""
    kinds = "graph", "host", "host", "graph"
    assert explored_gpu("ring of two", kinds)[1] is None
    assert "is NaN" in explored_gpu("ring of two", kinds, "meeting out of order")[1]


@pytest.mark.parametrize("kinds", [("host", "host"), ("host", "replay", "graph")], ids=" ".join)
@pytest.mark.parametrize("group", PAIRS)
def test_no_rank_accepts_a_wrong_chunk_after_a_rank_has_stopped(group, kinds):
    visited, fault = explored_gpu(group, kinds, may_stop=0, watchdogs=True)
    assert fault is None and visited > 50
    if group != "two machines":
        assert "accepts" in explored_gpu(group, kinds, "release before notification", may_stop=0, watchdogs=True)[1]


@pytest.mark.parametrize("kinds", [("host",) * 3, ("host", "replay", "graph"), ("graph", "graph")], ids=" ".join)
@pytest.mark.parametrize("group", PAIRS)
def test_no_rank_accepts_a_wrong_chunk_after_a_put_is_lost(group, kinds):
    """A put in flight is undefined memory until its flag is raised, so its chunks arrive in any order and in pieces.
    "flag first": the flag is in one group with its chunks. "counter": the k-th flag says that any k puts arrived."""
    visited, fault = explored_gpu(group, kinds, may_lose=0, watchdogs=True)
    assert fault is None and visited > 50
    assert "deadlock" in explored_gpu(group, kinds, may_lose=0)[1]  # only a watchdog ends the call
    assert "accepts" in explored_gpu(group, kinds, "flag first", may_lose=0, watchdogs=True)[1]
    if kinds[1] == "host" and group != "ring of two":  # which has one round per call
        assert "accepts" in explored_gpu(group, kinds, "counter", may_lose=0, watchdogs=True)[1]


@pytest.mark.parametrize("group", ["ring of two", "ulysses inside"])
def test_peers_are_notified_before_a_failing_rank_releases_its_waits(group):
    """Otherwise it overwrites chunks that a slow peer still reads, with those of the next call in the same half. That
    the flags of these are copies of its poisoned word comes too late."""
    kinds = "graph", "graph"
    assert explored_gpu(group, kinds, watchdogs=True)[1] is None
    assert "accepts" in explored_gpu(group, kinds, "release before peers are notified", watchdogs=True)[1]


@pytest.mark.parametrize("group", [*PAIRS, "ring of three"])
def test_flags_of_an_earlier_use_of_the_window_satisfy_no_wait(group):
    """As left by a rank before a restart, in every word. The calls of the model have other identities than 0."""
    ranks = range(GROUPS[group][0].world_size)
    words = itertools.product(ranks, ranks, range(16), (0, 1))
    stale = [(Flag(*word), 0) for word in words]
    visited, fault = explored_gpu(group, ("host",) * 3, stale=stale)
    assert fault is None and visited > 50
    assert re.search("accepts|is NaN", explored_gpu(group, ("host",) * 3, "any flag", stale=stale)[1])


def grid_program(w, calls, faults):
    """One call of rank w of four, which exchanges a chunk with w ^ 1, and then one that depends on it with w ^ 2."""
    in_graph = calls[0].kind != "host"
    made: list[GpuOp] = []
    for n, peer in enumerate((w ^ 1, w ^ 2)):
        flag, region = Flag(w, peer, 0), Region(0, str(n), (), peer, 0)
        made.append(GpuOp(0, Put(Flag(peer, w, 0), (region._replace(writer=w),))))
        made.append(GpuOp(0, Await((flag,), not in_graph and "any flag" not in faults, None if in_graph else -1)))
        made += [GpuOp(0, Check((flag,), "no check in graphs" not in faults))] if in_graph else []
        made.append(GpuOp(0, GpuRead((region,))))
    made += [] if in_graph else [GpuOp(0, Check((Flag(w, w ^ 1, 0), Flag(w, w ^ 2, 0))))]
    return [*made, GpuOp(0, Drain()), GpuOp(0, End())]


@pytest.mark.parametrize(
    ("kind", "faults"),
    [("host", ["any flag"]), ("replay", ["no check in graphs", "flags by value"])],
    ids=["host", "replay"],
)
def test_no_rank_accepts_a_chunk_that_depends_on_another_call(kind, faults):
    """Rank 0 makes another call. Rank 3 exchanges nothing with it, but its result depends on it."""
    calls, other = [GpuCall(kind, 0, 1)], [GpuCall(kind, 0, 2)]

    def explored(*faults):
        programs = [grid_program(w, calls, faults) for w in range(4)]
        return explore_gpu(programs, [other, calls, calls, calls], faults, watchdogs=kind == "host")

    visited, found = explored()
    assert found is None and visited > 50
    for fault in faults:
        assert "accepts a wrong chunk" in explored(fault)[1]
