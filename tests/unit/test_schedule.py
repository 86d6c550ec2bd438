"""The schedule as plain data: replays the steps of all ranks against each other, without tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import groupby, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_xfuser.layout.plan import Layout, legal_layouts
from sf_xfuser.layout.schedule import (
    DEFERRED_SLABS,
    JOINT,
    LOOKAHEAD,
    Attend,
    Chunking,
    Exchange,
    Message,
    Piece,
    Schedule,
    build_schedule,
)

SMALL = [layout for n in range(1, 9) for m in range(1, 9) if n * m <= 16 for layout in legal_layouts(n, m, heads=None)]
CHUNKINGS = [Chunking(kv_parts=kv, last_kv_parts=last_kv) for kv, last_kv in product((1, 2, 3), repeat=2)]
CHUNKINGS += [replace(chunking, granularity="slab", machines_at_once=n % 3 + 1) for n, chunking in enumerate(CHUNKINGS)]
CHUNKINGS += [Chunking(granularity="unstaged")]

layouts = st.builds(
    Layout,
    torus=st.integers(1, 5),
    ulysses=st.integers(1, 4),
    ring_across=st.integers(1, 3),
    ring_inside=st.integers(1, 4),
).filter(lambda layout: layout.world_size <= 48)
joints = st.sampled_from([None, "front", "rear"])
chunkings = st.sampled_from(CHUNKINGS)


def schedules(layout: Layout, joint=None, chunking: Chunking = Chunking()) -> list[Schedule]:  # noqa: B008
    return [build_schedule(layout, w, joint, chunking) for w in range(layout.world_size)]


def exchanges(s: Schedule, link: str | None = None) -> list[Exchange]:
    return [step for step in s.steps if isinstance(step, Exchange) and link in (None, step.link)]


def attends(s: Schedule) -> list[Attend]:
    return [step for step in s.steps if isinstance(step, Attend)]


def is_complete(pieces: Sequence[Piece]) -> bool:
    """Each part of one source, once."""
    source, _, parts = pieces[0]
    return sorted(pieces) == [Piece(source, part, parts) for part in range(parts)]


def by_source(pieces: Sequence[Piece]) -> dict[int, list[Piece]]:
    return {source: [piece for piece in pieces if piece.source == source] for source in {p.source for p in pieces}}


def all_keys(s: Schedule) -> set[Piece]:
    return {piece for slab in s.slabs for piece in slab}


def replay(all_schedules: list[Schedule]) -> list[dict]:
    """Run all ranks against each other over a strict transport: rounds of a link complete in order, and only when both
    ends have posted them. Returns the state of each rank. Fails on a deadlock, and on an output sent before it is
    final."""
    layout = all_schedules[0].layout
    state = [
        {
            "at": 0,
            "have": {("q", Piece(w)), ("kv", Piece(w)), ("kv", Piece(JOINT))},
            "outputs": Counter(),
            "met": Counter(),
        }
        for w in range(layout.world_size)
    ]
    posted: list[dict[str, list[Exchange]]] = [{"inside": [], "across": []} for _ in all_schedules]
    done = [Counter() for _ in all_schedules]  # rounds completed per link

    def complete_rounds() -> bool:
        moved = False
        for w, links in enumerate(posted):
            for link, rounds in links.items():
                if done[w][link] == len(rounds):
                    continue
                k = done[w][link]
                peers = {m.peer for m in (*rounds[k].sends, *rounds[k].receives)}
                if all(len(posted[p][link]) > k for p in peers) and all(done[p][link] >= k for p in peers):
                    done[w][link] += 1
                    moved = True
                    for m in rounds[k].receives:
                        if m.tensor == "o":
                            state[w]["outputs"].update((layout.head_group(m.peer), piece) for piece in m.pieces)
                        else:
                            state[w]["have"] |= {(m.tensor, piece) for piece in m.pieces}
        return moved

    def advance(w: int) -> bool:
        me, steps = state[w], all_schedules[w].steps
        if me["at"] == len(steps):
            return False
        step = steps[me["at"]]
        if isinstance(step, Exchange):
            # A rank can send its own tokens in any number of parts.
            needs = {(m.tensor, p) for m in step.sends if m.tensor != "o" for p in m.pieces if p.source != w}
            if not needs <= me["have"]:
                return False
            for piece in (p for m in step.sends if m.tensor == "o" for p in m.pieces):
                final = {key for query, key in me["met"] if query == piece}
                assert final == all_keys(all_schedules[w]), f"rank {w} sends {piece} before it is final"
            posted[w][step.link].append(step)
        else:
            needs = {("q", piece) for piece in step.queries} | {("kv", piece) for piece in step.keys}
            if not needs <= me["have"]:
                return False
            me["met"].update(product(step.queries, step.keys))
        me["at"] += 1
        return True

    moved = True
    while moved:
        moved = any([advance(w) for w in range(layout.world_size)])
        moved |= complete_rounds()
    for w, me in enumerate(state):
        assert me["at"] == len(all_schedules[w].steps), f"rank {w} is stuck at {all_schedules[w].steps[me['at']]}"
        for link in ("inside", "across"):
            assert done[w][link] == len(posted[w][link]), f"rank {w}: rounds of link {link} never completed"
    return state


def check(layout: Layout, joint, chunking: Chunking) -> None:
    all_schedules = schedules(layout, joint, chunking)
    for w, me in enumerate(replay(all_schedules)):
        s = all_schedules[w]
        # Each Q of the rank's head group meets each KV once, joint keys and all parts included.
        keys = [*range(layout.world_size), JOINT] if joint else [*range(layout.world_size)]
        every_key = [piece for slab in s.slabs for piece in slab]
        assert me["met"] == Counter(product(s.queries, every_key)) and set(me["met"].values()) == {1}
        for pieces, sources in ((s.queries, layout.ulysses_group(w)), (every_key, keys)):
            assert sorted(by_source(pieces)) == sorted(sources)
            assert all(is_complete(parts) for parts in by_source(pieces).values())
        # The output of each other head group for the rank's tokens arrives once, with all parts.
        returned = [(group, piece) for (group, piece), n in me["outputs"].items() for _ in range(n)]
        assert {group for group, _ in returned} == set(range(layout.ulysses_degree)) - {layout.head_group(w)}
        for group in {group for group, _ in returned}:
            assert by_source([p for g, p in returned if g == group]).keys() == {w}
            assert is_complete([piece for g, piece in returned if g == group])
    match_messages(all_schedules)
    for s in all_schedules:
        check_buffers(s)
        check_last(s)
        check_lookahead(s, chunking)
        check_forwards(s)
        check_deferred(s, chunking)


def between(messages: Sequence[Message], peer: int) -> list[tuple[str, tuple[Piece, ...]]]:
    """The messages to or from ``peer``, in order."""
    return [(m.tensor, m.pieces) for m in messages if m.peer == peer]


def match_messages(all_schedules: list[Schedule]) -> None:
    """In each round, the messages w sends to p equal those p receives from w, in order. No chunk arrives twice."""
    layout = all_schedules[0].layout
    rounds = {(w, step.link, step.round): step for w, s in enumerate(all_schedules) for step in exchanges(s)}
    arrived = Counter()
    for (w, link, k), step in rounds.items():
        peers = [peer for peer, _ in groupby(m.peer for m in step.sends)]
        assert len(peers) == len(set(peers)), "messages to one peer are adjacent: shm raises a flag after the last"
        for m in step.sends:
            assert between(step.sends, m.peer) == between(rounds[m.peer, link, k].receives, w)
            same_machine = layout.machine(w) == layout.machine(m.peer)
            assert same_machine == (link == "inside"), "a message is on the wrong link"
        for m in step.receives:
            assert between(step.receives, m.peer) == between(rounds[m.peer, link, k].sends, w)
            arrived.update((w, m.tensor, piece, m.peer if m.tensor == "o" else None) for piece in m.pieces)
            assert m.tensor == "o" or w not in {piece.source for piece in m.pieces}
    assert set(arrived.values()) <= {1}
    for w, s in enumerate(all_schedules):
        wanted_kv = {piece for piece in all_keys(s) if piece.source not in (w, JOINT)}
        assert {piece for (rank, tensor, piece, _) in arrived if (rank, tensor) == (w, "kv")} == wanted_kv
        assert {piece for (rank, tensor, piece, _) in arrived if (rank, tensor) == (w, "q")} == {*s.queries} - {
            Piece(w)
        }


# -- properties of one rank's schedule --------------------------------------------------------------------------------


def is_run(pieces: Sequence[Piece], buffer: Sequence[Piece]) -> bool:
    """Whether ``pieces`` are adjacent in ``buffer``, so that one slice of a tensor holds them."""
    at = buffer.index(pieces[0])
    return tuple(pieces) == tuple(buffer[at : at + len(pieces)])


def reads_slab(s: Schedule, m: Message) -> bool:
    """Whether the message is sent from a slab. Ring neighbours have the same heads and get rows of a slab; others get
    chunks of the rank's inputs."""
    return m.tensor == "kv" and s.layout.head_group(m.peer) == s.layout.head_group(s.position)


