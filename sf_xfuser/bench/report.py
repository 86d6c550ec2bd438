"""Formats the rows of a benchmark as tables and a summary.

The reports compare the variant ``torus`` with xDiT's USP (the faster of the ``usp-*`` variants) and with the fastest of
xDiT's variants; other variants are listed in the order of the rows. Missing, null and non-finite values appear as an en
dash. MB is 10^6 bytes. A value in dB next to an error is the peak signal-to-noise ratio of the latents against those of
the uncompressed run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from sf_xfuser.config import environment

Row = Mapping[str, Any]

SUBJECT = "torus"
DASH = "–"
#: By importance: where not all fit, the last ones are printed below.
COLUMNS = ("variant", "median ms", "spread ms", "vs USP", "vs best xDiT", "max error", "out MB", "eff. %", "exposed ms",
           "peak MB", "first ms", "layout")  # fmt: skip
GRID_COLUMNS = ("case", "torus ms", "USP ms", "best xDiT", "best xDiT ms", "vs USP", "vs best xDiT", "eff. %",
                "bound by")  # fmt: skip
#: Columns of text; the others hold numbers.
TEXTS = frozenset({"variant", "layout", "case", "variant, case", "machine", "model", "default degrees", SUBJECT, ""})
_STYLES = {"skipped": "dim"}  # of a reason, by status; other statuses are red


def console() -> Console:
    """Standard output. If it is not a terminal, it has 150 columns, or as many as ``$COLUMNS`` says."""
    terminal = Console()
    return terminal if terminal.is_terminal or environment(["COLUMNS"]) else Console(width=150)


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedTable:
    """A table for rich in which no cell is cut. Columns that do not fit the width are printed as further tables below,
    each with the first column.

    ``lines``: the cells. ``styles``: of the lines. ``reasons``: (name, text, style) of what has no cells, printed below
    the table, followed by ``caption``.
    """

    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    styles: Sequence[str] = ()
    title: str = ""
    reasons: Sequence[tuple[str, str, str]] = ()
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, "bold")
        rest = [*range(1, len(self.columns))]
        while rest and self.lines:
            count = 1
            while count < len(rest) and self._width(console, rest[: count + 1]) <= options.max_width:
                count += 1
            yield self._part(rest[:count])
            rest = rest[count:]
        if self.reasons:
            reasons = Table.grid(padding=(0, 2))
            for name, text, style in self.reasons:
                reasons.add_row(Text(name), Text(text), style=style)
            yield reasons
        if self.caption:
            yield Text(self.caption, "italic")

    def _width(self, console: Console, numbers: Sequence[int]) -> int:
        unlimited = console.options.update(width=10_000)
        return console.measure(self._part(numbers), options=unlimited).maximum

    def _part(self, numbers: Sequence[int]) -> Table:
        """The table of the first column and of those with these ``numbers``."""
        result = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for n in (0, *numbers):
            name = self.columns[n]
            if name in TEXTS:
                result.add_column(name, overflow="fold")
            else:
                result.add_column("\n".join(name.rsplit(" ", 1)), justify="right", no_wrap=True)
        for line, style in zip_longest(self.lines, self.styles):
            result.add_row(*(Text(line[n]) for n in (0, *numbers)), style=style)
        return result


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each case id; cases and rows keep their order."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"]["id"], []).append(row)
    return cases


def finite(value: object) -> float | None:
    """``value`` as a float; None if it is missing, NaN or infinite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def fmt(value: object, scale: float = 1.0, suffix: str = "") -> str:
    """``value * scale`` with about three digits, or an en dash."""
    scaled = finite(value)
    if scaled is None:
        return DASH
    scaled *= scale
    size = abs(scaled)
    return (f"{scaled:#.3g}" if size < 1 else f"{scaled:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}") + suffix


def fmt_ratio(ratio: object) -> str:
    """``ratio`` as ``1.80x``, or an en dash."""
    value = finite(ratio)
    return DASH if value is None else f"{value:.2f}x"


def succeeded(row: Row | None) -> bool:
    return row is not None and row.get("status") == "ok"


def reason(row: Row) -> str:
    """Why a row has no numbers."""
    return f"{row.get('status', 'failed')}: {row.get('reason') or 'no reason given'}"


def fastest(rows: Iterable[Row]) -> Row | None:
    """The successful row with the lowest median."""
    timed = [row for row in rows if succeeded(row) and finite(row.get("median_s")) is not None]
    return min(timed, key=lambda row: float(row["median_s"]), default=None)


