"""``sf-xfuser bench``: measures cases on an emulated cluster or on torchrun's ranks, prints and stores the results."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from sf_xfuser.bench import comparison, emulate, peers, report
from sf_xfuser.bench.case import DTYPES, AttentionOptions, Case, launches, make_case, read_grid
from sf_xfuser.bench.deprecated import DeprecatedFlag, current_variants
from sf_xfuser.bench.document import new_document
from sf_xfuser.bench.outputs import Outputs
from sf_xfuser.bench.pipeline import MODELS, PipelineOptions
from sf_xfuser.bench.progress import Progress
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
    add("--topology", metavar="NxM", help="under torchrun: machines and ranks per machine, with the "
        "syntax of --sp-topology. Default: auto")  # fmt: skip
    # A flag without a value is None, so that _check can tell which flags were given.
    add = parser.add_argument_group("attention call").add_argument
    add(
        "--grid",
        metavar="FILE",
        help="run every case of a TOML file. Replaces --cluster and the other flags of this group",
    )
    add("--seq-len", type=int, metavar="L", help="tokens of the whole sequence. Default: 4096")
    add("--heads", type=int, help="query heads. Default: 8")
    add("--kv-heads", type=int, help="key and value heads, for grouped-query attention. Default: as many as --heads")
    add("--head-dim", type=int, help="size of a head. Default: 64")
    add("--batch", type=int, help="sequences per call. Default: 1")
    add("--dtype", choices=DTYPES, help="data type of the inputs. Default: float32")
    add("--plan", help="layout of the torus variants, with the syntax of --sp-plan. Default: auto")
    add = parser.add_argument_group("variants").add_argument
    add("--variants", metavar="A,B", help=f"measure only these: {', '.join(NAMES)}. Default: every legal variant "
        "except auto, torus-unstaged, named transports and compression. With --pipeline: torus-fp8 and torus-int8, "
        "measured in addition to the default")  # fmt: skip
    add("--against", metavar="A,B", help="compare with these packages as well, where they are installed and can run: "
        f"{', '.join(peers.PACKAGES)}, or all. With --pipeline: diffusers")  # fmt: skip
    add("--arms", dest="variants", action=DeprecatedFlag, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add("--pipeline", metavar="MODEL", help=f"measure whole denoising steps of xDiT's pipelines instead of attention "
        f"calls: {', '.join(MODELS)} (few layers, random weights), or a diffusers folder")  # fmt: skip
    add("--steps", type=int, help="with --pipeline: denoising steps per call. Default: 2")
    add = parser.add_argument_group("measurement").add_argument
    add("--repeat", type=int, default=7, help="timed calls of each variant. Default: 7")
    add("--warmup", type=int, help="untimed calls of each variant after its first call. Default: 2")
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

    0: every variant that ran gave a correct result. 1: a result was wrong, a rank failed, or an output could not be
    written. 2: the request is invalid.
    """
    try:
        return _bench(options)
    except (ValueError, emulate.EmulationError) as error:
        if launch_environment().local_rank in (None, 0):  # torchrun's ranks refuse the same request
            print(f"sf-xfuser bench: {error}", file=sys.stderr)
        return 2


def _bench(options: argparse.Namespace) -> int:
    world_size = launch_environment().world_size
    _check(options, world_size)
    if world_size is not None:
        set_defaults(_QUIET)
    outputs = Outputs("sf-xfuser bench", options)
    document = new_document("sf-xfuser")
    if options.pipeline is not None:
        failed = _bench_pipeline(options, document, world_size)
    else:
        failed = _bench_attention(options, outputs, document, world_size)
    return max(_finish(outputs, document), failed) if document["rows"] or world_size is None else 0


_CALL = ("seq_len", "heads", "kv_heads", "head_dim", "batch")
# What a mode does not use, with the reason.
_UNUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "torchrun": (
        "cannot be used under torchrun; use --topology and the flags of an attention call",
        ("cluster", "inter_rate", "inter_delay", "grid"),
    ),
    "grid": (
        "cannot be used with --grid, whose file has the clusters and the attention calls",
        ("cluster", "inter_rate", "inter_delay", "topology", "pipeline", *_CALL, "dtype", "plan", "steps"),
    ),
    "pipeline": (
        "cannot be used with --pipeline, which measures the model's own calls, one untimed and --repeat timed ones",
        (*_CALL, "warmup", "predict", "trace"),
    ),
    "cluster": ("is torchrun's topology and cannot be used with --cluster", ("topology",)),
    "attention": ("needs --pipeline", ("steps",)),
}