def check_buffers(s: Schedule) -> None:
    """Each attend, send and receive uses one slice of a buffer."""
    slab_of = {piece: k for k, slab in enumerate(s.slabs) for piece in slab}
    assert sum(map(len, s.slabs)) == len(slab_of), "a piece lies in two slabs"
    assert len(set(s.queries)) == len(s.queries)
    for step in attends(s):
        assert is_run(step.queries, s.queries)
        assert is_run(step.keys, s.slabs[step.slab])
    for step in exchanges(s):
        for m in step.receives:
            if m.tensor == "o":
                assert len(m.pieces) == 1 and m.pieces[0].source == s.position
            else:
                assert is_run(m.pieces, s.queries if m.tensor == "q" else s.slabs[slab_of[m.pieces[0]]])
        for m in step.sends:
            if m.tensor == "o":
                assert is_run(m.pieces, s.queries) and {p.source for p in m.pieces} == {m.peer}
            elif reads_slab(s, m):
                assert is_run(m.pieces, s.slabs[slab_of[m.pieces[0]]])
            else:
                assert len(m.pieces) == 1 and m.pieces[0].source == s.position


def check_last(s: Schedule) -> None:
    """After ``keys_last``, no step attends, forwards or receives the slab. After ``queries_last``, no step uses these
    queries, and their output is sent only then."""
    done: list[Piece] = []
    for step in s.steps:
        if isinstance(step, Attend):
            assert set(step.queries).isdisjoint(done)
            done += step.queries if step.queries_last else []
        else:
            outputs = {piece for m in step.sends if m.tensor == "o" for piece in m.pieces}
            assert outputs <= set(done) and set(done).isdisjoint(
                p for m in step.receives for p in m.pieces if m.tensor == "q"
            )
    assert sorted(done) == sorted(s.queries)
    slab_of = {piece: k for k, slab in enumerate(s.slabs) for piece in slab}
    released: list[int] = []
    for step in s.steps:
        if isinstance(step, Attend):
            assert step.slab not in released
            released += [step.slab] if step.keys_last else []
        else:
            read = [piece for m in step.sends if reads_slab(s, m) for piece in m.pieces]
            written = [piece for m in step.receives if m.tensor == "kv" for piece in m.pieces]
            assert {slab_of[piece] for piece in (*read, *written)}.isdisjoint(released)
    assert sorted(released) == [*range(len(s.slabs))]


