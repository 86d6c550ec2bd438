"""The results of ``make demo``: figures, sentences, a table, and an HTML page without scripts or external files."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from sf_xfuser.bench.demo import SINGLE, TORUS, ULYSSES, USP, picture_name
from sf_xfuser.bench.document import new_document
from sf_xfuser.bench.page import page
from sf_xfuser.bench.pictures import draw_timelines

_COLUMNS = (
    "attention", "seconds\nper step", "torus is\nfaster by", "MB sent by\na machine", "peak MB\nof a rank",
    "max diff.\n(1 = white)",
)  # fmt: skip
_PICTURE_PX = 320
_PAGE_STYLE = """
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
.pictures figure { background: none; padding: 0; }
img { max-width: 100%; border-radius: 6px; }
th { white-space: pre-line; }
"""


def figures(results: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
    """The content of figures.json, from the results of the ranks. ``reason``: why no cluster was emulated, if so; there
    are no speed-ups then."""
    rows = [{**row, "median_s": statistics.median(row["times_s"])} for row in results["rows"]]
    seconds = {row["variant"]: row["median_s"] for row in rows}
    for row in rows:
        comparable = reason is None and row["variant"] not in (SINGLE, TORUS)
        row["speedup_of_torus"] = row["median_s"] / seconds[TORUS] if comparable else None
    document = {key: value for key, value in new_document("demo").items() if key not in ("rows", "timelines")}
    return {
        **document,
        "speedup_over_usp": next(row["speedup_of_torus"] for row in rows if row["variant"] == USP),
        "max_abs_difference": max(row["max_abs_difference"] for row in rows),
        "emulated": reason is None,
        "reason": reason,
        "wire_to_compute": results["wire_to_compute"],
        "rows": rows,
    }


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What was shown, how the links were chosen, and what was not shown."""
    rows = {row["variant"]: row for row in found["rows"]}
    equal = f"all pictures equal that of one process up to {found['max_abs_difference']:.0e} (1 is white)"
    not_shown = (
        "Not shown: GPUs, NCCL, links inside a machine, latency, a trained model (the weights of the default model are "
        "random, so its pictures are noise)"
    )
    if found["reason"] is not None:
        return [
            f"Shown: xDiT's Flux pipeline ran on four ranks of this host, and {equal}.",
            f"The times mean nothing, because the ranks share one host without links: {found['reason']}.",
            f"{not_shown}, and any speed-up.",
        ]
    matched = found["wire_to_compute"]
    faster = [f"{rows[name]['speedup_of_torus']:.2f}x over {name}" for name in (USP, ULYSSES) if name in rows]
    return [
        f"Shown: on four emulated machines (network namespaces, real sockets, {matched['rate_bps'] / 1e6:.0f} Mbit/s "
        f"each), the speed-up of a denoising step by torus is {' and '.join(faster)}, and {equal}.",
        f"The rate was chosen such that a call of torus needs {matched['target']:.2f} times as long on the wire as in "
        "attention, as the simulator computes for Flux at 4096 px on 4 machines x 8 H100 with 400 Gbit/s each; here "
        f"it was {matched['measured']:.2f} while the steps were timed.",
        f"{not_shown}, and a gain over one process, as the four machines share {found['hardware']['cores']} cores; "
        "32 GPUs cannot run flat Ulysses, because they do not divide Flux's 24 heads.",
    ]


def table(found: Mapping[str, Any]) -> Table:
    columns = (Column(name, justify="left" if n == 0 else "right") for n, name in enumerate(_COLUMNS))
    shown = Table(*columns)
    for row in found["rows"]:
        shown.add_row(*_cells(row))
    return shown


def _cells(row: Mapping[str, Any]) -> list[str]:
    def number(key: str, text: str, scale: float = 1.0) -> str:
        return text.format(row[key] * scale) if row[key] else "-"

    return [
        row["variant"],
        f"{row['median_s']:.3f}",
        number("speedup_of_torus", "{:.2f}x"),
        number("bytes_between_machines", "{:.1f}", 1e-6),
        number("peak_bytes", "{:.0f}", 1e-6),
        f"{row['max_abs_difference']:.0e}" if row["variant"] != SINGLE else "-",
    ]


def draw_timeline(timelines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One attention call of USP and one of torus, on one time axis."""
    from matplotlib.figure import Figure

    by_name = {timeline["variant"]: timeline for timeline in timelines}
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    draw_timelines(figure, by_name[USP], by_name[TORUS])
    figure.savefig(path, dpi=110)


def html(found: Mapping[str, Any], title: str, folder: Path) -> str:
    """The page. ``folder`` has the pictures of the variants and timeline.png."""
    head = "".join(f"<th>{escape(name)}</th>" for name in _COLUMNS)
    lines = ""
    for row in found["rows"]:
        kind = ' class="best"' if row["variant"] == TORUS else ""
        first, *rest = _cells(row)
        layout = f"<small>{escape(row['layout'])}</small>"
        lines += f"<tr{kind}><td>{escape(first)}{layout}</td>" + "".join(f"<td>{x}</td>" for x in rest) + "</tr>\n"
    pictures = "".join(
        f'<figure><img alt="" src="{_thumbnail(folder / picture_name(row["variant"]))}">'
        f"<figcaption>{escape(row['variant'])}</figcaption></figure>\n"
        for row in found["rows"]
    )
    timeline = base64.b64encode((folder / "timeline.png").read_bytes()).decode()
    facts = {**found["hardware"], **found["versions"], "created": found["created"], "commit": found["commit"]}
    body = (
        f"<h1>sf-xfuser demo</h1>\n<p>{escape(title)}</p>\n"
        + "".join(f"<p>{escape(text)}</p>\n" for text in sentences(found))
        + f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>\n'
        + f'<figure><img alt="Timelines of USP and torus" src="data:image/png;base64,{timeline}"></figure>\n'
        + f'<div class="pictures">{pictures}</div>\n'
        + f"<p><small>{escape(' · '.join(f'{name} {value}' for name, value in facts.items() if value))}</small></p>"
    )
    return page("sf-xfuser demo", body, _PAGE_STYLE)


def _thumbnail(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as picture:
        picture.thumbnail((_PICTURE_PX, _PICTURE_PX))
        encoded = io.BytesIO()
        picture.convert("RGB").save(encoded, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"
