"""A server on an emulated cluster of two machines with two ranks, where calls are staged: many requests in one process
group, bad ones, requests of two threads, attention backends without log-sum-exp, and the counts of all this."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from xfuser.core.distributed.attention_backend import AttentionBackendType

from sf_xfuser.bench.tiny_models import save_tiny_model
from sf_xfuser.integrations.xdit.attention_backends import LSE_BACKENDS
from tests.launch import check, on_cluster, reports
from tests.support_table import Row

ROWS = [
    Row("hundreds of requests of changing size, steps and batch in one process group", "exact",
        "memory, `/dev/shm`, descriptors, threads and recorded programs stop growing after the largest request"),
    Row("a bad request (too large, of a wrong type)", "refused",
        "each rank raises its error; the next request is exact"),
    Row("an error on one rank, in attention or outside", "refused",
        "at once, all ranks raise an error that names it; the next request is exact"),
    Row("ranks with different requests", "refused", "all ranks raise an error with both; the next request is exact"),
    Row("requests of several threads", "refused", "while one runs, the others raise an error; they are never mixed"),
    Row("xDiT's HTTP service and Ray workers", "exact", "also after a bad request; `test_launchers.py`"),
]  # fmt: skip
NO_LSE = [backend.name for backend in AttentionBackendType if backend.name not in LSE_BACKENDS]
OTHERS = r"TransportError: rank {} on \S+ failed: MemoryError: planted"
BAD = {
    "too large": ("RuntimeError: .*(alloc|memory)",) * 4,
    "prompt of a wrong type": ("ValueError: `prompt` has to be of type",) * 4,
    "height of a wrong type": ("TypeError: ",) * 4,
    "one rank between its calls": tuple("MemoryError: planted" if w == 1 else OTHERS.format(1) for w in range(4)),
    "one rank after its calls": tuple("MemoryError: planted" if w == 3 else "done" for w in range(4)),
    "other seed on one rank": ("TransportError: ranks make different calls .*seed=",) * 4,
}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return save_tiny_model("flux", tmp_path_factory.mktemp("serving") / "flux", layers=1, single_layers=1)


def serve(flux, requests: int) -> dict[str, dict[str, Any]]:
    finished = on_cluster("serving.py", flux, requests, "--sp-backend", "torus", timeout=280)
    found = reports(finished.output)
    assert all(len(ranks) == 4 for ranks in found.values()), finished.output[-8000:]
    return found


@pytest.fixture(scope="module")
def served(flux):
    return serve(flux, 24)


def require_result(outcomes: dict[str, str]) -> None:
    """xDiT returns the result on the last rank."""
    assert outcomes == {"0": "done", "1": "done", "2": "done", "3": "exact"}


def require_no_growth(found):
    for rank, end in found["end"].items():
        warm = found["warm"][rank]
        assert end["calls"] == 12 and end["programs"] <= 2 * 12, end
        for what in ("shared_memory_bytes", "shared_memory_files", "descriptors", "threads"):
            assert end[what] <= warm[what], (what, warm, end)
        assert end["resident_mb"] <= warm["resident_mb"] + 12, (warm, end)
        assert set(found["exact"][rank]) == ({True} if rank == "3" else set())


def test_requests_of_changing_shape_leave_nothing_behind(served):
    require_no_growth(served)


@pytest.mark.slow
def test_three_hundred_requests_leave_nothing_behind(flux):
    require_no_growth(serve(flux, 300))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_fails_alone_on_all_ranks(served, case):
    name = f"bad: {case}"
    check(name, {name: {rank: outcome for rank, (outcome, _) in served[name].items()}}, BAD[case])
    require_result({rank: after for rank, (_, after) in served[name].items()})


def test_a_request_of_a_second_thread_is_refused_and_never_mixed(served):
    require_result({rank: first for rank, (first, _) in served["two threads"].items()})
    for first, second in (*served["two threads"].values(), *served["two threads in other order"].values()):
        assert second.startswith("RuntimeError: a request is running in another thread"), (first, second)
    for first, _ in served["two threads in other order"].values():
        assert re.match("ValueError: ranks are in different requests|TransportError: ranks make different calls", first)
    require_result(served["after threads"])


def test_counts_are_those_of_explain_and_of_prometheus(served):
    for before, after, explained, text in served["counts"].values():
        assert f"attention calls handled by torus: {after['calls']['torus']}\n" in explained + "\n"
        assert after["backend"] == "torus" and after["fallbacks"] == {} and before["exposed_ms"] == 0
        calls = after["calls"]["torus"] - before["calls"]["torus"]
        assert after["traced_calls"] == calls > 0 and after["exposed_ms"] > 0
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        shown = {(sample.name.removeprefix("sf_xfuser_"), *sample.labels.values()): sample.value for sample in samples}
        for link in ("inside", "across"):
            assert after["received_bytes"][link] > before["received_bytes"][link]
            assert shown["received_bytes_total", link] == after["received_bytes"][link]
        assert shown["calls_total", "torus"] == after["calls"]["torus"]
        assert shown["traced_calls_total",] == calls
        assert shown["exposed_seconds_total",] == pytest.approx(after["exposed_ms"] / 1e3)


@pytest.mark.parametrize("backend", NO_LSE)
def test_calls_of_a_backend_without_lse_fall_back(served, backend):
    for rank, (differences, handled, fell_back, reason) in served[f"backend {backend}"].items():
        assert handled == 0 < fell_back
        assert reason.startswith(f"attention backend {backend} returns no log-sum-exp")
        if rank == "3":
            from_usp, *from_plain = differences
            assert from_usp == 0 and all(difference < 1e-4 for difference in from_plain)
