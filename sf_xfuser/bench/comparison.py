"""One line per case: torus against xDiT and against each peer, from the rows of a bench document. Pure.

A cell is the speed-up of torus over the fastest variant of the column; where none of them can run the case, it says so,
and ``refusals`` has the reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from rich import box
from rich.table import Table

from sf_xfuser.bench import report
from sf_xfuser.bench.peers import PACKAGES
from sf_xfuser.bench.report import Row

CANNOT = "cannot run"


def has_peers(rows: Iterable[Row]) -> bool:
    return any(row.get("family") == "peer" for row in rows)


def opponents(rows: Sequence[Row]) -> dict[str, Callable[[Sequence[Row]], Row | None]]:
    """Column -> the fastest row of one case. A package that ran in no case has no column; ``refusals`` names it."""
    found: dict[str, Callable[[Sequence[Row]], Row | None]] = {
        "xDiT's USP": report.usp_row,
        "best xDiT": report.best_xdit_row,
    }
    for package in PACKAGES:
        if any(_is_of(package, row) and report.succeeded(row) for row in rows):
            found[package] = partial(_fastest_of, package)
    return found


def ratios(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Case -> column -> median of the fastest variant of the column over that of torus; None if none can run.

    Without a case that torus did not run.
    """
    columns = opponents(rows)
    result: dict[str, dict[str, float | None]] = {}
    for case, of_case in report.by_case(rows).items():
        torus = report.variant_row(of_case, report.SUBJECT)
        if torus is not None and report.succeeded(torus):
            fastest = {column: find(of_case) for column, find in columns.items()}
            result[case] = {
                column: None if row is None else row["median_s"] / torus["median_s"] for column, row in fastest.items()
            }
    return result


def lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    columns, compared, cells = list(opponents(rows)), ratios(rows), []
    for case, of_case in report.by_case(rows).items():
        torus = report.variant_row(of_case, report.SUBJECT) or {}
        shown = [CANNOT if ratio is None else report.fmt_ratio(ratio) for ratio in compared.get(case, {}).values()]
        cells.append([case, report.fmt(torus.get("median_s"), 1e3), *(shown or [report.DASH] * len(columns))])
    return ["case", "torus ms", *columns], cells


def refusals(rows: Iterable[Row]) -> list[str]:
    """Why variants of xDiT and of peers cannot run: a line per reason, with the variants and the cases.

    Without those that would repeat another variant, whose reason the table of their case shows.
    """
    cases = report.by_case(rows)
    found: dict[str, dict[str, list[str]]] = {}
    for case, of_case in cases.items():
        for row in of_case:
            reason = str(row.get("reason"))
            if row.get("family") in ("peer", "xdit") and not report.succeeded(row) and " it equals " not in reason:
                found.setdefault(reason, {}).setdefault(row["variant"], []).append(case)
    texts = []
    for reason, variants in found.items():
        where = list(dict.fromkeys(case for of_variant in variants.values() for case in of_variant))
        text = "in all cases" if len(where) == len(cases) > 1 else ", ".join(where)
        texts.append(f"{', '.join(variants)}: {reason} ({text})")
    return texts


def table(rows: Sequence[Row]) -> Table:
    header, cells = lines(rows)
    result = Table(box=box.SIMPLE_HEAD, padding=0, title="Speed-up of torus over")
    for n, name in enumerate(header):
        result.add_column("\n".join(name.split(" ")), justify="left" if n == 0 else "right", no_wrap=n > 0)
    for line in cells:
        result.add_row(*(cell.replace(CANNOT, "cannot") for cell in line))
    return result


def markdown(rows: Sequence[Row]) -> str:
    """The table for GitHub, then the reasons as a list."""
    return report.markdown(*lines(rows)) + "\n" + "".join(f"- {refusal}\n" for refusal in refusals(rows))


def _is_of(package: str, row: Mapping[str, object]) -> bool:
    return row.get("family") == "peer" and str(row["variant"]).startswith(f"{package}-")


def _fastest_of(package: str, rows: Sequence[Row]) -> Row | None:
    return report.fastest(row for row in rows if _is_of(package, row))
