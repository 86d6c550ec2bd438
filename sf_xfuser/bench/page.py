"""Plots a bench document and writes an HTML page without scripts or external files. Needs matplotlib."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from os import PathLike
from textwrap import shorten, wrap
from typing import IO, TYPE_CHECKING, Any

from sf_xfuser.bench import report
from sf_xfuser.bench.deprecated import upgrade
from sf_xfuser.bench.report import Row
from sf_xfuser.bench.timelines import without_overlap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = 3  # with more cases, the plot shows ratios only

# Okabe and Ito's palette, which colour-blind readers can distinguish.
_COLOURS = {
    "compute": "#0072B2",
    "wait": "#C4C4C4",
    "q": "#E69F00",
    "k": "#009E73",
    "v": "#CC79A7",
    "kv": "#009E73",
    "o": "#D55E00",
    "other": "#56B4E9",
}
_STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f3f5f7; --best: #d9f2e3; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --line: #3d444d; --soft: #22272e; --best: #12402a; --bad: #ff9d94; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { margin-bottom: 0.2rem; }
pre { background: var(--soft); padding: 0.6rem 0.8rem; border-radius: 6px; white-space: pre-wrap; }
details { border-top: 1px solid var(--line); padding: 0.5rem 0; }
details details { border: 0; padding: 0.3rem 0; }
summary { cursor: pointer; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.6rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap; }
th { background: var(--soft); }
.text, th:first-child, td:first-child { text-align: left; white-space: normal; }
.best td { background: var(--best); font-weight: 600; }
.skipped td { font-style: italic; opacity: 0.8; }
.failed td { color: var(--bad); opacity: 1; }
small { display: block; opacity: 0.7; font-weight: 400; }
figure { margin: 0.6rem 0; background: #fff; border-radius: 6px; padding: 0.5rem; }
figure svg { width: 100%; height: auto; }
"""

# Key of a document -> its name on the page, scale and unit.
_UNITS = {
    "memory_bytes": ("memory", 1e-9, " GB"),
    "inter_rate_bps": ("rate between machines", 1e-6, " Mbit/s"),
    "inter_delay_s": ("delay between machines", 1e3, " ms"),
}


@dataclass(frozen=True, slots=True)
class Panel:
    """One part of a figure: its height in inches and its drawing function."""

    height: float
    draw: Callable[[Axes], None]


