"""Runs the settings of ranks/settings.py for the tests of memory, compilation and caches."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sf_xfuser.bench.tiny_models import save_tiny_model
from tests.launch import on_cluster, reports

# Largest difference to one process, as a fraction of the largest value. It is 0.05 if ranks attend to their own keys.
LIMITS = {"exact": 5e-5, "as xDiT": 5e-5, "exact to rounding": 2e-2}
CALLS_OF_A_STEP = 4  # Flux: four blocks. Wan: two blocks with and without the prompt


def both(*settings: str) -> list[str]:
    """The cases of settings that are tested through ``parallelize`` and through xDiT."""
    return [f"{way}:{setting}" for setting in settings for way in ("diffusers", "xdit")]


def run(folder: Path, kind: str, cases: Iterable[str], timeout: float = 200) -> dict[str, dict[str, Any]]:
    """case -> rank -> what the rank reported. ``kind``: memory, compilation or caches. One launch."""
    for family in ("flux", "wan"):
        save_tiny_model(family, folder / family)
    given = [f"{kind}:{case}" for case in cases]
    no_pool = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # else each rank starts a process for each core
    found = reports(on_cluster("settings.py", folder, *given, timeout=timeout, env=no_pool).output, given)
    return {case.partition(":")[2]: ranks for case, ranks in found.items()}


def require_result(ranks: dict[str, Any], result: str) -> dict[str, Any]:
    """The report of rank 0, after a check that all ranks made the same staged calls with ``result``, that of a row."""
    assert len(ranks) == 4, ranks
    first, *_ = reported = list(ranks.values())
    if isinstance(first, str) and first.startswith("ModuleNotFoundError"):
        pytest.skip(first)
    assert not any(isinstance(report, str) for report in reported), ranks
    assert all(report["calls"] == first["calls"] and report["stages"] > 1 for report in reported), ranks
    assert not any(report["fell back"] for report in reported), ranks
    assert all(report["error"] <= LIMITS[result] for report in reported), ranks
    return first
