"""``sf-xfuser bench``: measures cases on an emulated cluster or on torchrun's ranks, prints and stores the results."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sf_xfuser.bench import comparison, emulate, peers, report
from sf_xfuser.bench.case import DTYPES, AttentionOptions, Case, launches, make_case, read_grid
from sf_xfuser.bench.deprecated import DeprecatedFlag, current_variants
from sf_xfuser.bench.document import check_output_paths, new_document, write_json
from sf_xfuser.bench.pipeline import MODELS, PipelineOptions
from sf_xfuser.bench.rank import run, run_pipeline
from sf_xfuser.bench.timelines import chrome_trace
from sf_xfuser.bench.variants import COMPRESSED, NAMES, torus_name
from sf_xfuser.config import TorusArgs, launch_environment, set_defaults

# xDiT, transformers, PyTorch's profiler and its sockets write to the same streams as the tables.
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
    add = parser.add_argument_group("cluster").add_argument
    add("--cluster", metavar="NxM", help="emulate N machines with M ranks each on this computer. Without it, run on "
        "the ranks that torchrun started")  # fmt: skip
    add("--inter-rate", metavar="RATE", help="bandwidth of each emulated machine, such as 100mbit or 2.5gbit. Default: "
        "unlimited")  # fmt: skip
    add("--inter-delay", metavar="DELAY", help="one-way delay between emulated machines, such as 0.2ms. Default: none")
    add("--topology", default="auto", metavar="NxM", help="under torchrun: machines and ranks per machine, with the "
        "syntax of --sp-topology. Default: auto")  # fmt: skip
    add = parser.add_argument_group("attention call").add_argument
    add(
        "--grid",
        metavar="FILE",
        help="run every case of a TOML file. Replaces --cluster and the other flags of this group",
    )
    add("--seq-len", type=int, default=4096, metavar="L", help="tokens of the whole sequence. Default: 4096")
    add("--heads", type=int, default=8, help="query heads. Default: 8")
    add("--kv-heads", type=int, help="key and value heads, for grouped-query attention. Default: as many as --heads")
    add("--head-dim", type=int, default=64, help="size of a head. Default: 64")
    add("--batch", type=int, default=1, help="sequences per call. Default: 1")
    add("--dtype", choices=DTYPES, default="float32", help="data type of the inputs. Default: float32")
    add("--plan", default="auto", help="layout of the torus variants, with the syntax of --sp-plan. Default: auto")
    add = parser.add_argument_group("variants").add_argument
    add("--variants", metavar="A,B", help=f"measure only these: {', '.join(NAMES)}. Default: every legal variant "
        "except auto, torus-unstaged, named transports and compression. With --pipeline: torus-fp8 and torus-int8, "
        "measured in addition to the default")  # fmt: skip
    add("--against", metavar="A,B", help="compare with these packages as well, where they are installed and can run: "
        f"{', '.join(peers.PACKAGES)}, or all. With --pipeline: diffusers")  # fmt: skip
    add("--arms", dest="variants", action=DeprecatedFlag, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add("--pipeline", metavar="MODEL", help=f"measure whole denoising steps of xDiT's pipelines instead of attention "
        f"calls: {', '.join(MODELS)} (few layers, random weights), or a diffusers folder")  # fmt: skip
    add("--steps", type=int, default=2, help="with --pipeline: denoising steps per call. Default: 2")
    add = parser.add_argument_group("measurement").add_argument
    add("--repeat", type=int, default=7, help="timed calls of each variant. Default: 7")
    add("--warmup", type=int, default=2, help="untimed calls of each variant after its first call. Default: 2")
    add("--seed", type=int, default=0, help="seed of the random inputs. Default: 0")
    add("--predict", action="store_true", help="calibrate the simulator on this cluster (10 to 33 s) and print its "
        "prediction for each variant")  # fmt: skip
    add("--timeout", type=float, default=300.0, metavar="SECONDS", help="maximum wait for another rank. Default: 300")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="write rows and timelines as JSON; - for standard output instead of tables")
    add("--plot", metavar="FILE", help="write bar charts and the timeline of one call (png, svg, pdf)")
    add("--trace", metavar="FILE", help="write the timelines as a Chrome trace, for Perfetto")
    add("--report", metavar="FILE", help="write a self-contained HTML page with tables and plots")
    add("--markdown", metavar="FILE", help="write one line per case as a Markdown table")


def bench_command(options: argparse.Namespace) -> int:
    """Run the benchmark and return the exit status.

    0: every variant that ran gave a correct result. 1: a result was wrong or a rank failed. 2: the request is invalid.
    130: Ctrl-C.
    """
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
    world_size = launch_environment().world_size
    if world_size is None and options.cluster is None and options.grid is None:
        raise ValueError(
            "use --cluster NxM or --grid FILE to emulate a cluster, or start ranks with torchrun: torchrun "
            "--nproc-per-node 8 -m sf_xfuser.cli bench ..."
        )
    if world_size is not None:
        if options.cluster or options.inter_rate or options.inter_delay or options.grid:
            raise ValueError(
                "--cluster, --inter-rate, --inter-delay and --grid emulate clusters and cannot be used under torchrun; "
                "use --topology and the flags of an attention call"
            )
        set_defaults(_QUIET)
    document = new_document("sf-xfuser")
    if options.pipeline is not None:
        failed = _bench_pipeline(options, document, world_size)
    else:
        failed = _bench_attention(options, document, world_size)
    return max(_finish(options, document), failed) if document["rows"] or world_size is None else 0


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for an invalid request; split ``options.variants`` at the commas."""
    if options.repeat < 1 or options.warmup < 0 or options.steps < 1:
        raise ValueError(
            f"--repeat and --steps must be at least 1 and --warmup at least 0, got {options.repeat}, {options.steps} "
            f"and {options.warmup}"
        )
    if not options.timeout > 0 or not math.isfinite(options.timeout):
        raise ValueError(f"--timeout must be a positive number of seconds, got {options.timeout}")
    if options.grid and (options.cluster or options.pipeline or options.inter_rate or options.inter_delay):
        raise ValueError(
            "--grid contains clusters and attention calls; remove --cluster, --inter-rate, --inter-delay and --pipeline"
        )
    if options.pipeline and options.pipeline not in MODELS and not Path(options.pipeline, "model_index.json").is_file():
        raise ValueError(f"--pipeline must be {', '.join(MODELS)} or a diffusers folder, got {options.pipeline!r}")
    TorusArgs(plan=options.plan)
    options.variants = current_variants(options.variants) if options.variants else None
    allowed = [torus_name(name) for name in COMPRESSED] if options.pipeline else NAMES
    for name in options.variants or ():
        if name not in allowed and (options.pipeline or not name.startswith("xdit-u")):
            pipeline = " with --pipeline" if options.pipeline else ""
            raise ValueError(f"--variants{pipeline}: unknown variant {name!r}; choose from {', '.join(allowed)}")
    packages = options.against.split(",") if options.against else []
    options.against = peers.names_of(packages)
    if options.pipeline and not {*packages} <= {"diffusers", peers.ALL}:
        raise ValueError(f"--against with --pipeline must be diffusers, got {','.join(packages)}")
    check_output_paths(options, "json", "plot", "trace", "report", "markdown")
    if options.plot or options.report:
        from sf_xfuser.bench import page

        page.require_matplotlib()


