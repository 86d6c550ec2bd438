"""Denoising steps as arms of a benchmark: every arm runs what its name says, and gives one process's latents."""

from __future__ import annotations

import json
import re

import pytest

from sf_xfuser.bench.pipeline import SHAPES, PipelineOptions, measure
from sf_xfuser.launch import read_model_facts
from sf_xfuser.tiny_models import save_tiny_model
from tests.launch import torchrun

CALLS = {"flux": 4, "cogvideox": 2, "hunyuanvideo": 4, "wan": 4}  # of attention per step: blocks, times passes


@pytest.mark.parametrize("family", CALLS)
def test_arms(family, tmp_path):
    folder = save_tiny_model(family, tmp_path / family)
    output = torchrun("bench_pipeline.py", folder, 16, nproc=4).output
    found = sorted((json.loads(line) for line in re.findall(r"@@(.*?)@@", output)), key=lambda rank: rank["rank"])
    assert len(found) == 4
    records = found[0]["records"]
    assert all(rank["records"] == records for rank in found)
    usp = ["ulysses=2 ring=2 allgather", "ulysses=2 ring=2 alltoall"]
    assert [record["arm"] for record in records] == ["single", "torus", *usp]
    assert records[1]["layout"] == "torus=2 ulysses=2 ring=1"
    for record in records:
        assert len(record["times_s"]) == 2, record  # one round of two steps
        assert record["max_abs_error"] <= (1e-4 if record["arm"] != "single" else 0), record
        assert record["first_call_s"] > 0
        if record["arm"] != "single":
            pairs = zip(record["attention_s"], record["times_s"], strict=True)
            assert all(0 < attention < step for attention, step in pairs), record

    # Two calls of two steps for each arm: the untimed ones in order, then the timed ones.
    per_arm = 2 * CALLS[family]
    for rank in found:
        ring = [rank["rank"] % 2, rank["rank"] % 2 + 2]  # xDiT's own layout: Ring across machines
        expected = [[ring, "ALL_GATHER"]] * per_arm + [[ring, "ALL_TO_ALL"]] * per_arm
        assert rank["rings"] == 2 * expected
        assert rank["served"] == 2 * per_arm


def test_shapes_make_models(tmp_path):
    """A folder with the heads of the published model, and blocks of the one kind that is wanted."""
    flux = SHAPES["flux"]
    folder = save_tiny_model("flux", tmp_path / "flux", heads=flux.heads, head_dim=16, layers=0, single_layers=1)
    assert read_model_facts(str(folder)).heads == 24
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert (config["num_layers"], config["num_single_layers"]) == (0, 1)
    with pytest.raises(ValueError, match="only flux and hunyuanvideo have blocks of one stream"):
        save_tiny_model("wan", tmp_path / "wan", single_layers=1)
    with pytest.raises(ValueError, match="use at least 1 block"):
        save_tiny_model("flux", tmp_path / "none", layers=0, single_layers=0)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no diffusers folder; bench --pipeline measures folders of FluxPipeline"):
        measure(PipelineOptions(model=str(tmp_path)))
