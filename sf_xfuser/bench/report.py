"""A bench document as tables, a summary and a Chrome trace. Reads plain JSON data; measures nothing.

A document holds ``rows`` (one per case and variant) and ``timelines`` (spans of one call). Variants are whatever the rows name,
in the rows' order; only ``torus`` (the subject), ``usp-*`` and ``ulysses`` (what it is compared with) have a meaning.
The dB beside an error are the peak signal-to-noise ratio of latents against those of the run without compression.
``ratio_to_usp`` of a row is against the faster ``usp-*`` variant of its case. A value that is missing, null or not finite
shows as an en dash. MB is 10^6 bytes.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]

SUBJECT = "torus"
DASH = "–"
COLUMNS = (
    *("variant", "layout", "median ms", "spread ms", "first ms", "exposed ms", "peak MB", "out MB"),
    *("max error", "eff. %", "vs USP", "vs best xDiT"),
)
GRID_COLUMNS = (
    *("case", "torus ms", "USP ms", "best xDiT", "best xDiT ms"),
    *("vs USP", "vs best xDiT", "eff. %", "bound by"),
)
_STYLES = {"ok": "", "skipped": "dim"}  # status -> style of a table line; red for all others


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Case id -> its rows, both in the order of ``rows``."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"]["id"], []).append(row)
    return cases


def number(value: object) -> float | None:
    """``value`` as a float; None when it is missing, NaN or infinite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def shown(value: object, scale: float = 1.0, suffix: str = "") -> str:
    """``value * scale`` with about three digits, or an en dash."""
    plain = number(value)
    if plain is None:
        return DASH
    plain *= scale
    size = abs(plain)
    return (f"{plain:#.3g}" if size < 1 else f"{plain:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}") + suffix


def times(ratio: object) -> str:
    """``ratio`` as ``1.80x``, or an en dash."""
    plain = number(ratio)
    return DASH if plain is None else f"{plain:.2f}x"


def succeeded(row: Row | None) -> bool:
    return row is not None and row.get("status") == "ok"


def refusal(row: Row) -> str:
    """Why a row has no numbers."""
    return f"{row.get('status', 'failed')}: {row.get('reason') or 'no reason given'}"


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row with the lowest median of those that succeeded."""
    timed = [row for row in rows if succeeded(row) and number(row.get("median_s")) is not None]
    return min(timed, key=lambda row: float(row["median_s"]), default=None)


def contender(rows: Iterable[Row]) -> Row | None:
    """The fastest row that is no single-process reference: the one to highlight."""
    return fastest(row for row in rows if row.get("family") != "reference")


def variant_row(rows: Iterable[Row], variant: str) -> Row | None:
    return next((row for row in rows if row["variant"] == variant), None)


def usp_row(rows: Iterable[Row]) -> Row | None:
    """The faster of xDiT's USP variants."""
    return fastest(row for row in rows if row["variant"].startswith("usp-"))


def best_xdit_row(rows: Iterable[Row]) -> Row | None:
    return fastest(row for row in rows if row.get("family") == "xdit")


def peak(row: Row | None) -> float | None:
    """Activation memory of the rank that needs most, in bytes."""
    known = [size for size in map(number, (row or {}).get("peak_bytes") or ()) if size is not None]
    return max(known, default=None)


def spread(row: Row) -> tuple[float | None, float | None]:
    """The quartiles, or the extremes where there are none."""
    low, high = number(row.get("q1_s")), number(row.get("q3_s"))
    return (number(row.get("min_s")), number(row.get("max_s"))) if low is None or high is None else (low, high)


def bytes_out(row: Row) -> float | None:
    """Measured bytes to other machines, of the machine that sends most."""
    matrix = row.get("wire_bytes")
    if not matrix:
        return None
    return max(
        sum(number(size) or 0.0 for to, size in enumerate(line) if to != machine) for machine, line in enumerate(matrix)
    )


