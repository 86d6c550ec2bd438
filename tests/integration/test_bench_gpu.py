"""``python -m sf_xfuser.bench.gpu`` on a CPU: every part on tiny tensors and the check of results."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sf_xfuser.bench import gpu
from sf_xfuser.bench.loopback import Loopback, OneRank, StreamLoopback
from sf_xfuser.bench.timing import summary
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.layout.plan import Layout
from tests import virtual

CPU = torch.device("cpu")


def test_without_a_gpu_it_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "rows.json"
    if torch.cuda.is_available():
        pytest.skip("tests/gpu has it")
    assert gpu.main(["--smoke", "--repeat", "2", "--warmup", "1", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_every_part_has_its_rows(smoke):
    assert smoke["smoke"] and smoke["failures"] == []
    variants = {(row["part"], row["variant"]) for row in smoke["rows"]}
    assert {("chunking", "torus, library"), ("chunking", "torus, fused"), ("chunking", "SDPA_FLASH")} <= variants
    assert {("fused", "fused, 1 x 1 chunks"), ("fused", "fused, 4 x 4 chunks"), ("fused", "SDPA_FLASH")} <= variants
    assert {variant for part, variant in variants if part == "bandwidth"} == {
        "merge", "merge, the last", "pack K, V", "unpack K, V",
        "pack Q to fp8", "unpack Q from fp8", "pack Q to int8", "unpack Q from int8",
    }  # fmt: skip
    assert {variant for part, variant in variants if part == "enqueue"} == {"torus, library", "torus, fused"}
    assert sum(row["part"] == "pieces" for row in smoke["rows"]) == 2 * 2 * 2


def test_every_row_has_the_librarys_time(smoke):
    for row in smoke["rows"]:
        assert row["library"] == "SDPA_FLASH" and row["library_us"] > 0 and row["median_us"] > 0 and row["repeat"] == 2
        assert row["ratio"] > 0 and (row.get("error") is None or row["error"] <= 1)
    table = gpu.table(smoke["rows"])
    assert table.row_count == len(smoke["rows"])


def test_statistics():
    assert summary([4.0, 1.0, 3.0, 2.0, 9.0]) == {"median_us": 3.0, "quartiles_us": [2.0, 4.0], "repeat": 5}
    assert summary([7.0]) == {"median_us": 7.0, "quartiles_us": [7.0, 7.0], "repeat": 1}
    assert gpu.fastest({"a": [1.0, 9.0, 9.0], "b": [8.0, 8.0, 8.0], "c": [0.1]}, ["a", "b"]) == ("b", 8.0)


def test_variants_alternate_and_warm_up_runs_are_not_counted():
    bench = gpu.Bench(CPU, gpu.SMOKE, repeat=2, warmup=1)
    ran = []
    us = bench.us({name: lambda name=name: ran.append(name) for name in "ab"})
    assert ran == list("ababab") and {name: len(each) for name, each in us.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "chunking,nothing"], "--parts nothing: choose from chunking"),
        (["--repeat", "0"], "--repeat must be at least 1"),
    ],
)
def test_an_invalid_request_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["a row twice as large", "a row not written"])
def test_wrong_results_are_found(fault):
    q, k, v = (torch.randn(1, 2, 40, 64).bfloat16() for _ in range(3))
    out, _ = sdpa_attend(q, k, v)
    assert gpu.require_exact("right", out.clone(), out, q, k, v) <= 1
    wrong = out.clone()
    wrong[:, :, -1] = math.nan if "not" in fault else wrong[:, :, -1] * 2
    with pytest.raises(gpu.BadResult, match="not finite" if "not" in fault else "against float64"):
        gpu.require_exact("wrong", wrong, out, q, k, v)


def test_new_memory_is_filled_with_nan_only_inside_the_block():
    with gpu.poisoned():
        assert torch.empty(1000).isnan().all() and torch.zeros(2).new_empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


LAYOUTS = [(4, 1, 1, 1), (4, 2, 1, 4), (1, 2, 1, 2), (2, 2, 2, 1), (1, 1, 2, 2), (3, 1, 1, 1)]


@pytest.mark.parametrize("kernel", gpu.KERNELS)
@pytest.mark.parametrize("degrees", LAYOUTS)
def test_one_rank_computes_what_the_whole_group_would(degrees, kernel):
    """Its own result, the outputs that it sends to peers, and the outputs that it receives."""
    layout = Layout(**dict(zip(("torus", "ulysses", "ring_across", "ring_inside"), degrees, strict=True)))
    L = 12 * layout.world_size
    q, k, v = (torch.randn(2, L, 24, 64).transpose(1, 2) for _ in range(3))
    whole, _ = sdpa_attend(q, k, v)
    rank = OneRank(layout, q, k, v, Loopback(CPU))
    rank.fill(whole[:, :, : L // layout.world_size])
    with gpu.poisoned():
        result = gpu.call(rank, gpu.KERNELS[kernel])
    torch.testing.assert_close(result, whole[:, :, : result.shape[2]], rtol=0, atol=2e-5)
    seen = torch.zeros(L, dtype=torch.bool)
    for rows, out in rank.outputs(result):
        torch.testing.assert_close(out, whole[:, rank.heads, rows], rtol=0, atol=2e-5)
        assert not seen[rows].any()
        seen[rows] = True
    assert int(seen.sum()) == L // layout.ring_degree


def test_tokens_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="10 tokens cannot be split evenly over 4 ranks"):
        OneRank(
            Layout(torus=4, ulysses=1, ring_across=1, ring_inside=1), *[torch.zeros(1, 4, 10, 64)] * 3, Loopback(CPU)
        )


def test_the_transport_between_gpus_without_peers(monkeypatch):
    """With threads as streams: calls in both halves of the window finish without peers."""
    virtual.use_cpu_streams(monkeypatch)
    layout = Layout(torus=4, ulysses=2, ring_across=1, ring_inside=1)
    q, k, v = (torch.randn(1, 8 * 16, 8, 64).transpose(1, 2) for _ in range(3))
    whole, _ = sdpa_attend(q, k, v)
    rank = OneRank(layout, q, k, v, StreamLoopback(8, 0, range(1, 8), CPU))
    rank.fill(whole[:, :, :16])
    for _ in range(3):
        torch.testing.assert_close(gpu.call(rank, sdpa_attend), whole[:, :, :16], rtol=0, atol=2e-5)
    rank.mesh.close()
