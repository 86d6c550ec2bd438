"""``sf-xfuser plan`` and ``sf-xfuser simulate``. Neither needs PyTorch."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from sf_xfuser.bench import report
from sf_xfuser.bench.deprecated import DeprecatedFlag, upgrade
from sf_xfuser.bench.outputs import Outputs
from sf_xfuser.bench.progress import Progress
from sf_xfuser.bench.timelines import chrome_trace, from_chrome_trace, side_by_side
from sf_xfuser.config import TorusArgs
from sf_xfuser.files import read_json
from sf_xfuser.layout.plan import UNEVEN, make_plan
from sf_xfuser.layout.schedule import Granularity
from sf_xfuser.layout.usp_layouts import XditConfig
from sf_xfuser.simulator import ITEMSIZE, CallShape, TorusVariant, predict
from sf_xfuser.simulator.cluster import Cluster
from sf_xfuser.simulator.models import MODELS, find_model
from sf_xfuser.simulator.planner import PATTERN_OF, RankedLayout, Ranking, rank
from sf_xfuser.simulator.presets import PRESETS, preset


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``sf-xfuser plan``."""
    _add_call_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="write the ranking as JSON; - for standard output instead of a table")
    add("--plot", metavar="FILE", help="plot the time over machines, link speed and sequence length (png, svg, pdf)")


