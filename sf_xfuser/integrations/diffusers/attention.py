"""Replaces diffusers' context-parallel attention function, for models that ``parallelize`` has changed.

Tensors are [B, S, H, D], as in diffusers: B batch, S tokens of this rank, H heads, D head size.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sf_xfuser.integrations import caches
from sf_xfuser.integrations.fallback import DropIn
from sf_xfuser.integrations.hooks import Hook, HookSet
from sf_xfuser.integrations.xdit.attention_backends import as_attend_function
from sf_xfuser.kernels import AttendFunction, sdpa_attend
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.call import Tokens

_DISPATCH = "diffusers.models.attention_dispatch"
_ATTRIBUTE = "sf_xfuser"  # on a ContextParallelConfig, on attention modules and on processor classes
uncompiled = partial(torch.compiler.disable, reason="Torus Attention is not traced: compile without fullgraph=True")

_MASKED = -1000.0  # added to a score, it makes the weight 0 in float32; diffusers adds -10000 (bfloat16: -9984)


@dataclass(eq=False, kw_only=True)
class TorusContextParallel(DropIn):
    """The attention of one parallelized model, in place of ``original``, diffusers' own function.

    ``splits_text``: the plan splits ``encoder_hidden_states``. forward.py sets ``in_forward`` and ``is_uneven`` (some
    sequence length is not divisible by the number of ranks). ``attended``: attention modules that reached ``__call__``.
    """

    unsupported = "torus cannot run this attention call exactly"
    original_name = "diffusers' own context-parallel attention"

    original: Callable[..., Any]
    splits_text: bool
    in_forward: bool = False
    is_uneven: bool = False
    attended: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Create ``config``; ``enable_parallelism`` of diffusers would set its own on the model and its processors."""
        super().__post_init__()
        parallel = importlib.import_module("diffusers.models._modeling_parallel")
        layout = self.mesh.layout
        config = parallel.ContextParallelConfig(ring_degree=layout.ring_degree, ulysses_degree=layout.ulysses_degree)
        device = "cuda" if dist.get_backend(self.mesh.ulysses_group) == "nccl" else "cpu"
        config._ulysses_mesh = DeviceMesh.from_group(self.mesh.ulysses_group, device)
        setattr(config, _ATTRIBUTE, self)
        self.config = parallel.ParallelConfig(context_parallel_config=config)

    @uncompiled
    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        *,
        forward_op: Callable[..., Any],
        **rest: Any,
    ) -> Any:
        """Same contract as ``original``. ``query`` [B, S, H, D], ``key`` and ``value`` [B, S_kv, H_kv, D]; returns
        [B, S, H, D]. ``attn_mask`` covers this rank's keys."""
        if not self.in_forward:
            raise RuntimeError(
                "attention of a parallelized model ran outside the model's forward, so its inputs were not split: call "
                "the model itself, not model.forward() or one of its modules"
            )
        self.attended.add(self.mesh.layer)
        self._reject_ordered_keys(key, attn_mask, is_causal, forward_op)
        unsupported = {"attention dropout": dropout_p, "the caller requests the log-sum-exp": return_lse}
        reason = self.mesh.unavailable_reason() or next(
            (text for text, applies in unsupported.items() if applies), None
        )
        if reason is not None:
            self._require_fallback(reason, attn_mask)
            self.count_fallback(reason)
            options = (attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)
            return self.original(query, key, value, *options, forward_op=forward_op, **rest)
        self.handled += 1
        attention = self.attention(local_attention(forward_op, scale), scale, query.shape[3])
        attend = partial(torus_attention, mesh=self.mesh, attention=attention)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if attn_mask is not None:
            return self._attend_to_unmasked_keys(attend, q, k, v, attn_mask).transpose(1, 2)
        counts = Tokens(*((x.shape[2],) * self.mesh.layout.world_size for x in (q, k)))
        return attend(q, k, v, tokens=None if self.is_uneven else counts).transpose(1, 2)

    def _reject_ordered_keys(
        self, key: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool, forward_op: Callable[..., Any]
    ) -> None:
        """Raise ValueError if the result depends on the order of keys, which differs from the model's inputs: each rank
        has its part of the text, then its part of the image. Local, with the same result on all ranks."""
        window = tuple(getattr(forward_op, "keywords", {}).get("window_size", (-1, -1)))
        if is_causal:
            reason = "causal attention needs keys in order"
        elif window != (-1, -1):
            reason = f"a window of {window} needs keys in order"
        elif attn_mask is not None and (attn_mask.dim() != 4 or attn_mask.shape[2:] != (1, key.shape[1])):
            reason = f"a mask of shape {list(attn_mask.shape)} is not [batch, heads, 1, {key.shape[1]} local keys]"
        else:
            return
        raise ValueError(f"{self.unsupported}: {reason}, and tokens are split over ranks; leave it out")

    def _attend_to_unmasked_keys(
        self, attend: Callable[..., torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Attention over the keys that ``mask`` [B or 1, H or 1, 1, S_kv] keeps. Exact with every kernel, because the
        other keys are removed. Collective: ranks exchange how many keys they keep. Makes one call per mask of the
        batch; on a GPU each call synchronizes to read the mask."""
        kept = mask if mask.dtype == torch.bool else mask > _MASKED
        reason = None
        if not torch.equal(kept, kept[:, :1].expand_as(kept)):
            reason = "the mask differs between heads; give one for all heads"
        elif mask.dtype != torch.bool and mask[kept].any():
            reason = f"the mask has values between {_MASKED:g} and 0, which only weaken keys; give a boolean mask"
        indices = [row.nonzero().flatten() for row in kept[:, 0, 0]]
        with self.mesh.call():
            reports = self.mesh.control.gather("attention mask", [reason, q.shape[2], [len(i) for i in indices]])
            if not all(map(sum, zip(*(counts for _, _, counts in reports), strict=True))):
                reason = "the mask leaves a sample without keys; keep at least one"
            if reasons := {reason, *(reason for reason, _, _ in reports)} - {None}:
                self.mesh.refuse(f"{self.unsupported}: {min(reasons)}")
        q_tokens = [queries for _, queries, _ in reports]
        outs = []
        for n, index in enumerate(indices):
            sample = slice(n, n + 1) if len(indices) > 1 else slice(None)
            kept_kv = (x[sample].index_select(2, index) for x in (k, v))
            outs.append(attend(q[sample], *kept_kv, tokens=Tokens(q_tokens, [c[n] for _, _, c in reports])))
        return torch.cat(outs)

    def _require_fallback(self, reason: str, attn_mask: torch.Tensor | None) -> None:
        """Raise ValueError if ``original`` would be wrong: its ring ignores masks, its Ulysses needs equal parts."""
        layout = self.mesh.layout
        if layout.ring_degree > 1:
            limit = "without a ring: give TorusArgs(backend='torus', plan='torus=T,ulysses=U'), T x U = number of ranks"
        elif self.is_uneven:
            limit = f"with sequence lengths divisible by {layout.world_size} ranks: choose such a size and text length"
        elif attn_mask is not None:
            limit = "without a mask: leave the mask out"
        else:
            return
        raise ValueError(f"{self.unsupported}: {reason}; {self.original_name} can only run it {limit}")

    # -- attention modules --------------------------------------------------------------------------------------------

    def configure(self, attention: list[tuple[str, torch.nn.Module, Any]]) -> None:
        """Make the current processors attend across ranks, and check this after each of their calls."""
        require_backend(attention)
        for name, module, processor in attention:
            if hasattr(processor, "_parallel_config"):
                processor._parallel_config = self.config
            setattr(module, _ATTRIBUTE, (self, name))
            _check_calls_of(type(processor), name)


def attention_modules(modules: Mapping[str, torch.nn.Module]) -> list[tuple[str, torch.nn.Module, Any]]:
    """(name, module, processor) for each attention module."""
    entries = ((name, module, getattr(module, "processor", None)) for name, module in modules.items())
    return [(name, module, processor) for name, module, processor in entries if processor is not None]


def require_backend(attention: list[tuple[str, torch.nn.Module, Any]]) -> None:
    """Raise ValueError if an attention backend would silently attend to the tokens of one rank only."""
    registry = importlib.import_module(_DISPATCH)._AttentionBackendRegistry
    for _, _, processor in attention:
        backend = getattr(processor, "_attention_backend", None) or registry.get_active_backend()[0]
        name = str(getattr(backend, "value", backend))
        if name not in registry._supports_context_parallel:
            raise ValueError(
                f"attention backend {name!r} does not support context parallelism; call model.set_attention_backend() "
                f"with one of {sorted(registry._supports_context_parallel)}"
            )


def _check_calls_of(processor: type, name: str) -> None:
    """Wrap ``processor.__call__`` to check that its attention ran across ranks. The wrapper is on the processor because
    caches replace the forward of the attention module. Raises ValueError for a function."""
    call: Any = processor.__call__
    if hasattr(call, _ATTRIBUTE):
        return
    if not inspect.isfunction(call):
        raise ValueError(f"{name} has a {processor.__name__} as attention processor; give an instance of a class")

    @functools.wraps(call)
    def checked(self: Any, attention: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(attention, _ATTRIBUTE):
            return call(self, attention, *args, **kwargs)
        _before_attention(attention)
        output = call(self, attention, *args, **kwargs)
        _after_attention(attention, self)
        return output

    setattr(checked, _ATTRIBUTE, True)
    processor.__call__ = checked  # type: ignore[method-assign]


@uncompiled
def _before_attention(attention: torch.nn.Module) -> None:
    torus, name = getattr(attention, _ATTRIBUTE)
    torus.mesh.layer = name
    torus.attended.discard(name)


@uncompiled
def _after_attention(attention: torch.nn.Module, processor: Any) -> None:
    """Raise RuntimeError if the processor attended only to this rank's tokens. Cross-attention may do so if the text is
    not split, because every rank then has all keys."""
    torus, name = getattr(attention, _ATTRIBUTE)
    may_be_local = getattr(attention, "is_cross_attention", False) and not torus.splits_text
    if name not in torus.attended and not may_be_local:
        raise RuntimeError(
            f"{name} attended to the tokens of this rank only: its processor {type(processor).__name__} does not pass "
            f"its _parallel_config to diffusers' dispatch_attention_fn, or its attention backend does not support "
            f"context parallelism; set a processor that does, or call model.set_attention_backend() with another one"
        )


@lru_cache(maxsize=64)  # a CUDA graph of calls refers to the function
def local_attention(forward_op: Callable[..., Any], scale: float | None) -> AttendFunction:
    """The local attention of a diffusers backend as ``attend(q, k, v)`` on [B, H, S, D]. ``forward_op`` is its operator
    on [B, S, H, D]. The native operator returns no log-sum-exp [B, S, H]; ``sdpa_attend`` replaces it."""
    if getattr(forward_op, "__name__", "") == "_native_attention_forward_op":
        return partial(sdpa_attend, scale=scale)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = forward_op(None, *tensors, None, 0.0, False, scale, False, True, _save_ctx=False)
        return out.transpose(1, 2), lse.transpose(1, 2)

    return as_attend_function(attend)


# -- the hook in diffusers --------------------------------------------------------------------------------------------


def _wrap_dispatch(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _templated_context_parallel_attention(*args: Any, **kwargs: Any) -> Any:
        config = getattr(kwargs.get("_parallel_config"), "context_parallel_config", None)
        return (getattr(config, _ATTRIBUTE, None) or original)(*args, **kwargs)

    return _templated_context_parallel_attention


_HOOK = Hook(
    module=_DISPATCH,
    name="_templated_context_parallel_attention",
    wrap=_wrap_dispatch,
    why="every attention backend of diffusers that supports context parallelism calls this global function",
    remove_when="diffusers' ContextParallelConfig accepts the function that computes attention between ranks",
)
_hook_set = HookSet((_HOOK,), roots=("diffusers",))


def install_hook() -> Callable[..., Any]:
    """Hook diffusers once and return its own function. Raises RuntimeError if it has no context parallelism."""
    try:
        dispatch = importlib.import_module(_DISPATCH)
        _hook_set.install()
        caches.install()
        original: Callable[..., Any] = dispatch._templated_context_parallel_attention.__wrapped__
        return original
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"parallelize() needs a diffusers with context parallelism (tested: 0.42.1): pip install -U diffusers "
            f"({type(error).__name__}: {error})"
        ) from None
