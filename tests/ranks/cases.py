"""The rank side of tests: reports results, and runs many small cases in one launch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping

import torch.distributed as dist


def report(case: str, result: object) -> None:
    """Write one line with the JSON of ``result`` that ``launch.records`` reads."""
    os.write(1, f"@report {json.dumps([case, os.environ.get('RANK', '0'), result])}\n".encode())


def run_cases(
    program: Mapping[str, Callable[[int], str | None]], names: Iterable[str], caught: type | tuple[type, ...]
) -> None:
    """Call ``case_<name>(rank)`` of ``program`` (its globals) for each name, and report the returned text, or the
    error if its type is in ``caught``. Collective."""
    for name in names:
        try:
            text = program[f"case_{name}"](dist.get_rank()) or "nothing was raised"
        except caught as error:
            text = f"{type(error).__name__}: {error}"
        report(name, str(text))
        dist.barrier()