def add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``sf-xfuser simulate``."""
    _add_call_arguments(parser)
    add = parser.add_argument_group("variant").add_argument
    add("--sp-plan", default="best", metavar="PLAN", help="best (torus as sf-xfuser plan ranks it first), "
        "auto, paper, usp, torus=T,ulysses=U,ring=R, or ulysses=U,ring=R for xDiT's USP. Default: best")  # fmt: skip
    add("--no-overlap", action="store_true", help="make torus wait for each transfer before it continues")
    add("--measured", metavar="FILE", help="add the measured timeline of a sf-xfuser bench document (--json) or trace "
        "(--trace)")  # fmt: skip
    add("--measured-variant", metavar="NAME", help="variant of that timeline. Default: torus")
    add("--measured-arm", dest="measured_variant", action=DeprecatedFlag, default=argparse.SUPPRESS,
        help=argparse.SUPPRESS)  # fmt: skip
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="write the timelines as JSON; - for standard output")
    add("--plot", metavar="FILE", help="plot the timelines (png, svg, pdf)")
    add("--trace", metavar="FILE", help="write the timelines as a Chrome trace, for Perfetto")


def _add_call_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("cluster").add_argument
    add("--preset", metavar="NAME", help=f"hardware: {', '.join(PRESETS)}. Default: p4de")
    add("--cluster-file", metavar="FILE", help="hardware from a JSON file, for instance from plan --json")
    add("--machines", type=int, metavar="N", help="number of machines. Default: the preset's")
    add("--gpus-per-machine", type=int, metavar="M", help="GPUs per machine. Default: the preset's")
    add("--across-gbps", type=float, metavar="GBIT", help="bandwidth of a machine to others. Default: the preset's")
    add("--inside-gbps", type=float, metavar="GBIT", help="bandwidth of a GPU in a machine. Default: the preset's")
    add("--transport", choices=tuple(PATTERN_OF), help="transport of torus: NCCL sends and "
        "receives, or one-sided puts (nvshmem). Default: two_sided")  # fmt: skip
    add = parser.add_argument_group("attention call, from a model").add_argument
    add("--model", metavar="NAME", help=f"{', '.join(MODELS)}, or the config.json of a transformer")
    add("--height", type=int, help="height of the image or video, in pixels")
    add("--width", type=int, help="width of the image or video, in pixels")
    add("--frames", type=int, help="number of frames of the video")
    add = parser.add_argument_group("attention call, without a model").add_argument
    add("--heads", type=int, help="query heads")
    add("--kv-heads", type=int, help="key and value heads. Default: as many as --heads")
    add("--head-dim", type=int, help="size of a head")
    add("--seq-len", type=int, metavar="L", help="tokens of the whole sequence")
    add = parser.add_argument_group("attention call").add_argument
    add("--batch", type=int, help="sequences per call. Default: the model's, or 1")
    add("--dtype", choices=tuple(ITEMSIZE), default="bfloat16", help="data type of the inputs. Default: bfloat16")


def plan_command(options: argparse.Namespace) -> int:
    """Rank the layouts and print them. Returns 2 for an invalid request, 1 if an output could not be written."""
    try:
        outputs = Outputs("sf-xfuser plan", options)
        cluster, shape, calls = _call(options)
        started_s = time.perf_counter()
        with Progress("sf-xfuser plan") as progress:
            progress.doing("ranking the layouts")
            ranking = rank(cluster, shape, calls=calls, transport=options.transport or "two_sided")
        took_s = time.perf_counter() - started_s
    except ValueError as error:
        print(f"sf-xfuser plan: {error}", file=sys.stderr)
        return 2
    outputs.json(ranking.to_json())
    if not outputs.on_stdout:
        _show(ranking, took_s)
    outputs.file("plot", lambda path: _plot(ranking, options.transport or "two_sided", path))
    return int(outputs.failed)


def _plot(ranking: Ranking, transport: str, path: str) -> None:
    from sf_xfuser.bench import plan_page

    plan_page.plot(ranking, transport, _title(ranking), path)


def simulate_command(options: argparse.Namespace) -> int:
    """Replay every rank and print the times. Returns 2 for an invalid request, 1 if an output could not be written."""
    try:
        outputs = Outputs("sf-xfuser simulate", options)
        cluster, shape, _ = _call(options)
        with Progress("sf-xfuser simulate") as progress:
            progress.doing(f"simulating {cluster.world_size} ranks")
            timelines = [_timeline(cluster, shape, _variant(options, cluster, shape))]
        if options.measured:
            timelines.insert(0, _measured(options, cluster, shape))
    except ValueError as error:
        print(f"sf-xfuser simulate: {error}", file=sys.stderr)
        return 2
    document = {"rows": [], "timelines": timelines}
    outputs.json(document, indent=None)
    for timeline in () if outputs.on_stdout else timelines:
        spans = [span for entry in timeline["ranks"] for span in entry["spans"] if span["link"] == "compute"]
        compute_ms = sum(span["end_s"] - span["start_s"] for span in spans) / len(timeline["ranks"]) * 1e3
        total = f"{timeline['duration_s'] * 1e3:.2f} ms, {compute_ms:.2f} ms of it compute (mean of the ranks)"
        print(f"{timeline['variant']}, {timeline['case']}: {total}")
    outputs.text("trace", lambda: json.dumps(chrome_trace(document)))
    outputs.file("plot", lambda path: _plot_timelines(timelines, path))
    return int(outputs.failed)


def _plot_timelines(timelines: list[dict[str, Any]], path: str) -> None:
    from sf_xfuser.bench import page

    page.save([page.timeline_panel(side_by_side(*timelines) if len(timelines) > 1 else timelines[0])], path)


# -- cluster, call and variant ----------------------------------------------------------------------------------------


def _call(options: argparse.Namespace) -> tuple[Cluster, CallShape, int]:
    """The cluster, the shape of a call, and the number of calls per denoising step."""
    if options.preset and options.cluster_file:
        raise ValueError("--preset and --cluster-file exclude each other; remove one")
    hardware = Cluster.load(options.cluster_file) if options.cluster_file else preset(options.preset or "p4de")
    sizes = {"--machines": options.machines, "--gpus-per-machine": options.gpus_per_machine}
    for name, number in sizes.items():
        if number is not None and not 1 <= number <= 4096:
            raise ValueError(f"{name} must be 1 to 4096, got {number}")
    cluster = hardware.with_size(
        options.machines or hardware.num_machines, options.gpus_per_machine or hardware.ranks_per_machine
    ).with_rates(across_gbps=options.across_gbps, inside_gbps=options.inside_gbps)
    shape, calls = _shape(options, cluster.world_size)
    return cluster, replace(shape, batch=shape.batch if options.batch is None else options.batch), calls


def _shape(options: argparse.Namespace, world_size: int) -> tuple[CallShape, int]:
    required = {name: getattr(options, name) for name in ("heads", "head_dim", "seq_len")}
    missing = [f"--{name.replace('_', '-')}" for name, value in required.items() if value is None]
    if options.model is None:
        if pixels := [f"--{name}" for name in ("height", "width", "frames") if getattr(options, name) is not None]:
            raise ValueError(f"{', '.join(pixels)} needs --model, which gives the tokens of a picture or video")
        if missing:
            raise ValueError(f"use --model with --height and --width, or {' and '.join(missing)}")
        kv_heads = options.heads if options.kv_heads is None else options.kv_heads
        return CallShape(**required, kv_heads=kv_heads, dtype=options.dtype), 1
    if len(missing) < len(required) or options.kv_heads is not None:
        raise ValueError("--model sets heads and tokens: remove --heads, --kv-heads, --head-dim and --seq-len")
    model = find_model(options.model)
    if options.height is None or options.width is None:
        raise ValueError(f"--model {model.name} needs --height and --width")
    return model.call(world_size, options.height, options.width, options.frames, options.dtype), model.calls


def _variant(options: argparse.Namespace, cluster: Cluster, shape: CallShape) -> TorusVariant | XditConfig:
    text = options.sp_plan
    if options.measured_variant is not None and options.measured is None:
        raise ValueError("--measured-variant needs --measured")
    usp = re.fullmatch(r"ulysses=(\d+),ring=(\d+)", text)
    if usp:
        if options.no_overlap or options.transport:
            raise ValueError("--no-overlap and --transport are of torus; remove them, or use --sp-plan torus=T,...")
        config = XditConfig(ulysses_degree=int(usp[1]), ring_degree=int(usp[2]))
        if shape.heads % config.ulysses_degree or shape.kv_heads % config.ulysses_degree:
            raise ValueError(f"ulysses={config.ulysses_degree} cannot split {shape.heads} heads")
        config.groups(cluster.num_machines, cluster.ranks_per_machine)  # raises ValueError for a wrong product
        return config
    granularity: Granularity | None = None
    if text == "best":
        ranked = rank(cluster, shape, transport=options.transport or "two_sided")
        best = next(c for c in ranked.layouts if c.name == report.SUBJECT)
        text, granularity = re.search(r"torus=\S+", best.flags)[0], best.granularity  # type: ignore[index]
    try:
        args = TorusArgs(plan=text)
    except ValueError as error:
        raise ValueError(f"{error}; best and ulysses=U,ring=R (xDiT's USP) are allowed as well") from None
    plan = make_plan(cluster.num_machines, cluster.ranks_per_machine, heads=shape.heads, kv_heads=shape.kv_heads,
                     rule=args.rule, explicit=args.explicit_plan(), max_imbalance=UNEVEN)  # fmt: skip
    return TorusVariant(
        layout=plan.layout,
        pattern=PATTERN_OF[options.transport or "two_sided"],
        overlap=not options.no_overlap,
        granularity=granularity,
    )


def _timeline(cluster: Cluster, shape: CallShape, variant: TorusVariant | XditConfig) -> dict[str, Any]:
    predicted = predict(cluster, shape, variant, every_rank=True)
    assert predicted.timeline is not None
    grid = f"{cluster.num_machines}x{cluster.ranks_per_machine}"
    batch = "" if shape.batch == 1 else f" B{shape.batch}"
    case = f"{cluster.name} {grid} L{shape.seq_len} H{_heads(shape)} D{shape.head_dim}{batch} {shape.dtype}"
    return {"case": case, "variant": f"predicted {variant}", **predicted.timeline}


def _measured(options: argparse.Namespace, cluster: Cluster, shape: CallShape) -> dict[str, Any]:
    """The first timeline of ``--measured-variant`` in a bench document or Chrome trace. Raises ValueError.

    Warns on stderr where it is known to be of another cluster or call.
    """
    path, variant = options.measured, options.measured_variant or report.SUBJECT
    try:
        document = read_json(path)
    except OSError as error:
        raise ValueError(f"--measured {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--measured {path} is not JSON: {error}") from None
    try:
        trace = document.get("traceEvents")
        timelines = upgrade(document)["timelines"] if trace is None else from_chrome_trace(trace)
        matching = [timeline for timeline in timelines if timeline["variant"] == variant]
        ranks = matching[0]["ranks"] if matching else []
        hardware = document.get("hardware", {}).get("accelerator")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"--measured {path} is not a document or trace of sf-xfuser bench ({error!r})") from None
    if not matching:
        variants = ", ".join(sorted({str(timeline["variant"]) for timeline in timelines})) or "none"
        raise ValueError(f"--measured {path} has no timeline of {variant}; its timelines: {variants}")
    if len(ranks) != cluster.world_size:
        raise ValueError(f"--measured {path} has {len(ranks)} ranks, the cluster has {cluster.world_size}")
    if different := _differences(str(matching[0]["case"]), hardware, cluster, shape):
        print(
            f"sf-xfuser simulate: warning: --measured {path} is of another cluster or call, so the times do not "
            f"compare: {'; '.join(different)}",
            file=sys.stderr,
        )
    return {**matching[0], "variant": f"measured {variant}"}


_CASE = re.compile(
    r"(?:(?P<name>\S+) )?(?P<grid>\d+x\d+)(?: (?P<rate>[\d.]+)mbit)?.* L(?P<tokens>\d+) H(?P<heads>\d+(?:/\d+)?) "
    r"D(?P<size>\d+)(?: B(?P<batch>\d+))?(?: (?P<dtype>\w*float\d+))?"
)
"""The id of a case of ``sf-xfuser bench`` or ``simulate``."""


def _differences(case: str, hardware: str | None, cluster: Cluster, shape: CallShape) -> list[str]:
    """What the measured ``case`` is known to have otherwise than the simulated cluster and call. Pure."""
    found = _CASE.match(case)
    if found is None:
        return []
    gbps = cluster.across.machine_gbps or cluster.across.rank_gbps * cluster.ranks_per_machine
    measured_on = {None: None, "cpu": "cpu"}.get(hardware, "cuda")
    pairs = [
        ("cluster", found["name"], cluster.name),
        ("device", measured_on, cluster.device),
        ("machines x ranks", found["grid"], f"{cluster.num_machines}x{cluster.ranks_per_machine}"),
        ("Mbit/s between machines", found["rate"], f"{gbps * 1e3:g}"),
        ("tokens", found["tokens"], str(shape.seq_len)),
        ("heads", found["heads"], _heads(shape)),
        ("head size", found["size"], str(shape.head_dim)),
        ("batch", found["batch"] or "1", str(shape.batch)),
        ("dtype", found["dtype"] or "float32", shape.dtype),
    ]
    return [f"{what} {ours}, simulated {theirs}" for what, ours, theirs in pairs if ours not in (None, theirs)]


def _heads(shape: CallShape) -> str:
    return str(shape.heads) if shape.kv_heads == shape.heads else f"{shape.heads}/{shape.kv_heads}"


# -- output -----------------------------------------------------------------------------------------------------------


def _show(ranking: Ranking, took_s: float) -> None:
    console = report.console()
    console.print(Text(_title(ranking), "bold"))
    table = Table(
        Column("layout, and why it was not chosen", overflow="fold"),
        *(Column(name, justify="right", no_wrap=True) for name in _NUMBERS),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for candidate in ranking.layouts:
        style = "bold green" if candidate is ranking.best else "dim" if candidate.bound_s is None else ""
        name = f"{candidate.name} (paper's rule)" if candidate.paper else candidate.name
        table.add_row(
            Group(Text(f"{name}: {candidate.layout}"), Padding(Text(candidate.reason), (0, 0, 0, 4))),
            *_cells(candidate, ranking.calls),
            style=style,
        )
    console.print(table)
    step = "one attention call" if ranking.calls == 1 else f"{ranking.calls} attention calls"
    console.print(
        f"ms per step counts attention only ({step}); > marks the lower bound of a layout that was not replayed",
        style="italic",
        highlight=False,
    )
    replayed = sum(candidate.predicted is not None for candidate in ranking.layouts)
    legal = sum(candidate.bound_s is not None for candidate in ranking.layouts)
    console.print(
        f"ranked in {took_s * 1e3:.0f} ms, replayed {replayed} of {legal} legal layouts and granularities",
        highlight=False,
    )
    console.print(f"launch with: {ranking.best.flags}", highlight=False, soft_wrap=True)


_NUMBERS = ("ms per\ncall", "ms per\nstep", "MB out of\nmachine", "buffer\nMB")


def _title(ranking: Ranking) -> str:
    cluster, shape = ranking.cluster, ranking.shape
    kv = "" if shape.kv_heads == shape.heads else f" ({shape.kv_heads} KV)"
    joint = f" and {shape.joint_tokens} text tokens on every rank" if shape.joint_tokens else ""
    return (
        f"{cluster.name}, {cluster.num_machines} machines x {cluster.ranks_per_machine}: {shape.seq_len} tokens{joint}"
        f", {shape.heads} heads{kv} of {shape.head_dim}, batch {shape.batch}, {shape.dtype}"
    )


def _cells(candidate: RankedLayout, calls: int) -> list[str]:
    """The numbers of a line, one per name of ``_NUMBERS``."""
    predicted = candidate.predicted
    if predicted is not None:
        seconds, step = f"{predicted.seconds * 1e3:.2f}", f"{predicted.seconds * calls * 1e3:.1f}"
    elif candidate.bound_s is not None:
        seconds, step = f">{candidate.bound_s * 1e3:.2f}", f">{candidate.bound_s * calls * 1e3:.1f}"
    else:
        seconds = step = report.DASH
    sent = report.DASH if candidate.across_bytes is None else f"{candidate.across_bytes / 1e6:,.1f}"
    buffer = report.DASH if predicted is None else f"{predicted.buffer_bytes / 1e6:,.0f}"
    return [seconds, step, sent, buffer]
