"""The ``sf-xfuser`` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from sf_xfuser import __version__, doctor
from sf_xfuser.bench import emulate


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="sf-xfuser", description="Topology-aware sequence parallelism and Torus Attention for xDiT."
    )
    parser.add_argument("--version", action="version", version=f"sf-xfuser {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor.add_doctor_arguments(commands.add_parser("doctor", help="check this installation"))
    bench = commands.add_parser(
        "bench",
        help="benchmark Torus Attention against xDiT's own sequence parallelism",
        description="Measures one attention call (with --pipeline: denoising steps) in every legal variant of xDiT's "
        "USP and of Torus Attention. Variants alternate in one process group. Each result is checked against a single "
        "process first. Runs on torchrun's ranks or, with --cluster, on an emulated cluster, which needs Linux, "
        "iproute2, and root or user namespaces.",
    )
    if arguments[:1] == ["bench"]:  # only bench needs PyTorch, which takes seconds to import
        from sf_xfuser.bench.command import add_bench_arguments, bench_command

        add_bench_arguments(bench)
        bench.set_defaults(run=bench_command)
    plan = commands.add_parser(
        "plan",
        help="rank the layouts for a model and a cluster, by simulation",
        description="Ranks every legal layout of an attention call on a cluster with the simulator. Prints the time "
        "per call and the attention time per denoising step, bytes between machines, buffer memory, and why each "
        "layout was not chosen. Needs no cluster and no GPU.",
    )
    simulate = commands.add_parser(
        "simulate",
        help="simulate the timeline of an attention call on a cluster",
        description="Simulates every rank of an attention call and prints its time. Writes the timeline as a plot or "
        "Chrome trace, optionally next to a measured one. Needs no cluster and no GPU.",
    )
    if arguments[:1] in (["plan"], ["simulate"]):
        from sf_xfuser.bench import plan_command

        plan_command.add_plan_arguments(plan)
        plan_command.add_simulate_arguments(simulate)
        plan.set_defaults(run=plan_command.plan_command)
        simulate.set_defaults(run=plan_command.simulate_command)
    text = "run a command on an emulated cluster"
    cluster = commands.add_parser("cluster", help=text, description=f"{text.capitalize()}.")
    run = cluster.add_subparsers(dest="verb", required=True).add_parser(
        "run",
        help="run a command on every rank",
        description="Creates machines from network namespaces, connects them with shaped links, runs the command on "
        "every rank with torchrun's environment variables, and prints the bytes sent between machines.",
    )
    add = run.add_argument
    add("--cluster", required=True, metavar="NxM", help="N machines with M ranks each, such as 4x2")
    add("--inter-rate", metavar="RATE", help="bandwidth of each machine, such as 100mbit. Default: unlimited")
    add("--inter-delay", metavar="DELAY", help="one-way delay between machines, such as 0.2ms. Default: none")
    add("--timeout", type=float, metavar="SECONDS", help="stop all ranks after this time. Default: never")
    add(
        "--grace",
        type=float,
        default=15.0,
        metavar="SECONDS",
        help="time to exit for the other ranks after one fails. Default: 15",
    )
    add("--prefix", action="store_true", help="prefix each line of output with its machine and rank")
    add("--json", metavar="FILE", help="write cluster, status, failures and bytes between machines")
    add("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="command to run on every rank")
    run.set_defaults(run=_cluster_run)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


def _cluster_run(options: argparse.Namespace) -> int:
    """Run the command and print the bytes between machines on stderr.

    Returns the status of the run, 2 for an invalid or impossible cluster, 130 for Ctrl-C.
    """
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
    table = Table(
        "from \\ to", *(Column(name, justify="right") for name in names), title=f"{spec}: MB sent between machines"
    )
    for i, row in enumerate(outcome.bytes_between):
        table.add_row(names[i], *("-" if i == j else f"{count / 1e6:.3f}" for j, count in enumerate(row)))
    Console(stderr=True).print(table)
    if options.json:
        Path(options.json).write_text(json.dumps({"spec": asdict(spec), **asdict(outcome)}, indent=1) + "\n")
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