def fastest_parallel(rows: Iterable[Row]) -> Row | None:
    """The fastest row that is not a reference; tables highlight it."""
    return fastest(row for row in rows if row.get("family") != "reference")


def variant_row(rows: Iterable[Row], variant: str) -> Row | None:
    return next((row for row in rows if row["variant"] == variant), None)


def usp_row(rows: Iterable[Row]) -> Row | None:
    """The faster USP variant."""
    return fastest(row for row in rows if row["variant"].startswith("usp-"))


def best_xdit_row(rows: Iterable[Row]) -> Row | None:
    return fastest(row for row in rows if row.get("family") == "xdit")


def peak(row: Row | None) -> float | None:
    """Peak activation memory over all ranks, in bytes."""
    known = [size for size in map(finite, (row or {}).get("peak_bytes") or ()) if size is not None]
    return max(known, default=None)


def spread(row: Row) -> tuple[float | None, float | None]:
    """The quartiles; minimum and maximum where the row has no quartiles."""
    low, high = finite(row.get("q1_s")), finite(row.get("q3_s"))
    return (finite(row.get("min_s")), finite(row.get("max_s"))) if low is None or high is None else (low, high)


def bytes_out(row: Row) -> float | None:
    """Measured bytes that the busiest machine sends to others."""
    sent = (sum(finite(size) or 0.0 for to, size in enumerate(line) if to != machine)
            for machine, line in enumerate(row.get("wire_bytes") or ()))  # fmt: skip
    return max(sent, default=None)


def bound(rows: Sequence[Row]) -> tuple[float | None, str]:
    """Lower bound of a case's time and its limit, ``"compute"`` or ``"wire"``; prefers the bound of torus."""
    for row in sorted(rows, key=lambda row: row["variant"] != SUBJECT):
        seconds = finite(row.get("bound_s"))
        if succeeded(row) and seconds is not None:
            compute, wire = finite(row.get("bound_compute_s")), finite(row.get("bound_wire_s"))
            return seconds, "wire" if (wire or 0.0) > (compute or 0.0) else "compute"
    return None, DASH


def bound_text(rows: Sequence[Row]) -> str:
    seconds, limit = bound(rows)
    return "no lower bound" if seconds is None else f"lower bound {fmt(seconds, 1e3)} ms, set by {limit}"


def cells(row: Row) -> list[str]:
    """The cells of a successful row, one per column of ``COLUMNS``."""
    low, high = spread(row)
    error, psnr_db = finite(row.get("max_abs_error")), finite(row.get("psnr_db"))
    noise = "" if psnr_db is None else f" ({psnr_db:.1f} dB)"
    return [
        row["variant"],
        fmt(row.get("median_s"), 1e3),
        DASH if low is None or high is None else f"{fmt(low, 1e3)}..{fmt(high, 1e3)}",
        fmt_ratio(row.get("ratio_to_usp")),
        fmt_ratio(row.get("ratio_to_best_xdit")),
        DASH if error is None else f"{error:.1e}{noise}",
        fmt(bytes_out(row), 1e-6),
        fmt(row.get("efficiency"), 1e2),
        fmt(row.get("exposed_s"), 1e3),
        fmt(peak(row), 1e-6),
        fmt(row.get("first_call_s"), 1e3),
        row.get("layout") or DASH,
    ]


def table(rows: Sequence[Row]) -> FittedTable:
    """The variants of one case, the fastest highlighted, then the variants without numbers with their reasons."""
    best, measured = fastest_parallel(rows), [row for row in rows if succeeded(row)]
    return FittedTable(
        columns=COLUMNS,
        lines=[cells(row) for row in measured],
        styles=["bold green" if row is best else "" for row in measured],
        title=rows[0]["case"]["id"] if rows else "",
        reasons=[
            (row["variant"], reason(row), _STYLES.get(row.get("status", ""), "red"))
            for row in rows
            if not succeeded(row)
        ],
        caption=bound_text(rows),
    )


def matrix_table(title: str, matrix: Sequence[Sequence[object]]) -> FittedTable:
    """MB between machines: a line per sender, a column per receiver."""
    return FittedTable(
        columns=["machine", *(f"to {machine}" for machine in range(len(matrix)))],
        lines=[[f"from {machine}", *(fmt(size, 1e-6) for size in line)] for machine, line in enumerate(matrix)],
        title=title,
    )


