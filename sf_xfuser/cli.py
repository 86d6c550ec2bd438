"""The ``sf-xfuser`` command."""

from __future__ import annotations

import argparse
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any

from rich.console import Console

from sf_xfuser import __version__
from sf_xfuser.bench import emulate, report
from sf_xfuser.bench.outputs import Outputs


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser(arguments).parse_args(arguments)
    try:
        with _stopped_by_signals():
            status: int = options.run(options)
            return status
    except KeyboardInterrupt as stop:
        print(f"sf-xfuser {options.command}: stopped", file=sys.stderr)
        return int(*stop.args) if stop.args else 130


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP end the command as Ctrl-C does: ranks end, temporary folders go."""

    def stop(number: int, _: FrameType | None) -> None:
        for handled in numbers:
            signal.signal(handled, signal.SIG_IGN)  # the first signal ends the command
        raise KeyboardInterrupt(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command line ``arguments``. Only the flags of its subcommand are there."""
    result = argparse.ArgumentParser(
        prog="sf-xfuser", description="Topology-aware sequence parallelism and Torus Attention for xDiT."
    )
    result.add_argument("--version", action="version", version=f"sf-xfuser {__version__}")
    commands = result.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="check this installation")
    if arguments[:1] == ["doctor"]:
        from sf_xfuser.doctor import add_doctor_arguments

        add_doctor_arguments(doctor)
    bench = _add(
        commands,
        "bench",
        "benchmark Torus Attention against xDiT's own sequence parallelism",
        "Measures one attention call (with --pipeline: denoising steps) in every legal variant of xDiT's "
        "USP and of Torus Attention. Variants alternate in one process group. Each result is checked against a single "
        "process first. Runs on torchrun's ranks or, with --cluster, on an emulated cluster, which needs Linux, "
        "iproute2, and root or user namespaces.",
        "sf-xfuser bench --cluster 4x2 --inter-rate 100mbit --report bench.html",
        "sf-xfuser bench --cluster 2x2 --inter-rate 80mbit --pipeline flux --repeat 1",
        "sf-xfuser bench --grid examples/grid.toml --json rows.json --markdown rows.md",
        "torchrun --nproc-per-node 8 -m sf_xfuser bench --seq-len 32768 --heads 24",
    )
    if arguments[:1] == ["bench"]:  # only bench needs PyTorch, which takes seconds to import
        from sf_xfuser.bench.command import add_bench_arguments, bench_command

        add_bench_arguments(bench)
        bench.set_defaults(run=bench_command)
    plan = _add(
        commands,
        "plan",
        "rank the layouts for a model and a cluster, by simulation",
        "Ranks every legal layout of an attention call on a cluster with the simulator. Prints the time "
        "per call and the attention time per denoising step, bytes between machines, buffer memory, and why each "
        "layout was not chosen. Needs no cluster and no GPU.",
        "sf-xfuser plan --machines 4 --model flux --height 4096 --width 4096",
        "sf-xfuser plan --preset dgx-h100 --heads 40 --head-dim 128 --seq-len 65536",
        "sf-xfuser plan --model wan --height 720 --width 1280 --frames 81 --plot p.png",
    )
    simulate = _add(
        commands,
        "simulate",
        "simulate the timeline of an attention call on a cluster",
        "Simulates every rank of an attention call and prints its time. Writes the timeline as a plot or "
        "Chrome trace, optionally next to a measured one. Needs no cluster and no GPU.",
        "sf-xfuser simulate --machines 2 --model flux --height 2048 --width 2048",
        "sf-xfuser simulate --model flux --height 2048 --width 2048 --trace call.json",
        "sf-xfuser simulate --heads 24 --head-dim 128 --seq-len 65536 --plot call.png",
    )
    if arguments[:1] in (["plan"], ["simulate"]):
        from sf_xfuser.bench import plan_command

        plan_command.add_plan_arguments(plan)
        plan_command.add_simulate_arguments(simulate)
        plan.set_defaults(run=plan_command.plan_command)
        simulate.set_defaults(run=plan_command.simulate_command)
    models = _add(
        commands,
        "models",
        "list the supported models and their default degrees",
        "Lists the models of xDiT, the result of --sp-backend torus for each, and the degrees that it takes by default "
        "on a cluster. Needs no cluster, no GPU and no network.",
        "sf-xfuser models --machines 4 --gpus-per-machine 8",
        "sf-xfuser models --machines 2 --json models.json",
    )
    if arguments[:1] == ["models"]:
        from sf_xfuser.bench.models_command import add_models_arguments, models_command

        add_models_arguments(models)
        models.set_defaults(run=models_command)
    text = "run a command on an emulated cluster"
    example = "sf-xfuser cluster run --cluster 2x2 --inter-rate 200mbit -- python train.py"
    cluster = _add(commands, "cluster", text, f"{text.capitalize()}.", example)
    run = _add(
        cluster.add_subparsers(dest="verb", required=True),
        "run",
        "run a command on every rank",
        "Creates machines from network namespaces, connects them with shaped links, runs the command on "
        "every rank with torchrun's environment variables, and prints the bytes sent between machines.",
        example,
        "sf-xfuser cluster run --cluster 4x1 --prefix --timeout 60 -- hostname",
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
    add("--json", metavar="FILE", help="write cluster, status, failures and bytes between machines; - for standard "
        "output, and the output of the ranks goes to standard error")  # fmt: skip
    add("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="command to run on every rank")
    run.set_defaults(run=_cluster_run)
    return result


def _add(commands: Any, name: str, help: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """Add a subcommand whose ``--help`` ends with the examples."""
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description, 78),
        epilog="\n  ".join(["examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return added


def _cluster_run(options: argparse.Namespace) -> int:
    """Run the command and print the bytes between machines on stderr.

    Returns the status of the run, 2 for an invalid or impossible cluster, 1 if the output could not be written.
    """
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    try:
        outputs = Outputs("sf-xfuser cluster", options)
        spec = emulate.ClusterSpec.parse(options.cluster, options.inter_rate, options.inter_delay)
        if spec.unshaped:
            print(f"sf-xfuser cluster: {spec.unshaped}", file=sys.stderr)
        outcome = emulate.run(
            spec, argv, timeout_s=options.timeout, grace_s=options.grace, prefix=options.prefix,
            output=sys.stderr.fileno() if outputs.on_stdout else None,
        )  # fmt: skip
    except (ValueError, emulate.EmulationError) as error:
        print(f"sf-xfuser cluster: {error}", file=sys.stderr)
        return 2
    Console(stderr=True).print(report.matrix_table(f"{spec}: MB sent between machines", outcome.bytes_between))
    outputs.json({"spec": asdict(spec), **asdict(outcome)})
    return outcome.status or int(outputs.failed)


if __name__ == "__main__":
    sys.exit(main())