def input_rounds(s: Schedule) -> list[Exchange]:
    return [step for step in exchanges(s, "across") if step.receives[0].tensor != "o"]


def lookaheads(s: Schedule) -> Iterator[tuple[int, int]]:
    """For each Attend: the number of input rounds between machines posted so far, and the number needed so far."""
    arrival = {p: n for n, step in enumerate(input_rounds(s), 1) for p in arriving(step)}
    posted = needed = 0
    for step in s.steps:
        if isinstance(step, Attend):
            read = {("q", piece) for piece in step.queries} | {("kv", piece) for piece in step.keys}
            needed = max(needed, *(arrival.get(item, 0) for item in read))
            yield posted, needed
        elif step.link == "across" and step.receives[0].tensor != "o":
            posted += 1


def arriving(step: Exchange) -> set[tuple[str, Piece]]:
    return {(m.tensor, piece) for m in step.receives for piece in m.pieces}


def check_lookahead(s: Schedule, chunking: Chunking) -> None:
    """When a chunk is consumed, at most ``LOOKAHEAD`` later rounds are posted; exactly as many, unless a round forwards
    a chunk that has not arrived. The lookahead covers the machines that are attended at once and, with a ring across
    machines, all parts of a slab."""
    total = len(input_rounds(s))
    parts = max(piece.parts for piece in all_keys(s)) if s.layout.ring_across > 1 else 1
    ahead = max(LOOKAHEAD, parts, chunking.machines_at_once)
    before = -1
    for posted, needed in lookaheads(s):
        assert needed <= posted <= needed + ahead
        if needed > before and s.layout.ring_across == 1:
            assert posted == min(total, needed + ahead)
        before = needed


