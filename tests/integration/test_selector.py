"""``--sp-backend auto``: the candidates, the trials, and the selection on real ranks."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sf_xfuser.autotune.selector import flat_ulysses, second_layout, torus_first
from sf_xfuser.autotune.trials import OWN, Trial
from sf_xfuser.layout.plan import UNEVEN, Layout, make_plan
from sf_xfuser.layout.usp_layouts import XditConfig
from tests.launch import reports, torchrun

# -- the trial of one call shape --------------------------------------------------------------------------------------


def run(trial: Trial, seconds: dict[str, float]) -> list[str]:
    """Run the trial with fixed times per candidate; returns the candidates in the order of their calls."""
    calls: list[str] = []
    while trial.selected is None:
        calls.append(trial.next)
        trial.record(seconds[trial.next])
    return calls


def test_all_are_timed_in_turn_and_the_fastest_is_selected():
    trial = Trial(["torus", "own", "other"])
    assert str(trial) == "trial running; torus: not timed; own: not timed; other: not timed"
    calls = run(trial, {"torus": 1.1, "own": 1.0, "other": 1.15})
    assert calls[:3] == ["torus", "own", "other"] and len(calls) <= 10
    assert trial.selected == "own" == trial.next and str(trial).startswith("selected own; torus: 1.1e+03 ms (med")


def test_a_clearly_slower_candidate_is_not_timed_again():
    trial = Trial(["torus", "own"])
    assert run(trial, {"torus": 1.0, "own": 1.6}) == ["torus", "own"]
    assert trial.selected == "torus"


@pytest.mark.parametrize(
    ("candidates", "times", "selected"),
    [
        (["a", "b"], [1.015, 1.0], "a"),  # the preferred one
        (["a", "b"], [1.03, 1.0], "b"),  # no tie
        (["torus", OWN], [1.0, 1.015], OWN),
        (["torus", OWN], [1.0, 1.03], "torus"),  # no tie
    ],
)
def test_on_a_tie_xdits_own_is_selected_else_the_preferred_candidate(candidates, times, selected):
    trial = Trial(candidates)
    run(trial, dict(zip(candidates, times, strict=True)))
    assert trial.selected == selected


def test_the_lowest_median_is_selected_not_the_lowest_time():
    """One candidate with varying times against one with constant times; and one disturbed call."""
    for torus, selected in (([0.9, 1.3, 1.3, 1.3, 1.3], OWN), ([0.9, 2.0, 0.9, 0.9, 0.9], "torus")):
        took = iter(torus)
        trial = Trial(["torus", OWN])
        while trial.selected is None:
            trial.record(next(took) if trial.next == "torus" else 1.0)
        assert trial.selected == selected and next(took, None) is None


def test_the_fastest_of_five_candidates_are_timed_again():
    """Ten calls are not enough for all."""
    seconds = {"a": 1.0, "b": 1.3, "c": 1.02, "d": 1.2, "e": 1.1}
    trial = Trial(list(seconds))
    calls = run(trial, seconds)
    assert Counter(calls[:10]) == {"a": 3, "c": 3, "e": 2, "b": 1, "d": 1} and trial.selected == "a"


def test_two_close_candidates_get_up_to_thirty_calls():
    trial = Trial(["a", "b", "c"])
    calls = run(trial, {"a": 1.035, "b": 1.0, "c": 1.05})
    assert len(calls) == 30 and set(calls[10:]) == {"a", "b"} and trial.selected == "b"
    trial = Trial(["a", "b"])
    assert len(run(trial, {"a": 1.045, "b": 1.0})) == 10 and trial.selected == "b"


def test_a_failed_candidate_is_not_timed_again():
    trial = Trial(["torus", OWN, "others"])
    run(trial, {"torus": 1.0, OWN: 1.2, "others": inf})
    assert trial.selected == "torus" and trial.times["others"] == [inf] and "others: failed" in str(trial)


def test_a_single_candidate_needs_no_trial():
    assert run(Trial(["torus"]), {}) == []


@given(st.lists(st.floats(0.01, 100.0) | st.floats(1.0, 1.1), min_size=2, max_size=5))
def test_a_trial_costs_little_and_selects_the_best(times):
    """After one call of each candidate, no call is 50 % slower than the best; after ten calls only close candidates
    are timed."""
    seconds = {f"candidate {n}": seconds for n, seconds in enumerate(times)}
    trial = Trial(list(seconds))
    calls, best = run(trial, seconds), min(seconds.values())
    assert len(calls) <= 30 and best / seconds[trial.selected] >= 0.98
    assert sum(seconds[name] for name in calls) <= sum(times) + 1.5 * best * (len(calls) - len(times))
    turns = [seconds[name] for name in calls[10:]]
    assert sum(turns) <= 1.022 * best * len(turns)


# -- which candidates -------------------------------------------------------------------------------------------------


def test_second_layout():
    def second(num_machines: int, ranks_per_machine: int, heads: int) -> str:
        plan = make_plan(num_machines, ranks_per_machine, heads=heads, max_imbalance=UNEVEN)
        return str(second_layout(plan.layout, heads, heads))

    assert second(4, 2, 8) == "torus=4 ulysses=1 ring=2"
    assert second(3, 1, 3) == "None"  # a ring moves more bytes
    assert second(1, 4, 8) == "None"


def test_flat_ulysses_is_a_candidate_if_legal_and_not_xdits_own():
    def flat(ulysses: int, ring: int, heads: int | None = None, kv_heads: int | None = None) -> list[str]:
        return list(map(str, flat_ulysses(XditConfig(ulysses_degree=ulysses, ring_degree=ring), heads, kv_heads)))

    assert flat(2, 4, 8) == flat(2, 4) == flat(1, 8, 16, 8) == ["ulysses=8 ring=1"]
    assert flat(2, 4, 12) == flat(2, 4, 8, 2) == []
    assert flat(8, 1, 8) == []  # equal to xDiT's own


def test_torus_is_preferred_across_machines_with_no_more_bytes():
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
    """(two texts by rank for each case, all output)."""
    output = torchrun("auto_calls.py", *flags, nproc=4).output
    found = {case: list(ranks.values()) for case, ranks in reports(output).items()}
    assert all(len(ranks) == 4 for ranks in found.values())
    return found, output


def selected_of(found: dict[str, list[tuple[str, str]]], candidates: set[str]) -> set[str]:
    """The selected candidates. Asserts correct results, and the same candidates in the same order on all ranks."""
    last = set()
    for name in ("short", "long"):
        assert all(difference <= 2e-6 for difference, _ in found[name])
        assert len({ran for _, ran in found[name]}) == 1
        ran = found[name][0][1].split(" then ")
        assert len(ran) == 32 and set(ran) == candidates
        assert len(set(ran[30:])) == 1  # a trial has at most thirty calls
        last.add(ran[-1])
    return last


TORUS = "torus (torus=2 ulysses=1 ring=2)"
UNSTAGED = "torus unstaged (torus=2 ulysses=1 ring=2)"
FLAT = "xDiT's USP (ulysses=4 ring=1)"


def test_a_candidate_that_is_slow_on_one_rank_is_selected_by_none():
    """On rank 2 torus is slow and xDiT's other degrees fail."""
    found, output = calls(*OF_2X2, "--slow", "torus", "--broken")
    assert selected_of(found, {TORUS, OWN}) == {OWN}
    assert f"{FLAT} is left out: rank 2: ArithmeticError: planted" in output
    for text in {text for text, _ in found["explain"]}:
        assert f"--sp-backend auto: candidates {TORUS}, {OWN}, {FLAT}; {OWN} is ulysses=2 ring=2 allgather; " in text
        assert f"calls of [1, 8, 256, 16] in float32, SDPA_FLASH: selected {OWN}; " in text
        assert re.search(rf"{OWN}: \S+ ms \(median of \d\); {re.escape(FLAT)}: failed", text)
        assert f"attention calls handled by {OWN}: " in text
        assert "fell back to xDiT's own USP 1 times: causal attention needs keys in order" in text
    for text, counted in found["explain"]:
        for name in (OWN, FLAT, "torus"):
            own = re.findall(rf"(?:handled by {re.escape(name)}: |fell back to {name} )(\d+)", text)
            assert counted.get(name, 0) == sum(map(int, own))
    assert len(re.findall(r"--sp-backend auto: calls of \[.*?: selected xDiT's own USP; ", output)) == 2


