"""Measures this package on one GPU: ``make gpu`` in a checkout, ``python -m sf_xfuser.bench.gpu`` once installed.

Needs PyTorch and no network. In a checkout it installs the package first. Each part (``gpu_parts``) is a process of its
own with a time limit, and each row is written to the document as soon as it is measured. So a part that fails, hangs or
is interrupted loses no other row. A part starts only if its estimated time is left. At the end, a table compares the
rows with ``GOALS``.

This module needs nothing but the standard library and ``config``, so that it runs before the install.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sf_xfuser.bench.document import ROW, new_document
from sf_xfuser.config import with_environment

Row = dict[str, Any]
"""``part``, ``name`` and one of: ``value`` with ``unit`` (and ``goal``, a key of ``GOALS``); ``skipped``, ``failed`` or
``not_run``, the reason."""

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Goal:
    """Largest value that meets the goal, and where the number comes from."""

    limit: float
    unit: str
    source: str


_LAUNCH_US = 5.0  # host time of one launch, as CUDA's own figures give it
GOALS = {
    "host T4U2R4": Goal(200, "us", "Python alone; 1300 us before calls were recorded as programs"),
    "host T4U8R1": Goal(250, "us", "as T4U2R4; 1700 us before"),
    "host T4U1R1": Goal(100, "us", "as T4U2R4; 550 us before"),
    "host T8U1R8": Goal(500, "us", "as T4U2R4; 5800 us before"),
    "host unstaged": Goal(80, "us", "as T4U2R4, for calls too short to be staged"),
    "launches T4U2R4": Goal(90, "launches", "190 before: attends, merges, sends and waits"),
    "launches T4U8R1": Goal(110, "launches", "269 before"),
    "enqueue T4U2R4": Goal(200 + 90 * _LAUNCH_US, "us", f"the two goals above, {_LAUNCH_US:g} us a launch"),
    "enqueue T4U8R1": Goal(250 + 110 * _LAUNCH_US, "us", f"the two goals above, {_LAUNCH_US:g} us a launch"),
    "error": Goal(2.0, "x SDPA's error", "a kernel may be twice as far from float64 as PyTorch's attention"),
    "exact": Goal(0, "elements", "copies, and repeated calls, are bitwise equal"),
    "rounding": Goal(1.0, "x the step", "half a step of the quantized format, and the scale's own rounding"),
    "chunking": Goal(1.03, "x one call", "pieces and merges may cost 3 % over one attention call"),
    "bandwidth": Goal(1 / 0.85, "x a copy", "merge and packing reach 85 % of a copy's rate"),
    "fused": Goal(1 / 0.75, "x the library", "the fused kernel reaches 75 % of the fastest library at D=128"),
}


@dataclass(frozen=True, slots=True)
class Part:
    """``command``: prints its rows as lines that start with ``ROW``; gets ``--seconds``, after which it should end. It
    is cut after ``limit_s``, and started only if ``estimate_s`` is left."""

    name: str
    command: Sequence[str]
    estimate_s: float
    limit_s: float


_ESTIMATES_S = {
    "machine": 15,
    "accuracy": 40,
    "host": 15,
    "launches": 40,
    "chunking": 60,
    "symm_mem-2": 35,
    "symm_mem-graph": 30,
    "symm_mem-4": 45,
    "accuracy-fused": 60,
    "bandwidth": 30,
    "nccl_put-2": 35,
    "nvshmem-2": 35,
    "fused": 40,
    "flags": 15,
    "nccl_put-4": 45,
    "nvshmem-4": 45,
    "nccl_put-graph": 30,
    "nvshmem-graph": 30,
}
"""The parts in order of value, with estimated seconds on one H200. No GPU has measured them yet."""

_SMOKE_ESTIMATE_S = 5
_LIMIT_FACTOR = 2  # a part may take this much longer than estimated
_RESERVE_S = 8  # between the end of a part's last case and its limit


def parts(names: Sequence[str], smoke: bool) -> list[Part]:
    """The named parts, in order of value."""
    chosen = []
    for name in (name for name in _ESTIMATES_S if name in names):
        estimate_s = _SMOKE_ESTIMATE_S if smoke else _ESTIMATES_S[name]
        command = [sys.executable, "-m", "sf_xfuser.bench.gpu_parts", name, *(["--smoke"] if smoke else [])]
        chosen.append(Part(name, command, estimate_s, 60 if smoke else _LIMIT_FACTOR * estimate_s))
    return chosen


# -- running ---------------------------------------------------------------------------------------------------------


def run_part(part: Part, limit_s: float, env: dict[str, str], folder: str, add: Callable[[Row], None]) -> None:
    """Run the part's command in ``folder`` for at most ``limit_s``, and pass each row to ``add``. A part that fails, or
    is cut, adds a row with the reason. All its processes have ended afterwards, also if this is interrupted."""
    process = subprocess.Popen(
        part.command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    deadline, log = time.monotonic() + limit_s, deque[str](maxlen=40)
    try:
        while (line := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
            text, found, row = line.rstrip().partition(ROW)
            try:
                if found:
                    add({"part": part.name, **json.loads(row)})
            except json.JSONDecodeError:  # the output of another process is in the line
                text = line.rstrip()
            if text:
                log.append(text)
        status = process.wait(timeout=max(1.0, deadline - time.monotonic()))
        reason = f"exit status {status}: {log[-1] if log else 'no output'}" if status else ""
    except (queue.Empty, subprocess.TimeoutExpired):
        reason = f"cut after {limit_s:.0f} s"
    finally:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=5)
    if reason:
        add({"part": part.name, "name": part.name, "failed": reason, "log": list(log)})


class Report:
    """The document of one run, rewritten after each row."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path, self.document = path, document
        self.rows: list[Row] = document["rows"]
        self._write()

    def add(self, row: Row) -> None:
        if row.get("goal"):
            row["limit"] = GOALS[row["goal"]].limit
        self.rows.append(row)
        self._write()
        print(
            "  ".join(cell for cell in (row["part"], row["name"], row.get("what", ""), result(row)) if cell), flush=True
        )

    def _write(self) -> None:
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps(self.document, indent=1) + "\n")
        new.replace(self.path)