def check_forwards(s: Schedule) -> None:
    """A forward waits only for chunks that the next Attend waits for as well."""
    arrival = {(step.link, item): step.round for step in exchanges(s) for item in arriving(step)}
    needed = {"inside": -1, "across": -1}
    forwards: set[Piece] = set()
    for step in s.steps:
        if isinstance(step, Exchange):
            forwards |= {piece for m in step.sends if reads_slab(s, m) for piece in m.pieces}
            continue
        read = {("q", piece) for piece in step.queries} | {("kv", piece) for piece in step.keys}
        for link in needed:
            needed[link] = max(needed[link], *(arrival.get((link, item), -1) for item in read))
            assert all(arrival.get((link, ("kv", piece)), -1) <= needed[link] for piece in forwards)
        forwards = set()


def check_deferred(s: Schedule, chunking: Chunking) -> None:
    """While outputs travel between machines, the local queries attend exactly the last slabs; nothing if unstaged."""
    layout = s.layout
    pushes = [at for at, step in enumerate(s.steps) if isinstance(step, Exchange) and is_push(step)]
    if layout.torus == 1:
        assert not pushes
        return
    own = {piece for piece in s.queries if layout.machine(piece.source) == layout.machine(s.position)}
    num_deferred = {"block": DEFERRED_SLABS, "slab": 1, "unstaged": 0}[chunking.granularity]
    deferred = {*range(max(1, len(s.slabs) - num_deferred), len(s.slabs))}
    after_first, after_last = set(), set()
    for at, step in enumerate(s.steps):
        if isinstance(step, Attend) and not own.isdisjoint(step.queries):
            after_first |= {step.slab} if at > pushes[0] else set()
            after_last |= {step.slab} if at > pushes[-1] else set()
            assert at > pushes[-1] or step.slab not in deferred
    assert after_first == after_last == deferred
    assert all(own.issuperset(step.queries) for step in s.steps[pushes[-1] :] if isinstance(step, Attend))


def is_push(step: Exchange) -> bool:
    return step.link == "across" and step.receives[0].tensor == "o"


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [None, "front", "rear"])
def test_every_small_layout(joint):
    for n, layout in enumerate(SMALL):
        check(layout, joint, Chunking())
        if layout.torus > 1:
            check(layout, joint, CHUNKINGS[n % len(CHUNKINGS)])


@pytest.mark.parametrize(
    "chunking",
    CHUNKINGS,
    ids=lambda chunking: f"{chunking.granularity} kv{chunking.kv_parts} last{chunking.last_kv_parts}",
)
def test_every_chunking(chunking):
    """Three machines that split heads, and a ring across machines: slabs of every kind."""
    for joint in (None, "front", "rear"):
        check(Layout(torus=3, ulysses=2, ring_across=1, ring_inside=2), joint, chunking)
        check(Layout(torus=2, ulysses=1, ring_across=2, ring_inside=2), joint, chunking)


