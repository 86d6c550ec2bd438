"""Every transformer of xDiT that calls USP, under ``--sp-backend torus`` on 2x2 ranks: the rows of ``model_table.py``.

All of them run in one launch. A row says what torus has to equal; its exceptions are checked too, by the reason that is
logged or by xDiT's own error. README's table is printed from the rows: ``python -m tests.support_table``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sf_xfuser.launch import read_model_facts
from tests.launch import torchrun
from tests.ranks.model_table import HEADS, MODELS, SIZES, Model
from tests.support_table import END, START, table

# Two machines of two ranks. Degrees: all heads split ("4x1"), or Ulysses across machines and a ring inside ("2x2").
CASES = {"4x1": (4, 1), "2x2": (2, 2)}
EXACT = 2e-5
VISIBLE = 5e-2  # what a rank that attends to its own keys alone makes of the result, at least


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[tuple[str, str, str], list[dict]]:
    """(model, case, size) -> what each of the four ranks saw."""
    folder = tmp_path_factory.mktemp("models")
    for model in MODELS:
        model.save(folder / model.folder)
    flags = {
        case: ["--model", "none", "--sp-backend", "torus", "--sp-topology", "2x2",
               "--ulysses_degree", str(ulysses), "--ring_degree", str(ring)]
        for case, (ulysses, ring) in CASES.items()
    }  # fmt: skip
    output = torchrun("run_transformers.py", folder, json.dumps(flags), nproc=4, timeout=400).output
    found: dict[tuple[str, str, str], list[dict]] = {}
    for text in re.findall(r"@<(\{.*?\})>@", output):
        rank = json.loads(text)
        found.setdefault((rank["name"], rank["case"], rank["size"]), []).append(rank)
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.folder)
def test_torus_equals(measured, model: Model, case, size):
    exception = model.exception(case, size)
    kind = exception.kind if exception else "served"
    if exception is not None and kind == "never":
        pytest.skip(exception.why)
    ranks = measured[model.name, case, size]
    assert len(ranks) == 4
    if exception is not None and kind == "fails":
        assert all(exception.says in rank["error"] for rank in ranks), ranks
        return
    assert not any(rank["error"] for rank in ranks), ranks
    assert worst(ranks, "torus_xdit") <= EXACT, ranks
    if exception is not None and kind == "handed back":
        assert all(rank["served"] == 0 and list(rank["handed_back"]) == [exception.says] for rank in ranks), ranks
        return
    assert all(rank["served"] > 0 and not rank["handed_back"] for rank in ranks), ranks
    assert worst(ranks, "alone_single") >= VISIBLE, ranks
    if kind == "xdit":
        assert worst(ranks, "xdit_single") > EXACT, "xDiT is exact here: compare with one process"
    else:
        assert worst(ranks, "torus_single") <= EXACT, ranks


def worst(ranks: list[dict], what: str) -> float:
    """The largest difference among the ranks that hold a result."""
    held = [rank[what] for rank in ranks if rank[what] == rank[what]]
    assert held, ranks
    return max(held)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.folder)
def test_heads_are_read_from_the_models_folder(model: Model, tmp_path):
    """So that degrees need not be given."""
    built = model.build()
    (built.transformer if model.is_pipeline else built).save_config(tmp_path / "transformer")
    facts = read_model_facts(str(tmp_path))
    assert facts is not None and facts.heads == HEADS
    assert facts.kv_heads == {"Lumina 2": 4}.get(model.name, HEADS) or "Krea" in model.name


def test_the_readme_has_the_table_of_the_rows():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    assert text[text.index(START) + len(START) : text.index(END)].strip() == table().strip()
