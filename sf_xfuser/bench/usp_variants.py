"""Calls xDiT's own attention in any of its layouts, all in one process group.

``XditGroups`` selects the layout around each call. Every call uses the attention function that xDiT registers for its
attention backend (on a CPU: PyTorch's flash kernel): once without Ring, once per KV block with it, from PyTorch's ring
template. ``attention_timer`` measures these calls.

Importing this module needs no xfuser.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.integrations.xdit import plugin
from sf_xfuser.integrations.xdit.attention_backends import as_attend_function
from sf_xfuser.integrations.xdit.usp_groups import XditGroups
from sf_xfuser.kernels import AttendFunction
from sf_xfuser.layout.usp_layouts import XditConfig


def unavailable() -> str | None:
    """Why xDiT's variants cannot run in this installation; None if they can."""
    return plugin.unsupported()


def call_usp(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """xDiT's own USP, not the plugin's: attention of this rank's tokens on all ranks' tokens, not causal.

    [B, H, S, D] in and out; keys and values may have fewer heads. Collective over the sequence-parallel group, with the
    same number of tokens on every rank.
    """
    from xfuser.model_executor.layers import usp

    kv_repeat = query.shape[1] // key.shape[1]
    compact_kv = {"kv_head_repeat": kv_repeat} if kv_repeat > 1 else {}  # xDiT before 0.7 has no such parameter
    xdit_usp = inspect.unwrap(usp.USP)
    out: torch.Tensor = xdit_usp(query, key, value, dropout_p=0.0, is_causal=False, **compact_kv)
    return out


def make_groups(
    configs: Iterable[XditConfig], *, ranks_per_machine: int, members: Sequence[int] | None = None
) -> XditGroups:
    """The process groups of ``configs``. Collective over the world.

    Starts xDiT where it is not running: torch.distributed, xDiT's groups and its runtime state. xDiT then selects an
    attention backend with mergeable partial results, or raises RuntimeError. ``members[p]``: the rank at machine-major
    position ``p``; rank ``p`` by default.
    """
    plugin.enable()  # without an accelerator, importing xDiT fails otherwise
    _start_xdit()
    groups = XditGroups(range(dist.get_world_size()) if members is None else members, ranks_per_machine)
    for config in configs:
        groups.make(config)
    return groups


def _start_xdit() -> None:
    from xfuser import xFuserArgs
    from xfuser.core.distributed import init_distributed_environment, runtime_state

    if runtime_state.runtime_state_is_initialized():
        return
    init_distributed_environment()  # xDiT's world group, and torch.distributed where needed
    # With Ring over all ranks, xDiT rejects attention backends without mergeable partial results.
    args = xFuserArgs(model="none", ring_degree=dist.get_world_size())
    engine_config, _ = args.create_config()
    # Attention needs only the base class; its subclasses need a pipeline.
    runtime_state._RUNTIME = runtime_state.RuntimeState(engine_config)


def registered_attention() -> AttendFunction:
    """xDiT's attention function for Torus Attention, looked up at each call so that ``attention_timer`` measures it."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from xfuser.core.distributed import get_runtime_state
        from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY

        out, lse = as_attend_function(ATTENTION_FUNCTION_REGISTRY[get_runtime_state().attention_backend])(q, k, v)
        return out, lse

    return attend


@contextmanager
def attention_timer(callback: Callable[[float, float], None]) -> Iterator[None]:
    """Inside the block, call ``callback(start_s, end_s)`` after each call of xDiT's attention function.

    It measures xDiT's USP, and Torus Attention under ``--sp-backend torus``. On an accelerator it measures the launch,
    not the kernel. xDiT must be running.
    """
    from xfuser.core.distributed import get_runtime_state
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY

    backend = get_runtime_state().attention_backend
    kernel = ATTENTION_FUNCTION_REGISTRY[backend]

    @functools.wraps(kernel)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = kernel(*args, **kwargs)
        callback(start, time.perf_counter())
        return result

    ATTENTION_FUNCTION_REGISTRY[backend] = timed
    try:
        yield
    finally:
        ATTENTION_FUNCTION_REGISTRY[backend] = kernel
