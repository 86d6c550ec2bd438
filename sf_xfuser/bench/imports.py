"""Measures the time that the installed plugin adds to ``import xfuser``: ``python -m sf_xfuser.bench.imports``.

New processes alternate between *on* (as installed), *off* (``SF_XFUSER_AUTOLOAD=0``) and *absent*
(``TORCH_DEVICE_BACKEND_AUTOLOAD=0``: PyTorch does not search for the plugin). Without an accelerator, xDiT cannot be
imported without the plugin. PyTorch then reports a CUDA build and a device, so that all variants import the same
modules as on a GPU, without the hooks of the CPU platform. Needs xfuser.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from rich.console import Console
from rich.table import Table

from sf_xfuser.config import AUTOLOAD_VARIABLE, with_environment

#: Environment variables of each variant.
VARIANTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "on": MappingProxyType({AUTOLOAD_VARIABLE: "1"}),
        "off": MappingProxyType({AUTOLOAD_VARIABLE: "0"}),
        "absent": MappingProxyType({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}),
    }
)
LIMIT = 1.02

# torch.backends.mps reports the device; xDiT does not use it, because CUDA comes first.
_IMPORT = """
import sys, time
started = time.perf_counter()
import torch
if not torch.accelerator.is_available():
    torch.version.cuda, torch.backends.mps.is_available = "13.0", lambda: True
__import__("xfuser")
seconds = time.perf_counter() - started
print(f"{seconds} {'sf_xfuser.integrations.xdit.plugin' in sys.modules}")
"""


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each process, by variant, after one round that fills the page cache.

    Raises RuntimeError if xDiT cannot be imported or the plugin is loaded in the wrong variant.
    """
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(rounds + 1):
        for variant in list(VARIANTS)[:: 1 if number % 2 == 0 else -1]:
            seconds = _import_once(variant)
            if number:
                times[variant].append(seconds)
    return times


def _import_once(variant: str) -> float:
    result = subprocess.run(
        [sys.executable, "-c", _IMPORT],
        env=with_environment(VARIANTS[variant]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if result.returncode:
        raise RuntimeError(f"xfuser cannot be imported with the plugin {variant}:\n{result.stderr[-2000:]}")
    seconds, loaded = result.stdout.split()[-2:]
    if (loaded == "True") != (variant == "on"):
        raise RuntimeError(f"with the plugin {variant}, sf_xfuser.integrations.xdit.plugin in sys.modules is {loaded}")
    return float(seconds)


def ratios(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of *on* over that of each other variant."""
    median = {variant: statistics.median(seconds) for variant, seconds in times.items()}
    return {variant: median["on"] / median_s for variant, median_s in median.items() if variant != "on"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sf_xfuser.bench.imports", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="processes per variant. Default: 15")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times to this file")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    times = measure(options.rounds)
    relative = ratios(times)
    table = Table("plugin", "median s", "minimum s", "on / this")
    for variant, seconds in times.items():
        ratio = f"{relative[variant]:.3f}" if variant in relative else ""
        table.add_row(variant, f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}", ratio)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    if options.json:
        options.json.write_text(json.dumps({"seconds": times, "ratios": relative}, indent=1) + "\n")
    if (slower := max(relative.values())) > LIMIT:
        print(f"import xfuser takes {slower:.3f} times as long with the plugin; the limit is {LIMIT}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
