"""The flag protocol of one-sided transports (``transport/shm.py``; on GPUs ``transport/device.py``), in every
interleaving of small groups.

A model of the executor: each rank's real schedule, four calls in a row, as a list of operations on shared memory; or
all-to-alls (``all_to_all.py``) in turn with such calls, or calls of other shapes, whose chunks lie elsewhere.
Every reachable interleaving is visited. Since each place and each flag has one writer, how far the ranks have come
says all that there is to say about memory.
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


class Place(NamedTuple):
    """Where one chunk lies in a window."""

    half: int
    tensor: str
    pieces: tuple[Piece, ...]
    writer: int
    shape: int

    @property
    def kind(self) -> tuple[bool, int]:
        """Of two kinds of calls each place of one may lie over any of the other's."""
        return self.tensor == ALL_TO_ALL, self.shape


@dataclass(frozen=True)
class Write:
    """Begin to write a chunk on ``peer``; it is whole with the next operation."""

    peer: int
    place: Place
    epoch: int = field(compare=False)


@dataclass(frozen=True)
class Raise:
    """Count ``chunks`` more in the flag on ``peer``: those of one round, at once."""

    peer: int
    chunks: int = 1


@dataclass(frozen=True)
class Await:
    """Until the flag of ``peer`` here says ``count`` chunks."""

    peer: int
    count: int


@dataclass(frozen=True)
class Drain:
    """Until all that was put has arrived: the end of a call, where puts only start when they are made."""


@dataclass(frozen=True)
class Read:
    """Read what was written into ``places`` in ``epoch``."""

    places: tuple[Place, ...]
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
    """What attention.py does to shared memory on one rank, where ``links`` go through it; what comes over the others is
    there at once. ``mixed``: and all_to_all.py, in every second call. ``changing``: calls have three shapes in turn.
    ``drains``: calls end with a Drain. To plant faults: another number of ``halves``; ``short``: chunks by which every
    wait falls short; ``silent``: (sender, receiver) pairs whose chunks raise no flag; ``hasty``: a round's flag is
    raised before its chunks are written; not ``greets``: all-to-alls tell ring neighbours nothing, and ranks do not
    meet where ``Mesh.begin`` lets them."""
    schedule = build_schedule(layout, position, chunking=chunking)
    operations: list[Write | Raise | Await | Read | Drain] = []
    due = dict.fromkeys(range(layout.world_size), 0)

    def call(epoch):
        arriving: dict[tuple, tuple] = {}  # what is due -> (peer, its flag's count, place)
        outputs = []

        def place_of(message, writer):
            return Place(epoch % halves, message.tensor, message.pieces, writer, epoch % 3 if changing else 0)

        def wait_for(due_ones):
            operations.extend(Await(peer, count - short) for peer, count, _ in due_ones)
            if due_ones:
                operations.append(Read(tuple(place for _, _, place in due_ones), epoch))

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
                    wait_for(use(message.tensor, message.pieces))  # a ring passes on what it received
            for peer, messages in groupby(step.sends, key=lambda message: message.peer):
                if (position, peer) in silent:
                    continue
                places = [place_of(message, position) for message in messages]
                count = Raise(peer, len(places))
                written = [Write(peer, place, epoch) for place in places]
                operations.extend([count, *written] if hasty else [*written, count])
            for message in step.receives:
                if (message.peer, position) in silent:
                    continue
                due[message.peer] += 1
                one = (message.peer, due[message.peer], place_of(message, message.peer))
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
        def place(writer):
            return Place(epoch % halves, ALL_TO_ALL, (), writer, 0)

        those = peers(with_ring=greets)
        for peer in those:
            operations.append(Write(peer, place(position), epoch))
            operations.append(Raise(peer))
            due[peer] += 1
        operations.extend(Await(peer, due[peer] - short) for peer in those)
        operations.append(Read(tuple(place(peer) for peer in those), epoch))

    for epoch in range(1, epochs + 1):
        if halves == 1 and greets and (mixed or changing):
            raise_and_wait(peers(with_ring=True))
        (all_to_all if mixed and epoch % 2 == 0 else call)(epoch)
    return operations


def counted(op, peer):
    """By how much an operation raises the flag on ``peer``."""
    return op.chunks if isinstance(op, Raise) and op.peer == peer else 0


def explore(programs):
    """Visit every interleaving. (States visited, what went wrong or None.)"""
    # raised[w][peer][n]: what the flag of w on peer says after n operations.
    raised = [
        [list(accumulate((counted(op, peer) for op in operations), initial=0)) for peer in range(len(programs))]
        for operations in programs
    ]
    # When each chunk is written into each place, and when each kind of call was last read in each epoch.
    writes: list[dict[Write, list[tuple[int, int]]]] = [{} for _ in programs]
    last_read: list[dict[tuple[tuple[bool, int], int, int], int]] = [{} for _ in programs]
    for w, operations in enumerate(programs):
        for at, op in enumerate(operations):
            if isinstance(op, Write):
                writes[w].setdefault(op, []).append((at, op.epoch))
            elif isinstance(op, Read):
                last_read[w][op.places[0].kind, op.places[0].half, op.epoch] = at

    def fault(state, w, op):
        if isinstance(op, Write):
            for (other, half, epoch), at in last_read[op.peer].items():
                if other != op.place.kind and half == op.place.half and epoch < op.epoch and state[op.peer] <= at:
                    return f"rank {w} begins to write {op.place} while rank {op.peer} reads what lies there"
        for place in op.places if isinstance(op, Read) else ():
            begun = [x for x in writes[place.writer][Write(w, place, 0)] if x[0] < state[place.writer]]
            if not begun or begun[-1][1] != op.epoch or state[place.writer] < begun[-1][0] + 2:
                return f"rank {w} reads {place} of call {op.epoch}: its writes begun are {begun}"
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
            return len(seen), f"nobody can go on at {state}"
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


