"""Plots of a ranking: time of an attention call over machines, link speed and length. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from os import PathLike
from typing import TYPE_CHECKING

from sf_xfuser.bench.page import Panel, save, set_title
from sf_xfuser.bench.progress import Progress
from sf_xfuser.layout.plan import paper_layout
from sf_xfuser.simulator import CallShape, TorusVariant, predict
from sf_xfuser.simulator.cluster import Cluster
from sf_xfuser.simulator.planner import PATTERN_OF, Ranking, rank

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour, line width and style. The best of each kind is drawn first and wide, so that a line that equals it shows.
_LINES = {
    "torus, best layout": ("#0072B2", 4.0, "-"),
    "xDiT's best": ("#D55E00", 4.0, "-"),
    "torus, paper's rule": ("#9AD5F5", 1.5, "--"),
    "xDiT's USP": ("#F5C542", 1.5, "--"),
}
_MACHINES = (1, 2, 3, 4, 6, 8, 12, 16)
_FACTORS = tuple(2.0 ** (n / 2) for n in range(-6, 7))


@dataclass(frozen=True, slots=True)
class Sweep:
    """``seconds[line][n]``: time at ``at[n]``; None without a legal layout. ``requested``: the value of the ranking."""

    label: str
    at: tuple[float, ...]
    requested: float
    seconds: dict[str, list[float | None]]


def plot(ranking: Ranking, transport: str, title: str, path: str | PathLike[str]) -> None:
    """Write three panels that mark where torus and xDiT are equally fast. The suffix selects the file type."""
    with Progress("sf-xfuser plan") as progress:
        panels = [
            _panel(sweep, title if n == 0 else "") for n, sweep in enumerate(sweeps(ranking, transport, progress))
        ]
    save(panels, path)


def sweeps(ranking: Ranking, transport: str, progress: Progress) -> list[Sweep]:
    """One sweep per panel."""
    cluster, shape = ranking.cluster, ranking.shape
    n, m = cluster.num_machines, cluster.ranks_per_machine
    rate = cluster.across.machine_gbps or cluster.across.rank_gbps

    def swept(label: str, at: Sequence[float], base: float, of: Callable[[float], tuple[Cluster, CallShape]]) -> Sweep:
        times = []
        for x in at:
            progress.doing(f"ranking the layouts for {x:,g} {label}")
            times.append(_lines(*of(x), transport))
            progress.advance()
        return Sweep(label, tuple(at), base, {line: [seconds[line] for seconds in times] for line in _LINES})

    machines = [x for x in sorted({*_MACHINES, n}) if x * m <= shape.seq_len]
    lengths = [x for x in (round(shape.seq_len * f) for f in _FACTORS) if x >= cluster.world_size]
    progress.total = len(machines) + len(_FACTORS) + len(lengths)
    unit = "out of a machine" if cluster.across.machine_gbps else "out of a rank"
    return [
        swept("machines", machines, n, lambda x: (cluster.with_size(int(x), m), shape)),
        swept(f"Gbit/s {unit}", [rate * f for f in _FACTORS], rate, lambda x: (_at_rate(cluster, x), shape)),
        swept("tokens", lengths, shape.seq_len, lambda x: (cluster, replace(shape, seq_len=int(x)))),
    ]


def _at_rate(cluster: Cluster, gbps: float) -> Cluster:
    if cluster.across.machine_gbps:
        return cluster.with_rates(across_gbps=gbps)
    return replace(cluster, across=replace(cluster.across, rank_gbps=gbps))


def _lines(cluster: Cluster, shape: CallShape, transport: str) -> dict[str, float | None]:
    ranking = rank(cluster, shape, transport=transport)
    timed = [(ranked.name, ranked.predicted.seconds) for ranked in ranking.layouts if ranked.predicted is not None]
    paper = paper_layout(cluster.num_machines, cluster.ranks_per_machine, gcd(shape.heads, shape.kv_heads))

    paper_variant = TorusVariant(layout=paper, pattern=PATTERN_OF[transport])

    def fastest(matches: Callable[[str], bool]) -> float | None:
        return min((seconds for name, seconds in timed if matches(name)), default=None)

    return {
        "torus, best layout": fastest(lambda name: name == "torus"),
        "torus, paper's rule": predict(cluster, shape, paper_variant).seconds,
        "xDiT's USP": fastest(lambda name: name.startswith("usp-")),
        "xDiT's best": fastest(lambda name: name != "torus"),
    }


def crossings(sweep: Sweep) -> list[tuple[float, float]]:
    """(at, seconds) where torus's best layout and xDiT's best are equally fast, interpolated in logarithms. Pure."""
    points = []
    ours, theirs = sweep.seconds["torus, best layout"], sweep.seconds["xDiT's best"]
    for n in range(1, len(sweep.at)):
        ends = ours[n - 1], theirs[n - 1], ours[n], theirs[n]
        if any(x is None for x in ends):
            continue
        a, b, c, d = (math.log(x) for x in ends if x is not None)
        if (a - b) * (c - d) < 0:
            part = (a - b) / (a - b - (c - d))
            low, high = math.log(sweep.at[n - 1]), math.log(sweep.at[n])
            points.append((math.exp(low + part * (high - low)), math.exp(a + part * (c - a))))
    return points


def _panel(sweep: Sweep, title: str) -> Panel:
    def draw(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        for line, (colour, width, style) in _LINES.items():
            known = [(x, y * 1e3) for x, y in zip(sweep.at, sweep.seconds[line], strict=True) if y is not None]
            if known:
                axes.plot(*zip(*known, strict=True), style, marker=".", color=colour, linewidth=width, label=line)
        axes.axvline(sweep.requested, color="#A0A0A0", linewidth=1, linestyle=":", label="requested")
        for at, seconds in crossings(sweep):
            axes.plot(at, seconds * 1e3, "o", color="#202020", fillstyle="none")
            axes.annotate(f"{at:,.3g}", (at, seconds * 1e3), xytext=(6, 6), textcoords="offset points", fontsize=8)
        set_title(axes, f"{title}\n" * bool(title) + f"Time of an attention call over {sweep.label}")
        axes.set(xscale="log", yscale="log", xlabel=sweep.label, ylabel="ms per attention call")
        for axis in (axes.xaxis, axes.yaxis):  # plain numbers, not powers of ten
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        ticks = sweep.at[:: 1 if len(sweep.at) < 10 else 2]
        axes.set_xticks([*ticks], [f"{at:,.3g}" if at < 1000 else f"{at:,.0f}" for at in ticks])
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
        axes.grid(alpha=0.3, which="both")

    return Panel(3.2, draw)