def grid_cells(rows: Iterable[Row]) -> list[list[str]]:
    """One line per case, with one cell per column of ``GRID_COLUMNS``."""
    lines = []
    for case, case_rows in by_case(rows).items():
        torus, usp, xdit = variant_row(case_rows, SUBJECT), usp_row(case_rows) or {}, best_xdit_row(case_rows) or {}
        measured = torus if torus is not None and succeeded(torus) else {}
        missing = DASH if torus is None else str(torus.get("status", "failed"))
        lines.append([
            case, fmt(measured.get("median_s"), 1e3) if measured else missing, fmt(usp.get("median_s"), 1e3),
            xdit.get("variant", DASH), fmt(xdit.get("median_s"), 1e3), fmt_ratio(measured.get("ratio_to_usp")),
            fmt_ratio(measured.get("ratio_to_best_xdit")), fmt(measured.get("efficiency"), 1e2), bound(case_rows)[1],
        ])  # fmt: skip
    return lines


def grid_table(rows: Iterable[Row]) -> FittedTable:
    """One line per case: torus against USP and against xDiT's fastest variant."""
    return FittedTable(columns=GRID_COLUMNS, lines=grid_cells(rows))


def markdown_table(rows: Iterable[Row]) -> str:
    """``grid_table`` as a GitHub table."""
    return markdown(GRID_COLUMNS, grid_cells(rows))


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A GitHub table. Columns but the first are aligned to the right."""
    rule = [":--", *["--:"] * (len(columns) - 1)]
    escaped = ([text.replace("|", "\\|") for text in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, rule, *escaped))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Torus over all cases, as JSON data. Values without data are None.

    ``cases``: their number. ``without_torus``: ids of the cases without a torus result. ``vs_usp``, ``vs_best_xdit``:
    ``cases`` compared, ``geometric_mean``, ``best``, ``worst`` and ``slower`` (all below 1). ``peak_vs_usp``,
    ``peak_vs_ulysses``: the case with the largest ratio of peak memory. ``wire_deviation``: the row with the
    largest relative deviation of its measured bytes from the formula.
    """
    cases = by_case(rows)
    torus = {case: row for case, group in cases.items() if (row := variant_row(group, SUBJECT)) and succeeded(row)}
    efficiencies = [value for row in torus.values() if (value := finite(row.get("efficiency"))) is not None]
    deviations: list[dict[str, Any]] = []
    for row in filter(succeeded, rows):
        formula, measured = finite(row.get("formula_bytes")), bytes_out(row)
        if formula and measured is not None:
            deviation = measured / formula - 1
            deviations.append({"case": row["case"]["id"], "variant": row["variant"], "deviation": deviation})
    ulysses = {case: variant_row(case_rows, "ulysses") for case, case_rows in cases.items()}
    return {
        "cases": len(cases),
        "without_torus": [case for case in cases if case not in torus],
        "median_efficiency": statistics.median(efficiencies) if efficiencies else None,
        "vs_usp": _ratios(torus, "ratio_to_usp"),
        "vs_best_xdit": _ratios(torus, "ratio_to_best_xdit"),
        "peak_vs_usp": _largest_peak_ratio(torus, {case: usp_row(case_rows) for case, case_rows in cases.items()}),
        "peak_vs_ulysses": _largest_peak_ratio(torus, ulysses),
        "wire_deviation": max(deviations, key=lambda item: abs(item["deviation"]), default=None),
    }


