"""Resource usage of the kernels, without a GPU: ``python -m sf_xfuser.bench.kernels``.

Compiles every shipped configuration for the architectures in ``kernels.shipped`` and prints its registers, shared
memory and spills. Exits with status 1 if a configuration spills more than ``KNOWN_SPILLS``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sf_xfuser.kernels.shipped import all_shipped, compile_for

KNOWN_SPILLS = {
    "3.5": {
        f"attend chunks (last) D={D} on sm_100": nbytes for D, nbytes in ((72, 32), (96, 40), (128, 24), (256, 32))
    },
    "3.6": {"attend chunks D=128 on sm_100": 32, "attend chunks (last) D=128 on sm_100": 32},
}
"""Bytes per thread, by Triton version. 3.7 to 3.9 spill nothing. 3.4 cannot compile every fused kernel for sm_100."""


def usages() -> list[dict[str, Any]]:
    """One row per configuration and architecture. Needs Triton."""
    return [
        {"kernel": kernel.label, "architecture": f"sm_{architecture}", **asdict(compile_for(kernel, architecture))}
        for kernel in all_shipped()
        for architecture in kernel.architectures
    ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per configuration: registers, shared bytes, widest load and spills, by architecture."""
    architectures = sorted({row["architecture"] for row in rows}, key=lambda name: int(name.removeprefix("sm_")))
    result = Table(title="registers / shared bytes / bits of the widest load; spilled bytes in red")
    result.add_column("kernel")
    for name in architectures:
        result.add_column(name, justify="right")
    by_kernel: dict[str, dict[str, str]] = {}
    for row in rows:
        text = f"{row['registers']} / {row['shared_bytes']} / {row['load_bits']}"
        if row["spilled_bytes"]:
            text += f" [red]spills {row['spilled_bytes']}[/red]"
        by_kernel.setdefault(row["kernel"], {})[row["architecture"]] = text
    for kernel, cells in by_kernel.items():
        result.add_row(kernel, *(cells.get(name, "") for name in architectures))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sf_xfuser.bench.kernels", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    options = parser.parse_args(argv)
    try:
        import triton
    except ImportError:
        sys.exit("Triton is not installed: pip install triton")
    if triton.knobs.runtime.interpret:
        sys.exit("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    rows = usages()
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    known = KNOWN_SPILLS.get(".".join(triton.__version__.split(".")[:2]), {})
    spilled = {f"{row['kernel']} on {row['architecture']}": row["spilled_bytes"] for row in rows}
    spilling = [name for name, nbytes in spilled.items() if nbytes > known.get(name, 0)]
    if spilling:
        print(f"kernels that spill registers: {', '.join(spilling)}", file=sys.stderr)
    return int(bool(spilling))


if __name__ == "__main__":
    sys.exit(main())
