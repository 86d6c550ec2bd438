"""Attention processors: PipeFusion's KV cache, and Latte's temporal attention."""

from __future__ import annotations

from typing import Any

from sf_xfuser.integrations.hooks import wrapper
from sf_xfuser.integrations.xdit.repairs import context
from sf_xfuser.integrations.xdit.repairs.context import call


@wrapper
def record_update(update_and_get_kv_cache: Any, self: Any, new_kv: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    cache = update_and_get_kv_cache(self, new_kv, layer, *args, **kwargs)
    if context.is_active():
        call.cached_layer = layer
    return cache


@wrapper
def update_cache_once(usp: Any, *args: Any, **kwargs: Any) -> Any:
    """Remove ``attn_layer`` if its processor has updated the KV cache, as those of SD3 and Flux.2 do."""
    layer = kwargs.get("attn_layer")
    if layer is not None and call.cached_layer is layer:
        from xfuser.core.distributed import get_runtime_state

        if get_runtime_state().num_pipeline_patch > 1:
            context.note("PipeFusion's KV cache is updated once for each attention call")
        kwargs["attn_layer"], kwargs["head_balance_layer"] = None, layer
    try:
        return usp(*args, **kwargs)
    finally:
        call.cached_layer = None


@wrapper
def latte_call(processor_call: Any, *args: Any, **kwargs: Any) -> Any:
    with context.setting(temporal=bool(kwargs.get("latte_temporal_attention")) and context.num_ranks() > 1):
        return processor_call(*args, **kwargs)


@wrapper
def local_over_frames(usp: Any, *args: Any, **kwargs: Any) -> Any:
    if not call.temporal:
        return usp(*args, **kwargs)
    from xfuser.model_executor.layers.usp import attention

    context.note("Latte's temporal attention stays on its rank")
    return attention(*args, **kwargs)
