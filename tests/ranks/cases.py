"""Runs many small test cases in one launch; rank side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch.distributed as dist


def run_cases(
    program: Mapping[str, Callable[[int], str | None]], names: Iterable[str], caught: type | tuple[type, ...]
) -> None:
    """Call ``case_<name>(rank)`` of ``program`` (its globals) for each name, and print ``@@name rank text@@`` with the
    returned text, or the error if its type is in ``caught``. ``launch.reports`` parses it. Collective."""
    rank = dist.get_rank()
    for name in names:
        try:
            text = program[f"case_{name}"](rank) or "nothing was raised"
        except caught as error:
            text = f"{type(error).__name__}: {error}"
        print(f"@@{name} {rank} {text}@@", flush=True)
        dist.barrier()