# Without a ring and without overlap, all inputs are read before the outputs leave.
@pytest.mark.parametrize("group", [name for name in GROUPS if name != "two machines without overlap"])
def test_a_single_window_would_not_be(group):
    assert "writes begun" in explored(group, halves=1)[1]


def inside_a_machine(layout, chunking=Chunking(kv_parts=2, last_kv_parts=2), **planted):  # noqa: B008
    machine = range(layout.ranks_per_machine)
    return explore([program(layout, w, chunking, links=["inside"], **planted) for w in machine])


@pytest.mark.parametrize("torus", [2, 3, 4])
@pytest.mark.parametrize("ulysses", [2, 3])
@pytest.mark.parametrize(
    "chunking", [Chunking(kv_parts=2, last_kv_parts=2), Chunking(overlap=False)], ids=["overlap", "no overlap"]
)
def test_one_half_is_enough_inside_machines_without_a_ring(torus, ulysses, chunking):
    layout = Layout(torus=torus, ulysses=ulysses, ring_across=1, ring_inside=1)
    visited, fault = inside_a_machine(layout, chunking, halves=1)
    assert fault is None and visited > 50


def test_one_half_is_not_enough_on_a_single_machine():
    assert "writes begun" in inside_a_machine(GROUPS["ulysses inside"][0], halves=1)[1]


@pytest.mark.parametrize("ulysses", [2, 3])
@pytest.mark.parametrize("other", ["mixed", "changing"])
@pytest.mark.parametrize(
    "chunking", [Chunking(kv_parts=2, last_kv_parts=2), Chunking(overlap=False)], ids=["overlap", "no overlap"]
)
def test_in_one_half_ranks_meet_before_a_call_of_another_kind(ulysses, other, chunking):
    layout = Layout(torus=2, ulysses=ulysses, ring_across=1, ring_inside=1)
    visited, fault = inside_a_machine(layout, chunking, halves=1, **{other: True})
    assert fault is None and visited > 50
    assert "while rank" in inside_a_machine(layout, chunking, halves=1, **{other: True}, greets=False)[1]


@pytest.mark.parametrize("group", GROUPS)
def test_a_wait_that_falls_short_is_found(group):
    assert "writes begun" in explored(group, short=1)[1]


@pytest.mark.parametrize("group", GROUPS)
def test_a_flag_before_the_chunks_of_its_round_is_found(group):
    assert "writes begun" in explored(group, hasty=True)[1]


def test_empty_chunks_have_to_raise_their_flags():
    """Rank 0 sends to rank 1, which has nothing to say: only its flags tell rank 0 how far it has come."""
    assert "writes begun" in explored("ring of two", silent={(1, 0)})[1]


@pytest.mark.parametrize("other", ["mixed", "changing"])
@pytest.mark.parametrize("group", GROUPS)
def test_calls_of_another_kind_in_between_are_safe(group, other):
    visited, fault = explored(group, **{other: True})
    assert fault is None and visited > 50


def test_all_to_alls_have_to_greet_the_ring():
    assert "writes begun" in explored("ulysses and ring", mixed=True, greets=False)[1]


# -- over a fabric that keeps no order --------------------------------------------------------------------------------


def explore_unordered(programs, flags, parity=2):
    """As ``explore``, but a put is only begun by the rank that makes it: the chunk arrives, together with its flag, at
    any time before the rank's next Drain has ended, and before or after others of the same pair. ``flags``:
    ``"equal"``, one for the k-th chunk of a pair in a call of either ``parity``, which a wait wants to hold just this
    call's value; or ``"counter"``, one for each pair, which a chunk sets to its number."""
    puts, number_of = [], []  # by rank and operation: (peer, place) of a put, and its number among those to the peer
    for operations in programs:
        counted = dict.fromkeys(range(len(programs)), 0)
        puts.append({at: (op.peer, op.place) for at, op in enumerate(operations) if isinstance(op, Write)})
        number_of.append({})
        for at, (peer, _) in puts[-1].items():
            counted[peer] += 1
            number_of[-1][at] = counted[peer]
    put_at = [{(puts[w][at][0], number): at for at, number in number_of[w].items()} for w in range(len(programs))]
    flag_of = []  # by rank and operation: which flag a put sets, by peer, number in its call, and parity of that
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
        for place in op.places if isinstance(op, Read) else ():
            begun = [put for put, to in puts[place.writer].items() if to == (w, place) and put < at[place.writer]]
            whole = all((place.writer, put) not in flying for put in begun)
            if not begun or not whole or programs[place.writer][begun[-1]].epoch != op.epoch:
                return f"rank {w} reads {place} of call {op.epoch}: its writes begun are {begun}, {whole=}"
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
            return len(seen), f"nobody can go on at {at}"
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
def test_a_flag_for_each_chunk_is_safe_without_any_order(group):
    visited, fault = explored_unordered(group, "equal")
    assert fault is None and visited > 50


@pytest.mark.parametrize("group", SMALL)
def test_one_flag_for_calls_of_both_parities_would_not_be(group):
    """A wait that comes late would find the next call's value, and never end."""
    assert "nobody can go on" in explored_unordered(group, "equal", parity=1)[1]


@pytest.mark.parametrize("group", ["two machines", "ulysses inside"])
def test_a_counter_would_not_be(group):
    """Where several chunks of a pair are on their way at once."""
    fault = explored_unordered(group, "counter")[1]
    assert "writes begun" in fault or "nobody can go on" in fault


@pytest.mark.parametrize("group", SMALL)
def test_nor_would_a_single_window(group):
    assert "writes begun" in explored_unordered(group, "equal", halves=1)[1]
