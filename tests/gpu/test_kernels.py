"""The Triton kernels and their benchmark on a GPU. Not yet run on a GPU (see README)."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tests.launch import RANKS, run

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run_python(*arguments):
    """In a process without Triton's interpreter."""
    return run([sys.executable, *map(str, arguments)], timeout=900, env={"PYTHONPATH": str(RANKS.parents[1])})


def test_fused_matches_the_reference():
    assert "matches the reference" in run_python(RANKS / "fused_gpu.py").output


def test_a_call_compiles_no_kernel():
    assert "match the references" in run_python(RANKS / "kernels_gpu.py").output


def test_benchmark(tmp_path):
    """Tiny sizes, each result checked before it is timed. Includes Torus Attention with both attention kernels."""
    path = tmp_path / "rows.json"
    run_python("-m", "sf_xfuser.bench.gpu", "--smoke", "--json", path)
    assert json.loads(path.read_text())["failures"] == []
