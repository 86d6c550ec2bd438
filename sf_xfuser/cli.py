"""The ``sf-xfuser`` command."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from sf_xfuser import __version__
from sf_xfuser.bench import emulate

_STYLE = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "bold red"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="sf-xfuser", description="Torus Attention as a backend for xDiT.")
    parser.add_argument("--version", action="version", version=f"sf-xfuser {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="check this installation",
        description="Versions, hooks, accelerators, transports, topology and environment traps: a line each, with all "
        "that is wrong. Exit status 0 when xDiT can run with --sp-backend here, 1 when not.",
    )
    doctor.add_argument("--verbose", action="store_true", help="print every finding, such as every hook")
    doctor.add_argument("--json", action="store_true", help="print every finding as JSON")
    bench = commands.add_parser(
        "bench",
        help="compare sequence-parallel methods, on GPUs or on an emulated cluster",
        description="Every legal way to run one attention call (or, with --pipeline, denoising steps) across the ranks "
        "of a cluster: xDiT's own and Torus Attention, alternating within one process group, checked against a single "
        "process first. Under torchrun on its ranks; with --cluster on an emulated cluster, which needs Linux, "
        "iproute2 and root or user namespaces.",
    )
    if arguments[:1] == ["bench"]:  # the others do without PyTorch, which takes seconds to import
        from sf_xfuser.bench.command import add_bench_arguments, bench_command

        add_bench_arguments(bench)
        bench.set_defaults(run=bench_command)
    plan = commands.add_parser(
        "plan",
        help="which layout to take on a cluster, and why, without one",
        description="Every legal layout of a model's attention on a cluster, ranked by the simulator: time per call "
        "and per denoising step (its attention), bytes between machines, memory, and why each was not taken.",
    )
    simulate = commands.add_parser(
        "simulate",
        help="the timeline of an attention call on a cluster, without one",
        description="Replays the steps of every rank on a cluster's description, as a picture or a Chrome trace, "
        "beside a measured one where there is.",
    )
    if arguments[:1] in (["plan"], ["simulate"]):
        from sf_xfuser.bench import plan_command

        plan_command.add_plan_arguments(plan)
        plan_command.add_simulate_arguments(simulate)
        plan.set_defaults(run=plan_command.plan_command)
        simulate.set_defaults(run=plan_command.simulate_command)
    doctor.set_defaults(run=_doctor)
    cluster = commands.add_parser("cluster", help="run a program on an emulated cluster")
    run = cluster.add_subparsers(dest="verb", required=True).add_parser(
        "run",
        help="run a torchrun-style program on every rank",
        description="Makes machines out of network namespaces, joins them by shaped links, runs the command on every "
        "rank with torchrun's variables, and counts the bytes between machines.",
    )
    add = run.add_argument
    add("--cluster", required=True, metavar="NxM", help="machines x ranks per machine, such as 4x2")
    add("--inter-rate", metavar="RATE", help="what a machine can send, such as 100mbit, 2.5gbit. Default: not shaped")
    add("--inter-delay", metavar="DELAY", help="one-way delay between machines, such as 0.2ms")
    add("--timeout", type=float, metavar="SECONDS", help="end all ranks after this time")
    add("--grace", type=float, default=15.0, metavar="SECONDS", help="left to others after a failure. Default: 15")
    add("--prefix", action="store_true", help="mark each line of output with its machine and rank")
    add("--json", metavar="FILE", help="write the spec, the status, failures and bytes between machines to FILE")
    add("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what every rank runs")
    run.set_defaults(run=_cluster_run)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


def _cluster_run(options: argparse.Namespace) -> int:
    """Run, print the bytes between machines on stderr. The status of the Outcome; 2: the cluster or its description is
    at fault; 130: Ctrl-C."""
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    try:
        spec = emulate.ClusterSpec.parse(options.cluster, options.inter_rate, options.inter_delay)
        outcome = emulate.run(spec, argv, timeout_s=options.timeout, grace_s=options.grace, prefix=options.prefix)
    except (ValueError, emulate.EmulationError) as error:
        print(f"sf-xfuser cluster: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    names = [f"machine{i}" for i in range(spec.num_machines)]
    table = Table("from \\ to", *(Column(name, justify="right") for name in names), title=f"{spec}: MB sent")
    for i, row in enumerate(outcome.bytes_between):
        table.add_row(names[i], *("-" if i == j else f"{count / 1e6:.3f}" for j, count in enumerate(row)))
    Console(stderr=True).print(table)
    if options.json:
        Path(options.json).write_text(json.dumps({"spec": asdict(spec), **asdict(outcome)}, indent=1) + "\n")
    return outcome.status


def _doctor(options: argparse.Namespace) -> int:
    from sf_xfuser import doctor

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # xDiT and transformers talk while they are imported
    with Console(stderr=True).status("importing xDiT and looking at its hooks ..."):
        findings = doctor.examine()
    usable = doctor.usable(findings)
    if options.json:
        print(doctor.to_json(findings))
        return 0 if usable else 1
    console = Console()
    if options.verbose:
        table = Table(*(Column(name, overflow="fold") for name in ("section", "what", "status", "detail")))
        for finding in findings:
            table.add_row(finding.section, finding.name, finding.status, finding.detail, style=_STYLE[finding.status])
        console.print(table)
    else:
        for status, line in doctor.summary(findings):
            console.print(line, style=_STYLE[status], markup=False, highlight=False, soft_wrap=True)
    console.print("[bold green]usable[/]" if usable else "[bold red]not usable: see the failures above[/]")
    return 0 if usable else 1


if __name__ == "__main__":
    sys.exit(main())
