"""The JSON document of a benchmark run, and the version and commit behind it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from sf_xfuser import __version__

COMMIT_FILE = "commit.txt"  # in the package; setup.py writes it into distributions

_PACKAGES = ("torch", "triton", "xfuser", "diffusers", "yunchang", "para-attn")
ROW = "@row "
"""Starts a line of a process's output that is one row, as JSON."""


def print_row(row: dict[str, Any]) -> None:
    print(ROW + json.dumps(row), flush=True)


def new_document(command: str, accelerator: str | None = None) -> dict[str, Any]:
    """A document without rows: date, commit of this package, command line, hardware and versions. PyTorch is asked
    for the ``accelerator`` unless it is given."""
    if accelerator is None:
        import torch

        accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "schema": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join([*shlex.split(command), *sys.argv[1:]]),
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "memory_bytes": memory, "accelerator": accelerator},
        "versions": {
            "sf_xfuser": __version__,
            "python": platform.python_version(),
            **{name: installed_version(name) for name in _PACKAGES},
        },
        "rows": [],
        "timelines": [],
    }


def commit() -> str | None:
    """The commit of this package: of its checkout, or recorded when it was built. None if neither is known.

    A repository that only contains the folder of an installed package is not its checkout.
    """
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        if git("ls-files", "--full-name", "__init__.py") == "sf_xfuser/__init__.py":
            return git("describe", "--always", "--dirty") or None
    except (OSError, subprocess.TimeoutExpired):
        pass  # no git: it may be recorded
    try:
        return (package / COMMIT_FILE).read_text().strip() or None
    except OSError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def installed_version(name: str) -> str | None:
    """The version of a package; None if it is not installed, or if its metadata is damaged."""
    try:
        return metadata.version(name) or None
    except (metadata.PackageNotFoundError, KeyError):
        return None