@pytest.mark.parametrize("joint", [None, "front", "rear"])
def test_unstaged_there_is_one_attention(joint):
    for layout in SMALL:
        s = build_schedule(layout, layout.world_size - 1, joint, Chunking(granularity="unstaged"))
        (attend,) = (step for step in s.steps if isinstance(step, Attend))
        assert attend.queries == s.queries and (attend.keys,) == s.slabs and s.remote == ()
        assert attend.keys_last and attend.queries_last
        sources = [Piece(source) for source in range(layout.world_size)]
        front, rear = ([Piece(JOINT)] if joint == end else [] for end in ("front", "rear"))
        assert list(attend.keys) == front + sources + rear


def test_invalid_chunkings_are_refused():
    with pytest.raises(ValueError, match="unstaged needs kv_parts=1"):
        Chunking(kv_parts=2, granularity="unstaged")
    with pytest.raises(ValueError, match="block needs machines_at_once=1"):
        Chunking(machines_at_once=2)
    with pytest.raises(ValueError, match=r"granularity must be one of .*, got 'staged'"):
        Chunking(granularity="staged")


@settings(max_examples=25)
@given(layouts, joints, chunkings)
def test_larger_layouts(layout, joint, chunking):
    check(layout, joint, chunking)


@given(st.integers(0, 200), st.integers(1, 12))
def test_parts_cover_the_tokens_of_their_source(tokens, parts):
    """Parts differ by at most one token, also with fewer tokens than parts."""
    spans = [Piece(0, part, parts).span(tokens) for part in range(parts)]
    assert [low for low, _ in spans] + [tokens] == [0] + [high for _, high in spans]
    assert {high - low for low, high in spans} <= {tokens // parts, -(-tokens // parts)}


def test_slabs_have_the_parts_of_the_chunking():
    """Queries and KV of the local machine are not split; other KV has the given number of parts."""
    layout = Layout(torus=4, ulysses=2, ring_across=1, ring_inside=2)
    s = build_schedule(layout, 5, chunking=Chunking(kv_parts=3, last_kv_parts=5))
    parts = [{piece.parts for piece in slab} for slab in s.slabs]
    assert parts == [{1}, {3}, {3}, {5}]
    assert {piece.parts for piece in s.queries} == {1}


@settings(max_examples=60)
@given(layouts, st.sampled_from([1, 2, 4, 8]), chunkings)
def test_bytes_between_machines_equal_the_formulas(layout, heads_per_kv_head, chunking):
    """Elements that leave a machine, counted from the schedule, equal ``Layout.egress``."""
    g = Fraction(1, heads_per_kv_head)
    n = layout.num_machines
    chunk = Fraction(1, layout.world_size * layout.ulysses_degree)  # of B*L*H*D: one rank's tokens, one head group
    weight = {"q": chunk, "o": chunk, "kv": 2 * g * chunk}
    out = Counter()
    for w, s in enumerate(schedules(layout, chunking=chunking)):
        for step in exchanges(s, "across"):
            out[layout.machine(w)] += sum(weight[m.tensor] / piece.parts for m in step.sends for piece in m.pieces)
    assert set(out.values()) <= {layout.egress(g)}
    if layout.torus == n:
        assert layout.egress(g) == (2 + 2 * g) * Fraction(n - 1, n * n)
    if layout.torus == 1:
        assert layout.egress(g) == 2 * g * Fraction(n - 1, n)


def test_the_paper_example_pulls_in_rotation():
    """4 machines x 8, T=4 U=2 R=4: receives in order t-1, t-2, t-3; sends in order t+1, t+2, t+3; O in order."""
    layout = Layout(torus=4, ulysses=2, ring_across=1, ring_inside=4)
    w = layout.position(1, 0, 0, 2)
    for chunking in (Chunking(), Chunking(kv_parts=2, last_kv_parts=2)):
        across = exchanges(build_schedule(layout, w, chunking=chunking), "across")
        assert all(len({(m.tensor, *m.pieces[0][1:]) for m in step.sends}) == 1 for step in across)
        order = [(step.sends[0].tensor, step.sends[0].pieces[0].part) for step in across]
        parts = {"q": 1, "kv": chunking.kv_parts, "o": 1}
        assert order == [(x, part) for x in parts for _ in range(3) for part in range(parts[x])]
        for of, senders, receivers in (("q", [0, 3, 2], [2, 3, 0]), ("kv", [0, 3, 2], [2, 3, 0])):
            rounds = [step for step in across if step.sends[0].tensor == of][:: parts[of]]
            assert [{layout.machine(m.peer) for m in step.receives} for step in rounds] == [{x} for x in senders]
            assert [{layout.machine(m.peer) for m in step.sends} for step in rounds] == [{x} for x in receivers]
        pushes = [step for step in across if step.sends[0].tensor == "o"]
        assert [{layout.machine(m.peer) for m in step.sends} for step in pushes] == [{0}, {3}, {2}]
        assert [{layout.machine(m.peer) for m in step.receives} for step in pushes] == [{2}, {3}, {0}]


COUNTS = {  # (T, U, R_i): granularity -> attends, rounds inside, rounds across
    (4, 2, 4): {"block": (27, 14, 9), "slab": (10, 6, 9), "unstaged": (1, 3, 2)},
    (4, 8, 1): {"block": (15, 2, 9), "slab": (10, 2, 9), "unstaged": (1, 2, 2)},
    (2, 1, 8): {"block": (18, 14, 3), "slab": (4, 2, 3), "unstaged": (1, 1, 2)},
    (1, 2, 4): {"block": (7, 5, 0), "slab": (1, 3, 0), "unstaged": (1, 3, 0)},
}


@pytest.mark.parametrize("degrees", COUNTS)
def test_attends_and_rounds(degrees):
    torus, ulysses, ring_inside = degrees
    layout = Layout(torus=torus, ulysses=ulysses, ring_across=1, ring_inside=ring_inside)
    for granularity, expected in COUNTS[degrees].items():
        for w in range(layout.world_size):
            s = build_schedule(layout, w, chunking=Chunking(granularity=granularity))
            rounds = len(exchanges(s, "inside")), len(exchanges(s, "across"))
            assert (len(attends(s)), *rounds) == expected, granularity


def test_slabs_are_attended_whole():
    """Every Attend covers all blocks of a slab, or of one part. One round sends a block to all ranks of the ring."""
    layout = Layout(torus=3, ulysses=2, ring_across=1, ring_inside=3)
    for chunking in (Chunking(granularity="slab"), Chunking(kv_parts=2, last_kv_parts=3, granularity="slab")):
        s = build_schedule(layout, 7, chunking=chunking)
        for step in attends(s):
            assert len({piece.source for piece in step.keys}) == layout.ranks_per_machine
        for step in exchanges(s, "inside"):
            if step.sends[0].tensor == "kv":
                assert {m.peer for m in step.sends} == {m.peer for m in step.receives}
                assert {*layout.ring_group(7)} - {7} == {m.peer for m in step.sends}
                assert len({m.pieces for m in step.sends}) == 1


@pytest.mark.parametrize("chunking", [Chunking(), Chunking(kv_parts=2, last_kv_parts=3)], ids=["whole", "split"])
def test_transfers_are_in_flight_while_chunks_are_attended(chunking):
    """Each remote chunk is posted at least one Attend before it is needed. O chunks are sent one by one, with an Attend
    between any two, and before the attention of the rank's own queries."""
    layout = Layout(torus=4, ulysses=1, ring_across=1, ring_inside=2)
    for w in range(layout.world_size):
        s = build_schedule(layout, w, chunking=chunking)
        for step in input_rounds(s):
            needs = "queries" if step.sends[0].tensor == "q" else "keys"
            pieces = {piece for _, piece in arriving(step)}
            at = s.steps.index(step)
            used = next(
                i for i, x in enumerate(s.steps) if isinstance(x, Attend) and not pieces.isdisjoint(getattr(x, needs))
            )
            assert any(isinstance(x, Attend) for x in s.steps[at:used]), f"round {step.round} is not overlapped"
        pushes = [at for at, step in enumerate(s.steps) if isinstance(step, Exchange) and is_push(step)]
        assert len(pushes) == 3
        assert all(any(isinstance(x, Attend) for x in s.steps[a:b]) for a, b in pairwise(pushes))
        final = s.steps[-1]
        assert isinstance(final, Attend) and final.queries == (Piece(w),) and final.keys_last