def plot(document: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Write bars for each case (for many cases: ratios) and the first timeline. The suffix selects the file type."""
    document = upgrade(document)
    cases = report.by_case(document["rows"])
    if not cases:
        raise ValueError("nothing to plot: the document has no rows")
    many = len(cases) > _PANELS
    panels = [ratio_panel(document["rows"])] if many else [bars_panel(rows) for rows in cases.values()]
    panels += [timeline_panel(timeline) for timeline in (document.get("timelines") or ())[:1]]
    save(panels, path)


def require_matplotlib() -> None:
    """Raise RuntimeError with the remedy if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install 'sf-xfuser[bench]'") from error


def save(panels: Sequence[Panel], to: str | PathLike[str] | IO[str], file_type: str | None = None) -> None:
    """Draw the panels below one another. ``file_type``: by default, the suffix of ``to``."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"text.parse_math": False, "svg.hashsalt": "sf-xfuser", "svg.fonttype": "path"}
    with matplotlib.rc_context(style):
        figure: Figure = Figure(figsize=(11, sum(panel.height for panel in panels)), layout="constrained")
        grid = figure.add_gridspec(len(panels), 1, height_ratios=[panel.height for panel in panels])
        for n, panel in enumerate(panels):
            panel.draw(figure.add_subplot(grid[n]))
        figure.savefig(to, format=file_type, dpi=150)


def set_title(axes: Axes, text: str) -> None:
    """A bold title, left, in lines that the figure does not cut."""
    lines = [line for part in text.split("\n") for line in wrap(part, 95)]
    axes.set_title("\n".join(lines), loc="left", fontweight="bold")


def bars_panel(rows: Sequence[Row]) -> Panel:
    """Median time per variant of one case, split into attention and exposed communication."""

    def draw(axes: Axes) -> None:
        seconds, limit_name = report.bound(rows)
        unit = "denoising step" if rows[0].get("kind") == "pipeline" else "call"
        measured = [report.spread(row)[1] or row.get("median_s") for row in rows if report.succeeded(row)]
        limit = max((x for x in map(report.finite, [*measured, seconds]) if x is not None), default=1e-3) * 1e3
        for y, row in enumerate(rows):
            median = report.finite(row.get("median_s")) if report.succeeded(row) else None
            if median is None:
                text = report.reason(row) if not report.succeeded(row) else report.DASH
                _label(axes, limit * 0.01, y, shorten(text, 90, placeholder=" …"), color="#606060")
                continue
            attention = report.finite(row.get("attention_s"))
            split = median if attention is None else min(attention, median)
            axes.barh(y, split * 1e3, 0.65, color=_COLOURS["other" if attention is None else "compute"])
            axes.barh(y, (median - split) * 1e3, 0.65, left=split * 1e3, color=_COLOURS["wait"])
            low, high = report.spread(row)
            reach = [[max(median - (low or median), 0) * 1e3], [max((high or median) - median, 0) * 1e3]]
            axes.errorbar(median * 1e3, y, xerr=reach, color="#202020", capsize=3, linewidth=1)
            ratio = report.finite(row.get("ratio_to_usp"))
            label = f"{report.fmt(median, 1e3)} ms" + (f", {report.fmt_ratio(ratio)} USP" if ratio is not None else "")
            _label(axes, max(median, high or 0) * 1e3 + limit * 0.012, y, label)
        if seconds is not None:
            text = f"lower bound, set by {limit_name}"
            axes.axvline(seconds * 1e3, color="#202020", linestyle="--", linewidth=1, label=text)
        keys: dict[str, str] = {}
        for row in filter(report.succeeded, rows):
            whole = report.finite(row.get("attention_s")) is None
            keys |= {"whole call": "other"} if whole else {"attention": "compute", "exposed": "wait"}
        _legend(axes, {name: _COLOURS[colour] for name, colour in keys.items()})
        axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
        axes.set(xlim=(0, limit * 1.22), ylim=(len(rows) - 0.4, -0.6), xlabel=f"ms per {unit}, median and spread")
        set_title(axes, rows[0]["case"]["id"])

    return Panel(1.0 + 0.32 * len(rows), draw)


def ratio_panel(rows: Sequence[Row]) -> Panel:
    """Speedup of torus over USP and over xDiT's fastest variant, for each case."""
    cases = report.by_case(rows)

    def draw(axes: Axes) -> None:
        kinds = {"vs USP": ("ratio_to_usp", "compute"), "vs best xDiT": ("ratio_to_best_xdit", "q")}
        ratios: list[tuple[float | None, float]] = []
        for y, case_rows in enumerate(cases.values()):
            row = report.variant_row(case_rows, report.SUBJECT)
            if row is None or not report.succeeded(row):
                text = f"no {report.SUBJECT} variant" if row is None else report.reason(row)
                _label(axes, 0.01, y, shorten(text, 90, placeholder=" …"), color="#606060")
                continue
            for offset, (key, colour) in zip((-0.2, 0.2), kinds.values(), strict=True):
                ratio = report.finite(row.get(key))
                axes.barh(y + offset, ratio or 0.0, 0.36, color=_COLOURS[colour])
                ratios.append((ratio, y + offset))
        largest = max([1.0, *(ratio for ratio, _ in ratios if ratio is not None)])
        for ratio, y_of_bar in ratios:
            _label(axes, (ratio or 0.0) + largest * 0.006, y_of_bar, report.fmt_ratio(ratio))
        axes.axvline(1.0, color="#202020", linestyle="--", linewidth=1, label="equal")
        _legend(axes, {name: _COLOURS[colour] for name, (_, colour) in kinds.items()})
        axes.set_yticks(range(len(cases)), list(cases))
        axes.set(xlim=(0, largest * 1.1), ylim=(len(cases) - 0.4, -0.6), xlabel="speedup (higher is better)")
        set_title(axes, f"{report.SUBJECT} against xDiT")

    return Panel(1.0 + 0.42 * len(cases), draw)


def timeline_panel(timeline: Mapping[str, Any]) -> Panel:
    """The timeline of one call: compute, waits and transfers of each rank, coloured by tensor."""
    ranks: list[Mapping[str, Any]] = sorted(timeline["ranks"], key=lambda rank: (rank["machine"], rank["rank"]))
    used = {span["link"] for rank in ranks for span in rank["spans"]}
    links = ["compute", *(link for link in ("inside", "across") if link in used)]

    def draw(axes: Axes) -> None:
        colours: set[str] = set()
        for n, rank in enumerate(ranks):
            for m, link in enumerate(links):
                y = n * (len(links) + 0.5) + m
                if link == "compute":
                    _draw_spans(axes, [span for span in rank["spans"] if span["link"] == "wait"], y, colours)
                _draw_spans(axes, [span for span in rank["spans"] if span["link"] == link], y, colours)
        height = len(links) + 0.5
        labels = [f"rank {rank['rank']}  {link}" if not m else link for rank in ranks for m, link in enumerate(links)]
        axes.set_yticks([n * height + m for n in range(len(ranks)) for m in range(len(links))], labels, fontsize=7)
        for machine in dict.fromkeys(rank["machine"] for rank in ranks):
            mine = [n for n, rank in enumerate(ranks) if rank["machine"] == machine]
            top, bottom = mine[0] * height - 0.75, (mine[-1] + 1) * height - 0.75
            axes.axhspan(top, bottom, color="#000000" if machine % 2 else "#ffffff", alpha=0.05, linewidth=0, zorder=0)
            right, middle = axes.get_yaxis_transform(), (top + bottom) / 2
            axes.text(1.004, middle, f"machine {machine}", transform=right, rotation=270, va="center", fontsize=7)
        longest = max((span["end_s"] for rank in ranks for span in rank["spans"]), default=0.0)
        duration = max(report.finite(timeline.get("duration_s")) or 0.0, longest) or 1e-3
        axes.set(xlim=(0, duration * 1e3), ylim=(max(len(ranks), 1) * height - 0.75, -0.75), xlabel="ms")
        names = {"other": "other tensors"}
        _legend(axes, {names.get(key, key): colour for key, colour in _COLOURS.items() if key in colours}, left=1.03)
        set_title(axes, f"one call of {timeline['variant']}, {timeline['case']}")

    return Panel(1.1 + 0.15 * len(ranks) * (len(links) + 0.5), draw)


def _draw_spans(axes: Axes, spans: list[Mapping[str, Any]], y: float, colours: set[str]) -> None:
    """Draw the spans of one link at ``y``, overlapping ones as thinner bars; add their kinds to ``colours``."""
    rows = without_overlap(spans)
    height = 0.84 / max(len(rows), 1)
    for n, row in enumerate(rows):
        for kind in dict.fromkeys(map(_kind, row)):
            parts = [span for span in row if _kind(span) == kind]
            bars = [(span["start_s"] * 1e3, (span["end_s"] - span["start_s"]) * 1e3) for span in parts]
            extent = (y - 0.42 + n * height, height)
            axes.broken_barh(bars, extent, facecolors=_COLOURS[kind], edgecolor="white", linewidth=0.3)
            colours.add(kind)


def _kind(span: Mapping[str, Any]) -> str:
    if span["link"] in ("compute", "wait"):
        return str(span["link"])
    tensor = str(span["name"]).split(" ")[0].lower()
    return tensor if tensor in ("q", "k", "v", "kv", "o") else "other"


def _label(axes: Axes, x: float, y: float, text: str, color: str = "#000000") -> None:
    """A text with a background, readable on top of a line."""
    background = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.text(x, y, text, va="center", fontsize=8, color=color, bbox=background, zorder=4)


def _legend(axes: Axes, colours: Mapping[str, str], left: float = 1.01) -> None:
    """A legend right of the axes: one patch per colour, then the labelled lines."""
    from matplotlib.patches import Patch

    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    handles = [*(Patch(color=colour, label=name) for name, colour in colours.items()), *lines]
    if handles:
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(left, 1.0), frameon=False, borderaxespad=0)


