"""``make gpu`` on a GPU, with tiny sizes. Not yet run on a GPU (see README)."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from sf_xfuser.bench.gpu import verdict
from tests.launch import RANKS, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_call_compiles_no_kernel():
    """In a process without Triton's interpreter."""
    command = [sys.executable, str(RANKS / "kernels_gpu.py")]
    finished = run(command, timeout=900, env={"PYTHONPATH": str(RANKS.parents[1])})
    assert "match the references" in finished.output


def test_every_result_is_exact(tmp_path):
    """Kernels and transports against float64, and copies and repeated calls bitwise."""
    path = tmp_path / "rows.json"
    run([sys.executable, "-m", "sf_xfuser.bench.gpu", "--smoke", "--out", str(path)], timeout=900)
    rows = json.loads(path.read_text())["rows"]
    exact = [row for row in rows if row.get("goal") in ("error", "exact", "rounding")]
    assert exact and verdict(exact) == "met", [row for row in exact if verdict([row]) == "missed"]
