"""Writes the table of docs/models.md from the rows that tests check. Usage: python -m tests.support_table [--write]"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from tests.integration.test_pipelines import FAMILIES
from tests.ranks.model_table import HEIGHT, MODELS, SIZES, Limit

START, END = "<!-- models: python -m tests.support_table --write -->", "<!-- end of models -->"
PAGE = Path(__file__).parents[1] / "docs/models.md"

# What tests/integration/ runs whole, by family, where it is not a wrapper of the rows.
PIPELINES = {"flux": "Flux (pipeline)", "sd3": "SD3 (pipeline)", "cogvideox": "CogVideoX (pipeline)"}


def table() -> str:
    """Markdown: what torus gives for each model and size of input, and why it is not always what one process gives."""
    assert PIPELINES.keys() <= set(FAMILIES)
    lines = [f"| model | {' | '.join(SIZES)} | because |", "|---" * (len(SIZES) + 2) + "|"]
    lines += [_line(name, {"odd": HEIGHT}) for name in PIPELINES.values()]
    return "\n".join([*lines, *(_line(model.name, model.limits) for model in MODELS)])


def _line(name: str, limits: Mapping[str, Limit]) -> str:
    cells = [_result(limits.get("all") or limits.get(size)) + ", no ring" * (f"2x2 {size}" in limits) for size in SIZES]
    if "2x2" in limits:
        cells[0] += ", no ring"
    return f"| {' | '.join([name, *cells, '; '.join(dict.fromkeys(x.why for x in limits.values()))])} |"


def _result(limit: Limit | None) -> str:
    if limit is None:
        return "exact"
    return {"xdit": "as xDiT", "falls back": "falls back", "fails": "xDiT cannot", "never": "xDiT cannot"}[limit.kind]


def main() -> None:
    if "--write" in sys.argv:
        text = PAGE.read_text()
        start, end = text.index(START) + len(START), text.index(END)
        PAGE.write_text(f"{text[:start]}\n{table()}\n{text[end:]}")
    else:
        print(table())


if __name__ == "__main__":
    main()