def test_ranks_at_different_points_of_a_trial_start_over():
    found, _ = calls(*OF_2X2, "--slow", "xDiT", "--behind")
    assert selected_of(found, {TORUS, OWN, FLAT}) == {TORUS}


def test_unstaged_torus_is_a_candidate_without_shared_memory():
    found, _ = calls(*OF_2X2, "--apart", "--slow", "torus (,xDiT")
    assert selected_of(found, {TORUS, UNSTAGED, OWN, FLAT}) == {UNSTAGED}


def test_flat_ulysses_can_be_selected():
    """Also with joint tokens, which USP cuts to the heads of these degrees."""
    found, _ = calls(*OF_2X2, "--slow", "torus,own", "--joint")
    assert selected_of(found, {TORUS, OWN, FLAT}) == {FLAT}
    assert all(f"attention calls handled by {FLAT}: " in text for text, _ in found["explain"])


def test_each_sequence_parallel_group_selects_separately():
    found, _ = calls(*FLAGS, "--sp-topology", "4x1", "--ulysses_degree", "2", "--data_parallel_degree", "2")
    for name in ("short", "long"):
        assert all(difference <= 2e-6 for difference, _ in found[name])
        ran = Counter(ran for _, ran in found[name])
        assert all(ranks % 2 == 0 for ranks in ran.values())  # the ranks of a group make the same calls
        assert all(len(set(text.split(" then ")[30:])) == 1 for text in ran)


@pytest.mark.slow
def test_candidates_inside_one_machine_are_timed_and_checked():
    flags = ("--sp-topology", "1x4", "--ulysses_degree", "4", "--sp-check", "first", "--slow", "xDiT")
    torus = "torus (torus=1 ulysses=4 ring=1)"
    found, _ = calls(*FLAGS, *flags)
    assert selected_of(found, {torus, OWN}) == {torus}
    assert all("--sp-check first: 2 shape(s), at most" in text for text, _ in found["explain"])
    fallback = "fell back to xDiT's own USP 1 times: attention backend SDPA returns no log-sum-exp"
    assert all(fallback in text for text, _ in found["explain"])
