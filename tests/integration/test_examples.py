"""The numbered examples on forked ranks (3 and 5 to 8: test_launchers.py; demo: make demo)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from sf_xfuser.bench.tiny_models import save_tiny_model
from tests.launch import run, torchrun

EXAMPLES = Path(__file__).parents[2] / "examples"


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
