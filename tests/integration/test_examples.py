"""The numbered examples on forked ranks (3 and 5 to 8: test_launchers.py), and the demo with a small picture."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sf_xfuser.bench import emulate
from sf_xfuser.bench.tiny_models import save_tiny_model
from tests.launch import environment, run, torchrun

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO = [sys.executable, str(EXAMPLES / "demo.py"), "--size", "128", "--steps", "2", "--rounds", "2", "--out"]
needs_namespaces = pytest.mark.skipif((reason := emulate.unavailable()) is not None, reason=reason or "")


def test_explain_a_plan():
    output = run([sys.executable, str(EXAMPLES / "01_explain_a_plan.py"), "--machines", "4"]).output
    assert "torus=4 ulysses=2 ring=4" in output and "2.00x the bytes between machines" in output


@pytest.mark.parametrize("example", ["02_attention_on_four_ranks.py", "09_long_context_attention.py"])
def test_attention_on_four_ranks(example):
    output = torchrun(EXAMPLES / example, nproc=4).output
    differences = re.findall(r"rank \d: max abs difference from one process (0\.0e\+00|[\d.]+e-\d\d)", output)
    assert len(differences) == 4 and all(0 <= float(x) < 1e-5 for x in differences)


def test_enable_by_hand(tmp_path):
    model = save_tiny_model("wan", tmp_path / "wan")
    output = torchrun(EXAMPLES / "04_enable_by_hand.py", model, nproc=4, env={"SF_XFUSER_AUTOLOAD": "0"}).output
    assert re.search(r"handled by torus: [1-9]", output)


def test_plain_diffusers(tmp_path):
    model = save_tiny_model("flux", tmp_path / "flux")
    output = torchrun(EXAMPLES / "10_plain_diffusers.py", model, nproc=4).output
    assert re.search(r"handled by torus: 8, fallbacks: {}", output)


@needs_namespaces
def test_demo(tmp_path):
    output = run([*DEMO, str(tmp_path)]).output
    found = json.loads((tmp_path / "figures.json").read_text())
    rows = {row["variant"]: row for row in found["rows"]}
    assert list(rows) == ["one process", "xDiT USP", "flat Ulysses", "torus", "auto"]
    assert found["emulated"] and found["speedup_over_usp"] == rows["xDiT USP"]["speedup_of_torus"] > 1
    assert 0 < found["max_abs_difference"] < 1e-4
    usp, ulysses, torus = (rows[name]["bytes_between_machines"] for name in ("xDiT USP", "flat Ulysses", "torus"))
    # Torus: 3/4 of Q in each of two calls, of 320 tokens and 384 fp32 elements, and 64 tokens of latents. USP: twice.
    assert [usp / 2, ulysses, torus] == pytest.approx([2 * 0.75 * 320 * 384 * 4] * 3, rel=0.15)
    assert all(len(row["times_s"]) == 2 and row["peak_bytes"] > 1e5 for row in found["rows"][1:])
    matched = found["wire_to_compute"]
    assert matched["target"] == pytest.approx(2.18, rel=0.01) and matched["measured"] > 0
    text = " ".join(output.split())
    assert f"{found['speedup_over_usp']:.2f}x over xDiT USP" in text and "Not shown: GPUs" in text
    page = (tmp_path / "demo.html").read_text()
    assert page.count("<img") == page.count('src="data:image/') == len(rows) + 1 and "href" not in page


@pytest.mark.slow
def test_demo_without_namespaces(tmp_path):
    fake = tmp_path / "unshare"
    fake.write_text("#!/bin/sh\necho unshare failed: Operation not permitted >&2\nexit 1\n")
    fake.chmod(0o755)
    out = tmp_path / "out"
    output = run([*DEMO, str(out)], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}).output
    assert all(text in " ".join(output.split()) for text in ("Operation not permitted", "run as root", "--privileged"))
    found = json.loads((out / "figures.json").read_text())
    assert found["speedup_over_usp"] is None and found["max_abs_difference"] < 1e-4 and not found["emulated"]


@needs_namespaces
def test_demo_leaves_no_process_after_ctrl_c_and_proves_its_folder(tmp_path):
    process = subprocess.Popen(
        [*DEMO, str(tmp_path)], stderr=subprocess.PIPE, text=True, env=environment(None), start_new_session=True
    )
    while not (tmp_path / "ranks.log").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(2)  # the ranks are importing
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.communicate(timeout=60)[1].endswith("demo: stopped\n") and process.returncode == 130
    running = run(["ps", "-eo", "args"]).output
    assert "ps -eo" in running and str(tmp_path) not in running
    output = run([*DEMO, "/proc/demo"], expect_failure=True).output
    assert output.startswith("demo: ") and "/proc/demo" in output and len(output.splitlines()) == 1
