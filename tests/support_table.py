"""Writes the tables of docs/ that show the rows of tests. Usage: python -m tests.support_table [--write]

A table stands between ``<!-- rows of tests/integration/test_x.py -->`` and ``<!-- end of rows -->``. The module has
``ROWS``: named tuples, whose fields are the columns. ``Row`` is the one of docs/support.md.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
TABLE = re.compile(r"(<!-- rows of (\S+)\.py -->\n)(.*?)(<!-- end of rows -->)", re.S)


class Row(NamedTuple):
    """What a user does, what torus gives ("exact", "as xDiT", "falls back", "refused"), and how or why."""

    what: str
    result: str
    how: str = ""


def filled(page: str) -> str:
    """The text of a page with all of its tables made from the rows."""
    return TABLE.sub(lambda found: found[1] + _table(found[2].replace("/", ".")) + found[4], page)


def _table(module: str) -> str:
    rows = importlib.import_module(module).ROWS
    names = [name.replace("_", " ") for name in rows[0]._fields]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (names, ["---"] * len(names), *rows))


def main() -> None:
    for page in PAGES:
        text = page.read_text()
        if "--write" in sys.argv:
            page.write_text(filled(text))
        else:
            print("\n".join(found[0] for found in TABLE.finditer(filled(text))), end="")


if __name__ == "__main__":
    main()