def result(row: Row) -> str:
    """The result of a row as text."""
    for state in ("skipped", "failed", "not_run"):
        if state in row:
            return f"{state.replace('_', ' ')}: {row[state]}"
    text = f"{row['value']:.4g} {row['unit']}" if "value" in row else ""
    return f"{text} (goal {row['limit']:.4g}: {verdict([row])})" if "limit" in row else text


def verdict(rows: Sequence[Row]) -> str:
    return "met" if all(row["value"] <= row["limit"] for row in rows) else "missed"


def measure(parts: Sequence[Part], report: Report, seconds: float, env: dict[str, str]) -> bool:
    """Run the parts until ``seconds`` have passed. Returns whether all were started, or left out for time; False after
    an interruption."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:  # not the checkout, whose sf_xfuser has no kernels
        for number, part in enumerate(parts):
            left_s = deadline - time.monotonic()
            if part.estimate_s > left_s:
                reason = f"time: estimated {part.estimate_s:.0f} s, {max(0.0, left_s):.0f} s left"
                report.add({"part": part.name, "name": part.name, "not_run": reason})
                continue
            try:
                run_part(part, min(part.limit_s, left_s), env, folder, report.add)
            except KeyboardInterrupt:
                for missing in parts[number:]:
                    report.add({"part": missing.name, "name": missing.name, "not_run": "interrupted"})
                return False
    return True


# -- installing ------------------------------------------------------------------------------------------------------


def install(folder: Path) -> dict[str, str]:
    """Install this checkout and the wheels in its folder ``wheels/``, if this file is in a checkout that the running
    Python does not use already. Returns the environment for parts. Where pip cannot install, the package is copied to
    ``folder``."""
    if not (CHECKOUT / "pyproject.toml").is_file():
        return with_environment({})
    wheels = sorted(map(str, (CHECKOUT / "wheels").glob("*.whl")))
    if wheels:
        _pip("--no-index", *wheels)
    found = subprocess.run(
        [sys.executable, "-c", "from importlib.util import find_spec as f; print(f('sf_xfuser.kernels').origin)"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    if found.stdout and Path(found.stdout.strip()).resolve().parent == CHECKOUT / "kernels":
        print("sf-xfuser: this checkout is installed already (editable)", flush=True)
        return with_environment({})
    if _pip("--no-build-isolation", str(CHECKOUT)):
        return with_environment({})
    print(f"sf-xfuser: pip cannot install; this run uses a copy in {folder}", flush=True)
    shutil.copytree(CHECKOUT / "sf_xfuser", folder / "sf_xfuser")
    shutil.copytree(CHECKOUT / "kernels", folder / "sf_xfuser" / "kernels")
    return with_environment({"PYTHONPATH": str(folder)})


def _pip(*arguments: str) -> bool:
    """Whether ``pip install`` succeeded. Without dependencies, so that it needs no network and replaces no package."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        *arguments,
    ]
    print("$", " ".join(command), flush=True)
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if finished.returncode:
        print(finished.stdout, flush=True)
    return not finished.returncode


