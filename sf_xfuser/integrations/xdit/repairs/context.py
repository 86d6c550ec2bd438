"""State that the repairs share: the current transformer call, and the repairs that were used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class CallContext:
    """Properties of the current transformer call that ``USP`` cannot derive from its ``[B, H, S, D]`` tensors."""

    text: int = 0  # leading text tokens, replicated on all ranks
    padding: int = 0  # padded image tokens at the end of the last rank's chunk
    temporal: bool = False  # attention over frames, which are replicated
    cached_layer: Any = None  # its attention processor has just updated the KV cache
    prompt_lengths: Sequence[int] = ()  # valid text tokens of each sample; empty without padding
    padded_length: int = 0  # the length that prompts are padded to


call = CallContext()
used: list[str] = []  # repairs that a call needed, in the order of their first use

# Set by repairs.hooks().
is_active: Callable[[], bool] = bool  # whether --sp-backend is given
log: Callable[[str], None] = print


@contextmanager
def setting(**values: Any) -> Iterator[None]:
    """Set fields of ``call`` inside the block."""
    before = {name: getattr(call, name) for name in values}
    for name, value in values.items():
        setattr(call, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(call, name, value)


def num_ranks() -> int:
    """Size of the sequence-parallel group; 1 without ``--sp-backend``, so that nothing is repaired."""
    if not is_active():
        return 1
    from xfuser.core.distributed import get_sequence_parallel_world_size

    return int(get_sequence_parallel_world_size())


def note(repair: str) -> None:
    """Log a repair when a call first needs it."""
    if not torch.compiler.is_compiling() and repair not in used:
        used.append(repair)
        log(f"repaired in xDiT: {repair}")
