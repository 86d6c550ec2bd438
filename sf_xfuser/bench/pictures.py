"""Draws the pictures of README.md and docs/ from the schedules and the rows in docs/results. Usage: make pictures

``traffic.svg``: the messages between ranks. ``timeline.svg``: one measured call. ``speedups.svg``: torus against xDiT
and other packages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sf_xfuser.bench import comparison, report
from sf_xfuser.layout.chunking import CallSize, choose_chunking
from sf_xfuser.layout.plan import UNEVEN, Layout, make_plan
from sf_xfuser.layout.schedule import Exchange, build_schedule
from sf_xfuser.layout.usp_layouts import XditConfig, egress

ROOT = Path(__file__).parents[2]
ACROSS, INSIDE, COMPUTE, WAIT, TEXT = "#c8423b", "#8d99ae", "#2a6f97", "#e3e6ea", "#444444"
WIRE = {"Q": "#e9a23b", "KV": ACROSS, "O": "#5a9e7c"}
HEADS = 6  # not divisible by the four ranks, so the layout has a ring
TOKENS_PER_RANK = 16384
MACHINES = (2, 3, 4, 8)

Traffic = dict[tuple[int, int], list[tuple[str, float]]]
"""(sender, receiver) -> the chunks sent, in order: name of the tensor, size as a fraction of Q."""


def usp_traffic(config: XditConfig) -> Traffic:
    """One call of xDiT's USP on 2 x 2 ranks."""
    ulysses, rings = config.groups(2, 2)
    exchanged = [(tensor, 1 / (4 * config.ulysses_degree)) for tensor in "QKVO"]
    traffic: Traffic = {(a, b): exchanged for group in ulysses for a in group for b in group if a != b}
    hops = [pair for group in rings for pair in zip(group, (*group[1:], group[0]), strict=True)]
    return traffic | {hop: [(tensor, 1 / 4) for tensor in "KV"] for hop in hops}


def torus_traffic(layout: Layout) -> Traffic:
    """One call of Torus Attention: the messages in the schedule of each rank."""
    call_size = CallSize(q_tokens=TOKENS_PER_RANK, kv_tokens=TOKENS_PER_RANK, heads=HEADS, head_size=128, batch=1)
    cut = choose_chunking(layout, call_size, "cuda", "block")
    share = 1 / (layout.world_size * layout.ulysses_degree)
    traffic: Traffic = {}
    for rank in range(layout.world_size):
        for step in build_schedule(layout, rank, chunking=cut).steps:
            for message in step.sends if isinstance(step, Exchange) else ():
                size = sum(1 / piece.parts for piece in message.pieces) * share * len(message.tensor)  # K and V: twice
                traffic.setdefault((rank, message.peer), []).append((message.tensor.upper(), size))
    return traffic


def draw_traffic(figure: Any, results: Path) -> None:
    usp = XditConfig(ulysses_degree=2, ring_degree=2)
    mapped = XditConfig(ulysses_degree=2, ring_degree=2, placement="machines-first")
    torus = make_plan(2, 2, heads=HEADS, max_imbalance=UNEVEN).layout
    grid = figure.add_gridspec(2, 3, height_ratios=(1.7, 1))
    for column, (title, subtitle, traffic) in enumerate(
        (
            ("xDiT's USP", "Ulysses inside machines, Ring across", usp_traffic(usp)),
            ("Topology-aware", "Ulysses across machines, Ring inside", usp_traffic(mapped)),
            ("Torus Attention", "in chunks, hidden behind attention", torus_traffic(torus)),
        )
    ):
        axes = figure.add_subplot(grid[0, column])
        axes.set(xlim=(-0.8, 2.8), ylim=(-0.75, 1.9))
        axes.axis("off")
        axes.set_title(title, fontweight="bold", fontsize=15)
        axes.text(1, 1.87, subtitle, ha="center", va="top", fontsize=11, color=TEXT)
        _draw_ranks(axes, traffic)
    layouts = [make_plan(n, 2, heads=24, max_imbalance=UNEVEN).layout for n in MACHINES]
    axes = figure.add_subplot(grid[1, :])
    for shift, label, color, values in (
        (-0.18, "xDiT's USP", INSIDE, [egress(XditConfig(ulysses_degree=2, ring_degree=n), n, 2) for n in MACHINES]),
        (0.18, "topology-aware, Torus Attention", ACROSS, [float(layout.egress()) for layout in layouts]),
    ):
        bars = axes.bar([x + shift for x in range(len(MACHINES))], values, 0.34, label=label, color=color)
        axes.bar_label(bars, fmt="%.2f", fontsize=11, padding=2)
    axes.set_xticks(range(len(MACHINES)), [f"{n} machines" for n in MACHINES], fontsize=12)
    axes.set(ylim=(0, 2.1), yticks=[])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title("Bytes out of each machine per attention call (1 = all of Q)", fontsize=13, fontweight="bold")
    axes.legend(loc="upper left", frameon=False, fontsize=11)


