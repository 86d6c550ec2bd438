"""Model-checks the flag protocol of the one-sided transports (``transport/cpu/shm.py``, ``transport/gpu/device.py``).

The model runs the real schedule of each rank of a small group for four calls, as a list of operations on shared memory.
Calls may alternate with all-to-alls (``all_to_all.py``), or change shape and so the offsets of chunks. Every reachable
interleaving is visited. Each chunk and each flag has one writer, so the progress of the ranks determines the memory.
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


class Slot(NamedTuple):
    """The memory of one chunk in a window."""

    half: int
    tensor: str
    pieces: tuple[Piece, ...]
    writer: int
    shape: int

    @property
    def kind(self) -> tuple[bool, int]:
        """Slots of two kinds of calls may overlap."""
        return self.tensor == ALL_TO_ALL, self.shape


@dataclass(frozen=True)
class Write:
    """Start writing a chunk on ``peer``. It is complete at the next operation."""

    peer: int
    slot: Slot
    epoch: int = field(compare=False)


@dataclass(frozen=True)
class Raise:
    """Add ``chunks`` to the flag on ``peer``: all chunks of a round at once."""

    peer: int
    chunks: int = 1


@dataclass(frozen=True)
class Await:
    """Wait until the flag of ``peer`` on this rank is at least ``count``."""

    peer: int
    count: int


@dataclass(frozen=True)
class Drain:
    """Wait at the end of a call until all puts have arrived, if puts are asynchronous."""


@dataclass(frozen=True)
class Read:
    """Read the chunks that were written to ``slots`` in ``epoch``."""

    slots: tuple[Slot, ...]
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
    greets=True,
    hasty=False,
    drains=False,
    epochs=EPOCHS,
):
    """The shared-memory operations of attention.py on one rank. ``links``: the links in shared memory; chunks of other
    links arrive at once. ``mixed``: every second call is an all-to-all. ``changing``: calls alternate between three
    shapes. ``drains``: calls end with a Drain.

    Faults: other ``halves``; ``short``: each wait expects this many chunks too few; ``silent``: (sender, receiver)
    pairs that raise no flag; ``hasty``: the flag of a round is raised before its chunks are written; ``greets=False``:
    all-to-alls do not raise flags for ring neighbours, and ``Mesh.begin`` does not make ranks meet."""
    schedule = build_schedule(layout, position, chunking=chunking)
    operations: list[Write | Raise | Await | Read | Drain] = []
    due = dict.fromkeys(range(layout.world_size), 0)

    def call(epoch):
        arriving: dict[tuple, tuple] = {}  # expected piece -> (peer, count of its flag, slot)
        outputs = []

        def slot_of(message, writer):
            return Slot(epoch % halves, message.tensor, message.pieces, writer, epoch % 3 if changing else 0)

        def wait_for(expected):
            operations.extend(Await(peer, count - short) for peer, count, _ in expected)
            if expected:
                operations.append(Read(tuple(slot for _, _, slot in expected), epoch))

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
                slots = [slot_of(message, position) for message in messages]
                count = Raise(peer, len(slots))
                written = [Write(peer, slot, epoch) for slot in slots]
                operations.extend([count, *written] if hasty else [*written, count])
            for message in step.receives:
                if (message.peer, position) in silent:
                    continue
                due[message.peer] += 1
                one = (message.peer, due[message.peer], slot_of(message, message.peer))
                if message.tensor == "o":
                    outputs.append(one)
                else:
                    arriving.update({(message.tensor, piece): one for piece in message.pieces})
        wait_for(outputs)
        if drains:
            operations.append(Drain())

    def peers(with_ring):
        found = sorted({*layout.ulysses_group(position), *(layout.ring_group(position) if with_ring else ())})
        here = [peer for peer in found if "across" in links or layout.machine(peer) == layout.machine(position)]
        return [peer for peer in here if peer != position]

    def raise_and_wait(those):
        operations.extend(Raise(peer) for peer in those)
        for peer in those:
            due[peer] += 1
        operations.extend(Await(peer, due[peer] - short) for peer in those)

    def all_to_all(epoch):
        def slot(writer):
            return Slot(epoch % halves, ALL_TO_ALL, (), writer, 0)

        those = peers(with_ring=greets)
        for peer in those:
            operations.append(Write(peer, slot(position), epoch))
            operations.append(Raise(peer))
            due[peer] += 1
        operations.extend(Await(peer, due[peer] - short) for peer in those)
        operations.append(Read(tuple(slot(peer) for peer in those), epoch))

    for epoch in range(1, epochs + 1):
        if halves == 1 and greets and (mixed or changing):
            raise_and_wait(peers(with_ring=True))
        (all_to_all if mixed and epoch % 2 == 0 else call)(epoch)
    return operations


def counted(op, peer):
    """The increment of the flag on ``peer`` by an operation."""
    return op.chunks if isinstance(op, Raise) and op.peer == peer else 0


def explore(programs):
    """Visit every interleaving. Returns the number of states and the first fault, or None."""
    # raised[w][peer][n]: the flag of w on peer after n operations.
    raised = [
        [list(accumulate((counted(op, peer) for op in operations), initial=0)) for peer in range(len(programs))]
        for operations in programs
    ]
    # The operation that writes each slot, and the last one that reads each kind of call, by epoch.
    writes: list[dict[Write, list[tuple[int, int]]]] = [{} for _ in programs]
    last_read: list[dict[tuple[tuple[bool, int], int, int], int]] = [{} for _ in programs]
    for w, operations in enumerate(programs):
        for at, op in enumerate(operations):
            if isinstance(op, Write):
                writes[w].setdefault(op, []).append((at, op.epoch))
            elif isinstance(op, Read):
                last_read[w][op.slots[0].kind, op.slots[0].half, op.epoch] = at

    def fault(state, w, op):
        if isinstance(op, Write):
            for (other, half, epoch), at in last_read[op.peer].items():
                if other != op.slot.kind and half == op.slot.half and epoch < op.epoch and state[op.peer] <= at:
                    return f"rank {w} begins to write {op.slot} while rank {op.peer} reads this memory"
        for slot in op.slots if isinstance(op, Read) else ():
            begun = [x for x in writes[slot.writer][Write(w, slot, 0)] if x[0] < state[slot.writer]]
            if not begun or begun[-1][1] != op.epoch or state[slot.writer] < begun[-1][0] + 2:
                return f"rank {w} reads {slot} of call {op.epoch}: its writes begun are {begun}"
        return None

    start = (0,) * len(programs)
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        stuck = True
        for w, operations in enumerate(programs):
            if state[w] == len(operations):
                continue
            op = operations[state[w]]
            if isinstance(op, Await) and raised[op.peer][w][state[op.peer]] < op.count:
                continue
            stuck = False
            if found := fault(state, w, op):
                return len(seen), found
            after = (*state[:w], state[w] + 1, *state[w + 1 :])
            if after not in seen:
                seen.add(after)
                todo.append(after)
        if stuck and any(at < len(operations) for at, operations in zip(state, programs, strict=True)):
            return len(seen), f"deadlock at {state}"
    return len(seen), None


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
    "two machines without overlap": (Layout(torus=2, ulysses=1, ring_across=1, ring_inside=1), Chunking(overlap=False)),
    "ring without overlap": (Layout(torus=1, ulysses=1, ring_across=1, ring_inside=3), Chunking(overlap=False)),
}


def explored(group, **planted):
    layout, chunking = GROUPS[group]
    return explore([program(layout, w, chunking, **planted) for w in range(layout.world_size)])


@pytest.mark.parametrize("group", GROUPS)
def test_two_halves_and_no_barrier_are_safe(group):
    visited, fault = explored(group)
    assert fault is None and visited > 50


# Without a ring and without overlap, all inputs are read before the outputs are sent.
@pytest.mark.parametrize("group", [name for name in GROUPS if name != "two machines without overlap"])
def test_one_half_is_not_safe(group):
    assert "writes begun" in explored(group, halves=1)[1]


def inside_a_machine(layout, chunking=Chunking(kv_parts=2, last_kv_parts=2), **planted):  # noqa: B008
    machine = range(layout.ranks_per_machine)
    return explore([program(layout, w, chunking, links=["inside"], **planted) for w in machine])


@pytest.mark.parametrize("torus", [2, 3, 4])
@pytest.mark.parametrize("ulysses", [2, 3])
@pytest.mark.parametrize(
    "chunking", [Chunking(kv_parts=2, last_kv_parts=2), Chunking(overlap=False)], ids=["overlap", "no overlap"]
)
def test_one_half_is_safe_inside_machines_without_a_ring(torus, ulysses, chunking):
    layout = Layout(torus=torus, ulysses=ulysses, ring_across=1, ring_inside=1)
    visited, fault = inside_a_machine(layout, chunking, halves=1)
    assert fault is None and visited > 50


def test_one_half_is_not_safe_on_a_single_machine():
    assert "writes begun" in inside_a_machine(GROUPS["ulysses inside"][0], halves=1)[1]


@pytest.mark.parametrize("ulysses", [2, 3])
@pytest.mark.parametrize("other", ["mixed", "changing"])
@pytest.mark.parametrize(
    "chunking", [Chunking(kv_parts=2, last_kv_parts=2), Chunking(overlap=False)], ids=["overlap", "no overlap"]
)
def test_with_one_half_ranks_meet_before_a_call_of_another_kind(ulysses, other, chunking):
    layout = Layout(torus=2, ulysses=ulysses, ring_across=1, ring_inside=1)
    visited, fault = inside_a_machine(layout, chunking, halves=1, **{other: True})
    assert fault is None and visited > 50
    assert "while rank" in inside_a_machine(layout, chunking, halves=1, **{other: True}, greets=False)[1]


@pytest.mark.parametrize("group", GROUPS)
def test_a_wait_for_too_few_chunks_is_found(group):
    assert "writes begun" in explored(group, short=1)[1]


@pytest.mark.parametrize("group", GROUPS)
def test_a_flag_before_the_chunks_of_its_round_is_found(group):
    assert "writes begun" in explored(group, hasty=True)[1]


def test_empty_chunks_must_raise_their_flags():
    """Rank 1 sends only empty chunks to rank 0, which needs their flags to know the progress of rank 1."""
    assert "writes begun" in explored("ring of two", silent={(1, 0)})[1]


@pytest.mark.parametrize("other", ["mixed", "changing"])
@pytest.mark.parametrize("group", GROUPS)
def test_calls_of_another_kind_in_between_are_safe(group, other):
    visited, fault = explored(group, **{other: True})
    assert fault is None and visited > 50


def test_all_to_alls_must_raise_flags_for_the_ring():
    assert "writes begun" in explored("ulysses and ring", mixed=True, greets=False)[1]


# -- on a fabric without ordering -------------------------------------------------------------------------------------


def explore_unordered(programs, flags, parity=2):
    """As ``explore``, with asynchronous puts: a chunk and its flag arrive together, at any time before the end of the
    sender's next Drain, in any order. ``flags``: ``"equal"``, one flag for the k-th chunk of a pair in calls of each
    ``parity``, which must equal the value of this call; or ``"counter"``, one flag per pair, which a chunk sets to its
    number."""
    puts, number_of = [], []  # by rank and operation: (peer, slot) of a put, and its number among those to the peer
    for operations in programs:
        counted = dict.fromkeys(range(len(programs)), 0)
        puts.append({at: (op.peer, op.slot) for at, op in enumerate(operations) if isinstance(op, Write)})
        number_of.append({})
        for at, (peer, _) in puts[-1].items():
            counted[peer] += 1
            number_of[-1][at] = counted[peer]
    put_at = [{(puts[w][at][0], number): at for at, number in number_of[w].items()} for w in range(len(programs))]
    flag_of = []  # by rank and operation: the flag that a put sets, as (peer, number in its call, parity of the call)
    for w, operations in enumerate(programs):
        in_call = Counter()
        flag_of.append({})
        for at, (peer, _) in puts[w].items():
            epoch = operations[at].epoch
            flag_of[w][at] = peer, in_call[peer, epoch], epoch % parity
            in_call[peer, epoch] += 1

    def arrived(at, flying, w, put):
        return put < at[w] and (w, put) not in flying

    def ready(state, w, op):
        at, flying, counters = state
        if isinstance(op, Drain):
            return not any(writer == w for writer, _ in flying)
        if not isinstance(op, Await):
            return True
        if flags == "counter":
            return dict(counters).get((op.peer, w), 0) >= op.count
        put, flag = put_at[op.peer][w, op.count], flag_of[op.peer]
        later = [other for other in flag if other > put and flag[other] == flag[put]]  # which set it to another value
        return arrived(at, flying, op.peer, put) and not any(arrived(at, flying, op.peer, other) for other in later)

    def fault(state, w, op):
        at, flying, _ = state
        for slot in op.slots if isinstance(op, Read) else ():
            begun = [put for put, to in puts[slot.writer].items() if to == (w, slot) and put < at[slot.writer]]
            whole = all((slot.writer, put) not in flying for put in begun)
            if not begun or not whole or programs[slot.writer][begun[-1]].epoch != op.epoch:
                return f"rank {w} reads {slot} of call {op.epoch}: its writes begun are {begun}, {whole=}"
        return None

    start = ((0,) * len(programs), frozenset(), ())
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        at, flying, counters = state
        following = []
        for w, operations in enumerate(programs):
            if at[w] == len(operations) or not ready(state, w, op := operations[at[w]]):
                continue
            if found := fault(state, w, op):
                return len(seen), found
            begun = flying | {(w, at[w])} if isinstance(op, Write) else flying
            following.append(((*at[:w], at[w] + 1, *at[w + 1 :]), begun, counters))
        for w, put in flying:
            counted = dict(counters)
            if flags == "counter":
                counted[w, puts[w][put][0]] = number_of[w][put]
            following.append((at, flying - {(w, put)}, tuple(sorted(counted.items()))))
        if not following and any(x < len(operations) for x, operations in zip(at, programs, strict=True)):
            return len(seen), f"deadlock at {at}"
        for after in following:
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return len(seen), None


SMALL = ["two machines", "ulysses inside", "ring of two", "ring of three"]


def explored_unordered(group, flags, parity=2, **planted):
    layout, chunking = GROUPS[group]
    programs = [program(layout, w, chunking, drains=True, epochs=3, **planted) for w in range(layout.world_size)]
    return explore_unordered([[op for op in each if not isinstance(op, Raise)] for each in programs], flags, parity)


@pytest.mark.parametrize("group", SMALL)
def test_one_flag_per_chunk_is_safe_without_ordering(group):
    visited, fault = explored_unordered(group, "equal")
    assert fault is None and visited > 50


@pytest.mark.parametrize("group", SMALL)
def test_one_flag_for_both_parities_is_not_safe(group):
    """A late wait would find the value of the next call, and never end."""
    assert "deadlock" in explored_unordered(group, "equal", parity=1)[1]


@pytest.mark.parametrize("group", ["two machines", "ulysses inside"])
def test_a_counter_is_not_safe(group):
    """With several chunks of a pair in flight."""
    fault = explored_unordered(group, "counter")[1]
    assert "writes begun" in fault or "deadlock" in fault


@pytest.mark.parametrize("group", SMALL)
def test_one_half_is_not_safe_without_ordering(group):
    assert "writes begun" in explored_unordered(group, "equal", halves=1)[1]
