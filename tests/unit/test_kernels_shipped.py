"""Ahead-of-time compilation: resource usage of the kernels, without a GPU."""

from __future__ import annotations

import json
import sys

import pytest

from sf_xfuser.bench.kernels import KNOWN_SPILLS
from tests.launch import run

triton = pytest.importorskip("triton", reason="Triton is not installed")


def test_no_kernel_spills(tmp_path):
    """Except those of older Triton versions that ``KNOWN_SPILLS`` lists."""
    path = tmp_path / "rows.json"
    finished = run([sys.executable, "-m", "sf_xfuser.bench.kernels", "--json", str(path)], timeout=600)
    rows = json.loads(path.read_text())["rows"]
    for row in rows:
        known = KNOWN_SPILLS.get(triton.__version__[:3], {}).get(f"{row['kernel']} on {row['architecture']}", 0)
        assert row["spilled_bytes"] <= known and 0 < row["registers"] <= 255, row
        assert row["kernel"] in finished.output
    plain = [row for row in rows if row["kernel"].startswith(("merge", "copy", "pack"))]
    assert {row["architecture"] for row in plain} == {"sm_80", "sm_90", "sm_100"}
    assert {row["load_bits"] for row in plain} == {128}, "memory-bound kernels use the widest loads"


SPILLING = """
from dataclasses import replace
from sf_xfuser.kernels import shipped
from sf_xfuser.bench import kernels
spilling = replace(shipped.all_shipped()[0], options={"maxnreg": 24}, architectures=(80,))
kernels.all_shipped = lambda: [spilling]
raise SystemExit(kernels.main([]))
"""


def test_a_spill_fails():
    finished = run([sys.executable, "-c", SPILLING], timeout=300, expect_failure=True)
    assert finished.returncode == 1 and "kernels that spill registers: merge D=64 on sm_80" in finished.output