def bound(rows: Sequence[Row]) -> tuple[float | None, str]:
    """``(seconds, "compute" or "wire")`` of a case: the subject's bound, else that of the first row that has one."""
    for row in sorted(rows, key=lambda row: row["variant"] != SUBJECT):
        seconds = number(row.get("bound_s"))
        if succeeded(row) and seconds is not None:
            compute, wire = number(row.get("bound_compute_s")), number(row.get("bound_wire_s"))
            return seconds, "wire" if (wire or 0.0) > (compute or 0.0) else "compute"
    return None, DASH


def bound_text(rows: Sequence[Row]) -> str:
    seconds, binder = bound(rows)
    return "no bound known" if seconds is None else f"bound {shown(seconds, 1e3)} ms, set by {binder}"


def cells(row: Row) -> list[str]:
    """One text per name in ``COLUMNS``. For rows that succeeded."""
    low, high = spread(row)
    error, psnr_db = number(row.get("max_abs_error")), number(row.get("psnr_db"))
    noise = "" if psnr_db is None else f" ({psnr_db:.1f} dB)"
    return [
        row["variant"],
        row.get("layout") or DASH,
        shown(row.get("median_s"), 1e3),
        DASH if low is None or high is None else f"{shown(low, 1e3)}..{shown(high, 1e3)}",
        shown(row.get("first_call_s"), 1e3),
        shown(row.get("exposed_s"), 1e3),
        shown(peak(row), 1e-6),
        shown(bytes_out(row), 1e-6),
        DASH if error is None else f"{error:.1e}{noise}",
        shown(row.get("efficiency"), 1e2),
        times(row.get("ratio_to_usp")),
        times(row.get("ratio_to_best_xdit")),
    ]


def table(rows: Sequence[Row]) -> Table:
    """All variants of one case, the fastest highlighted; a variant without numbers shows why in place of its layout."""
    best = contender(rows)
    lines = [cells(row) if succeeded(row) else [row["variant"], refusal(row)] for row in rows]
    styles = ["bold green" if row is best else _STYLES.get(row.get("status", ""), "red") for row in rows]
    title = rows[0]["case"]["id"] if rows else ""
    return _table(COLUMNS, lines, left=2, styles=styles, title=title, caption=bound_text(rows))


def matrix_table(row: Row) -> Table:
    """Measured MB per call from each machine (line) to each machine (column)."""
    matrix = row.get("wire_bytes") or []
    title = f"{row['variant']}: MB from machine (line) to machine (column)"
    lines = [[str(machine), *(shown(size, 1e-6) for size in line)] for machine, line in enumerate(matrix)]
    return _table(["", *map(str, range(len(matrix)))], lines, left=1, title=title)


def grid_cells(rows: Iterable[Row]) -> list[list[str]]:
    """One line per case, with one text per name in ``GRID_COLUMNS``."""
    lines = []
    for case, of_case in by_case(rows).items():
        subject, usp, xdit = variant_row(of_case, SUBJECT), usp_row(of_case) or {}, best_xdit_row(of_case) or {}
        measured = subject if subject is not None and succeeded(subject) else {}
        absent = DASH if subject is None else str(subject.get("status", "failed"))
        lines.append(
            [
                case,
                shown(measured.get("median_s"), 1e3) if measured else absent,
                shown(usp.get("median_s"), 1e3),
                xdit.get("variant", DASH),
                shown(xdit.get("median_s"), 1e3),
                times(measured.get("ratio_to_usp")),
                times(measured.get("ratio_to_best_xdit")),
                shown(measured.get("efficiency"), 1e2),
                bound(of_case)[1],
            ]
        )
    return lines


def grid_table(rows: Iterable[Row]) -> Table:
    """One line per case: the subject against USP and against the best xDiT variant."""
    return _table(GRID_COLUMNS, grid_cells(rows), left=1)


