"""``sf-xfuser plan`` and ``sf-xfuser simulate``. Without PyTorch."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from sf_xfuser.bench import report
from sf_xfuser.files import read_json
from sf_xfuser.layout.plan import UNEVEN, make_plan
from sf_xfuser.layout.usp_layouts import XditConfig
from sf_xfuser.simulator import ITEMSIZE, CallShape, TorusVariant, predict
from sf_xfuser.simulator.cluster import Cluster
from sf_xfuser.simulator.models import MODELS, find_model
from sf_xfuser.simulator.planner import PATTERN_OF, RankedLayout, Ranking, rank
from sf_xfuser.simulator.presets import PRESETS, preset

_WIDTH = 170  # of tables that no terminal shows
_MEASURED, _PREDICTED = "measured", "predicted"


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``sf-xfuser plan``."""
    _add_what(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--json", metavar="FILE", help="everything as JSON; - for standard output instead of the table")
    out.add_argument("--plot", metavar="FILE", help="time against machines, link speed and length (png, svg, pdf)")


def add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``sf-xfuser simulate``."""
    _add_what(parser)
    what = parser.add_argument_group("which way")
    what.add_argument("--sp-plan", default="best", metavar="PLAN", help="best (what plan takes), auto, paper, "
                      "torus=T,ulysses=U,ring=R, or ulysses=U,ring=R for xDiT's USP. Default: best")  # fmt: skip
    what.add_argument("--no-overlap", action="store_true", help="torus, each transfer waited for at once")
    what.add_argument("--measured", metavar="FILE", help="a trace or document of sf-xfuser bench (--trace, --json), to "
                      "lay beside the prediction")  # fmt: skip
    what.add_argument(
        "--measured-variant", default=report.SUBJECT, metavar="VARIANT", help="whose timeline. Default: torus"
    )
    out = parser.add_argument_group("output")
    out.add_argument("--json", metavar="FILE", help="the timelines as JSON; - for standard output")
    out.add_argument("--plot", metavar="FILE", help="the timelines as a picture (png, svg, pdf)")
    out.add_argument("--trace", metavar="FILE", help="the timelines as a Chrome trace, for Perfetto")


def _add_what(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("cluster")
    where.add_argument("--machines", type=int, help="Default: the preset's")
    where.add_argument("--gpus-per-machine", type=int, metavar="M", help="Default: the preset's")
    where.add_argument("--preset", metavar="NAME", help=f"{', '.join(PRESETS)}. Default: p4de")
    where.add_argument("--cluster-file", metavar="FILE", help="a cluster as JSON instead (plan --json writes one)")
    where.add_argument("--across-gbps", type=float, metavar="GBIT", help="what a machine can send, instead")
    where.add_argument("--inside-gbps", type=float, metavar="GBIT", help="what a GPU can send in its machine, instead")
    where.add_argument("--transport", choices=tuple(PATTERN_OF), default="two_sided", help="what moves torus' chunks: "
                       "NCCL's sends and receives, or one-sided puts (nvshmem). Default: two_sided")  # fmt: skip
    what = parser.add_argument_group("model")
    what.add_argument("--model", metavar="NAME", help=f"{', '.join(MODELS)}, or a transformer's config.json")
    what.add_argument("--height", type=int, help="of the picture, in pixels")
    what.add_argument("--width", type=int, help="of the picture, in pixels")
    what.add_argument("--frames", type=int, help="of a video")
    what.add_argument("--heads", type=int, help="query heads, where no model is given")
    what.add_argument("--kv-heads", type=int, help="key heads. Default: as many")
    what.add_argument("--head-dim", type=int)
    what.add_argument("--seq-len", type=int, metavar="L", help="tokens of all ranks")
    what.add_argument("--batch", type=int, help="sequences of a call. Default: the model's, or 1")
    what.add_argument("--dtype", choices=tuple(ITEMSIZE), default="bfloat16", help="Default: bfloat16")


def plan_command(options: argparse.Namespace) -> int:
    """Rank and show. 2: the request makes no sense."""
    try:
        report.require_files(options, "json", "plot")
        cluster, shape, calls = _asked(options)
        started_s = time.perf_counter()
        ranking = rank(cluster, shape, calls=calls, transport=options.transport)
        took_s = time.perf_counter() - started_s
        if options.plot:
            from sf_xfuser.bench import plan_page

            plan_page.plot(ranking, options.transport, options.plot)
    except (ValueError, RuntimeError) as error:
        print(f"sf-xfuser plan: {error}", file=sys.stderr)
        return 2
    if not report.write_json(options.json, ranking.to_json(), indent=1):
        _show(ranking, took_s)
    return 0


def simulate_command(options: argparse.Namespace) -> int:
    """Replay every rank and show. 2: the request makes no sense."""
    try:
        report.require_files(options, "json", "plot", "trace")
        cluster, shape, _ = _asked(options)
        variant = _variant(options, cluster, shape)
        timelines = [_timeline(cluster, shape, variant)]
        if options.measured:
            timelines.insert(0, _measured(options.measured, options.measured_variant, cluster))
        if options.plot:
            from sf_xfuser.bench import page

            panels = [page.timeline_panel(_overlaid(*timelines) if options.measured else timelines[0])]
            page.save(panels, options.plot)
    except (ValueError, RuntimeError) as error:
        print(f"sf-xfuser simulate: {error}", file=sys.stderr)
        return 2
    document = {"rows": [], "timelines": timelines}
    if options.trace:
        Path(options.trace).write_text(json.dumps(report.chrome_trace(document)))
    if report.write_json(options.json, document):
        return 0
    for timeline in timelines:
        spans = [span for found in timeline["ranks"] for span in found["spans"]]
        computed = sum(s["end_s"] - s["start_s"] for s in spans if s["link"] == "compute") / len(timeline["ranks"])
        said = f"{timeline['duration_s'] * 1e3:.2f} ms, of which a rank computes {computed * 1e3:.2f} ms on average"
        print(f"{timeline['variant']}, {timeline['case']}: {said}")
    return 0


# -- what was asked ---------------------------------------------------------------------------------------------------


def _asked(options: argparse.Namespace) -> tuple[Cluster, CallShape, int]:
    if options.preset and options.cluster_file:
        raise ValueError("give --preset or --cluster-file, not both")
    known = Cluster.load(options.cluster_file) if options.cluster_file else preset(options.preset or "p4de")
    given = {"--machines": options.machines, "--gpus-per-machine": options.gpus_per_machine}
    for name, number in given.items():
        if number is not None and not 1 <= number <= 4096:
            raise ValueError(f"{name} must be 1 to 4096, got {number}")
    cluster = known.with_size(
        options.machines or known.num_machines, options.gpus_per_machine or known.ranks_per_machine
    ).with_rates(across_gbps=options.across_gbps, inside_gbps=options.inside_gbps)
    shape, calls = _shape(options, cluster.world_size)
    return cluster, replace(shape, batch=shape.batch if options.batch is None else options.batch), calls


def _shape(options: argparse.Namespace, world_size: int) -> tuple[CallShape, int]:
    by_hand = {name: getattr(options, name) for name in ("heads", "head_dim", "seq_len")}
    missing = [f"--{name.replace('_', '-')}" for name, value in by_hand.items() if value is None]
    if options.model is None:
        if missing:
            raise ValueError(f"give --model with --height and --width, or {' and '.join(missing)}")
        kv_heads = options.heads if options.kv_heads is None else options.kv_heads
        return CallShape(**by_hand, kv_heads=kv_heads, dtype=options.dtype), 1
    if len(missing) < len(by_hand) or options.kv_heads is not None:
        raise ValueError("--model knows its heads and tokens: leave --heads, --kv-heads, --head-dim, --seq-len out")
    model = find_model(options.model)
    if options.height is None or options.width is None:
        raise ValueError(f"--model {model.name} needs --height and --width")
    return model.call(world_size, options.height, options.width, options.frames, options.dtype), model.calls


def _variant(options: argparse.Namespace, cluster: Cluster, shape: CallShape) -> TorusVariant | XditConfig:
    pattern, overlap = PATTERN_OF[options.transport], not options.no_overlap
    text = options.sp_plan
    usp = re.fullmatch(r"ulysses=(\d+),ring=(\d+)", text)
    if usp:
        config = XditConfig(ulysses_degree=int(usp[1]), ring_degree=int(usp[2]))
        if shape.heads % config.ulysses_degree or shape.kv_heads % config.ulysses_degree:
            raise ValueError(f"{shape.heads} heads do not split ulysses={config.ulysses_degree} ways")
        config.groups(cluster.num_machines, cluster.ranks_per_machine)  # raises where the product is wrong
        return config
    planned = partial(
        make_plan,
        cluster.num_machines,
        cluster.ranks_per_machine,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        max_imbalance=UNEVEN,
    )
    if text == "best":
        ranked = rank(cluster, shape, transport=options.transport)
        best = next(c for c in ranked.layouts if c.name == report.SUBJECT)
        text = re.search(r"torus=\S+", best.flags)[0]  # type: ignore[index]
    explicit = re.fullmatch(r"torus=(\d+),ulysses=(\d+),ring=(\d+)", text)
    if explicit:
        degrees = dict(zip(("torus", "ulysses", "ring"), map(int, explicit.groups()), strict=True))
        return TorusVariant(layout=planned(explicit=degrees).layout, pattern=pattern, overlap=overlap)
    if text not in ("auto", "paper"):
        raise ValueError(
            f"--sp-plan must be best, auto, paper, torus=T,ulysses=U,ring=R or ulysses=U,ring=R, got {text!r}"
        )
    return TorusVariant(layout=planned(rule=text).layout, pattern=pattern, overlap=overlap)


def _timeline(cluster: Cluster, shape: CallShape, variant: TorusVariant | XditConfig) -> dict[str, Any]:
    predicted = predict(cluster, shape, variant, every_rank=True)
    assert predicted.timeline is not None
    grid = f"{cluster.num_machines}x{cluster.ranks_per_machine}"
    kv = "" if shape.kv_heads == shape.heads else f"/{shape.kv_heads}"
    case = f"{cluster.name} {grid} L{shape.seq_len} H{shape.heads}{kv} D{shape.head_dim} {shape.dtype}"
    return {"case": case, "variant": f"{_PREDICTED} {variant}", **predicted.timeline}


# -- a measured timeline beside it ------------------------------------------------------------------------------------


def _measured(path: str, variant: str, cluster: Cluster) -> dict[str, Any]:
    """The first timeline of ``variant`` in a bench document or Chrome trace, renamed. Raises ValueError."""
    try:
        document = read_json(path)
    except OSError as error:
        raise ValueError(f"--measured {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--measured {path} is not JSON: {error}") from None
    try:
        found = _from_trace(document["traceEvents"]) if "traceEvents" in document else document["timelines"]
        mine = [timeline for timeline in found if timeline["variant"] == variant]
        ranks = mine[0]["ranks"] if mine else []
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"--measured {path} is no trace or document of sf-xfuser bench ({error!r})") from None
    if not mine:
        variants = ", ".join(sorted({str(timeline["variant"]) for timeline in found})) or "no timeline at all"
        raise ValueError(f"--measured {path} has no timeline of {variant}; it has {variants}")
    if len(ranks) != cluster.world_size:
        raise ValueError(f"--measured {path} has {len(ranks)} ranks, the cluster {cluster.world_size}")
    return {**mine[0], "variant": f"{_MEASURED} {variant}"}


def _from_trace(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Timelines from the events that ``report.chrome_trace`` writes."""
    names = {(e["name"], e["pid"], e["tid"] if e["name"] == "thread_name" else 0): e["args"].get("name") for e in events
             if e["ph"] == "M"}  # fmt: skip
    timelines: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events:
        if event["ph"] != "X":
            continue
        variant, machine, case = re.fullmatch(
            r"(.*) machine (\d+): (.*)", names["process_name", event["pid"], 0]
        ).groups()  # type: ignore[union-attr]
        number = int(re.match(r"rank (\d+) ", names["thread_name", event["pid"], event["tid"]])[1])  # type: ignore[index]
        timeline = timelines.setdefault(
            (variant, case), {"case": case, "variant": variant, "duration_s": 0.0, "ranks": {}}
        )
        mine = timeline["ranks"].setdefault(number, {"rank": number, "machine": int(machine), "spans": []})
        start, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
        span = {"link": event["cat"], "name": event["name"], "start_s": start, "end_s": end}
        mine["spans"].append({**span, "bytes": event["args"].get("bytes", 0)})
        timeline["duration_s"] = max(timeline["duration_s"], end)
    return [{**t, "ranks": [t["ranks"][n] for n in sorted(t["ranks"])]} for t in timelines.values()]


def _overlaid(measured: Mapping[str, Any], predicted: Mapping[str, Any]) -> dict[str, Any]:
    """One timeline in which each rank's measured lines stand above its predicted ones."""
    width = len(str(len(predicted["ranks"]) - 1))
    ranks = [
        {**found, "rank": f"{found['rank']:0{width}} {word}"}
        for timeline, word in ((measured, _MEASURED), (predicted, _PREDICTED))
        for found in timeline["ranks"]
    ]
    longest = max(measured["duration_s"], predicted["duration_s"])
    return {"case": measured["case"], "variant": f"{measured['variant']} and {predicted['variant']}", "duration_s": longest,
            "ranks": ranks}  # fmt: skip


# -- showing it -------------------------------------------------------------------------------------------------------


def _show(ranking: Ranking, took_s: float) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    cluster, shape = ranking.cluster, ranking.shape
    kv = "" if shape.kv_heads == shape.heads else f" ({shape.kv_heads} of KV)"
    joint = f" and {shape.joint_tokens} text tokens on every rank" if shape.joint_tokens else ""
    title = (
        f"{cluster.name}, {cluster.num_machines} machines x {cluster.ranks_per_machine}: {shape.seq_len} tokens{joint}"
        f", {shape.heads} heads{kv} of {shape.head_dim}, batch {shape.batch}, {shape.dtype}"
    )
    right = ("ms a call", "ms a step", "MB out of a machine", "MB held")
    columns = [Column("way"), Column("layout"), *(Column(name, justify="right") for name in right), Column("why")]
    table = Table(*columns, title=title, caption=_caption(ranking), pad_edge=False)
    for candidate in ranking.layouts:
        style = "bold green" if candidate is ranking.best else "dim" if candidate.bound_s is None else ""
        table.add_row(*_cells(candidate, ranking.calls), style=style)
    console.print(table)
    replayed = sum(candidate.predicted is not None for candidate in ranking.layouts)
    legal = sum(candidate.bound_s is not None for candidate in ranking.layouts)
    console.print(f"ranked in {took_s * 1e3:.0f} ms, {replayed} of {legal} replayed", highlight=False)
    console.print(f"launch with: {ranking.best.flags}", highlight=False)


def _cells(candidate: RankedLayout, calls: int) -> list[str]:
    predicted = candidate.predicted
    if predicted is not None:
        seconds, step = f"{predicted.seconds * 1e3:.2f}", f"{predicted.seconds * calls * 1e3:.1f}"
    elif candidate.bound_s is not None:
        seconds, step = f">{candidate.bound_s * 1e3:.2f}", f">{candidate.bound_s * calls * 1e3:.1f}"
    else:
        seconds = step = report.DASH
    out = report.DASH if candidate.across_bytes is None else f"{candidate.across_bytes / 1e6:,.1f}"
    held = report.DASH if predicted is None else f"{predicted.buffer_bytes / 1e6:,.0f}"
    name = f"{candidate.name} (paper's rule)" if candidate.paper else candidate.name
    return [name, candidate.layout, seconds, step, out, held, candidate.reason]


def _caption(ranking: Ranking) -> str:
    calls = (
        f"a step is {ranking.calls} attention calls" if ranking.calls > 1 else "a step is taken as one attention call"
    )
    return f"{calls}, nothing else; > is a bound, where a replay could not change the choice"