# -- the command -----------------------------------------------------------------------------------------------------


def summary(document: dict[str, Any]) -> list[str]:
    """The machine, the goals with the worst row of each, and what has no result."""
    rows: list[Row] = document["rows"]
    machine: Row = next((row for row in rows if row["part"] == "machine"), {})
    facts = (f"{name} {machine.get(name)}" for name in ("gpu", "driver", "cuda", "torch", "triton"))
    table = [("goal", "limit", "worst row", "", "rows", "source")]
    for name, goal in GOALS.items():
        measured = [row for row in rows if row.get("goal") == name and "value" in row]
        worst = max(measured, key=lambda row: float(row["value"]), default=None)
        got = ("not measured", "") if worst is None else (f"{worst['value']:.4g}", verdict(measured))
        table.append((name, f"<= {goal.limit:.4g} {goal.unit}", *got, str(len(measured)), goal.source))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["", ", ".join(facts), ""]
    lines += ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    without = [row for row in rows if not {"failed", "skipped", "not_run"}.isdisjoint(row)]
    return [*lines, "", *(f"{row['part']}, {row['name']}: {result(row)}" for row in without)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sf_xfuser.bench.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="stop after this many minutes. Default: 8")
    parser.add_argument("--parts", default=",".join(_ESTIMATES_S), help="comma-separated. Default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu.json"), metavar="FILE", help="the rows. Default: gpu.json"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, also on a CPU; the times are meaningless")
    options = parser.parse_args(argv)
    options.parts = options.parts.split(",")
    if unknown := [name for name in options.parts if name not in _ESTIMATES_S]:
        parser.error(f"--parts {','.join(unknown)}: choose from {', '.join(_ESTIMATES_S)}")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.absolute().parent}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every part ended well (goals may be missed), 1 if one failed, 2 without PyTorch or a GPU, 130 after
    an interruption."""
    options = parse(argv)
    started_s = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` and `make` end this as Ctrl-C does
    document = new_document("python -m sf_xfuser.bench.gpu", accelerator="see the part machine")
    report = Report(options.out, document | {"smoke": options.smoke})
    with tempfile.TemporaryDirectory() as copied:
        env = install(Path(copied))
        first, *others = parts(["machine", *options.parts], options.smoke)
        seconds = 60 * options.minutes
        finished = measure([first], report, seconds, env)
        if report.rows[-1].get("gpu", "unknown") is None and not options.smoke:
            print("no GPU: PyTorch finds no CUDA device (--smoke runs tiny sizes on the CPU)", file=sys.stderr)
            return 2
        finished = finished and measure(others, report, started_s + seconds - time.monotonic(), env)
    print("\n".join(summary(report.document)))
    print(f"\nrows: {options.out}")
    return 130 if not finished else int(any("failed" in row for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