def markdown_table(rows: Iterable[Row]) -> str:
    """``grid_table`` as GitHub table text, with a final newline."""
    rule = [":--", *["--:"] * (len(GRID_COLUMNS) - 1)]
    lines = [GRID_COLUMNS, rule, *([text.replace("|", "\\|") for text in line] for line in grid_cells(rows))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The subject over all cases, as JSON data. Values that no case gives are None.

    ``cases`` all of them, ``without_torus`` ids of those where it gave no numbers, ``median_efficiency``;
    ``vs_usp``, ``vs_best_xdit``: ``cases`` compared, ``geometric_mean``, ``best`` and ``worst`` ``{case, ratio}``,
    ``slower`` list of those below 1; ``peak_vs_usp`` (the faster one), ``peak_vs_ulysses``: ``{case, ratio}`` of the
    case with the largest ratio of peak memory; ``wire_deviation``: ``{case, variant, deviation}`` of the row whose measured
    bytes lie farthest from the formula, relative to it, positive for more.
    """
    cases = by_case(rows)
    subjects = {
        case: row for case, of in cases.items() if (row := variant_row(of, SUBJECT)) is not None and succeeded(row)
    }
    efficiencies = [value for row in subjects.values() if (value := number(row.get("efficiency"))) is not None]
    deviations: list[dict[str, Any]] = []
    for row in rows:
        formula, measured = number(row.get("formula_bytes")), bytes_out(row)
        if succeeded(row) and formula and measured is not None:
            deviation = measured / formula - 1
            deviations.append({"case": row["case"]["id"], "variant": row["variant"], "deviation": deviation})
    return {
        "cases": len(cases),
        "without_torus": [case for case in cases if case not in subjects],
        "median_efficiency": statistics.median(efficiencies) if efficiencies else None,
        "vs_usp": _ratios(subjects, "ratio_to_usp"),
        "vs_best_xdit": _ratios(subjects, "ratio_to_best_xdit"),
        "peak_vs_usp": _largest_peak_ratio(subjects, {case: usp_row(of) for case, of in cases.items()}),
        "peak_vs_ulysses": _largest_peak_ratio(
            subjects, {case: variant_row(of, "ulysses") for case, of in cases.items()}
        ),
        "wire_deviation": max(deviations, key=lambda item: abs(item["deviation"]), default=None),
    }


def summary_cells(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """``(what, value)`` lines of a summary."""
    absent = summary["without_torus"]
    lines = [("cases", f"{summary['cases']}" + (f", without torus: {', '.join(absent)}" if absent else ""))]
    for key, other in (("vs_usp", "USP"), ("vs_best_xdit", "best xDiT")):
        ratios = summary[key]
        slower = ", ".join(map(_at, ratios["slower"])) or "none"
        lines += [
            (f"vs {other}, geometric mean of {ratios['cases']}", times(ratios["geometric_mean"])),
            (f"vs {other}, best", _at(ratios["best"])),
            (f"vs {other}, worst", _at(ratios["worst"])),
            (f"vs {other}, slower in", f"{len(ratios['slower'])} of {ratios['cases']}: {slower}"),
        ]
    deviation = summary["wire_deviation"]
    by = deviation and f"{deviation['deviation']:+.2%} ({deviation['variant']}, {deviation['case']})"
    return [
        *lines,
        ("median efficiency", shown(summary["median_efficiency"], 1e2, " %")),
        ("peak memory vs USP, at most", _at(summary["peak_vs_usp"])),
        ("peak memory vs Ulysses, at most", _at(summary["peak_vs_ulysses"])),
        ("bytes vs formula, at worst", by or DASH),
    ]


def summary_table(summary: Mapping[str, Any]) -> Table:
    """``summary``'s result, one line per value."""
    return _table((SUBJECT, ""), summary_cells(summary), left=2)


def predictions(rows: Iterable[Row]) -> dict[str, Any] | None:
    """How near the simulator's times are to the measured ones, as JSON data; None where nothing was predicted.

    ``variants`` compared, in all cases; ``median_off`` of abs(predicted / measured - 1); ``worst`` ``{case, variant, ratio}``,
    the ratio farthest from 1; ``pairs`` of variants of one case whose measured medians differ by more than 10 %, and
    ``wrong_order``: ``{case, variants, ratio}`` (slower, faster, measured) of those that are predicted the other way.
    """
    found: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    pairs = 0
    for case, of_case in by_case(rows).items():
        known = [
            (row["variant"], median, predicted)
            for row in of_case
            if succeeded(row)
            and (median := number(row.get("median_s")))
            and (predicted := number(row.get("predicted_s")))
        ]
        found += [
            {"case": case, "variant": variant, "ratio": predicted / median} for variant, median, predicted in known
        ]
        for one, other in combinations(known, 2):
            fast, slow = sorted((one, other), key=lambda variant: variant[1])
            if slow[1] > fast[1] * 1.1:
                pairs += 1
                if slow[2] <= fast[2]:
                    wrong.append({"case": case, "variants": [slow[0], fast[0]], "ratio": slow[1] / fast[1]})
    if not found:
        return None
    return {
        "variants": len(found),
        "median_off": statistics.median(abs(item["ratio"] - 1) for item in found),
        "worst": max(found, key=lambda item: abs(item["ratio"] - 1)),
        "pairs": pairs,
        "wrong_order": wrong,
    }


def prediction_table(rows: Sequence[Row]) -> Table | None:
    """Predicted beside measured times of all variants and cases; None where nothing was predicted."""
    summed = predictions(rows)
    if summed is None:
        return None
    lines = [
        [
            row["variant"],
            row["case"]["id"],
            shown(row["median_s"], 1e3),
            shown(row["predicted_s"], 1e3),
            times(row["predicted_s"] / row["median_s"]),
        ]
        for row in rows
        if succeeded(row) and number(row.get("predicted_s")) is not None
    ]
    worst, wrong = summed["worst"], summed["wrong_order"]
    caption = (
        f"off by {shown(summed['median_off'], 1e2, ' %')} at the median of {summed['variants']}, at worst "
        f"{times(worst['ratio'])} ({worst['variant']}, {worst['case']}); order wrong in {len(wrong)} of {summed['pairs']} "
        f"pairs that differ by over 10 %"
    )
    return _table(("variant", "case", "measured ms", "predicted ms", "ratio"), lines, left=2, caption=caption)


def sub_links(spans: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Spans dealt out so that those of one list follow one another without overlap; as few lists as that takes."""
    links: list[list[Mapping[str, Any]]] = []
    for span in sorted(spans, key=lambda span: (span["start_s"], span["end_s"])):
        free = next((link for link in links if link[-1]["end_s"] <= span["start_s"]), None)
        if free is None:
            links.append([span])
        else:
            free.append(span)
    return links


def chrome_trace(document: Mapping[str, Any]) -> dict[str, Any]:
    """All timelines in Chrome's trace format, which Perfetto opens. A process is a machine of one call; a thread is a
    link of one rank, or several where spans of the link overlap."""
    events: list[dict[str, Any]] = []
    num_processes = 0

    def name(kind: str, pid: int, tid: int, text: str) -> None:
        events.append({"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": text}})
        order = {"sort_index": tid if kind == "thread" else pid}
        events.append({"ph": "M", "name": f"{kind}_sort_index", "pid": pid, "tid": tid, "args": order})

    for timeline in document.get("timelines") or ():
        for machine in sorted({rank["machine"] for rank in timeline["ranks"]}):
            num_processes += 1
            pid, tid = num_processes, 0
            name("process", pid, tid, f"{timeline['variant']} machine {machine}: {timeline['case']}")
            for rank in timeline["ranks"]:
                if rank["machine"] != machine:
                    continue
                for link in dict.fromkeys(span["link"] for span in rank["spans"]):
                    for n, spans in enumerate(sub_links(span for span in rank["spans"] if span["link"] == link)):
                        tid += 1
                        name("thread", pid, tid, f"rank {rank['rank']} {link}" + (f" {n + 1}" if n else ""))
                        events += (_complete_event(span, pid, tid) for span in spans)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _complete_event(span: Mapping[str, Any], pid: int, tid: int) -> dict[str, Any]:
    """In microseconds, rounded to the nanosecond so that the end of one span is never past the start of the next."""
    start, end = round(span["start_s"] * 1e6, 3), round(span["end_s"] * 1e6, 3)
    event = {"ph": "X", "name": span["name"], "cat": span["link"], "pid": pid, "tid": tid}
    return {**event, "ts": start, "dur": round(end - start, 3), "args": {"bytes": span.get("bytes", 0)}}


def _table(
    columns: Sequence[str],
    lines: Sequence[Sequence[str]],
    left: int,
    styles: Sequence[str] = (),
    title: str = "",
    caption: str = "",
) -> Table:
    """The first ``left`` columns hold text, the others numbers. The first stays whole where the terminal is narrow."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    result.title, result.caption = Text(title) if title else None, Text(caption) if caption else None
    for n, name in enumerate(columns):
        first = max((cell_len(line[0]) for line in lines), default=0) if n == 0 else None
        header = name if n < left else "\n".join(name.rsplit(" ", 1))
        side: Literal["left", "right"] = "left" if n < left else "right"
        overflow: Literal["fold", "ellipsis"] = "fold" if n < left else "ellipsis"
        result.add_column(header, justify=side, no_wrap=n == 0 or n >= left, min_width=first, overflow=overflow)
    for line, style in zip_longest(lines, styles):
        result.add_row(*map(Text, line), style=style)
    return result


def _ratios(subjects: Mapping[str, Row], key: str) -> dict[str, Any]:
    known = {case: ratio for case, row in subjects.items() if (ratio := number(row.get(key)))}
    ordered: list[dict[str, Any]] = [
        {"case": case, "ratio": known[case]} for case in sorted(known, key=lambda case: known[case])
    ]
    return {
        "cases": len(known),
        "geometric_mean": statistics.geometric_mean(known.values()) if known else None,
        "best": ordered[-1] if ordered else None,
        "worst": ordered[0] if ordered else None,
        "slower": [item for item in ordered if item["ratio"] < 1],
    }


def _largest_peak_ratio(subjects: Mapping[str, Row], others: Mapping[str, Row | None]) -> dict[str, Any] | None:
    ratios: list[dict[str, Any]] = []
    for case, row in subjects.items():
        mine, other = peak(row), peak(others[case]) if succeeded(others[case]) else None
        if mine is not None and other:
            ratios.append({"case": case, "ratio": mine / other})
    return max(ratios, key=lambda item: item["ratio"], default=None)


def _at(item: Mapping[str, Any] | None) -> str:
    return DASH if item is None else f"{times(item['ratio'])} ({item['case']})"


# -- files that a command line names -----------------------------------------------------------------------------------


def require_files(options: object, *names: str) -> None:
    """Raises ValueError where one of these options names a folder, or a file in a folder that does not exist."""
    for name in names:
        path = getattr(options, name)
        if path and path != "-" and not (folder := Path(path).absolute().parent).is_dir():
            raise ValueError(f"--{name} {path}: there is no folder {folder}")
        if path and Path(path).is_dir():
            raise ValueError(f"--{name} {path} is a folder; name a file")


def write_json(path: str | None, document: object, indent: int | None = None) -> bool:
    """Write ``document`` to ``path``; None: nowhere. Whether that is ``-``, standard output."""
    text = json.dumps(document, indent=indent) if path else ""
    if path == "-":
        print(text)
    elif path:
        Path(path).write_text(text + "\n")
    return path == "-"
