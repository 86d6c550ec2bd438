"""``python -m sf_xfuser.bench.gpu`` on a CPU: every part on tiny tensors, faults of a part, checks of results."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sf_xfuser.bench import gpu, gpu_parts, timing
from sf_xfuser.bench.loopback import Loopback, OneRank, StreamLoopback
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.layout.plan import Layout
from tests import virtual
from tests.launch import environment

CPU = torch.device("cpu")
COMMAND = [sys.executable, "-m", "sf_xfuser.bench.gpu", "--smoke"]
PARTS = [name for name in gpu_parts.PARTS if name not in ("symm_mem-4", "nvshmem-4", "nvshmem-graph")]  # to save time


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "rows.json"
    if torch.cuda.is_available():
        pytest.skip("tests/gpu has it")
    command = [*COMMAND, "--parts", ",".join(PARTS), "--out", path]
    finished = subprocess.run(command, env=environment({}), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(path.read_text()), finished.stdout


def test_every_part_runs_to_its_end(smoke):
    document, output = smoke
    rows = document["rows"]
    assert document["smoke"] and {row["part"] for row in rows} == set(PARTS)
    assert {part.name for part in gpu.parts(list(gpu_parts.PARTS), smoke=True)} == set(gpu_parts.PARTS)
    states = {"value", "skipped"}
    assert all(states & row.keys() for row in rows if row["part"] != "machine"), rows
    assert {row["skipped"] for row in rows if "skipped" in row and row["part"][:-2] not in ("nccl_put", "nvshmem")} <= {
        "no GPU",
    }
    values = {(row["part"], row["name"].partition(":")[2].strip() or row["name"]) for row in rows if "value" in row}
    assert {
        ("accuracy", "merge of 4 pieces"), ("accuracy", "copies"), ("accuracy", "int8 round trip"),
        ("accuracy-fused", "fused"), ("launches", "T4U2R4, block, host"), ("launches", "T4U2R4, unstaged, host"),
        ("chunking", "block, library"), ("chunking", "unstaged, fused"), ("symm_mem-2", "against one process"),
        ("symm_mem-2", "10 calls with delays"), ("bandwidth", "merge, the last"), ("fused", "fused, 4 x 4 chunks"),
    } <= values  # fmt: skip
    assert f"torch {torch.__version__}" in output


def test_goals_are_judged_by_their_worst_row(smoke):
    document, output = smoke
    (line,) = (line for line in output.splitlines() if line.startswith("error "))
    worst = max(row["value"] for row in document["rows"] if row.get("goal") == "error")
    assert f"{worst:.4g}" in line
    by_goal = {name: [row for row in document["rows"] if row.get("goal") == name] for name in gpu.GOALS}
    assert by_goal["exact"] and gpu.verdict(by_goal["exact"]) == "met"
    assert by_goal["rounding"] and gpu.verdict(by_goal["rounding"]) == "met"
    assert by_goal["error"] and worst < 4  # the ratio of two tiny errors scatters
    rows = [{"part": "a", "name": str(n), "goal": "error", "value": n, "limit": 2.0} for n in (1.0, 3.0)]
    assert any(
        line.split()[:7] == ["error", "<=", "2", "x", "SDPA's", "error", "3"] and "missed" in line
        for line in gpu.summary({"rows": rows})
    )


def test_a_measurement_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [*COMMAND[:-1], "--out", str(tmp_path / "rows.json")]
    finished = subprocess.run(command, env=environment({}), capture_output=True, text=True)
    assert finished.returncode == 2 and "no GPU" in finished.stderr
    assert [row["part"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == ["machine"]


def test_ctrl_c_leaves_the_rows_so_far(tmp_path):
    path = tmp_path / "rows.json"
    command = [*COMMAND, "--parts", "accuracy,bandwidth", "--out", str(path)]
    process = subprocess.Popen(command, env=environment({}), stdout=subprocess.PIPE, text=True)
    while not (path.exists() and len(json.loads(path.read_text())["rows"]) > 2):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    rows = json.loads(path.read_text())["rows"]
    assert process.returncode == 130 and rows[1]["part"] == "accuracy" and "value" in rows[1]
    assert rows[-1] == {"part": "bandwidth", "name": "bandwidth", "not_run": "interrupted"} and "worst row" in output


def test_a_plain_checkout_is_installed_first(tmp_path):
    """Into a Python that has PyTorch and no sf_xfuser."""
    for name in ("sf_xfuser", "kernels"):
        shutil.copytree(gpu.CHECKOUT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(gpu.CHECKOUT / name, tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "v"], check=True)
    (packages,) = (tmp_path / "v").glob("lib/*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    command = [tmp_path / "v/bin/python", "-m", "sf_xfuser.bench.gpu", "--smoke", "--parts", "flags"]
    finished = subprocess.run(command, cwd=tmp_path, env=environment({}), capture_output=True, text=True)
    assert finished.returncode == 0 and "pip install --no-deps" in finished.stdout, finished.stdout + finished.stderr
    assert (packages / "sf_xfuser/kernels/merge.py").exists()
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["part"] for row in rows] == ["machine", "flags"]

    shutil.rmtree(packages / "sf_xfuser")
    (tmp_path / "pyproject.toml").write_text("[build-system]\nrequires = []\nbuild-backend = 'none'\n")
    finished = subprocess.run(command, cwd=tmp_path, env=environment({}), capture_output=True, text=True)
    assert finished.returncode == 0 and "this run uses a copy" in finished.stdout, finished.stdout + finished.stderr
    assert not (packages / "sf_xfuser").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "chunking,nothing"], "--parts nothing: choose from machine, accuracy"),
        (["--out", "/no/such/folder/rows.json"], "there is no folder /no/such/folder"),
    ],
)
def test_an_invalid_request_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert words in capsys.readouterr().err


# -- faults of a part -------------------------------------------------------------------------------------------------

ROWS = "from sf_xfuser.bench.document import print_row as row; row({'name': 'first', 'value': 1.0, 'unit': 'us'})\n"


def run_parts(tmp_path, *parts, seconds=60.0):
    """``parts``: (name, program, limit in seconds). Returns the rows as the document has them."""
    report = gpu.Report(tmp_path / "rows.json", {"rows": []})
    chosen = [gpu.Part(name, [sys.executable, "-c", program], 1.0, limit) for name, program, limit in parts]
    assert gpu.measure(chosen, report, seconds, dict(os.environ))
    return json.loads(report.path.read_text())["rows"]


def test_a_part_that_raises_loses_no_other_row(tmp_path):
    rows = run_parts(tmp_path, ("a", f"{ROWS}print('x@row {{')\nraise OSError('broken')", 60), ("b", ROWS, 60))
    assert [(row["part"], row["name"]) for row in rows] == [("a", "first"), ("a", "a"), ("b", "first")]
    assert rows[1]["failed"] == "exit status 1: OSError: broken"
    assert rows[1]["log"][0] == "x@row {" and "Traceback" in rows[1]["log"][1]  # output of two processes in one line


def test_a_part_that_hangs_is_cut_with_all_its_processes(tmp_path):
    program = (
        f"{ROWS}import subprocess as s; print(s.Popen(['sleep', '1000']).pid, flush=True); s.run(['sleep', '1000'])"
    )
    rows = run_parts(tmp_path, ("a", program, 2), ("b", ROWS, 60))
    assert [(row["part"], row["name"]) for row in rows] == [("a", "first"), ("a", "a"), ("b", "first")]
    assert rows[1]["failed"] == "cut after 2 s"
    status = Path(f"/proc/{rows[1]['log'][0]}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()  # a container may have nobody to reap it


def test_parts_without_time_are_not_run(tmp_path):
    rows = run_parts(tmp_path, ("a", f"{ROWS}import time; time.sleep(1000)", 60), ("b", ROWS, 60), seconds=2)
    assert rows[0]["value"] == 1.0 and rows[1]["failed"] == "cut after 2 s"
    assert rows[2] == {"part": "b", "name": "b", "not_run": "time: estimated 1 s, 0 s left"}


def test_an_error_in_a_case_is_a_row_and_cases_end_with_the_time(capsys):
    bench = timing.Bench(CPU, timing.SMOKE, 1, 0, seconds=60)
    with bench.attempt("a case"):
        raise OSError("broken")
    late = timing.Bench(CPU, timing.SMOKE, 1, 0, seconds=0)
    assert list(bench.cases("ab")) == ["a", "b"] and list(late.cases("ab")) == []
    rows = [json.loads(line.removeprefix(gpu.ROW)) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"name": "a case", "failed": "OSError: broken"}, {"name": "a and the following", "not_run": "time"}]


# -- timing and checks ------------------------------------------------------------------------------------------------


def test_statistics():
    assert timing.summary([4.0, 1.0, 3.0, 2.0, 9.0]) == {"median_us": 3.0, "quartiles_us": [2.0, 4.0], "repeat": 5}
    assert timing.summary([7.0]) == {"median_us": 7.0, "quartiles_us": [7.0, 7.0], "repeat": 1}
    assert timing.fastest({"a": [1.0, 9.0, 9.0], "b": [8.0, 8.0, 8.0], "c": [0.1]}, ["a", "b"]) == ("b", 8.0)


def test_variants_alternate_and_warm_up_runs_are_not_counted():
    bench = timing.Bench(CPU, timing.SMOKE, repeat=2, warmup=1, seconds=60)
    ran = []
    us = bench.us({name: lambda name=name: ran.append(name) for name in "ab"})
    assert ran == list("ababab") and {name: len(each) for name, each in us.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("fault", ["a row twice as large", "a row not written"])
def test_wrong_results_are_found(fault):
    q, k, v = (torch.randn(1, 2, 40, 64).bfloat16() for _ in range(3))
    out, _ = sdpa_attend(q, k, v)
    assert timing.require_exact("right", out.clone(), out, q, k, v) <= 1
    wrong = out.clone()
    wrong[:, :, -1] = math.nan if "not" in fault else wrong[:, :, -1] * 2
    with pytest.raises(timing.BadResult, match="inf times" if "not" in fault else "error against float64"):
        timing.require_exact("wrong", wrong, out, q, k, v)


def test_new_memory_is_filled_with_nan_only_inside_the_block():
    with timing.poisoned():
        assert torch.empty(1000).isnan().all() and torch.zeros(2).new_empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


# -- one rank without its peers ---------------------------------------------------------------------------------------

LAYOUTS = [(4, 1, 1, 1), (4, 2, 1, 4), (1, 2, 1, 2), (2, 2, 2, 1), (1, 1, 2, 2), (3, 1, 1, 1)]


@pytest.mark.parametrize("granularity", gpu_parts.GRANULARITIES)
@pytest.mark.parametrize("kernel", gpu_parts.KERNELS)
@pytest.mark.parametrize("degrees", LAYOUTS)
def test_one_rank_computes_what_the_whole_group_would(degrees, kernel, granularity):
    """Its own result, the outputs that it sends to peers, and the outputs that it receives."""
    layout = Layout(**dict(zip(("torus", "ulysses", "ring_across", "ring_inside"), degrees, strict=True)))
    L = 12 * layout.world_size
    q, k, v = (torch.randn(2, L, 24, 64).transpose(1, 2) for _ in range(3))
    whole, _ = sdpa_attend(q, k, v)
    rank = OneRank(layout, q, k, v, Loopback(CPU), granularity)
    rank.fill(whole[:, :, : L // layout.world_size])
    with timing.poisoned():
        result = gpu_parts.call(rank, gpu_parts.KERNELS[kernel], granularity)
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
        torch.testing.assert_close(gpu_parts.call(rank, sdpa_attend, "block"), whole[:, :, :16], rtol=0, atol=2e-5)
    rank.mesh.close()
