"""The schedule as data: every rank's steps are replayed together, without tensors."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_xfuser.plan import Layout, legal_layouts
from sf_xfuser.schedule import JOINT, Attend, Exchange, Schedule, build_schedule

SMALL = [layout for n in range(1, 9) for m in range(1, 9) if n * m <= 16 for layout in legal_layouts(n, m, heads=None)]

layouts = st.builds(
    Layout,
    torus=st.integers(1, 5),
    ulysses=st.integers(1, 4),
    ring_across=st.integers(1, 3),
    ring_inside=st.integers(1, 4),
).filter(lambda layout: layout.world_size <= 48)
joints = st.sampled_from([None, "front", "rear"])


def schedules(layout: Layout, joint=None) -> list[Schedule]:
    return [build_schedule(layout, w, joint) for w in range(layout.world_size)]


def replay(all_schedules: list[Schedule]) -> list[dict]:
    """Run all ranks against each other with the strictest transport there is (rounds of a lane complete in order, and
    only when both ends have posted them); return what each rank holds. Fails if some rank can go no further."""
    layout = all_schedules[0].layout
    state = [
        {
            "at": 0,
            "have": {("q", w), ("k", w), ("v", w), ("k", JOINT), ("v", JOINT)},
            "outputs": set(),
            "met": Counter(),
        }
        for w in range(layout.world_size)
    ]
    posted: list[dict[str, list[Exchange]]] = [{"inside": [], "across": []} for _ in all_schedules]
    done = [Counter() for _ in all_schedules]  # rounds completed per lane

    def complete_rounds() -> bool:
        moved = False
        for w, lanes in enumerate(posted):
            for lane, rounds in lanes.items():
                if done[w][lane] == len(rounds):
                    continue
                k = done[w][lane]
                peers = {m.peer for m in (*rounds[k].sends, *rounds[k].receives)}
                if all(len(posted[p][lane]) > k for p in peers) and all(done[p][lane] >= k for p in peers):
                    done[w][lane] += 1
                    moved = True
                    for m in rounds[k].receives:
                        if m.tensor == "o":
                            state[w]["outputs"].add(layout.head_group(m.peer))
                        else:
                            state[w]["have"] |= {(m.tensor, s) for s in m.sources}
        return moved

    def advance(w: int) -> bool:
        me, steps = state[w], all_schedules[w].steps
        if me["at"] == len(steps):
            return False
        step = steps[me["at"]]
        if isinstance(step, Exchange):
            needs = {(m.tensor, s) for m in step.sends if m.tensor != "o" for s in m.sources}
            if not needs <= me["have"]:
                return False
            posted[w][step.lane].append(step)
        else:
            needs = {("q", s) for s in step.queries} | {(x, s) for s in step.keys for x in "kv"}
            if not needs <= me["have"]:
                return False
            me["met"].update((q, k) for q in step.queries for k in step.keys)
        me["at"] += 1
        return True

    moved = True
    while moved:
        moved = any([advance(w) for w in range(layout.world_size)])
        moved |= complete_rounds()
    for w, me in enumerate(state):
        assert me["at"] == len(all_schedules[w].steps), f"rank {w} waits for ever at {all_schedules[w].steps[me['at']]}"
        for lane in ("inside", "across"):
            assert done[w][lane] == len(posted[w][lane]), f"rank {w}: rounds of lane {lane} never completed"
    return state


def check(layout: Layout, joint) -> None:
    all_schedules = schedules(layout, joint)
    state = replay(all_schedules)
    everyone = range(layout.world_size)
    for w in everyone:
        # Each Q of my head group meets each KV once, the joint keys included.
        keys = [*everyone, JOINT] if joint else [*everyone]
        assert state[w]["met"] == Counter({(q, k): 1 for q in layout.ulysses_group(w) for k in keys})
        own = layout.head_group(w)
        assert state[w]["outputs"] == set(range(layout.ulysses_degree)) - {own}
    match_messages(all_schedules)


def match_messages(all_schedules: list[Schedule]) -> None:
    """Round by round, what w sends to p is what p receives from w, and no chunk arrives twice."""
    layout = all_schedules[0].layout
    rounds = {
        (w, step.lane, step.round): step
        for w, s in enumerate(all_schedules)
        for step in s.steps
        if isinstance(step, Exchange)
    }
    arrived = Counter()
    for (w, lane, k), step in rounds.items():
        for m in step.sends:
            mirror = [r for r in rounds[m.peer, lane, k].receives if r.peer == w and r.tensor == m.tensor]
            assert [r.sources for r in mirror] == [m.sources]
            same_machine = layout.machine(w) == layout.machine(m.peer)
            assert same_machine == (lane == "inside"), "a message is on the wrong lane"
        for m in step.receives:
            mirror = [s for s in rounds[m.peer, lane, k].sends if s.peer == w and s.tensor == m.tensor]
            assert [s.sources for s in mirror] == [m.sources]
            arrived.update((w, m.tensor, s, m.peer if m.tensor == "o" else None) for s in m.sources)
            assert w not in m.sources or m.tensor == "o"
    assert set(arrived.values()) <= {1}
    for w, s in enumerate(all_schedules):
        wanted_kv = {source for slab in s.slabs for source in slab if source not in (w, JOINT)}
        for x in "kv":
            assert {source for (rank, t, source, _) in arrived if (rank, t) == (w, x)} == wanted_kv
        wanted_q = set(s.queries) - {w}
        assert {source for (rank, t, source, _) in arrived if (rank, t) == (w, "q")} == wanted_q


@pytest.mark.parametrize("joint", [None, "front", "rear"])
def test_every_small_layout(joint):
    for layout in SMALL:
        check(layout, joint)


@settings(max_examples=25)
@given(layouts, joints)
def test_larger_layouts(layout, joint):
    check(layout, joint)


@settings(max_examples=60)
@given(layouts, st.sampled_from([1, 2, 4, 8]))
def test_bytes_between_machines_equal_the_formulas(layout, heads_per_kv_head):
    """Elements that leave a machine, counted from the schedule, against design.md section 2."""
    g = Fraction(1, heads_per_kv_head)
    n = layout.num_machines
    chunk = Fraction(1, layout.world_size * layout.ulysses_degree)  # of B*L*H*D: one rank's tokens, one head group
    weight = {"q": chunk, "o": chunk, "k": g * chunk, "v": g * chunk}
    out = Counter()
    for w, s in enumerate(schedules(layout)):
        for step in s.steps:
            if isinstance(step, Exchange) and step.lane == "across":
                out[layout.machine(w)] += sum(weight[m.tensor] * len(m.sources) for m in step.sends)
    assert set(out.values()) <= {layout.egress(g)}
    if layout.torus == n:
        assert layout.egress(g) == (2 + 2 * g) * Fraction(n - 1, n * n)
    if layout.torus == 1:
        assert layout.egress(g) == 2 * g * Fraction(n - 1, n)


def test_the_paper_example_pulls_in_rotation():
    """4 machines x 8, T=4 U=2 R=4: machine order is t-1, t-2, t-3 in and t+1, t+2, t+3 out."""
    layout = Layout(torus=4, ulysses=2, ring_across=1, ring_inside=4)
    w = layout.position(1, 0, 0, 2)
    across = [s for s in build_schedule(layout, w).steps if isinstance(s, Exchange) and s.lane == "across"]
    assert [sorted({layout.machine(m.peer) for m in s.receives}) for s in across[:6]] == [[0], [3], [2]] * 2
    assert [sorted({layout.machine(m.peer) for m in s.sends}) for s in across[:6]] == [[2], [3], [0]] * 2
    assert [{m.tensor for m in s.sends} for s in across] == [{"q"}] * 3 + [{"k", "v"}] * 3 + [{"o"}] * 3


def test_transfers_are_in_flight_while_chunks_are_attended():
    """Every machine's chunk is on its way at least one Attend before it is needed, and O leaves before the last one."""
    layout = Layout(torus=4, ulysses=1, ring_across=1, ring_inside=2)
    for w in range(layout.world_size):
        steps = build_schedule(layout, w).steps
        for at, step in enumerate(steps):
            if isinstance(step, Exchange) and step.lane == "across" and step.sends[0].tensor != "o":
                sources = {s for m in step.receives for s in m.sources}
                needs = "queries" if step.sends[0].tensor == "q" else "keys"
                used = next(
                    i
                    for i, s in enumerate(steps)
                    if isinstance(s, Attend) and not sources.isdisjoint(getattr(s, needs))
                )
                assert any(isinstance(s, Attend) for s in steps[at:used]), f"round {step.round} is not overlapped"
        assert isinstance(steps[-1], Attend) and steps[-1].queries == (w,)
