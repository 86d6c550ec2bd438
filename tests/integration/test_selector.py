"""``--sp-backend auto``: the candidates, which one a trial selects, and real ranks that choose together."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sf_xfuser.autotune.selector import flat_ulysses, layouts, torus_first
from sf_xfuser.autotune.trials import OWN, Contest
from sf_xfuser.config import TorusArgs
from sf_xfuser.layout.plan import Layout
from sf_xfuser.layout.usp_layouts import XditConfig
from tests.launch import reports, torchrun

AUTO = TorusArgs(backend="auto")

# -- the trial of one shape -------------------------------------------------------------------------------------------


def run(contest: Contest, true: dict[str, float]) -> list[str]:
    """The candidates in the order of their calls, where each takes its true time."""
    calls: list[str] = []
    while contest.chosen is None:
        calls.append(contest.turn)
        contest.took(true[contest.turn])
    return calls


def test_all_are_timed_in_turns_and_the_fastest_is_selected():
    contest = Contest(["torus", "own", "other"])
    assert str(contest) == "trial running; torus: not timed; own: not timed; other: not timed"
    calls = run(contest, {"torus": 1.1, "own": 1.0, "other": 1.15})
    assert calls[:3] == ["torus", "own", "other"] and len(calls) <= 10
    assert contest.chosen == "own" == contest.turn and str(contest).startswith("selected own; torus: 1.1e+03 ms (med")


def test_what_is_clearly_slower_is_not_timed_again():
    contest = Contest(["torus", "own"])
    assert run(contest, {"torus": 1.0, "own": 1.6}) == ["torus", "own"]
    assert contest.chosen == "torus"


@pytest.mark.parametrize(
    ("candidates", "times", "selected"),
    [
        (["a", "b"], [1.015, 1.0], "a"),  # the preferred one
        (["a", "b"], [1.03, 1.0], "b"),  # no tie
        (["torus", OWN], [1.0, 1.015], OWN),
        (["torus", OWN], [1.0, 1.03], "torus"),  # no tie
    ],
)
def test_a_tie_goes_to_xdits_own_and_else_to_what_is_preferred(candidates, times, selected):
    contest = Contest(candidates)
    run(contest, dict(zip(candidates, times, strict=True)))
    assert contest.chosen == selected


def test_what_is_usually_faster_is_selected_not_what_was_once():
    """Calls of one candidate that differ, beside calls of another that do not; and one call that something held up."""
    for torus, selected in (([0.9, 1.3, 1.3, 1.3, 1.3], OWN), ([0.9, 2.0, 0.9, 0.9, 0.9], "torus")):
        took = iter(torus)
        contest = Contest(["torus", OWN])
        while contest.chosen is None:
            contest.took(next(took) if contest.turn == "torus" else 1.0)
        assert contest.chosen == selected and next(took, None) is None


def test_of_five_candidates_the_nearest_are_timed_again():
    """Ten calls are not enough for all."""
    true = {"a": 1.0, "b": 1.3, "c": 1.02, "d": 1.2, "e": 1.1}
    contest = Contest(list(true))
    calls = run(contest, true)
    assert Counter(calls[:10]) == {"a": 3, "c": 3, "e": 2, "b": 1, "d": 1} and contest.chosen == "a"


def test_two_that_are_near_take_turns_for_longer():
    contest = Contest(["a", "b", "c"])
    calls = run(contest, {"a": 1.035, "b": 1.0, "c": 1.05})
    assert len(calls) == 30 and set(calls[10:]) == {"a", "b"} and contest.chosen == "b"
    contest = Contest(["a", "b"])
    assert len(run(contest, {"a": 1.045, "b": 1.0})) == 10 and contest.chosen == "b"


def test_what_fails_is_not_timed_again():
    contest = Contest(["torus", OWN, "others"])
    run(contest, {"torus": 1.0, OWN: 1.2, "others": inf})
    assert contest.chosen == "torus" and contest.times["others"] == [inf] and "others: failed" in str(contest)


def test_a_single_candidate_needs_no_trial():
    assert run(Contest(["torus"]), {}) == []


@given(st.lists(st.floats(0.01, 100.0) | st.floats(1.0, 1.1), min_size=2, max_size=5))
def test_it_is_never_slower_than_the_best(times):
    """Whatever the candidates take: but for one call of each, no call of a trial takes half as long again, and after
    ten calls only what is as fast takes turns."""
    true = {f"candidate {n}": seconds for n, seconds in enumerate(times)}
    contest = Contest(list(true))
    calls, best = run(contest, true), min(true.values())
    assert len(calls) <= 30 and best / true[contest.chosen] >= 0.98
    assert sum(true[name] for name in calls) <= sum(times) + 1.5 * best * (len(calls) - len(times))
    turns = [true[name] for name in calls[10:]]
    assert sum(turns) <= 1.022 * best * len(turns)


# -- which candidates -------------------------------------------------------------------------------------------------


def spelled(found: list[Layout]) -> list[str]:
    return [str(layout) for layout in found]


def test_layouts_of_torus_worth_trying():
    assert spelled(layouts(4, 2, 8, 8, 2, AUTO)) == ["torus=4 ulysses=2 ring=1", "torus=4 ulysses=1 ring=2"]
    assert spelled(layouts(3, 1, 3, 3, 1, AUTO)) == ["torus=3 ulysses=1 ring=1"]  # a ring would move more bytes
    assert spelled(layouts(1, 4, 8, 8, 4, AUTO)) == ["torus=1 ulysses=4 ring=1"]
    assert spelled(layouts(4, 2, None, None, 2, AUTO)) == ["torus=2 ulysses=1 ring=4 (2 across machines x 2 inside)"]
    assert spelled(layouts(4, 2, 8, 8, 2, replace(AUTO, plan="paper"))) == ["torus=4 ulysses=2 ring=1"]
    assert spelled(layouts(4, 2, 8, 8, 2, replace(AUTO, plan="torus=2,ulysses=2,ring=2"))) == [
        "torus=2 ulysses=2 ring=2 (2 across machines x 1 inside)"
    ]


def test_flat_ulysses_where_it_is_legal_and_not_xdits_own():
    def flat(ulysses: int, ring: int, heads: int | None = None, kv_heads: int | None = None) -> list[str]:
        return list(map(str, flat_ulysses(XditConfig(ulysses_degree=ulysses, ring_degree=ring), heads, kv_heads)))

    assert flat(2, 4, 8) == flat(2, 4) == flat(1, 8, 16, 8) == ["ulysses=8 ring=1"]
    assert flat(2, 4, 12) == flat(2, 4, 8, 2) == []
    assert flat(8, 1, 8) == []  # it is xDiT's own, which alone may run a call with padded keys


def test_without_a_trial_torus_comes_first_where_it_hides_something_and_moves_no_more_bytes():
    own = XditConfig(ulysses_degree=2, ring_degree=4)
    assert torus_first(Layout.on_grid(4, 2, torus=4, ulysses=2), own, Fraction(1))
    assert torus_first(Layout.on_grid(4, 2, torus=4, ulysses=2), own, Fraction(1, 8))  # xDiT's ring moves all heads
    ulysses = XditConfig(ulysses_degree=8, ring_degree=1)
    assert not torus_first(Layout.on_grid(4, 2, torus=1, ulysses=2), ulysses, Fraction(1))
    inside = XditConfig(ulysses_degree=4, ring_degree=1)
    assert not torus_first(Layout.on_grid(1, 4, torus=1, ulysses=4), inside, Fraction(1))


# -- real ranks -------------------------------------------------------------------------------------------------------

FLAGS = ("--model", "m", "--sp-backend", "auto")
OF_2X2 = (*FLAGS, "--sp-topology", "2x2", "--ulysses_degree", "2", "--ring_degree", "2")


def calls(*flags: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """(what each rank said of each case: two texts; all output)."""
    output = torchrun("auto_calls.py", *flags, nproc=4).output
    found = {case: list(ranks.values()) for case, ranks in reports(output).items()}
    assert all(len(ranks) == 4 for ranks in found.values())
    return found, output


def selected_of(found: dict[str, list[tuple[str, str]]], candidates: set[str]) -> set[str]:
    """The candidates that are selected, where all ranks ran the same ones in the same order and were right."""
    last = set()
    for name in ("short", "long"):
        assert all(difference <= 2e-6 for difference, _ in found[name])
        assert len({ran for _, ran in found[name]}) == 1
        ran = found[name][0][1].split(" then ")
        assert len(ran) == 32 and set(ran) == candidates
        assert len(set(ran[30:])) == 1  # a trial takes thirty calls at most
        last.add(ran[-1])
    return last


TORUS = "torus (torus=2 ulysses=1 ring=2)"
UNSTAGED = "torus unstaged (torus=2 ulysses=1 ring=2)"
FLAT = "xDiT's USP (ulysses=4 ring=1)"


def test_what_is_slow_on_one_rank_is_left_by_all():
    """The others could not know by themselves. On rank 2 torus comes late, and xDiT's other degrees fail there."""
    found, output = calls(*OF_2X2, "--slow", "torus", "--broken")
    assert selected_of(found, {TORUS, OWN}) == {OWN}
    assert f"{FLAT} is left out: rank 2: ArithmeticError: planted" in output
    for text in {text for text, _ in found["explain"]}:
        assert f"--sp-backend auto: candidates {TORUS}, {OWN}, {FLAT} (ulysses=2 ring=2 allgather)" in text
        assert f"calls of [1, 8, 256, 16] in float32, SDPA_FLASH: selected {OWN}; " in text
        assert re.search(rf"{OWN}: \S+ ms \(median of \d\); {re.escape(FLAT)}: failed", text)
        assert f"attention calls handled by {OWN}: " in text
        assert "handed back to xDiT 1 times: causal attention needs keys in order" in text
    assert len(re.findall(r"--sp-backend auto: calls of \[.*?: selected xDiT's own USP; ", output)) == 2