def summary_cells(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary as ``(name, value)`` lines."""
    missing = summary["without_torus"]
    lines = [("cases", f"{summary['cases']}" + (f"; no torus result in {', '.join(missing)}" if missing else ""))]
    for key, other in (("vs_usp", "USP"), ("vs_best_xdit", "best xDiT")):
        ratios = summary[key]
        slower = ", ".join(map(_fmt_case, ratios["slower"])) or "none"
        lines += [
            (f"vs {other}, geometric mean of {ratios['cases']}", fmt_ratio(ratios["geometric_mean"])),
            (f"vs {other}, best", _fmt_case(ratios["best"])),
            (f"vs {other}, worst", _fmt_case(ratios["worst"])),
            (f"vs {other}, slower in", f"{len(ratios['slower'])} of {ratios['cases']}: {slower}"),
        ]
    deviation = summary["wire_deviation"]
    by = deviation and f"{deviation['deviation']:+.2%} ({deviation['variant']}, {deviation['case']})"
    return [
        *lines,
        ("median efficiency", fmt(summary["median_efficiency"], 1e2, " %")),
        ("peak memory vs USP, largest", _fmt_case(summary["peak_vs_usp"])),
        ("peak memory vs Ulysses, largest", _fmt_case(summary["peak_vs_ulysses"])),
        ("bytes vs formula, worst", by or DASH),
    ]


def summary_table(summary: Mapping[str, Any]) -> FittedTable:
    return FittedTable(columns=(SUBJECT, ""), lines=summary_cells(summary))


def predictions(rows: Iterable[Row]) -> dict[str, Any] | None:
    """Accuracy of the simulator's times, as JSON data; None if no row has a prediction.

    ``variants``: rows compared. ``median_error``: median of abs(predicted / measured - 1). ``worst``: the row with the
    ratio farthest from 1. ``pairs``: number of pairs of variants of one case with medians over 10 % apart.
    ``wrong_order``: the pairs predicted in the opposite order, the slower variant first.
    """
    ratios: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    pairs = 0
    for case, case_rows in by_case(rows).items():
        known = [
            (row["variant"], median, predicted)
            for row in filter(succeeded, case_rows)
            if (median := finite(row.get("median_s"))) and (predicted := finite(row.get("predicted_s")))
        ]
        ratios += [{"case": case, "variant": name, "ratio": predicted / median} for name, median, predicted in known]
        for pair in combinations(known, 2):
            fast, slow = sorted(pair, key=lambda variant: variant[1])
            if slow[1] > fast[1] * 1.1:
                pairs += 1
                if slow[2] <= fast[2]:
                    wrong.append({"case": case, "variants": [slow[0], fast[0]], "ratio": slow[1] / fast[1]})
    if not ratios:
        return None
    return {
        "variants": len(ratios),
        "median_error": statistics.median(abs(item["ratio"] - 1) for item in ratios),
        "worst": max(ratios, key=lambda item: abs(item["ratio"] - 1)),
        "pairs": pairs,
        "wrong_order": wrong,
    }


def prediction_table(rows: Sequence[Row]) -> FittedTable | None:
    """Predicted and measured times; None if no row has a prediction."""
    accuracy = predictions(rows)
    if accuracy is None:
        return None
    lines = []
    for row in rows:
        if succeeded(row) and finite(row.get("predicted_s")) is not None:
            measured_s, predicted_s = row["median_s"], row["predicted_s"]
            seconds = fmt(measured_s, 1e3), fmt(predicted_s, 1e3)
            lines.append([f"{row['variant']}, {row['case']['id']}", fmt_ratio(predicted_s / measured_s), *seconds])
    worst, wrong = accuracy["worst"], accuracy["wrong_order"]
    caption = (
        f"median error {fmt(accuracy['median_error'], 1e2, ' %')} over {accuracy['variants']} rows, worst "
        f"{fmt_ratio(worst['ratio'])} ({worst['variant']}, {worst['case']}); order wrong in {len(wrong)} of "
        f"{accuracy['pairs']} pairs that differ by over 10 %"
    )
    return FittedTable(columns=("variant, case", "ratio", "measured ms", "predicted ms"), lines=lines, caption=caption)


def _ratios(torus: Mapping[str, Row], key: str) -> dict[str, Any]:
    ratios: list[dict[str, Any]] = [
        {"case": case, "ratio": ratio} for case, row in torus.items() if (ratio := finite(row.get(key)))
    ]
    ratios.sort(key=lambda item: float(item["ratio"]))
    return {
        "cases": len(ratios),
        "geometric_mean": statistics.geometric_mean(item["ratio"] for item in ratios) if ratios else None,
        "best": ratios[-1] if ratios else None,
        "worst": ratios[0] if ratios else None,
        "slower": [item for item in ratios if item["ratio"] < 1],
    }


def _largest_peak_ratio(torus: Mapping[str, Row], others: Mapping[str, Row | None]) -> dict[str, Any] | None:
    ratios: list[dict[str, Any]] = []
    for case, row in torus.items():
        own, other = peak(row), peak(others[case]) if succeeded(others[case]) else None
        if own is not None and other:
            ratios.append({"case": case, "ratio": own / other})
    return max(ratios, key=lambda item: item["ratio"], default=None)


def _fmt_case(item: Mapping[str, Any] | None) -> str:
    return DASH if item is None else f"{fmt_ratio(item['ratio'])} ({item['case']})"