def _draw_ranks(axes: Any, traffic: Traffic) -> None:
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    for machine in (0, 1):
        box = FancyBboxPatch((machine * 2 - 0.4, -0.4), 0.8, 1.8, boxstyle="round,pad=0.05", fc="#f3f4f6", ec="#c5cad3")
        axes.add_patch(box)
        axes.text(machine * 2, -0.62, f"machine {machine}", ha="center", va="center", fontsize=11, color=TEXT)
    for (sender, receiver), sent in traffic.items():
        start, end = ((rank // 2 * 2, 1 - rank % 2) for rank in (sender, receiver))
        across = start[0] != end[0]
        style = f"arc3,rad={-0.25 if across else -0.4}"
        width, color = (2.4, ACROSS) if across else (1.6, INSIDE)
        axes.add_patch(
            FancyArrowPatch(
                start, end, connectionstyle=style, arrowstyle="-|>", mutation_scale=14, lw=width, color=color,
                shrinkA=16, shrinkB=16,
            )
        )  # fmt: skip
        if across and sender < receiver:
            _draw_chunks(axes, sent, start[1])
        elif sender < receiver:
            x, side = (-0.5, "right") if start[0] == 0 else (2.5, "left")
            axes.text(
                x,
                0.5,
                "\n".join(dict.fromkeys(tensor for tensor, _ in sent)),
                ha=side,
                va="center",
                fontsize=11,
                color="#5b6577",
            )
    for rank in range(4):
        circle = {"boxstyle": "circle,pad=0.3", "fc": COMPUTE, "ec": "none"}
        at = (rank // 2 * 2, 1 - rank % 2)
        axes.text(*at, f"GPU {rank}", ha="center", va="center", fontsize=8.5, color="white", weight="bold", bbox=circle)


def _draw_chunks(axes: Any, sent: list[tuple[str, float]], y: float) -> None:
    from matplotlib.patches import Rectangle

    left, scale = 0.43, 1.14 / sum(size for _, size in sent)
    for tensor, size in sent:
        color, width = WIRE.get(tensor, WIRE["KV"]), size * scale
        axes.add_patch(Rectangle((left, y - 0.1), width, 0.2, fc=color, ec="white", lw=1.5, zorder=3))
        fontsize = 10 if size > 0.1 else 6
        where = {"ha": "center", "va": "center", "zorder": 4}
        axes.text(left + width / 2, y, tensor, fontsize=fontsize, weight="bold", color="white", **where)
        left += width


def draw_timeline(figure: Any, results: Path) -> None:
    document = json.loads((results / "emulated-2core-timeline.json").read_text())
    timelines = {timeline["variant"]: timeline for timeline in document["timelines"]}
    usp = report.usp_row(document["rows"])
    assert usp is not None
    draw_timelines(figure, timelines[usp["variant"]], timelines["torus"])


def draw_timelines(figure: Any, usp: Mapping[str, Any], torus: Mapping[str, Any]) -> None:
    """One measured call of each, on the same scale."""
    shown = {
        "xDiT's USP waits for its collectives": usp,
        "Torus Attention attends while chunks arrive": torus,
    }
    longest = max(timeline["duration_s"] for timeline in shown.values())
    for axes, (title, timeline) in zip(
        figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.55)), shown.items(), strict=True
    ):
        labels, y = {}, 0.0
        for rank in timeline["ranks"]:
            spans = [span for span in rank["spans"] if span["end_s"] > span["start_s"]]
            axes.broken_barh([(0, timeline["duration_s"])], (y, 0.7), color=WAIT)
            axes.broken_barh(_bars(spans, "compute"), (y, 0.7), color=COMPUTE)
            labels[y + 0.35] = f"rank {rank['rank']} (machine {rank['machine']})"
            y += 0.75
            arrived = 0.0
            for span in sorted((s for s in spans if s["link"] == "across"), key=lambda s: float(s["end_s"])):
                start = max(arrived, span["start_s"])
                tensor = span["name"].split()[0].upper()
                arrived = span["end_s"]
                axes.broken_barh([(start, arrived - start)], (y, 0.35), color=WIRE[tensor], ec="white", lw=1.2)
                axes.text((start + arrived) / 2, y + 0.17, tensor, ha="center", va="center", fontsize=8, color="white")
            y += 0.55 if arrived else 0.15
        axes.set_yticks(list(labels), list(labels.values()), fontsize=10)
        axes.set(ylim=(y, -0.1), xlim=(0, longest))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
        axes.set_title(f"{title}: {timeline['duration_s'] * 1e3:.0f} ms", loc="left", fontsize=14, fontweight="bold")
    ticks = [n / 10 for n in range(0, int(longest * 10) + 1, 2)]
    axes.set_xticks(ticks, [f"{tick * 1e3:.0f} ms" for tick in ticks], fontsize=10)
    from matplotlib.patches import Patch

    legend = {"attention": COMPUTE, "waiting": WAIT} | {f"{x} from another machine": WIRE[x] for x in WIRE}
    handles = [Patch(color=color, label=label) for label, color in legend.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=10)


def _bars(spans: list[Mapping[str, Any]], link: str) -> list[tuple[float, float]]:
    return [(span["start_s"], span["end_s"] - span["start_s"]) for span in spans if span["link"] == link]


def draw_speedups(figure: Any, results: Path) -> None:
    rows = json.loads((results / "emulated-2core-peers.json").read_text())["rows"]
    ratios = comparison.ratios(rows)
    cases = {case: of_case[0]["case"] for case, of_case in report.by_case(rows).items() if case in ratios}
    labels = [
        f"{case['cluster']}, {case['inter_rate_bps'] / 1e6:.0f} Mbit/s, {case['seq_len']} tokens, {case['heads']} heads"
        for case in cases.values()
    ]
    columns = list(comparison.opponents(rows))
    for axes, column in zip(figure.subplots(1, len(columns), sharey=True, sharex=True), columns, strict=True):
        values = [ratios[case][column] for case in cases]
        colors = [COMPUTE if (ratio or 0) >= 1.05 else INSIDE for ratio in values]
        bars = axes.barh(labels, [ratio or 0 for ratio in values], color=colors)
        texts = [comparison.CANNOT if ratio is None else report.fmt_ratio(ratio) for ratio in values]
        axes.bar_label(bars, texts, padding=3, fontsize=9, color=TEXT, bbox={"fc": "white", "ec": "none", "pad": 1})
        axes.axvline(1, color=TEXT, lw=1, ls="--")
        axes.set(xlim=(0, 3.2), xticks=[0, 1, 2])
        axes.set_xticklabels(["0", "1", "2x"], fontsize=10)
        axes.tick_params(left=False, labelsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(column, fontsize=12, fontweight="bold")
    axes.invert_yaxis()
    figure.suptitle("Speed-up of Torus Attention over the fastest variant of each (emulated cluster, 2 CPU cores)")


PICTURES: dict[str, tuple[Callable[[Any, Path], None], tuple[float, float]]] = {
    "traffic": (draw_traffic, (11, 6.4)),
    "timeline": (draw_timeline, (11, 6.4)),
    "speedups": (draw_speedups, (12, 5.2)),
}


def draw_all(folder: Path, results: Path = ROOT / "docs/results", suffix: str = "svg") -> list[Path]:
    """Write each picture into ``folder``. A white background keeps it readable on dark pages."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context({"svg.hashsalt": "sf-xfuser", "font.family": "DejaVu Sans"}):
        for name, (draw, size) in PICTURES.items():
            figure = pyplot.figure(figsize=size, layout="constrained")
            draw(figure, results)
            paths.append(folder / f"{name}.{suffix}")
            figure.savefig(paths[-1], metadata={"Date": None} if suffix == "svg" else None)
            pyplot.close(figure)
    return paths


if __name__ == "__main__":
    print(*draw_all(ROOT / "docs/images"), sep="\n")
