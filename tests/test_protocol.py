"""The flag protocol of one-sided transports (``transport/shm.py``; on GPUs ``transport/device.py``), in every
interleaving of small groups.

A model of the executor: each rank's real schedule, four calls in a row, as a list of operations on shared memory.
Every reachable interleaving is visited. Since each place and each flag has one writer, how far the ranks have come
says all that there is to say about memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import pytest

from sf_xfuser.plan import Layout
from sf_xfuser.schedule import Cut, Exchange, Piece, build_schedule

EPOCHS = 4


class Place(NamedTuple):
    """Where one chunk lies in a window."""

    half: int
    tensor: str
    pieces: tuple[Piece, ...]
    writer: int


@dataclass(frozen=True)
class Write:
    """Begin to write a chunk on ``peer``; it is whole with the next operation, which raises the flag."""

    peer: int
    place: Place


@dataclass(frozen=True)
class Raise:
    peer: int


@dataclass(frozen=True)
class Await:
    """Until ``peer`` has raised its flag here ``count`` times."""

    peer: int
    count: int


@dataclass(frozen=True)
class Drain:
    """Until all that was put has arrived: the end of a call, where puts only start when they are made."""


@dataclass(frozen=True)
class Read:
    """Read what was written into ``places`` the ``nth`` time."""

    places: tuple[Place, ...]
    nth: int


def program(layout, position, cut, *, halves=2, short=0, silent=(), drains=False, epochs=EPOCHS):
    """What attention.py does to shared memory on one rank. To plant faults: another number of ``halves``; ``short``:
    chunks by which every wait falls short; ``silent``: (sender, receiver) pairs whose chunks raise no flag. ``drains``:
    calls end with a Drain."""
    schedule = build_schedule(layout, position, cut=cut)
    operations: list[Write | Raise | Await | Read | Drain] = []
    due = dict.fromkeys(range(layout.world_size), 0)

    def call(epoch):
        arriving: dict[tuple, tuple] = {}  # what is due -> (peer, its flag's count, place)
        outputs = []

        def place_of(message, writer):
            return Place(epoch % halves, message.tensor, message.pieces, writer)

        def wait_for(due_ones):
            operations.extend(Await(peer, count - short) for peer, count, _ in due_ones)
            if due_ones:
                operations.append(Read(tuple(place for _, _, place in due_ones), 1 + (epoch - 1) // halves))

        def use(tensor, pieces):
            return list(dict.fromkeys(arriving[tensor, piece] for piece in pieces if (tensor, piece) in arriving))

        for step in schedule.steps:
            if not isinstance(step, Exchange):
                wait_for(use("q", step.queries) + use("kv", step.keys))
                continue
            for message in step.sends:
                if message.tensor != "o" and layout.head_group(message.peer) == layout.head_group(position):
                    wait_for(use(message.tensor, message.pieces))  # a ring passes on what it received
                if (position, message.peer) not in silent:
                    operations.extend([Write(message.peer, place_of(message, position)), Raise(message.peer)])
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

    for epoch in range(1, epochs + 1):
        call(epoch)
    return operations


def explore(programs):
    """Visit every interleaving. (States visited, what went wrong or None.)"""
    # raised[w][peer][n]: how often w has raised its flag on peer after n operations; written likewise, by place.
    raised = [
        [list(accumulate((op == Raise(peer) for op in operations), initial=0)) for peer in range(len(programs))]
        for operations in programs
    ]
    written = [
        {
            write: (
                list(accumulate((op == write for op in operations), initial=0)),
                list(accumulate((op == write for op in [None, *operations]), initial=0)),  # and its flag raised
            )
            for write in {op for op in operations if isinstance(op, Write)}
        }
        for operations in programs
    ]

    def fault(state, w, op):
        for place in op.places if isinstance(op, Read) else ():
            begun, whole = (count[state[place.writer]] for count in written[place.writer][Write(w, place)])
            if not begun == whole == op.nth:
                return f"rank {w} reads {place}: {begun} writes begun and {whole} whole, but the {op.nth}. is due"
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
    "two machines": (Layout(torus=2, ulysses=1, ring_across=1, ring_inside=1), Cut(kv=1, last_kv=2)),
    "ulysses inside": (Layout(torus=1, ulysses=2, ring_across=1, ring_inside=1), Cut()),
    "ring of two": (Layout(torus=1, ulysses=1, ring_across=1, ring_inside=2), Cut()),
    "three machines": (Layout(torus=3, ulysses=1, ring_across=1, ring_inside=1), Cut()),
    "ulysses of three": (Layout(torus=1, ulysses=3, ring_across=1, ring_inside=1), Cut()),
    "ring of three": (Layout(torus=1, ulysses=1, ring_across=1, ring_inside=3), Cut()),
    "ring across three": (Layout(torus=1, ulysses=1, ring_across=3, ring_inside=1), Cut(kv=2, last_kv=2)),
}


def explored(group, **planted):
    layout, cut = GROUPS[group]
    return explore([program(layout, w, cut, **planted) for w in range(layout.world_size)])


@pytest.mark.parametrize("group", GROUPS)
def test_two_halves_and_no_barrier_are_safe(group):
    visited, fault = explored(group)
    assert fault is None and visited > 50


@pytest.mark.parametrize("group", GROUPS)
def test_a_single_window_would_not_be(group):
    assert "writes begun" in explored(group, halves=1)[1]


@pytest.mark.parametrize("group", GROUPS)
def test_a_wait_that_falls_short_is_found(group):
    assert "writes begun" in explored(group, short=1)[1]


def test_empty_chunks_have_to_raise_their_flags():
    """Rank 0 sends to rank 1, which has nothing to say: only its flags tell rank 0 how far it has come."""
    assert "writes begun" in explored("ring of two", silent={(1, 0)})[1]


# -- over a fabric that keeps no order --------------------------------------------------------------------------------


def explore_unordered(programs, flags):
    """As ``explore``, but a put is only begun by the rank that makes it: the chunk arrives, together with its flag, at
    any time before the rank's next Drain has ended, and before or after others of the same pair. ``flags``:
    ``"per chunk"``, each of which is set once a call, or ``"counter"``, one for each pair, which a chunk sets to its
    number."""
    puts, number_of = [], []  # by rank and operation: (peer, place) of a put, and its number among those to the peer
    for operations in programs:
        counted = dict.fromkeys(range(len(programs)), 0)
        puts.append({at: (op.peer, op.place) for at, op in enumerate(operations) if isinstance(op, Write)})
        number_of.append({})
        for at, (peer, _) in puts[-1].items():
            counted[peer] += 1
            number_of[-1][at] = counted[peer]
    put_at = [{(puts[w][at][0], number): at for at, number in number_of[w].items()} for w in range(len(programs))]

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
        return arrived(at, flying, op.peer, put_at[op.peer][w, op.count])

    def fault(state, w, op):
        at, flying, _ = state
        for place in op.places if isinstance(op, Read) else ():
            mine = [put for put, where in puts[place.writer].items() if where == (w, place)]
            begun = sum(put < at[place.writer] for put in mine)
            whole = sum(arrived(at, flying, place.writer, put) for put in mine)
            if not begun == whole == op.nth:
                return f"rank {w} reads {place}: {begun} writes begun and {whole} whole, but the {op.nth}. is due"
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


def explored_unordered(group, flags, **planted):
    layout, cut = GROUPS[group]
    programs = [program(layout, w, cut, drains=True, epochs=3, **planted) for w in range(layout.world_size)]
    return explore_unordered([[op for op in each if not isinstance(op, Raise)] for each in programs], flags)


@pytest.mark.parametrize("group", SMALL)
def test_a_flag_for_each_chunk_is_safe_without_any_order(group):
    visited, fault = explored_unordered(group, "per chunk")
    assert fault is None and visited > 50


@pytest.mark.parametrize("group", ["two machines", "ulysses inside"])
def test_a_counter_would_not_be(group):
    """Where several chunks of a pair are on their way at once."""
    fault = explored_unordered(group, "counter")[1]
    assert "writes begun" in fault or "nobody can go on" in fault


@pytest.mark.parametrize("group", SMALL)
def test_nor_would_a_single_window(group):
    assert "writes begun" in explored_unordered(group, "per chunk", halves=1)[1]