def _check(options: argparse.Namespace, world_size: int | None) -> None:
    """Raise ValueError for an invalid request; split ``options.variants`` at the commas."""
    if world_size is None and options.cluster is None and options.grid is None:
        raise ValueError(
            "use --cluster NxM or --grid FILE to emulate a cluster, or start ranks with torchrun: torchrun "
            "--nproc-per-node 8 -m sf_xfuser bench ..."
        )
    modes = [name for name in ("grid", "pipeline", "cluster") if getattr(options, name)]
    modes += ["torchrun"] * (world_size is not None) + ["attention"] * (not options.pipeline)
    for mode, (reason, names) in _UNUSED.items():
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) not in (None, False)]
        if mode in modes and given:
            raise ValueError(f"{', '.join(given)} {reason}")
    counts = {"repeat": 1, "steps": 1, "warmup": 0}
    for name, least in counts.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if not options.timeout > 0 or not math.isfinite(options.timeout):
        raise ValueError(f"--timeout must be a positive number of seconds, got {options.timeout}")
    if options.pipeline and options.pipeline not in MODELS and not Path(options.pipeline, "model_index.json").is_file():
        raise ValueError(f"--pipeline must be {', '.join(MODELS)} or a diffusers folder, got {options.pipeline!r}")
    TorusArgs(plan=options.plan or "auto")
    options.variants = current_variants(options.variants) if options.variants else None
    allowed = [torus_name(name) for name in COMPRESSED] if options.pipeline else NAMES
    for name in options.variants or ():
        if name not in allowed and (options.pipeline or not name.startswith("xdit-u")):
            pipeline = " with --pipeline" if options.pipeline else ""
            raise ValueError(f"--variants{pipeline}: unknown variant {name!r}; choose from {', '.join(allowed)}")
    if options.predict and report.SUBJECT not in (options.variants or NAMES):
        raise ValueError(f"--predict calibrates with the variant {report.SUBJECT}; add it to --variants")
    packages = options.against.split(",") if options.against else []
    options.against = peers.names_of(packages)
    if options.pipeline and not {*packages} <= {"diffusers", peers.ALL}:
        raise ValueError(f"--against with --pipeline must be diffusers, got {','.join(packages)}")


# -- running ----------------------------------------------------------------------------------------------------------


