"""Every transformer of xDiT that calls USP, under ``--sp-backend torus`` on 2x2 ranks: the rows of ``model_table.py``.

All of them run in one launch. A row says what torus has to equal; its exceptions are checked too, by the reason that is
logged or by xDiT's own error. The table of docs/models.md is made from the rows: ``python -m tests.support_table``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from sf_xfuser.integrations.xdit.degrees import read_model_facts
from tests.integration.test_pipelines import FAMILIES
from tests.launch import records, reports, torchrun
from tests.patched import copy_of_xdit
from tests.ranks.model_table import HEADS, HEIGHT, MODELS, SIZES, Limit, Model
from tests.support_table import PAGES, filled

# Two machines of two ranks. Degrees: all heads split ("4x1"), or Ulysses across machines and a ring inside ("2x2").
CASES = {"4x1": (4, 1), "2x2": (2, 2)}
EXACT = 2e-5
Measured = dict[tuple[str, str, str], list[dict]]  # (model, case, size) -> by rank
VISIBLE = 5e-2  # smallest difference if a rank attends to its own keys only
# What test_pipelines.py runs whole, where it is not a wrapper of the rows
PIPELINES = {"flux": "Flux (pipeline)", "sd3": "SD3 (pipeline)", "cogvideox": "CogVideoX (pipeline)"}
assert PIPELINES.keys() <= set(FAMILIES)


class ModelRow(NamedTuple):
    """What torus gives for a model and each size of input, and why it is not always what one process gives."""

    model: str
    even: str
    text_13: str
    odd: str
    because: str


def row_of(name: str, limits: Mapping[str, Limit]) -> ModelRow:
    cells = [result(limits.get("all") or limits.get(size)) + ", no ring" * (f"2x2 {size}" in limits) for size in SIZES]
    if "2x2" in limits:
        cells[0] += ", no ring"
    return ModelRow(name, *cells, "; ".join(dict.fromkeys(limit.why for limit in limits.values())))


def result(limit: Limit | None) -> str:
    if limit is None:
        return "exact"
    return {"xdit": "as xDiT", "falls back": "falls back", "fails": "xDiT cannot", "never": "xDiT cannot"}[limit.kind]


ROWS = [row_of(name, {"odd": HEIGHT}) for name in PIPELINES.values()]
ROWS += [row_of(model.name, model.limits) for model in MODELS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model in MODELS:
        model.save(folder / model.folder)
    return folder


@pytest.fixture(scope="module")
def measured(folder) -> Measured:
    return measure(folder)


def measure(folder: Path, *names: str, **env: str) -> Measured:
    """The results of each rank. ``names``: only these models."""
    flags = {
        case: ["--model", "none", "--sp-backend", "torus", "--sp-topology", "2x2",
               "--ulysses_degree", str(ulysses), "--ring_degree", str(ring)]
        for case, (ulysses, ring) in CASES.items()
    }  # fmt: skip
    output = torchrun("run_transformers.py", folder, json.dumps(flags), *names, nproc=4, timeout=400, env=env).output
    found: Measured = {}
    for _, _, rank in records(output):
        found.setdefault((rank["name"], rank["case"], rank["size"]), []).append(rank)
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.folder)
def test_torus_equals(measured, model: Model, case, size):
    exception = model.exception(case, size)
    kind = exception.kind if exception else "torus"
    if exception is not None and kind == "never":
        pytest.skip(exception.why)
    ranks = measured[model.name, case, size]
    assert len(ranks) == 4
    if exception is not None and kind == "fails":
        assert all(exception.reason in rank["error"] for rank in ranks), ranks
        return
    assert not any(rank["error"] for rank in ranks), ranks
    assert worst(ranks, "torus_xdit") <= EXACT, ranks
    if model.repaired:
        assert worst(ranks, "installed_single") > 100 * EXACT, ranks
        assert all(model.repaired in rank["repaired"] for rank in ranks), ranks
    if exception is not None and kind == "falls back":
        assert worst(ranks, "torus_single") <= EXACT, ranks
        assert all(rank["handled"] == 0 and list(rank["fallbacks"]) == [exception.reason] for rank in ranks), ranks
        return
    assert all(rank["handled"] > 0 and not rank["fallbacks"] for rank in ranks), ranks
    assert worst(ranks, "alone_single") >= VISIBLE, ranks
    if kind == "xdit":
        assert worst(ranks, "xdit_single") > EXACT, "xDiT is exact here: compare with one process"
    else:
        assert worst(ranks, "torus_single") <= EXACT, ranks


def worst(ranks: list[dict], what: str) -> float:
    """The largest difference on the ranks that have a result."""
    values = [rank[what] for rank in ranks if rank[what] == rank[what]]
    assert values, ranks
    return max(values)


def test_patches_repair_the_same(folder, tmp_path):
    """Without a repair by the plugin, on torus and on xDiT's own USP."""
    names = [model.name for model in MODELS if model.repaired]
    found = measure(folder, *names, PYTHONPATH=str(copy_of_xdit(tmp_path, "repairs")))
    assert {name for name, _, _ in found} == set(names)
    for (name, case, size), ranks in found.items():
        model = next(model for model in MODELS if model.name == name)
        exception = model.exception(case, size)
        if exception is not None and exception.kind == "fails":
            assert all("NotImplementedError" in rank["error"] for rank in ranks), ranks
        elif exception is None or exception.kind == "falls back":
            assert not any(rank["repaired"] for rank in ranks), ranks
            assert max(worst(ranks, "torus_single"), worst(ranks, "xdit_single")) <= EXACT, ranks


@pytest.mark.parametrize("patched", [False, True], ids=["hooks", "patches"])
def test_masks_of_an_earlier_request_are_not_reused(folder, tmp_path, patched):
    env = {"PYTHONPATH": str(copy_of_xdit(tmp_path, "repairs"))} if patched else {}
    output = torchrun("stale_masks.py", folder, nproc=2, env=env).output
    for name, ranks in reports(output, ["krea2", "ltx2"]).items():
        assert len(ranks) == 2 and all(max(differences) <= EXACT for differences in ranks.values()), (name, ranks)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.folder)
def test_heads_are_read_from_the_models_folder(model: Model, tmp_path):
    """So that degrees can be planned."""
    built = model.build()
    (built.transformer if model.is_pipeline else built).save_config(tmp_path / "transformer")
    facts = read_model_facts(str(tmp_path))
    assert facts is not None and facts.heads == HEADS
    assert facts.kv_heads == {"Lumina 2": 4}.get(model.name, HEADS) or "Krea" in model.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_the_tables_of_the_rows(page):
    """``python -m tests.support_table --write`` makes them."""
    text = page.read_text()
    assert text == filled(text)