# -- running ----------------------------------------------------------------------------------------------------------


def _bench_attention(options: argparse.Namespace, document: dict[str, Any], world_size: int | None) -> int:
    """Run every case and add the results to ``document``. Returns 1 if ranks of an emulated cluster failed."""
    attention = AttentionOptions(
        cases=(), variants=options.variants, against=options.against, repeat=options.repeat, warmup=options.warmup,
        seed=options.seed, topology=options.topology, timeout_s=options.timeout, predict=options.predict,
    )  # fmt: skip
    if world_size is None:
        cases = read_grid(options.grid) if options.grid else [_case(options, options.cluster)]
        try:
            return _on_emulated_clusters(options, attention, cases, document)
        except KeyboardInterrupt:
            if document["rows"]:
                _finish(options, document)
            raise

    def add_results(rows: list[dict[str, Any]], timelines: list[dict[str, Any]]) -> None:
        document["rows"] += rows
        document["timelines"] += timelines

    machines = max(1, world_size // (launch_environment().local_world_size or world_size))
    topology = options.topology if options.topology != "auto" else f"{machines}x{world_size // machines}"
    run(replace(attention, cases=(_case(options, topology),)), add_results)
    return 0


def _case(options: argparse.Namespace, cluster: str) -> Case:
    names = ("inter_rate", "inter_delay", "seq_len", "heads", "kv_heads", "head_dim", "batch", "dtype", "plan")
    return make_case({"cluster": cluster, **{name: getattr(options, name) for name in names}})


def _on_emulated_clusters(
    options: argparse.Namespace, attention: AttentionOptions, cases: Sequence[Case], document: dict[str, Any]
) -> int:
    """Run the cases, one launch per cluster. Returns 1 if ranks failed."""
    console = Console(stderr=True)
    failed = num_measured = 0
    for group in launches(list(cases)):
        spec = group[0].spec
        console.print(f"{spec}: starting {spec.world_size} ranks for {len(group)} case(s) ...")
        before = len(document["rows"])
        if _launch(console, spec, asdict(replace(attention, cases=tuple(group), emulated=True)), document) != 0:
            failed = 1
        measured = report.by_case(document["rows"][before:])
        num_measured += len(measured)
        if missing := [case.id for case in group if case.id not in measured]:
            console.print(f"[bold red]not measured[/]: {missing}")
        if len(cases) > 1:
            console.print(f"{num_measured} of {len(cases)} cases measured")
            if options.json != "-":
                write_json(options.json, document, indent=1)  # keep the results if this long run is killed
    return failed


def _bench_pipeline(options: argparse.Namespace, document: dict[str, Any], world_size: int | None) -> int:
    """Measure denoising steps and add the rows to ``document``. Returns 1 if ranks of an emulated cluster failed."""
    pipeline = PipelineOptions(
        model=options.pipeline, topology=options.topology, plan=options.plan, steps=options.steps,
        compress=tuple(name for name in COMPRESSED if torus_name(name) in (options.variants or ())),
        against=options.against,
        rounds=options.repeat, dtype=options.dtype, seed=options.seed, timeout_s=options.timeout,
    )  # fmt: skip
    if world_size is not None:
        document["rows"] += run_pipeline(
            pipeline, {"id": f"{pipeline.model} on {world_size} ranks", "model": pipeline.model}
        )
        return 0
    spec = emulate.ClusterSpec.parse(options.cluster, options.inter_rate, options.inter_delay)
    case = {
        "id": f"{pipeline.model} on {spec}",
        "cluster": options.cluster,
        "model": pipeline.model,
        **asdict(spec),
    }
    console = Console(stderr=True)
    console.print(f"{spec}: starting {spec.world_size} ranks ...")
    job = {"pipeline": asdict(replace(pipeline, topology="auto")), "case": case}
    return int(_launch(console, spec, job, document) != 0)


def _launch(console: Console, spec: emulate.ClusterSpec, job: dict[str, Any], document: dict[str, Any]) -> int:
    """Run ``bench.rank`` on an emulated cluster, print the failed ranks and return the exit status.

    Adds the results to ``document``, including those measured before a failure or Ctrl-C.
    """
    with tempfile.TemporaryDirectory(prefix="sf-xfuser-bench-") as folder:
        path = Path(folder, "job.json")
        path.write_text(json.dumps(job))
        try:
            outcome = emulate.run(spec, [sys.executable, "-m", "sf_xfuser.bench.rank", str(path)], env=_QUIET)
        finally:
            if (results_path := path.with_suffix(".rows")).is_file():
                results = json.loads(results_path.read_text())
                document["rows"] += results["rows"]
                document["timelines"] += results["timelines"]
    if outcome.status != 0:
        failures = "; ".join(f"rank {f.rank} (machine {f.machine}) {f.what}" for f in outcome.failures)
        console.print(f"[bold red]failed[/]: {failures or f'status {outcome.status}'}")
    return outcome.status


# -- output -----------------------------------------------------------------------------------------------------------


def _finish(options: argparse.Namespace, document: dict[str, Any]) -> int:
    """Print and write the results. Returns 1 if a result was wrong or there is none."""
    rows = document["rows"]
    if not write_json(options.json, document, indent=1):
        _show(rows)
    if options.trace:
        Path(options.trace).write_text(json.dumps(chrome_trace(document)))
    if options.markdown and rows:
        compared = "\n" + comparison.markdown(rows) if comparison.has_peers(rows) else ""
        Path(options.markdown).write_text(report.markdown_table(rows) + compared)
    if (options.plot or options.report) and rows:
        from sf_xfuser.bench import page

        if options.plot:
            page.plot(document, options.plot)
        if options.report:
            Path(options.report).write_text(page.html(document))
    return 1 if not rows or any(row["status"] == "failed" for row in rows) else 0


def _show(rows: list[dict[str, Any]]) -> None:
    console = report.console()
    cases = report.by_case(rows)
    for case_rows in cases.values():
        console.print(report.table(case_rows))
        torus = report.variant_row(case_rows, report.SUBJECT)
        if torus is not None and torus.get("wire_bytes") and len(cases) == 1:
            console.print(report.matrix_table(torus))
    if len(cases) > 1:
        console.print(report.grid_table(rows))
        console.print(report.summary_table(report.summary(rows)))
    if comparison.has_peers(rows):
        console.print(comparison.table(rows))
        console.print("\n".join(comparison.refusals(rows)), markup=False, highlight=False)
    if (predicted := report.prediction_table(rows)) is not None:
        console.print(predicted)
