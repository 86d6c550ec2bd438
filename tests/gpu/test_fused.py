"""The fused chunk attention kernel on a GPU. Nothing here has run yet (see README)."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.launch import RANKS, run

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_equals_the_twin():
    command = [sys.executable, str(RANKS / "fused_gpu.py")]  # its own process: this one has Triton's interpreter
    finished = run(command, timeout=900, env={"PYTHONPATH": str(RANKS.parents[1])})
    assert "the same as the twin" in finished.output
