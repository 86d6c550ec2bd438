"""The ``sf-xfuser`` command."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from sf_xfuser import __version__, emulate
from sf_xfuser.bench.command import add_bench_arguments, bench_command

_STYLE = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "bold red"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status."""
    parser = argparse.ArgumentParser(prog="sf-xfuser", description="Torus Attention as a backend for xDiT.")
    parser.add_argument("--version", action="version", version=f"sf-xfuser {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="check this installation",
        description="Versions, hooks, accelerators, transports, topology and environment traps. "
        "Exit status 0 when xDiT can run with --sp-backend here, 1 when not.",
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    bench = commands.add_parser(
        "bench",
        help="compare sequence-parallel methods, on GPUs or on an emulated cluster",
        description="Every legal way to run one attention call (or, with --pipeline, denoising steps) across the ranks "
        "of a cluster: xDiT's own and Torus Attention, alternating within one process group, checked against a single "
        "process first. Under torchrun on its ranks; with --cluster on an emulated cluster, which needs Linux, "
        "iproute2 and root or user namespaces.",
    )
    add_bench_arguments(bench)
    cluster = commands.add_parser("cluster", help="run a program on an emulated cluster")
    run = cluster.add_subparsers(dest="verb", required=True).add_parser(
        "run",
        help="run a torchrun-style program on every rank",
        description="Makes machines out of network namespaces, joins them by shaped links, runs the command on every "
        "rank with torchrun's variables, and counts the bytes between machines.",
    )
    emulate.add_cluster_arguments(run)
    options = parser.parse_args(argv)
    if options.command == "doctor":
        return _doctor(options.json)
    return bench_command(options) if options.command == "bench" else emulate.cluster_command(options)


def _doctor(as_json: bool) -> int:
    from sf_xfuser import doctor

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # xDiT and transformers talk while they are imported
    with Console(stderr=True).status("importing xDiT and looking at its hooks ..."):
        findings = doctor.examine()
    usable = doctor.usable(findings)
    if as_json:
        print(doctor.to_json(findings))
        return 0 if usable else 1
    console = Console()
    table = Table(title="sf-xfuser doctor", show_lines=False)
    for column in ("section", "what", "status", "detail"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        style = _STYLE[finding.status]
        table.add_row(finding.section, finding.name, f"[{style}]{finding.status}[/]", finding.detail)
    console.print(table)
    console.print("[bold green]usable[/]" if usable else "[bold red]not usable: see the failures above[/]")
    return 0 if usable else 1


if __name__ == "__main__":
    sys.exit(main())
