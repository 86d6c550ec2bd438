"""``--sp-backend auto``: who is tried and who stays, what is kept of a cluster, and real ranks that choose together."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sf_xfuser import presets
from sf_xfuser.args import TorusArgs
from sf_xfuser.choice import cluster_file, layouts, other_degrees, read_cluster, torus_first, write_cluster
from sf_xfuser.cluster import Cluster
from sf_xfuser.contest import OWN, Contest
from sf_xfuser.files import LARGEST_CHARACTERS
from sf_xfuser.plan import Layout
from sf_xfuser.xdit_layouts import XditConfig
from tests.launch import torchrun

AUTO = TorusArgs(backend="auto")

# -- who is tried, and who stays --------------------------------------------------------------------------------------


def settle(contest: Contest, true: dict[str, float]) -> list[str]:
    """The arms in the order of their calls, where each takes its true time."""
    calls: list[str] = []
    while contest.chosen is None:
        calls.append(contest.turn)
        contest.took(true[contest.turn])
    return calls


def test_without_predictions_all_are_tried_in_turn_and_the_fastest_stays():
    contest = Contest(["torus", "own", "other"], {})
    calls = settle(contest, {"torus": 1.1, "own": 1.0, "other": 1.15})
    assert calls[:3] == ["torus", "own", "other"] and len(calls) <= 10
    assert contest.chosen == "own" == contest.turn and contest.measured("own") == 1.0


def test_what_is_clearly_slower_is_not_tried_again():
    contest = Contest(["torus", "own"], {})
    assert settle(contest, {"torus": 1.0, "own": 1.6}) == ["torus", "own"]
    assert contest.chosen == "torus"


def test_what_is_predicted_far_behind_is_not_tried_where_the_prediction_holds():
    contest = Contest(["torus", "own"], {"torus": 3.1, "own": 1.0})
    assert settle(contest, {"torus": 0.1, "own": 1.2}) == ["own"]
    assert str(contest) == (
        "own; own: predicted 1e+03 ms, measured 1.2e+03 ms (median of 1); torus: predicted 3.1e+03 ms, not tried"
    )


def test_all_are_timed_but_the_hopeless():
    """As a probe that was disturbed once predicted: torus without stages at twice its time, the best of all."""
    predicted = {OWN: 1.67, "torus a": 2.05, "torus b": 2.14, "together": 3.31}
    contest = Contest(list(predicted), predicted)
    settle(contest, {OWN: 1.71, "torus a": 1.66, "torus b": 1.65, "together": 1.53})
    assert contest.chosen == "together"
    contest = Contest(list(predicted), {**predicted, "together": 5.1})
    assert "together" not in settle(contest, {OWN: 1.71, "torus a": 1.66, "torus b": 1.65, "together": 0.1})


@pytest.mark.parametrize("factor", [0.5, 2.0])  # faster than predicted says as much against the predictions
def test_predictions_that_turn_out_wrong_are_not_believed(factor):
    contest = Contest(["torus", "own"], {"torus": 4.0, "own": 1.0})
    settle(contest, {"torus": 0.1, "own": 1.0 * factor})
    assert contest.chosen == "torus"


def test_a_tie_goes_to_xdits_own_and_else_to_what_is_preferred():
    contest = Contest(["a", "b"], {"a": 1.1, "b": 1.0})
    settle(contest, {"a": 1.015, "b": 1.0})
    assert contest.chosen == "a"
    contest = Contest(["a", "b"], {"a": 1.1, "b": 1.0})
    settle(contest, {"a": 1.03, "b": 1.0})
    assert contest.chosen == "b"  # no tie
    contest = Contest(["torus", OWN], {"torus": 1.0, OWN: 1.1})
    settle(contest, {"torus": 1.0, OWN: 1.015})
    assert contest.chosen == OWN
    contest = Contest([OWN, "torus"], {"torus": 1.1, OWN: 1.0})
    settle(contest, {"torus": 1.0, OWN: 1.03})
    assert contest.chosen == "torus"  # no tie


def test_what_is_usually_faster_serves_not_what_was_once():
    """Calls of one arm that differ, beside calls of another that do not; and one call that something held up."""
    for torus, chosen in (([0.9, 1.3, 1.3, 1.3, 1.3], OWN), ([0.9, 2.0, 0.9, 0.9, 0.9], "torus")):
        took = iter(torus)
        contest = Contest(["torus", OWN], {})
        while contest.chosen is None:
            contest.took(next(took) if contest.turn == "torus" else 1.0)
        assert contest.chosen == chosen and next(took, None) is None


def test_of_five_arms_the_nearest_are_timed_again():
    """Ten calls are not enough for all."""
    true = {"a": 1.0, "b": 1.3, "c": 1.02, "d": 1.2, "e": 1.1}
    contest = Contest(list(true), {})
    calls = settle(contest, true)
    assert Counter(calls[:10]) == {"a": 3, "c": 3, "e": 2, "b": 1, "d": 1} and contest.chosen == "a"


def test_two_that_are_near_take_turns_for_longer():
    contest = Contest(["a", "b", "c"], {})
    calls = settle(contest, {"a": 1.035, "b": 1.0, "c": 1.05})
    assert len(calls) == 30 and set(calls[10:]) == {"a", "b"} and contest.chosen == "b"
    contest = Contest(["a", "b"], {})
    assert len(settle(contest, {"a": 1.045, "b": 1.0})) == 10 and contest.chosen == "b"


def test_what_fails_is_not_tried_again():
    contest = Contest(["torus", OWN, "others"], {})
    settle(contest, {"torus": 1.0, OWN: 1.2, "others": inf})
    assert contest.chosen == "torus" and contest.times["others"] == [inf] and "others: failed" in str(contest)


def test_a_single_arm_needs_no_call():
    assert settle(Contest(["torus"], {}), {}) == []


@given(
    st.lists(st.floats(0.01, 100.0) | st.floats(1.0, 1.1), min_size=2, max_size=5),
    st.lists(st.floats(1 / 1.2, 1.2), min_size=5, max_size=5),
    st.booleans(),
)
def test_it_is_never_slower_than_the_best(times, errors, predicting):
    """Whatever the arms take, with predictions within 20 % or none at all; after ten calls, taking turns or settled."""
    true = {f"arm {n}": seconds for n, seconds in enumerate(times)}
    predicted = {arm: true[arm] * error for arm, error in zip(true, errors, strict=False)} if predicting else {}
    contest = Contest(list(true), predicted)
    calls, best = settle(contest, true), min(true.values())
    assert len(calls) <= 30 and best / true[contest.chosen] >= 0.98
    turns = [true[arm] for arm in calls[10:]]
    assert sum(turns) <= 1.022 * best * len(turns)


# -- which arms -------------------------------------------------------------------------------------------------------


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


def test_other_degrees_of_xdits_worth_predicting():
    """Those that move no more bytes between machines, with rings hop by hop."""

    def others(ulysses: int, ring: int, *grid: int, heads: int | None = None, kv_heads: int | None = None) -> list[str]:
        own = XditConfig(ulysses_degree=ulysses, ring_degree=ring)
        return [str(config) for config in other_degrees(own, *grid, heads, kv_heads)]

    own, crossing = "ulysses=2 ring=4 alltoall", "ulysses=4 ring=2 alltoall"
    assert others(2, 4, 4, 2, heads=8) == ["ulysses=8 ring=1", crossing, own]
    assert others(2, 4, 4, 2) == ["ulysses=8 ring=1", crossing, own]
    assert others(2, 4, 4, 2, heads=12) == [crossing, own]
    assert others(2, 4, 4, 2, heads=8, kv_heads=2) == [own]
    assert others(8, 1, 4, 2, heads=8) == []  # all others move more
    assert others(4, 1, 1, 4, heads=8) == ["ulysses=2 ring=2 alltoall", "ulysses=1 ring=4 alltoall"]
    assert others(1, 2, 2, 1, heads=3) == ["ulysses=1 ring=2 alltoall"]


def test_without_a_prediction_torus_comes_first_where_it_hides_something_and_moves_no_more_bytes():
    own = XditConfig(ulysses_degree=2, ring_degree=4)
    assert torus_first(Layout.fitting(4, 2, torus=4, ulysses=2), own, Fraction(1))
    assert torus_first(Layout.fitting(4, 2, torus=4, ulysses=2), own, Fraction(1, 8))  # xDiT's ring moves all heads
    ulysses = XditConfig(ulysses_degree=8, ring_degree=1)
    assert not torus_first(Layout.fitting(4, 2, torus=1, ulysses=2), ulysses, Fraction(1))
    inside = XditConfig(ulysses_degree=4, ring_degree=1)
    assert not torus_first(Layout.fitting(1, 4, torus=1, ulysses=4), inside, Fraction(1))


# -- the cluster, kept ------------------------------------------------------------------------------------------------

HERE = {"ranks": [["host", "host", "cpu"]] * 2, "head_dim": 64, "torch": "2.13"}


def test_a_cluster_is_read_back_as_it_was_written(tmp_path):
    cluster = presets.PRESETS["p4de"]
    path = cluster_file(tmp_path / "new" / "folder", HERE)
    assert read_cluster(path, HERE) == (None, "")
    assert write_cluster(path, HERE, cluster) == f"kept in {path}"
    kept, said = read_cluster(path, HERE)
    assert Cluster.from_json(kept) == Cluster.from_json(json.loads(json.dumps(cluster.to_json())))
    assert said == f"as measured before, from {path}"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing half written beside it


def test_a_cluster_of_others_is_told_apart(tmp_path):
    elsewhere = {**HERE, "ranks": [["other", "other", "cpu"]] * 2}
    path = cluster_file(tmp_path, HERE)
    assert path != cluster_file(tmp_path, elsewhere)
    write_cluster(path, elsewhere, presets.PRESETS["p4de"])  # as if the file had been copied here
    assert read_cluster(path, HERE) == (
        None,
        f"{path} is ignored: it was measured on another cluster (ranks differ)",
    )


BROKEN = ["", '{"identity": {"ra', "[]", '{"identity": {}}', "\x00\xff", "[" * 100_000, "9" * 5000]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_ignored(tmp_path, text):
    path = tmp_path / "cluster.json"
    path.write_bytes(text.encode("latin-1"))
    kept, said = read_cluster(path, {})
    assert kept is None and said.startswith(f"{path} is ignored: it holds no cluster (")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    """A pipe without a writer would be waited for, a device never end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        kept, said = read_cluster(path, {})
        assert kept is None and said.startswith(f"{path} is ignored: it holds no cluster (") and "not a regular" in said
    (tmp_path / "large").write_text(" " * (LARGEST_CHARACTERS + 1))
    assert "more than 67108864 characters" in read_cluster(tmp_path / "large", {})[1]