def test_ranks_that_failed_at_different_points_of_a_trial_start_over():
    found, _ = calls(*OF_2X2, "--slow", "xDiT", "--behind")
    assert selected_of(found, {TORUS, OWN, FLAT}) == {TORUS}


def test_where_ranks_share_no_memory_unstaged_torus_is_a_candidate():
    found, _ = calls(*OF_2X2, "--apart", "--slow", "torus (,xDiT")
    assert selected_of(found, {TORUS, UNSTAGED, OWN, FLAT}) == {UNSTAGED}


def test_flat_ulysses_where_it_is_the_fastest():
    """With joint tokens, too, which each rank has to cut to the heads of those degrees."""
    found, _ = calls(*OF_2X2, "--slow", "torus,own", "--joint")
    assert selected_of(found, {TORUS, OWN, FLAT}) == {FLAT}
    assert all(f"attention calls handled by {FLAT}: " in text for text, _ in found["explain"])


def test_each_group_of_a_job_selects_by_itself():
    found, _ = calls(*FLAGS, "--sp-topology", "4x1", "--ulysses_degree", "2", "--data_parallel_degree", "2")
    for name in ("short", "long"):
        assert all(difference <= 2e-6 for difference, _ in found[name])
        ran = Counter(ran for _, ran in found[name])
        assert all(ranks % 2 == 0 for ranks in ran.values())  # a group's ranks make the same calls
        assert all(len(set(text.split(" then ")[30:])) == 1 for text in ran)


@pytest.mark.slow
def test_inside_one_machine_torus_and_xdits_own_are_compared_and_checked():
    flags = ("--sp-topology", "1x4", "--ulysses_degree", "4", "--sp-check", "first", "--slow", "xDiT")
    torus = "torus (torus=1 ulysses=4 ring=1)"
    found, _ = calls(*FLAGS, *flags)
    assert selected_of(found, {torus, OWN}) == {torus}
    assert all("--sp-check first: 2 shape(s), at most" in text for text, _ in found["explain"])
    handed_back = "handed back to xDiT 1 times: attention backend SDPA returns no log-sum-exp"
    assert all(handed_back in text for text, _ in found["explain"])  # torus alone would refuse such a backend
