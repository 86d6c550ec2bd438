"""The flag protocol of one-sided transports (``transport/cpu/shm.py``, ``transport/gpu/device.py``), model-checked in
every interleaving of small groups.

The model turns each rank's real schedule, for four calls in a row, into a list of operations on shared memory. Variants
alternate attention calls with all-to-alls (``all_to_all.py``), or use calls of other shapes with other offsets. Each
region and each flag has one writer, so the progress of each rank determines the state of the memory.
"""

from __future__ import annotations

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


# -- over a fabric without ordering -----------------------------------------------------------------------------------


def explore_unordered(programs, flags, parity=2):
    """As ``explore``, but puts are asynchronous. A chunk and its flag arrive at any time before the rank's next Drain
    ends, in any order with other chunks of the pair. ``flags="equal"``: one flag per chunk of a call and ``parity``;
    a wait expects exactly this call's value. ``flags="counter"``: one flag per pair; a chunk sets it to its number."""
    puts, number_of = [], []  # by rank and operation: (peer, region) of a put, and its number among puts to the peer
    for operations in programs:
        counted = dict.fromkeys(range(len(programs)), 0)
        puts.append({at: (op.peer, op.region) for at, op in enumerate(operations) if isinstance(op, Write)})
        number_of.append({})
        for at, (peer, _) in puts[-1].items():
            counted[peer] += 1
            number_of[-1][at] = counted[peer]
    put_at = [{(puts[w][at][0], number): at for at, number in number_of[w].items()} for w in range(len(programs))]
    flag_of = []  # by rank and operation: the flag of a put, as (peer, number in its call, parity of the call)
    for w, operations in enumerate(programs):
        in_call = Counter()
        flag_of.append({})
        for at, (peer, _) in puts[w].items():
            epoch = operations[at].epoch
            flag_of[w][at] = peer, in_call[peer, epoch], epoch % parity
            in_call[peer, epoch] += 1

    def arrived(at, in_flight, w, put):
        return put < at[w] and (w, put) not in in_flight

    def ready(state, w, op):
        at, in_flight, counters = state
        if isinstance(op, Drain):
            return not any(writer == w for writer, _ in in_flight)
        if not isinstance(op, Wait):
            return True
        if flags == "counter":
            return dict(counters).get((op.peer, w), 0) >= op.count
        put, flag = put_at[op.peer][w, op.count], flag_of[op.peer]
        later = [other for other in flag if other > put and flag[other] == flag[put]]  # overwrite the flag
        return arrived(at, in_flight, op.peer, put) and not any(
            arrived(at, in_flight, op.peer, other) for other in later
        )

    def fault(state, w, op):
        at, in_flight, _ = state
        for region in op.regions if isinstance(op, Read) else ():
            started = [put for put, to in puts[region.writer].items() if to == (w, region) and put < at[region.writer]]
            complete = all((region.writer, put) not in in_flight for put in started)
            if not started or not complete or programs[region.writer][started[-1]].epoch != op.epoch:
                return f"rank {w} reads {region} of call {op.epoch}: its started writes are {started}, {complete=}"
        return None

    def step(state):
        at, in_flight, counters = state
        following = []
        for w, operations in enumerate(programs):
            if at[w] == len(operations) or not ready(state, w, op := operations[at[w]]):
                continue
            if found := fault(state, w, op):
                return [], found
            after = in_flight | {(w, at[w])} if isinstance(op, Write) else in_flight
            following.append(((*at[:w], at[w] + 1, *at[w + 1 :]), after, counters))
        for w, put in in_flight:
            counted = dict(counters)
            if flags == "counter":
                counted[w, puts[w][put][0]] = number_of[w][put]
            following.append((at, in_flight - {(w, put)}, tuple(sorted(counted.items()))))
        if not following and any(x < len(operations) for x, operations in zip(at, programs, strict=True)):
            return [], f"deadlock at {at}"
        return following, None

    return search(((0,) * len(programs), frozenset(), ()), step)


SMALL = ["two machines", "ulysses inside", "ring of two", "ring of three"]


def explored_unordered(group, flags, parity=2, **faults):
    layout, chunking = GROUPS[group]
    programs = [program(layout, w, chunking, drains=True, epochs=3, **faults) for w in range(layout.world_size)]
    return explore_unordered([[op for op in each if not isinstance(op, Raise)] for each in programs], flags, parity)


@pytest.mark.parametrize("group", SMALL)
def test_one_flag_per_chunk_is_safe_without_ordering(group):
    visited, fault = explored_unordered(group, "equal")
    assert fault is None and visited > 50


@pytest.mark.parametrize("group", SMALL)
def test_one_flag_for_both_parities_is_unsafe(group):
    """A late wait would find the value of the next call and never end."""
    assert "deadlock" in explored_unordered(group, "equal", parity=1)[1]


@pytest.mark.parametrize("group", ["two machines", "ulysses inside"])
def test_a_counter_is_unsafe(group):
    """When several chunks of a pair are in flight at once."""
    fault = explored_unordered(group, "counter")[1]
    assert "started writes" in fault or "deadlock" in fault


@pytest.mark.parametrize("group", SMALL)
def test_one_half_is_unsafe_without_ordering(group):
    assert "started writes" in explored_unordered(group, "equal", halves=1)[1]
