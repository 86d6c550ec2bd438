"""``sf-xfuser bench``: builds the cluster or uses torchrun's, runs the cases, shows and stores what was measured."""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from sf_xfuser import __version__
from sf_xfuser.bench import emulate, report
from sf_xfuser.bench.case import DTYPES, Case, launches, make_case, read_grid
from sf_xfuser.bench.pipeline import SHAPES
from sf_xfuser.bench.rank import AttentionOrder, PipelineOrder, run, run_pipeline
from sf_xfuser.bench.variants import COMPRESSED, current_names, known_names, over
from sf_xfuser.config import TorusArgs, launch_environment, set_defaults

_WIDTH = 150  # of tables, where the output is not a terminal
# Imports of xDiT and transformers, and PyTorch's profiler and sockets, talk; a benchmark's output is its table.
_QUIET = {
    "XDIT_LOGGING_LEVEL": "ERROR",
    "LOG_LEVEL": "error",  # xDiT's older logger
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "critical",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "KINETO_LOG_LEVEL": "99",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``sf-xfuser bench``."""
    where = parser.add_argument_group("cluster")
    where.add_argument("--cluster", metavar="NxM", help="emulate N machines x M ranks on this computer. Without it: "
                       "the ranks that torchrun started")  # fmt: skip
    where.add_argument("--inter-rate", metavar="RATE", help="what an emulated machine can send: 100mbit, 2.5gbit")
    where.add_argument("--inter-delay", metavar="DELAY", help="one-way delay between emulated machines: 0.2ms")
    where.add_argument("--topology", default="auto", metavar="NxM", help="as --sp-topology, under torchrun")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--grid", metavar="FILE", help="TOML file of many cases; instead of the flags below")
    what.add_argument("--seq-len", type=int, default=4096, metavar="L", help="tokens of all ranks. Default: 4096")
    what.add_argument("--heads", type=int, default=8, help="query heads. Default: 8")
    what.add_argument("--kv-heads", type=int, help="key heads, for grouped-query attention. Default: as many")
    what.add_argument("--head-dim", type=int, default=64, help="Default: 64")
    what.add_argument("--batch", type=int, default=1, help="Default: 1")
    what.add_argument("--dtype", choices=DTYPES, default="float32", help="Default: float32")
    what.add_argument("--plan", default="auto", help="layout of the torus variants, as --sp-plan. Default: auto")
    what.add_argument("--variants", "--arms", type=current_names, metavar="A,B",
                      help=f"only these variants: {known_names()}. Default: all that are legal, torus over its default "
                      "transport; auto where it is named. With --pipeline: torus-fp8 and torus-int8, besides the "
                      "others")  # fmt: skip
    what.add_argument("--pipeline", metavar="MODEL", help="whole denoising steps through xDiT instead of attention "
                      "calls: flux, hunyuanvideo, cogvideox, or a diffusers folder")  # fmt: skip
    what.add_argument("--steps", type=int, default=2, help="with --pipeline: denoising steps per call. Default: 2")
    how = parser.add_argument_group("how")
    how.add_argument("--repeat", type=int, default=7, help="timed calls of each variant. Default: 7")
    how.add_argument("--warmup", type=int, default=2, help="untimed calls before, besides the first. Default: 2")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--predict", action="store_true", help="measure the cluster first (some seconds) and say what the "
                     "simulator predicts for each variant")  # fmt: skip
    how.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="longest wait. Default: 300")
    out = parser.add_argument_group("output")
    out.add_argument("--json", metavar="FILE", help="rows and timelines; - for standard output instead of tables")
    out.add_argument("--plot", metavar="FILE", help="bars and the timeline of one call (png, svg, pdf)")
    out.add_argument("--trace", metavar="FILE", help="Chrome trace, for Perfetto")
    out.add_argument("--report", metavar="FILE", help="one self-contained HTML page with all of it")
    out.add_argument("--markdown", metavar="FILE", help="the summary of a grid as a Markdown table")


def bench_command(options: argparse.Namespace) -> int:
    """Measure and show. 0: every variant that could run gave the right result; 1: one did not, or a rank failed; 2: the
    request makes no sense here; 130: Ctrl-C."""
    try:
        return _bench(options)
    except (ValueError, emulate.EmulationError) as error:
        print(f"sf-xfuser bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sf-xfuser bench: stopped", file=sys.stderr)
        return 130


def _bench(options: argparse.Namespace) -> int:
    _check(options)
    launched = launch_environment()
    if launched.world_size is None and options.cluster is None and options.grid is None:
        raise ValueError(
            "give --cluster NxM to emulate a cluster here, --grid FILE, or start the command on every rank: torchrun "
            "--nproc-per-node 8 -m sf_xfuser.cli bench ..."
        )
    if launched.world_size is not None and (options.cluster or options.inter_rate or options.inter_delay):
        raise ValueError("--cluster and its rates emulate a cluster; they mean nothing under torchrun")
    if options.pipeline is not None:
        return _bench_pipeline(options, launched.world_size)
    variants = tuple(options.variants.split(",")) if options.variants else None
    order = AttentionOrder(
        cases=(),
        variants=variants,
        repeat=options.repeat,
        warmup=options.warmup,
        seed=options.seed,
        topology=options.topology,
        timeout_s=options.timeout,
        predict=options.predict,
    )
    if launched.world_size is not None:
        return _under_torchrun(options, order, launched.world_size)
    cases = read_grid(options.grid) if options.grid else [_case(options, options.cluster)]
    document = new_document("sf-xfuser")
    try:
        failed = _on_emulated_clusters(options, order, cases, document)
    except KeyboardInterrupt:
        if document["rows"]:
            _finish(options, document)
        raise
    return max(_finish(options, document), failed)


def _check(options: argparse.Namespace) -> None:
    if options.repeat < 1 or options.warmup < 0 or options.steps < 1:
        raise ValueError(
            f"--repeat and --steps must be at least 1 and --warmup at least 0, got {options.repeat}, {options.steps} "
            f"and {options.warmup}"
        )
    if not options.timeout > 0 or not math.isfinite(options.timeout):
        raise ValueError(f"--timeout must be a positive number of seconds, got {options.timeout}")
    if options.grid and (options.cluster or options.pipeline or options.inter_rate or options.inter_delay):
        raise ValueError(
            "--grid names its own clusters and attention cases; leave --cluster, its rates and --pipeline out"
        )
    if options.pipeline and options.pipeline not in SHAPES and not Path(options.pipeline, "model_index.json").is_file():
        raise ValueError(f"--pipeline must be {', '.join(SHAPES)} or a diffusers folder, got {options.pipeline!r}")
    TorusArgs(plan=options.plan)
    known = set(known_names().split(", "))
    if options.pipeline and options.variants:
        known = {over(name) for name in COMPRESSED}
        if not set(options.variants.split(",")) <= known:
            raise ValueError(
                f"--variants {options.variants}: with --pipeline it adds variants to torus and xDiT's USP; there are "
                f"{', '.join(sorted(known))}"
            )
    for variant in options.variants.split(",") if options.variants else ():
        if variant not in known and not variant.startswith("xdit-u"):
            raise ValueError(f"--variants: no variant is called {variant!r}; there are {known_names()}")
    report.require_files(options, "json", "plot", "trace", "report", "markdown")
    if options.plot or options.report:
        from sf_xfuser.bench import page

        page.require_matplotlib()


def _case(options: argparse.Namespace, cluster: str) -> Case:
    names = ("inter_rate", "inter_delay", "seq_len", "heads", "kv_heads", "head_dim", "batch", "dtype", "plan")
    return make_case({"cluster": cluster, **{name: getattr(options, name) for name in names}})


# -- running ----------------------------------------------------------------------------------------------------------


def _on_emulated_clusters(
    options: argparse.Namespace, order: AttentionOrder, cases: Sequence[Case], document: dict[str, Any]
) -> int:
    """Run every case, fill the document in, show each case as it is done. 1 if some ranks failed."""
    console = Console(stderr=True)
    failed = done = 0
    for group in launches(list(cases)):
        console.print(f"{group[0].spec}: starting {group[0].world_size} ranks for {len(group)} case(s) ...")
        request = replace(order, cases=tuple(group), emulated=True).to_json()
        before = len(document["rows"])
        if _launch(console, group[0].spec, request, document) != 0:
            failed = 1
        measured = report.by_case(document["rows"][before:])
        done += len(measured)
        if missing := [case.id for case in group if case.id not in measured]:
            console.print(f"[bold red]not measured[/]: {missing}")
        if len(cases) > 1:
            console.print(f"{done} of {len(cases)} cases measured")
            if options.json != "-":
                report.write_json(options.json, document, indent=1)  # a grid takes its time, and may be killed
    return failed


def _launch(console: Console, spec: emulate.ClusterSpec, request: str, document: dict[str, Any], *flags: str) -> int:
    """Run ``rank`` on an emulated cluster and add to the document what it measured, also before a failure or Ctrl-C.
    The status of the cluster; the ranks that failed are named."""
    with tempfile.TemporaryDirectory(prefix="sf-xfuser-bench-") as folder:
        path = Path(folder, "order.json")
        path.write_text(request)
        try:
            outcome = emulate.run(spec, [sys.executable, "-m", "sf_xfuser.bench.rank", *flags, str(path)], env=_QUIET)
        finally:
            results = path.with_suffix(".rows")
            if results.is_file():
                found = json.loads(results.read_text())
                document["rows"] += found["rows"]
                document["timelines"] += found["timelines"]
    if outcome.status != 0:
        words = "; ".join(f"rank {f.rank} (machine {f.machine}) {f.what}" for f in outcome.failures)
        console.print(f"[bold red]failed[/]: {words or f'status {outcome.status}'}")
    return outcome.status


def _under_torchrun(options: argparse.Namespace, order: AttentionOrder, world_size: int) -> int:
    """This process is one rank. Rank 0 shows and stores; its status is the job's."""
    if options.grid:
        raise ValueError("--grid describes emulated clusters; under torchrun give the shape on the command line")
    set_defaults(_QUIET)
    topology = options.topology
    machines = topology if topology != "auto" else f"{_num_nodes(world_size)}x{world_size // _num_nodes(world_size)}"
    case = _case(options, machines)
    document = new_document("sf-xfuser")

    def done(rows: list[dict[str, Any]], timelines: list[dict[str, Any]]) -> None:
        document["rows"] += rows
        document["timelines"] += timelines

    run(replace(order, cases=(case,)), done)
    return _finish(options, document) if document["rows"] else 0


def _num_nodes(world_size: int) -> int:
    local = launch_environment().local_world_size or world_size
    return max(1, world_size // local)


def _bench_pipeline(options: argparse.Namespace, world_size: int | None) -> int:
    document = new_document("sf-xfuser")
    order = PipelineOrder(
        model=options.pipeline,
        topology=options.topology,
        plan=options.plan,
        case={},
        steps=options.steps,
        rounds=options.repeat,
        dtype=options.dtype,
        seed=options.seed,
        timeout_s=options.timeout,
        compress=[name for name in COMPRESSED if over(name) in (options.variants or "").split(",")],
    )
    if world_size is not None:
        set_defaults(_QUIET)
        document["rows"] += run_pipeline(order)
        return _finish(options, document) if document["rows"] else 0
    spec = emulate.ClusterSpec.parse(options.cluster, options.inter_rate, options.inter_delay)
    case = {"id": f"{order.model} on {spec}", "cluster": options.cluster, "model": order.model, **asdict(spec)}
    order = replace(order, topology="auto", case=case)
    console = Console(stderr=True)
    console.print(f"{spec}: starting {spec.world_size} ranks ...")
    status = _launch(console, spec, json.dumps(asdict(order)), document, "--pipeline")
    return max(_finish(options, document), 1 if status else 0)


# -- output -----------------------------------------------------------------------------------------------------------


def _finish(options: argparse.Namespace, document: dict[str, Any]) -> int:
    """Show and store; 1 if a variant's result was wrong or nothing was measured."""
    rows = document["rows"]
    if not report.write_json(options.json, document, indent=1):
        _show(rows)
    if options.trace:
        Path(options.trace).write_text(json.dumps(report.chrome_trace(document)))
    if options.markdown and rows:
        Path(options.markdown).write_text(report.markdown_table(rows))
    if (options.plot or options.report) and rows:
        from sf_xfuser.bench import page

        if options.plot:
            page.plot(document, options.plot)
        if options.report:
            Path(options.report).write_text(page.html(document))
    return 1 if not rows or any(row["status"] == "failed" for row in rows) else 0


def _show(rows: list[dict[str, Any]]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    cases = report.by_case(rows)
    for of_case in cases.values():
        console.print(report.table(of_case))
        torus = report.variant_row(of_case, report.SUBJECT)
        if torus is not None and torus.get("wire_bytes") and len(cases) == 1:
            console.print(report.matrix_table(torus))
    if len(cases) > 1:
        console.print(report.grid_table(rows))
        console.print(report.summary_table(report.summary(rows)))
    if (predicted := report.prediction_table(rows)) is not None:
        console.print(predicted)


def new_document(command: str) -> dict[str, Any]:
    """What a run's rows are stored with: when, of which commit, by which command, on what."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "schema": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": shlex.join([*shlex.split(command), *sys.argv[1:]]),
        "hardware": {
            "cpu": _cpu(),
            "cores": _cores(),
            "memory_bytes": _memory(),
            "accelerator": torch.cuda.get_device_name(0) if cuda else "cpu",
        },
        "versions": {
            "sf_xfuser": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "xfuser", "diffusers", "yunchang")},
        },
        "rows": [],
        "timelines": [],
    }


def _commit() -> str | None:
    """The commit of the checkout that this package runs from; None where it runs from none."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except OSError:
        return None
    return done.stdout.strip() or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cores() -> int:
    import torch

    return torch.multiprocessing.cpu_count()


def _memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal")), None)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
