"""DBCache (the package cache-dit) in Flux: all ranks skip the same steps, so their attention calls match.

In its own file and launch, because cache-dit changes the pipeline's class for the rest of the process.
"""

from __future__ import annotations

import json
import re

import pytest
import torch

from tests.launch import records, torchrun

pytest.importorskip("cache_dit", reason="DBCache needs the package cache-dit")
pytest.importorskip("xfuser.model_executor.cache.adapters.cache_dit", reason="xDiT before 0.7 has no DBCache")

STEPS = 6
CALLS_OF_A_STEP = 4  # two double and two single blocks


@pytest.mark.slow
def test_torus_equals_usp_with_the_same_cache(model_folder, tmp_path):
    """A skipped step changes the result: only xDiT's own USP with the same cache gives an equal one."""
    common = ["--family", "flux", "--model", str(model_folder("flux")), "--wrapper", "runner", "--text-length", "16",
              "--num_inference_steps", str(STEPS)]  # fmt: skip
    cached = ["--cache_method", "dbcache"]
    flags = {
        "all steps": ["--sp-backend", "torus", "--sp-topology", "2x2"],
        "usp": [*cached, "--ulysses_degree", "4"],
        "torus": [*cached, "--sp-backend", "torus", "--sp-topology", "2x2"],
        "torus ring": [*cached, "--sp-backend", "torus", "--sp-topology", "2x2", "--sp-plan", "torus=2,ring=2"],
    }
    argv = {name: [*common, *more, "--out", str(tmp_path / f"{name}.pt")] for name, more in flags.items()}
    (tmp_path / "cases.json").write_text(json.dumps(argv))
    output = torchrun("run_pipelines.py", tmp_path / "cases.json", nproc=4, timeout=200).output
    handled: dict[str, set[int]] = {name: set() for name in flags}
    for name, _, (outcome, explained) in records(output):
        assert outcome == "ok", f"{name}: {outcome}\n{output[-4000:]}"
        assert "fell back" not in explained, explained
        if found := re.search(r"handled by torus: (\d+)", explained):
            handled[name].add(int(found[1]))
    latents = {name: next(iter(torch.load(tmp_path / f"{name}.pt")["latents"].values())) for name in flags}
    assert handled["all steps"] == {STEPS * CALLS_OF_A_STEP}
    for name in ("torus", "torus ring"):
        assert (latents[name] - latents["usp"]).abs().max() <= 1e-4
        [calls] = handled[name]  # the same on all ranks
        assert CALLS_OF_A_STEP < calls < STEPS * CALLS_OF_A_STEP
    assert (latents["all steps"] - latents["torus"]).abs().max() > 1e-3
