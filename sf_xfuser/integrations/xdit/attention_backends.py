"""xDiT's attention backends (those with log-sum-exp, which Torus Attention merges by) and xDiT's runtime state.

Importing this module needs no xfuser.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from sf_xfuser.kernels import AttendFunction

# Backends of dense attention that return the natural-log log-sum-exp, which the merge of partial results needs.
LSE_BACKENDS = frozenset(
    {"SDPA_FLASH", "SDPA_EFFICIENT", "CUDNN", "FLASH", "FLASH_3", "FLASH_3_FP8", "AITER", "SAGE", "NPU"}
)


_LSE_IN_A_RING = frozenset({"AITER_SAGE", "AITER_SAGE_V2"})  # xDiT checks that the version of AITER can


def no_fallback_reason(backend: str, ring_degree: int, strict: bool) -> str | None:
    """Why calls of a backend without log-sum-exp cannot fall back to xDiT's own USP, with the remedy; None if they can.
    ``ring_degree``: that of xDiT's groups."""
    remedy = f"use one of {', '.join(sorted(LSE_BACKENDS))}"
    if ring_degree > 1 and backend not in _LSE_IN_A_RING:
        return (
            f"which xDiT's own USP needs as well, to merge the results of its ring (ring_degree {ring_degree}); "
            f"{remedy}, or a --sp-plan with ring=1"
        )
    if strict:
        return f"so every call would fall back to xDiT's own USP, which --sp-strict does not allow; {remedy}"
    return None


def with_lse(attention_backend: Any) -> Any:
    """``attention_backend``, a member of xDiT's ``AttentionBackendType``, or the fastest one with log-sum-exp."""
    if attention_backend.name in LSE_BACKENDS:
        return attention_backend
    from xfuser.envs import PACKAGES_CHECKER

    packages = PACKAGES_CHECKER.get_packages_info()
    if packages.get("has_flash_attn_3"):
        name = "FLASH_3"
    elif torch.cuda.is_available() and torch.version.hip is None and torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        name = "CUDNN"
    else:
        name = "FLASH" if packages.get("has_flash_attn") else "SDPA_FLASH"
    return type(attention_backend)[name]


@lru_cache(maxsize=64)
def as_attend_function(registered: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> AttendFunction:
    """A function of xDiT's registry as ``attend(q, k, v)``, with the log-sum-exp in [B, H, Sq]. The same one for the
    same function: a CUDA graph of calls refers to it."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = registered(q, k, v, dropout_p=0.0, is_causal=False, attention_kwargs=None)
        if lse.dim() == 4:  # cuDNN in some versions: [B, H, Sq, 1]
            lse = lse.squeeze(-1)
        return out, lse[..., : q.shape[2]]  # memory-efficient SDPA pads Sq to a multiple of 32

    return attend


class XditState:
    """The parts of xDiT's runtime state that a call depends on."""

    def attention_backend(self, explicit: Any) -> str:
        """Name of the attention backend of a call; ``explicit`` is the call's own ``backend=``."""
        from xfuser.core.distributed import get_runtime_state

        backend = explicit if explicit is not None else get_runtime_state().attention_backend
        return str(backend.name)

    def registered_attention(self, backend: str) -> Callable[..., Any]:
        """The function of xDiT's registry, without the decorator that adds joint tensors."""
        from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType

        function: Callable[..., Any] = ATTENTION_FUNCTION_REGISTRY[AttentionBackendType[backend]]
        return function

    def fp8_communication(self) -> bool:
        """Whether xDiT compresses its all-to-all."""
        from xfuser.core.distributed import get_runtime_state

        return getattr(get_runtime_state(), "fp8_comms", None) is not None

    def cached_by_pipefusion(self, attn_layer: Any) -> bool:
        """Whether USP keeps a PipeFusion KV cache for this layer."""
        from xfuser.core.distributed import get_runtime_state

        if attn_layer is None or get_runtime_state().num_pipeline_patch == 1:
            return False  # without PipeFusion wrapped layers have entries too, and the cache changes nothing
        from xfuser.core.cache_manager.cache_manager import get_cache_manager

        manager = get_cache_manager()
        return bool(manager.has_cache_entry(attn_layer)) if hasattr(manager, "has_cache_entry") else True