def html(document: Mapping[str, Any]) -> str:
    """The page: hardware and versions, a summary of several cases, then tables and plots of each case.

    It also contains the rows as JSON.
    """
    document = upgrade(document)
    rows: Sequence[Row] = document["rows"]
    timelines: Sequence[Mapping[str, Any]] = document.get("timelines") or ()
    cases = report.by_case(rows)
    figures = _Figures()
    parts = [_head(document)]
    if len(cases) > 1:
        lines = report.summary_cells(report.summary(rows))
        grid = _table(report.GRID_COLUMNS, (_line(line, left=1) for line in report.grid_cells(rows)))
        content = _table((), (_line(line, left=2) for line in lines)) + grid + figures.add(ratio_panel(rows))
        parts.append(_section("All cases", content, opened=True))
    for case, case_rows in cases.items():
        own = [timeline for timeline in timelines if timeline["case"] == case]
        parts.append(_section(case, _case(case_rows, own, figures), opened=len(cases) == 1))
    data = json.dumps(_finite(rows), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    parts.append(f'<script type="application/json" id="rows">{data}</script>')
    return page("sf-xfuser bench", "\n".join(parts))


def page(title: str, body: str, style: str = "") -> str:
    """An HTML page of its own, in the style of all reports and in ``style``."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


class _Figures:
    """Makes inline SVG with ids that are unique in the page."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, panel: Panel) -> str:
        self._count += 1
        text = io.StringIO()
        save([panel], text, "svg")
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
        svg = re.sub(r'( id="|url\(#|href="#)', rf"\1f{self._count}-", svg)
        return f"<figure>{svg}</figure>"


def _head(document: Mapping[str, Any]) -> str:
    version = document.get("versions", {}).get("sf_xfuser")
    facts = {"sf-xfuser": version, "commit": document.get("commit"), "created": document.get("created")}
    system = {**document.get("hardware", {}), **document.get("versions", {})}
    return (
        "<h1>sf-xfuser bench</h1>\n"
        f"<p>{_facts(facts)}</p>\n<pre>{escape(str(document.get('command') or report.DASH))}</pre>\n"
        + _section("Hardware and versions", _table((), (_line(pair, left=2) for pair in _pairs(system))), opened=False)
    )


def _case(rows: Sequence[Row], timelines: Sequence[Mapping[str, Any]], figures: _Figures) -> str:
    facts = {key: value for key, value in rows[0]["case"].items() if key != "id"}
    best = report.fastest_parallel(rows)
    body = [f"<p>{_facts(facts)}</p>", f"<p>{escape(report.bound_text(rows))}</p>"]
    body.append(_table(report.COLUMNS, (_variant(row, row is best) for row in rows)))
    body.append(figures.add(bars_panel(rows)))
    for timeline in timelines:
        title = f"Timeline of one call of {timeline['variant']}"
        body.append(_section(title, figures.add(timeline_panel(timeline)), opened=True))
    compared = (report.variant_row(rows, report.SUBJECT), report.usp_row(rows))
    for row in compared:
        if row is not None and report.succeeded(row) and len(row.get("wire_bytes") or ()) > 1:
            title = f"MB between machines, {row['variant']}"
            body.append(_section(title, _heat_table(row["wire_bytes"]), opened=False))
    return "\n".join(body)


def _variant(row: Row, best: bool) -> str:
    about = f"<small>{escape(row['description'])}</small>" if row.get("description") else ""
    variant = f"<td>{escape(row['variant'])}{about}</td>"
    if not report.succeeded(row):
        kind = "skipped" if row.get("status") == "skipped" else "skipped failed"
        span = len(report.COLUMNS) - 1
        return f'<tr class="{kind}">{variant}<td class="text" colspan="{span}">{escape(report.reason(row))}</td></tr>'
    named = zip(report.COLUMNS[1:], report.cells(row)[1:], strict=True)
    tags = (('<td class="text">' if name in report.TEXTS else "<td>", text) for name, text in named)
    rest = "".join(f"{tag}{escape(text)}</td>" for tag, text in tags)
    return f'<tr class="best">{variant}{rest}</tr>' if best else f"<tr>{variant}{rest}</tr>"


def _heat_table(matrix: Sequence[Sequence[Any]]) -> str:
    """MB from each machine (row) to each machine (column); more bytes have a stronger colour."""
    largest = max((report.finite(size) or 0.0 for line in matrix for size in line), default=0.0) or 1.0
    lines = []
    for machine, line in enumerate(matrix):
        row = [f"<th>from {machine}</th>"]
        for size in line:
            strength = 0.6 * (report.finite(size) or 0.0) / largest
            row.append(f'<td style="background: rgba(0, 114, 178, {strength:.2f})">{report.fmt(size, 1e-6)}</td>')
        lines.append(f"<tr>{''.join(row)}</tr>")
    return _table(["", *(f"to {machine}" for machine in range(len(matrix)))], lines)


def _section(title: str, content: str, opened: bool) -> str:
    return f"<details{' open' if opened else ''}>\n<summary>{escape(title)}</summary>\n{content}\n</details>"


def _table(columns: Sequence[str], lines: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _line(texts: Iterable[str], left: int) -> str:
    """A table row. The first ``left`` cells hold text, the others numbers."""
    text_cell = '<td class="text">'
    cells = (f"{text_cell if n < left else '<td>'}{escape(cell)}</td>" for n, cell in enumerate(texts))
    return f"<tr>{''.join(cells)}</tr>"


def _pairs(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and formatted values for the page."""
    pairs = []
    for key, value in facts.items():
        if key in _UNITS:
            name, scale, unit = _UNITS[key]
            pairs.append((name, report.fmt(value, scale, unit)))
        else:
            pairs.append((key.replace("_", " "), report.DASH if value is None or value == "" else str(value)))
    return pairs


def _facts(facts: Mapping[str, Any]) -> str:
    return escape(" · ".join(f"{name} {text}" for name, text in _pairs(facts)))


def _finite(value: Any) -> Any:
    """``value`` with None in place of NaN and infinity, which JSON cannot represent."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
