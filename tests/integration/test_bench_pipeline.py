"""``bench --pipeline``: every variant runs the attention of its name and returns the latents of one process."""

from __future__ import annotations

import json

import pytest

from sf_xfuser.bench import page, report
from sf_xfuser.bench.pipeline import MODELS, PipelineOptions, measure
from sf_xfuser.bench.rows import pipeline_rows
from sf_xfuser.bench.tiny_models import save_tiny_model
from sf_xfuser.bench.variants import SINGLE
from sf_xfuser.cli import main
from sf_xfuser.integrations.xdit.degrees import read_model_facts
from tests.launch import reports, torchrun

COMPRESSED = ["torus-fp8", "torus-int8"]
DIFFUSERS = ["diffusers-ulysses", "diffusers-ulysses-anything", "diffusers-unified"]
REASONS = ["", "equals diffusers-ulysses where counts divide", ""]  # why they cannot run
NO_PLAN = "ValueError: `cp_plan` must be provided"  # diffusers has none for HunyuanVideo and CogVideoX
CALLS = {"flux": 4, "cogvideox": 2, "hunyuanvideo": 4, "wan": 2}  # attention calls per step: blocks x passes


@pytest.mark.parametrize("family", CALLS)
def test_variants(family, tmp_path):
    folder = save_tiny_model(family, tmp_path / family)
    small, guidance = folder / "small_input.json", MODELS[family].size["guidance_scale"]
    small.write_text(json.dumps({**json.loads(small.read_text()), "guidance_scale": guidance}))
    output = torchrun("bench_pipeline.py", folder, 16, nproc=4).output
    found = reports(output)["variants"]
    assert len(found) == 4
    records = found["0"]["records"]
    assert all(rank["records"] == records for rank in found.values())
    usp = ["ulysses=2 ring=2 allgather", "ulysses=2 ring=2 alltoall"]
    assert [record["variant"] for record in records] == ["single", "torus", *usp, *COMPRESSED, *DIFFUSERS]
    assert records[1]["layout"] == "torus=2 ulysses=2 ring=1"
    for record, reason in zip(records[-3:], REASONS if family in ("flux", "wan") else [NO_PLAN] * 3, strict=True):
        assert record["reason"].startswith(reason) and bool(record["reason"]) == bool(reason), record
    for record in records:
        if record["reason"]:
            assert record["times_s"] == [], record
            continue
        assert len(record["times_s"]) == 2, record  # one round of two steps
        if record["variant"] in COMPRESSED:
            assert record["max_abs_error"] > 1e-5 and 35 <= record["psnr_db"] < 100, record
        else:
            assert record["max_abs_error"] <= (1e-4 if record["variant"] != "single" else 0), record
            assert record["psnr_db"] is None
        assert record["first_call_s"] > 0
        if record["variant"] not in ("single", *DIFFUSERS):
            pairs = zip(record["attention_s"], record["times_s"], strict=True)
            assert all(0 < attention < step for attention, step in pairs), record

    # Two calls of two steps for each variant: the untimed ones in order, then the timed ones.
    per_variant = 2 * CALLS[family]
    for number, rank in found.items():
        ring = [int(number) % 2, int(number) % 2 + 2]  # xDiT's own layout: Ring across machines
        expected = [[ring, "ALL_GATHER"]] * per_variant + [[ring, "ALL_TO_ALL"]] * per_variant
        assert rank["rings"] == 2 * expected
        assert rank["torus_calls"] == 2 * per_variant * len(["torus", *COMPRESSED])


def test_rows_and_tables_contain_the_psnr():
    """Below 40 dB against the uncompressed run, a variant has failed."""
    records = [
        {"variant": variant, "layout": "l", "times_s": [1.0], "attention_s": [0.5], "first_call_s": 2.0,
         "max_abs_error": error, "psnr_db": psnr_db, "reason": ""}
        for variant, error, psnr_db in (("single", 0, None), ("torus", 1e-6, None), ("ulysses=4 ring=1", 1e-6, None),
                                    ("torus-int8", 2e-2, 51.26), ("torus-fp8", 3e-2, 39.9))
    ]  # fmt: skip
    rows = pipeline_rows({"id": "flux"}, "float32", records)
    assert [row["variant"] for row in rows] == [SINGLE, "torus", "usp-ulysses", "torus-int8", "torus-fp8"]
    assert [row["family"] for row in rows] == ["reference", "ours", "xdit", "ours", "ours"]
    assert [row["psnr_db"] for row in rows] == [None, None, None, 51.26, 39.9]
    assert [row["status"] for row in rows] == ["ok"] * 4 + ["failed"]
    assert "39.9 dB, required 40 dB" in rows[-1]["reason"]
    assert "2.0e-02 (51.3 dB)" in report.cells(rows[3])
    assert "2.0e-02 (51.3 dB)" in page.html({"rows": rows, "timelines": []})


def test_only_compressed_variants_can_be_added(capsys):
    assert main(["bench", "--cluster", "2x1", "--pipeline", "flux", "--variants", "torus-fp8,ulysses"]) == 2
    assert "with --pipeline: unknown variant 'ulysses'; choose from torus-fp8, torus-int8" in capsys.readouterr().err


def test_models_have_the_heads_of_the_published_ones(tmp_path):
    arguments = {**MODELS["flux"].arguments, "head_dim": 16, "single_layers": 1}
    folder = save_tiny_model("flux", tmp_path / "flux", **arguments)
    assert read_model_facts(str(folder)).heads == 24
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert (config["num_layers"], config["num_single_layers"]) == (0, 1)
    with pytest.raises(ValueError, match="only flux and hunyuanvideo have single-stream blocks"):
        save_tiny_model("wan", tmp_path / "wan", single_layers=1)
    with pytest.raises(ValueError, match="use at least 1 block"):
        save_tiny_model("flux", tmp_path / "none", layers=0, single_layers=0)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a diffusers folder; bench --pipeline supports FluxPipeline"):
        measure(PipelineOptions(model=str(tmp_path)))
