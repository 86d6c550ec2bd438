"""The benchmark of the device kernels with tiny sizes: each result is checked before it is timed. Nothing here has run
yet (see README)."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tests.launch import RANKS, run

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_every_part_is_right(tmp_path):
    """Torus Attention with the library and with the fused kernel among them."""
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "sf_xfuser.bench.gpu", "--smoke", "--json", str(path)]
    run(command, timeout=900, env={"PYTHONPATH": str(RANKS.parents[1])})
    assert json.loads(path.read_text())["failures"] == []
