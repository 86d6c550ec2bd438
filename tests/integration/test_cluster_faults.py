"""Faults on an emulated cluster: no wrong result, no hang, nothing left behind (``ranks/cluster_faults.py``)."""

from __future__ import annotations

import json
import sys

import pytest

from sf_xfuser.bench import emulate
from sf_xfuser.bench.emulate import EmulationError
from tests.launch import RANKS, finish
from tests.ranks.cluster_faults import NAMES, Result, Scenario, check

REASON = emulate.unavailable()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=REASON or "")

QUICK = [
    "4x1/tcp/cut:1:2",
    "4x1/tcp/stop:1:3",
    "4x1/tcp/kill:0",
    "4x1/tcp/kill:1/no-counts",
    "4x1/two_sided/grad:1/goes-on",
    "2x2/auto/kill@attend:1",
    "2x2/auto/raise:1",
]


def run_scenarios(names: list[str], timeout: float) -> dict[str, dict]:
    """The result of each scenario, from one launch."""
    output = finish([sys.executable, str(RANKS / "cluster_faults.py"), "--json", *names], timeout=timeout).output
    lines = [line for line in output.splitlines() if line.startswith("{")]
    assert len(lines) == len(names), output[-8000:]
    return {result["name"]: result for result in map(json.loads, lines)}


@pytest.fixture(scope="module")
def quick() -> dict[str, dict]:
    return run_scenarios(QUICK, 200)


SLOW = [name for name in NAMES if name not in QUICK and name.startswith("4x1/tcp")]


@pytest.fixture(scope="module")
def slow() -> dict[str, dict]:
    return run_scenarios(SLOW, 3000)


@needs_namespaces
@pytest.mark.parametrize("name", QUICK)
def test_all_ranks_fail_or_none_does(name, quick):
    assert quick[name]["problems"] == [], quick[name]
    assert quick[name]["calls"] >= 4 * 5 and quick[name]["worst"] < 1e-5


@needs_namespaces
@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_faults(name, slow):
    assert slow[name]["problems"] == [], slow[name]


@pytest.mark.parametrize("verb", [emulate.cut, emulate.restore])
def test_links_outside_a_cluster(verb):
    with pytest.raises(EmulationError, match="not a rank of an emulated cluster with a machine 1"):
        verb(1)


# --- check ------------------------------------------------------------------------------------------------------


def call(index: int, began: float, t: float | None = None, **what) -> dict:
    return {"call": index, "began": began, "t": began + 0.1 if t is None else t, **({"off": 0.0} | what)}


def error(index: int, began: float, t: float, text: str = "an error") -> dict:
    return {"call": index, "began": began, "t": t, "error": "TransportError", "text": text}


# The fault lasts from 10 to 12. Ranks make calls 0 and 1 before it, fail at call 2, and succeed at call 3.
TEXT = "rank 0 on machine0: no data from rank 1"
GOOD = {
    rank: [call(0, 1), call(1, 9), error(2, 10, 11 + rank, TEXT.replace("rank 0", f"rank {rank}", 1)), call(3, 14)]
    for rank in range(4)
}


@pytest.mark.parametrize(
    ("name", "changed", "problems"),
    [
        ("4x1/tcp/raise:1", {}, []),
        ("4x1/tcp/calm:0", {}, ["rank(s) [0, 1, 2, 3] raised"]),
        ("4x1/tcp/raise:1", {2: call(1, 9, off=0.1)}, ["1 wrong results"]),
        ("4x1/tcp/raise:1", {2: call(1, 9, off=float("nan"))}, ["1 wrong results"]),
        ("4x1/tcp/raise:1", {2: call(1, 9, 55)}, ["a call took 46 s"]),
        ("4x1/tcp/raise:1", {2: error(2, 10, 19.5)}, ["rank(s) [2] raised late"]),
        ("4x1/tcp/raise:1/no-counts", {2: error(2, 10, 19.5)}, []),
        ("4x1/tcp/raise:1", {2: call(2, 10)}, ["rank(s) [2] did not raise"]),
        ("4x1/tcp/slow:1:15", {2: call(2, 10)}, ["rank(s) [2] did not raise"]),
        ("4x1/tcp/cut:1:20/no-counts", {rank: call(2, 10) for rank in range(4)}, []),
        ("4x1/tcp/raise:1", {2: error(1, 8, 9)}, ["an error before the fault"]),
        ("4x1/tcp/raise:1", {2: error(3, 14, 15)}, ["no call succeeds"]),
        ("4x1/tcp/raise:1", {2: error(2, 10, 11, "")}, ["an error without a text"]),
        ("4x1/tcp/kill:1/goes-on", {1: call(1, 9, off=0.1)}, ["1 wrong results"]),
    ],
)
def test_check(name, changed, problems):
    events = {rank: list(events) for rank, events in GOOD.items()}
    for rank, event in changed.items():
        events[rank][event["call"]] = event
    result = Result(name=name, bound_s=Scenario.parse(name).bound_s)
    check(Scenario.parse(name), events, 10.0, 12.0, result)
    assert result.problems == problems
    if not problems and result.after_s:
        assert result.tries == 1 and result.after_s == pytest.approx({0: 1, 1: 2, 2: result.after_s[2], 3: 4})
        assert result.named == f"{3 - (2 in changed)}/3"


@pytest.mark.parametrize("name", ["3x1/tcp/kill:1", "4x1/tcp/melt:1", "4x1/tcp/kill:7", "4x1/tcp/kill:1/blindly"])
def test_an_invalid_scenario_is_refused(name):
    with pytest.raises(ValueError, match="a scenario is SHAPE/TRANSPORT/FAULT"):
        Scenario.parse(name)


def test_every_scenario_of_the_table_is_valid():
    assert len({Scenario.parse(name) for name in NAMES}) == len(NAMES) >= 30
    assert {*QUICK} <= {*NAMES}