def test_a_cluster_without_sense_is_ignored(tmp_path):
    path = cluster_file(tmp_path, HERE)
    write_cluster(path, HERE, presets.PRESETS["p4de"])
    values = json.loads(path.read_text())
    values["cluster"]["across"]["rank_gbps"] = -1
    path.write_text(json.dumps(values))
    kept, said = read_cluster(path, HERE)
    assert kept is None and "rank_gbps must be a finite number above 0, got -1" in said
    values["cluster"]["across"]["ways"] = [["put", float("inf"), {}]]  # JSON of Python has such numbers
    path.write_text(json.dumps(values))
    assert read_cluster(path, HERE)[0] is None
    with pytest.raises(ValueError, match="describes no cluster: across: cannot convert float infinity"):
        Cluster.load(path)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    path = cluster_file(tmp_path / "file" / "below", HERE)
    assert write_cluster(path, HERE, presets.PRESETS["p4de"]).startswith(f"not kept: {path}: ")


# -- real ranks -------------------------------------------------------------------------------------------------------

FLAGS = ("--model", "m", "--sp-backend", "auto")
OF_2X2 = (*FLAGS, "--sp-topology", "2x2", "--ulysses_degree", "2", "--ring_degree", "2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def calls(cache: Path, *flags: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """(what each rank said of each case: two texts; all output)."""
    output = torchrun("auto_calls.py", *flags, nproc=4, env={"XDG_CACHE_HOME": str(cache)}).output
    found: dict[str, list[tuple[str, str]]] = {}
    for name, _, first, second in re.findall(r"@@(\w+)\|(\d)\|(.*?)\|(.*?)@@", output, re.DOTALL):
        found.setdefault(name, []).append((first, second))
    assert all(len(ranks) == 4 for ranks in found.values())
    return found, output


def chosen_for(found: dict[str, list[tuple[str, str]]], arms: set[str]) -> set[str]:
    """The arm that serves in the end, where all ranks took the same ones in the same order and were right."""
    last = set()
    for name in ("short", "long"):
        assert all(float(difference) <= 2e-6 for difference, _ in found[name])
        assert len({served for _, served in found[name]}) == 1
        served = found[name][0][1].split(" then ")
        assert len(served) == 32 and set(served) <= arms
        assert len(set(served[30:])) == 1  # thirty calls have settled it
        last.add(served[-1])
    return last


TORUS = "torus (torus=2 ulysses=1 ring=2)"
TOGETHER = "torus together (torus=2 ulysses=1 ring=2)"
OTHERS = {"xDiT's USP (ulysses=4 ring=1)", "xDiT's USP (ulysses=2 ring=2 alltoall)"}


@pytest.fixture(scope="module")
def late_torus(cache) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """The first run on this cluster. On rank 2 torus comes late, and xDiT's other degrees fail there."""
    return calls(cache, *OF_2X2, "--slow", "torus", "--broken")


def test_what_is_slow_on_one_rank_is_left_by_all(late_torus, cache):
    """The others could not know by themselves."""
    found, output = late_torus
    assert chosen_for(found, {TORUS, OWN}) == {OWN}
    assert re.search(r"xDiT's USP \(.*?\) is left out: rank 2: ArithmeticError: planted", output)
    path = cache / "sf-xfuser" / "cluster-[0-9a-f]{16}.json"
    said = {text for text, _ in found["explain"]}
    for text in said:
        assert re.search(rf"cluster for float32, 16, SDPA_FLASH: measured in \d+\.\d s, kept in {path}", text)
        assert re.search(rf"calls of \[1, 8, 256, 16\] in float32, SDPA_FLASH: {OWN}; ", text)
        assert re.search(rf"{OWN}: predicted \S+ ms, measured \S+ ms \(median of \d\)", text)
        assert re.search(r"xDiT's USP \(.*?\): predicted \S+ ms, failed", text)
        assert f"attention calls served by {OWN}: " in text
        assert "handed back to xDiT 1 times: causal attention needs keys in order" in text
    assert len(re.findall(r"--sp-backend auto: measuring the rates of this cluster", output)) == 1
    assert len(re.findall(r"--sp-backend auto: calls of \[.*?: xDiT's own USP; ", output)) == 2


def test_the_cluster_is_measured_once(late_torus, cache):
    found, output = calls(cache, *OF_2X2, "--slow", "xDiT")
    assert chosen_for(found, {TORUS, OWN, *OTHERS}) == {TORUS}
    assert all("cluster for float32, 16, SDPA_FLASH: as measured before, from " in text for text, _ in found["explain"])
    assert "measuring the rates" not in output


def test_where_ranks_share_no_memory_torus_without_stages_is_an_arm_of_its_own(cache):
    found, _ = calls(cache, *OF_2X2, "--apart", "--slow", "torus (,xDiT")
    assert chosen_for(found, {TORUS, TOGETHER, OWN, *OTHERS}) == {TOGETHER}
    assert all(f"{TOGETHER}: predicted " in text for text, _ in found["explain"])


def test_xdits_own_in_other_degrees_where_they_are_the_fastest(cache):
    """With joint tokens, too, which each rank has to cut to the heads of those degrees."""
    found, _ = calls(cache, *OF_2X2, "--slow", "torus,own", "--joint")
    assert chosen_for(found, {TORUS, OWN, *OTHERS}) <= OTHERS
    assert all("attention calls served by xDiT's USP (" in text for text, _ in found["explain"])


def test_each_group_of_a_job_measures_the_cluster_and_settles(cache):
    flags = ("--sp-topology", "4x1", "--ulysses_degree", "2", "--data_parallel_degree", "2")
    found, _ = calls(cache, *FLAGS, *flags)
    for name in ("short", "long"):
        assert all(float(difference) <= 2e-6 for difference, _ in found[name])
        served = Counter(served for _, served in found[name])
        assert all(ranks % 2 == 0 for ranks in served.values())  # a group's ranks make the same calls
        assert all(len(set(text.split(" then ")[30:])) == 1 for text in served)
    texts = [text for text, _ in found["explain"]]
    assert all(
        re.search(r"cluster for float32, 16, SDPA_FLASH: measured in \d+\.\d s, kept in ", text) for text in texts
    )


@pytest.mark.slow
def test_inside_one_machine_torus_and_xdits_own_are_compared_and_checked(cache):
    flags = ("--sp-topology", "1x4", "--ulysses_degree", "4", "--sp-check", "first", "--slow", "xDiT")
    torus = "torus (torus=1 ulysses=4 ring=1)"
    others = {"xDiT's USP (ulysses=2 ring=2 alltoall)", "xDiT's USP (ulysses=1 ring=4 alltoall)"}
    before = len(list(cache.glob("sf-xfuser/*")))
    found, _ = calls(cache, *FLAGS, *flags)
    assert chosen_for(found, {torus, OWN, *others}) == {torus}
    assert all("--sp-check first: 2 shape(s), at most" in text for text, _ in found["explain"])
    handed_back = "handed back to xDiT 1 times: attention backend SDPA returns no log-sum-exp"
    assert all(handed_back in text for text, _ in found["explain"])  # torus alone would refuse such a backend
    assert len(list(cache.glob("sf-xfuser/cluster-*.json"))) == before + 1  # another topology is another cluster
