"""Copies of the installed xDiT with the patch series of ``patches/0.7.0``."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

SERIES = Path(__file__).parents[1] / "patches" / "0.7.0"
ORDERS = [("backend",), ("repairs",), ("repairs", "backend"), ("backend", "repairs")]


def copy_of_xdit(folder: Path, *series: str, source: Path | None = None) -> Path:
    """Copy ``source`` (None: the installed xfuser) to ``folder`` and apply ``series`` in this order."""
    source = source or Path(find_spec("xfuser").submodule_search_locations[0]).parent
    for name in ("xfuser", "entrypoints", "docs"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in series:
        patches = sorted(SERIES.glob(f"{name}/*.patch"))
        assert patches
        for patch in patches:
            for check in (["--check"], []):
                command = ["git", "apply", *check, str(patch)]
                # git apply in a repository around folder would skip the files that the repository does not track
                env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
                assert done.returncode == 0, f"{patch.name}: {done.stderr}"
    return folder
