"""xDiT's own attention call as variants of an A/B run: its USP, unchanged, in any of its layouts, call by call.

What xDiT's USP looks at is swapped around each call (``xdit_groups``), so variants alternate inside one process group and a
run compares them under the same conditions.

Every variant calls the attention function registered for xDiT's attention backend (on a CPU: PyTorch's CPU flash kernel):
once per call without Ring, once per KV block with it, from PyTorch's ring template. ``attention_timer`` sits there.

Importing this module needs no xfuser.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.integrations.xdit import plugin
from sf_xfuser.integrations.xdit.attention_backends import as_attend_function
from sf_xfuser.integrations.xdit.usp_groups import XditGroups
from sf_xfuser.kernels import AttendFunction
from sf_xfuser.layout.usp_layouts import XditConfig


def available() -> str | None:
    """Why xDiT's variants cannot run in this installation; None if they can."""
    return plugin.unsupported()


class XditVariant:
    """One configuration, ready to be called. Made by :func:`open_variants`; holds no tensors."""

    def __init__(self, config: XditConfig, groups: XditGroups) -> None:
        self.config, self.groups = config, groups

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """``call_usp`` as ``config`` says."""
        with self.selected():
            return call_usp(query, key, value)

    def selected(self) -> AbstractContextManager[None]:
        """Inside, xDiT is laid out as ``config`` says, for whatever of xDiT's is called; then as it was. Local."""
        return self.groups.use(self.config)


def call_usp(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of this rank's tokens on everybody's, not causal: [B, H, S, D] in (KV may have fewer heads), out. By
    xDiT's own USP, also where the plugin is in its place.

    Collective over the sequence-parallel group; every rank holds the same number of tokens.
    """
    from xfuser.model_executor.layers import usp

    kv_repeat = query.shape[1] // key.shape[1]
    compact_kv = {"kv_head_repeat": kv_repeat} if kv_repeat > 1 else {}  # xDiT before 0.7 has no such parameter
    xdits_own = inspect.unwrap(usp.USP)
    out: torch.Tensor = xdits_own(query, key, value, dropout_p=0.0, is_causal=False, **compact_kv)
    return out


def open_variants(
    configs: Sequence[XditConfig],
    *,
    ranks_per_machine: int,
    members: Sequence[int] | None = None,
) -> dict[XditConfig, XditVariant]:
    """The variants of ``configs``, which share process groups. Collective over the world; the same arguments everywhere.

    Starts xDiT where it is not started: torch.distributed if need be, xDiT's groups, its runtime state. That asks
    for an attention backend whose partial results can be merged (RuntimeError where xDiT takes one that cannot).
    ``members[p]`` is the rank at machine-major position
    ``p``, for ``"machines-first"``; the default is rank ``p``.
    """
    plugin.enable()  # on a machine without an accelerator xDiT cannot even be imported otherwise
    _start_xdit()
    groups = XditGroups(range(dist.get_world_size()) if members is None else members, ranks_per_machine)
    for config in configs:
        groups.make(config)
    return {config: XditVariant(config, groups) for config in configs}


def _start_xdit() -> None:
    from xfuser import xFuserArgs
    from xfuser.core.distributed import init_distributed_environment, runtime_state

    if runtime_state.runtime_state_is_initialized():
        return
    init_distributed_environment()  # xDiT's world group; torch.distributed too where it is not initialised
    # Ring over all ranks: xDiT then refuses attention backends that no ring could merge.
    args = xFuserArgs(model="none", ring_degree=dist.get_world_size())
    engine_config, _ = args.create_config()
    # The base class is what attention needs; the others want a pipeline.
    runtime_state._RUNTIME = runtime_state.RuntimeState(engine_config)


def registered_attention() -> AttendFunction:
    """xDiT's attention function as Torus Attention calls it: looked up at each call, so ``attention_timer`` sees it."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from xfuser.core.distributed import get_runtime_state
        from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY

        out, lse = as_attend_function(ATTENTION_FUNCTION_REGISTRY[get_runtime_state().attention_backend])(q, k, v)
        return out, lse

    return attend


@contextmanager
def attention_timer(callback: Callable[[float, float], None]) -> Iterator[None]:
    """Inside, ``callback(start_s, end_s)`` follows each call of xDiT's attention function, in ``time.perf_counter``.

    It sees every variant of this module and Torus Attention under ``--sp-backend torus``, which look the function up at
    each call. On an accelerator the times are those of the launch, not of the kernel. After ``open_variants``.
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
