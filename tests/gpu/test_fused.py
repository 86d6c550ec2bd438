"""The fused chunk attention kernel on a GPU. Not yet run on a GPU (see README)."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.launch import RANKS, run

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_matches_the_reference():
    command = [sys.executable, str(RANKS / "fused_gpu.py")]  # a process without Triton's interpreter
    finished = run(command, timeout=900, env={"PYTHONPATH": str(RANKS.parents[1])})
    assert "matches the reference" in finished.output
