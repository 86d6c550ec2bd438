"""The kernel benchmark with tiny sizes, which checks each result before timing it. Not yet run on a GPU (see
README)."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tests.launch import RANKS, run

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_smoke(tmp_path):
    """Includes Torus Attention with the library and with the fused kernel."""
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "sf_xfuser.bench.gpu", "--smoke", "--json", str(path)]
    run(command, timeout=900, env={"PYTHONPATH": str(RANKS.parents[1])})
    assert json.loads(path.read_text())["failures"] == []