def _bench_attention(
    options: argparse.Namespace, outputs: Outputs, document: dict[str, Any], world_size: int | None
) -> int:
    """Run every case and add the results to ``document``. Returns 1 if ranks of an emulated cluster failed."""
    attention = AttentionOptions(
        cases=(), variants=options.variants, against=options.against, repeat=options.repeat,
        warmup=2 if options.warmup is None else options.warmup, seed=options.seed,
        topology=options.topology or "auto", timeout_s=options.timeout, predict=options.predict,
    )  # fmt: skip
    if world_size is None:
        cases = read_grid(options.grid) if options.grid else [_case(options, options.cluster)]
        try:
            return _on_emulated_clusters(outputs, attention, cases, document)
        except KeyboardInterrupt:
            if document["rows"]:
                _finish(outputs, document)
            raise

    def add_results(rows: list[dict[str, Any]], timelines: list[dict[str, Any]]) -> None:
        document["rows"] += rows
        document["timelines"] += timelines

    machines = max(1, world_size // (launch_environment().local_world_size or world_size))
    topology = f"{machines}x{world_size // machines}" if attention.topology == "auto" else attention.topology
    run(replace(attention, cases=(_case(options, topology),)), add_results)
    return 0


def _case(options: argparse.Namespace, cluster: str) -> Case:
    names = ("inter_rate", "inter_delay", "seq_len", "heads", "kv_heads", "head_dim", "batch", "dtype", "plan")
    return make_case({"cluster": cluster, **{name: getattr(options, name) for name in names}})


def _on_emulated_clusters(
    outputs: Outputs, attention: AttentionOptions, cases: Sequence[Case], document: dict[str, Any]
) -> int:
    """Run the cases, one launch per cluster. Returns 1 if ranks failed."""
    console = Console(stderr=True)
    failed = num_measured = 0
    for group in launches(list(cases)):
        spec = group[0].spec
        _say_starting(console, spec, f" for {len(group)} case(s)")
        before = len(document["rows"])
        if _launch(console, spec, asdict(replace(attention, cases=tuple(group), emulated=True)), document) != 0:
            failed = 1
        measured = report.by_case(document["rows"][before:])
        num_measured += len(measured)
        if missing := [case.id for case in group if case.id not in measured]:
            console.print(f"[bold red]not measured[/]: {missing}")
        if len(cases) > 1:
            console.print(f"{num_measured} of {len(cases)} cases measured")
            if not outputs.on_stdout:
                outputs.json(document)  # keep the results if this long run is killed
    return failed


def _bench_pipeline(options: argparse.Namespace, document: dict[str, Any], world_size: int | None) -> int:
    """Measure denoising steps and add the rows to ``document``. Returns 1 if ranks of an emulated cluster failed."""
    pipeline = PipelineOptions(
        model=options.pipeline, topology=options.topology or "auto", plan=options.plan or "auto",
        steps=options.steps or 2,
        compress=tuple(name for name in COMPRESSED if torus_name(name) in (options.variants or ())),
        against=options.against, rounds=options.repeat, dtype=options.dtype or "float32", seed=options.seed,
        timeout_s=options.timeout,
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
    _say_starting(console, spec)
    job = {"pipeline": asdict(replace(pipeline, topology="auto")), "case": case}
    return int(_launch(console, spec, job, document) != 0)


def _say_starting(console: Console, spec: emulate.ClusterSpec, what: str = "") -> None:
    console.print(f"{spec}: starting {spec.world_size} ranks{what} ...")
    if spec.unshaped:
        console.print(spec.unshaped, style="yellow")


def _launch(console: Console, spec: emulate.ClusterSpec, job: dict[str, Any], document: dict[str, Any]) -> int:
    """Run ``bench.rank`` on an emulated cluster, print the failed ranks and return the exit status.

    Adds the results to ``document``, including those measured before a failure or Ctrl-C.
    """
    with tempfile.TemporaryDirectory(prefix="sf-xfuser-bench-") as folder:
        path = Path(folder, "job.json")
        path.write_text(json.dumps(job))
        try:
            ranks = [sys.executable, "-m", "sf_xfuser.bench.rank", str(path)]
            outcome = emulate.run(spec, ranks, env={**_QUIET, "TMPDIR": folder})  # also of ranks that are killed
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


def _finish(outputs: Outputs, document: dict[str, Any]) -> int:
    """Print and write the results. Returns 1 if a result was wrong, there is none, or an output was not written."""
    rows = document["rows"]
    outputs.json(document)
    if not outputs.on_stdout:
        _show(rows)
    outputs.text("trace", lambda: json.dumps(chrome_trace(document)))
    if rows:
        from sf_xfuser.bench import page

        compared = "\n" + comparison.markdown(rows) if comparison.has_peers(rows) else ""
        outputs.text("markdown", lambda: report.markdown_table(rows) + compared)
        with Progress("sf-xfuser bench") as progress:
            progress.doing("drawing")
            outputs.file("plot", partial(page.plot, document))
            outputs.text("report", lambda: page.html(document))
    return 1 if outputs.failed or not rows or any(row["status"] == "failed" for row in rows) else 0


def _show(rows: list[dict[str, Any]]) -> None:
    console = report.console()
    cases = report.by_case(rows)
    for case_rows in cases.values():
        console.print(report.table(case_rows))
        torus = report.variant_row(case_rows, report.SUBJECT)
        if torus is not None and torus.get("wire_bytes") and len(cases) == 1:
            console.print(report.matrix_table(f"{torus['variant']}, MB sent", torus["wire_bytes"]))
    if len(cases) > 1:
        console.print(report.grid_table(rows))
        console.print(report.summary_table(report.summary(rows)))
    if comparison.has_peers(rows):
        console.print(comparison.table(rows))
        console.print("\n".join(comparison.refusals(rows)), markup=False, highlight=False)
    if (predicted := report.prediction_table(rows)) is not None:
        console.print(predicted)
