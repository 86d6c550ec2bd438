"""Adapters and kinds of pipelines on torus, against diffusers in one process: the table of docs/support.md.

All of them run in one launch on an emulated cluster of two machines with two ranks each, where calls are staged.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from sf_xfuser.bench import emulate
from tests.launch import on_cluster, reports

EXACT = 1e-4
REASON = emulate.unavailable()
WAYS = ("parallelize", "transformer", "pipeline")  # of ranks/adapters.py


class AdapterRow(NamedTuple):
    """The result of each way, and why some are refused. Empty: there is no such pipeline."""

    what: str
    parallelize: str
    xDiT_transformer: str
    xDiT_pipeline: str
    because: str


@dataclass(frozen=True)
class Refusal:
    """``error`` is a regular expression, ``why`` is on the page."""

    error: str
    why: str


@dataclass(frozen=True)
class Case:
    """``exact``: the ways that give the result of one process."""

    what: str
    exact: tuple[str, ...] = ("parallelize", "transformer")
    refused: dict[str, Refusal] = field(default_factory=dict)


SD3 = Refusal(
    r"ValueError: SD3Transformer2DModel has no attention processor that takes .* cannot split this model",
    "diffusers cannot split SD3 over tokens",
)


def ignored(names: str) -> dict[str, Refusal]:
    return {
        "pipeline": Refusal(f"ValueError: xFuserFluxPipeline would ignore {names}; .*parallelize", "xDiT ignores it")
    }


CASES = {
    "flux_lora": Case("Flux: LoRA (load, scale, two at once, fuse, unload, hot swap)", WAYS),
    "sd3_lora": Case("SD3: LoRA, as Flux", ("pipeline",), {"parallelize": SD3}),
    "wan_lora": Case("Wan: LoRA, as Flux"),
    "flux_controlnet": Case("Flux: ControlNet, also with two prompts"),
    "qwen_controlnet": Case("Qwen-Image: ControlNet"),
    "sd3_controlnet": Case("SD3: ControlNet", (), {"parallelize": SD3}),
    "flux_ip_adapter": Case(
        "Flux: IP-Adapter (load, scale, true CFG, unload)",
        ("parallelize",),
        {
            "transformer": Refusal(
                "ValueError: FluxIPAdapterAttnProcessor cannot replace xDiT's xFuserFluxAttnProcessor: .*parallelize",
                "in xDiT its attention processor attends to the tokens of one rank",
            ),
            "pipeline": Refusal(
                "ValueError: xDiT's pipelines would ignore an IP-Adapter; .*parallelize", "xDiT ignores it"
            ),
        },
    ),
    "flux_img2img": Case("Flux: image to image"),
    "flux_inpaint": Case("Flux: inpaint"),
    "flux_fill": Case("Flux Fill"),
    "flux_control": Case("Flux Control", WAYS),
    "flux_kontext": Case("Flux Kontext, also with true CFG"),
    "flux_kontext_inpaint": Case("Flux Kontext: inpaint"),
    "flux_true_cfg": Case("Flux: true CFG, also with two prompts", refused=ignored("true_cfg_scale, negative_prompt")),
    "qwen_true_cfg": Case("Qwen-Image: true CFG with prompts of different length"),
    "flux_batches": Case("Flux: several images per prompt, prompts of different length", WAYS),
    "sd3_batches": Case("SD3: as Flux, with negative prompts", ("pipeline",)),
    "wan_batches": Case("Wan: several videos per prompt, prompts of different length"),
    "qwen_batches": Case("Qwen-Image: several images per prompt, prompts of different length, true CFG"),
}


def row_of(case: Case) -> AdapterRow:
    cells = ["exact" if way in case.exact else "refused" if way in case.refused else "" for way in WAYS]
    return AdapterRow(case.what, *cells, "; ".join(refusal.why for refusal in case.refused.values()))


ROWS = [row_of(case) for case in CASES.values()]
RUNS = [f"{name}:{way}" for name, case in CASES.items() for way in (*case.exact, *case.refused)]


@pytest.fixture(scope="module")
def measured(model_folder) -> dict[str, dict[str, dict]]:
    if REASON is not None:
        pytest.skip(REASON)
    folders = {family: str(model_folder(family)) for family in ("flux", "sd3", "wan")}
    return defaultdict(dict, reports(on_cluster("adapters.py", json.dumps(folders), *RUNS).output))


@pytest.mark.parametrize("run", RUNS)
def test_pipeline(measured, run):
    name, way = run.split(":")
    ranks = measured[run]
    assert len(ranks) == 4, ranks
    if refusal := CASES[name].refused.get(way):
        assert all(re.match(refusal.error, rank["error"], re.S) for rank in ranks.values()), ranks
        return
    assert not any(rank["error"] or rank["fallbacks"] for rank in ranks.values()), ranks
    assert all(rank["handled"] > 0 and rank["staged"] for rank in ranks.values()), ranks
    differences = [difference for rank in ranks.values() for difference in rank["differences"]]
    assert differences and max(differences) <= EXACT, ranks
