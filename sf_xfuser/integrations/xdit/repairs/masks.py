"""Masks of padded text that xDiT ignores, so that the padding is attended to.

If xDiT passes the mask to an attention function that ignores it, SDPA computes the call. xDiT passes no mask for a
batch of prompts of different length: each sample then attends to its own text, in replicated joint tensors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sf_xfuser.integrations.hooks import wrapper
from sf_xfuser.integrations.xdit.repairs import context
from sf_xfuser.integrations.xdit.repairs.context import call

# Attention functions of xDiT that ignore masks of keys, and those that use only ``indices_k``.
_NO_MASK = ("SDPA_FLASH", "SDPA_EFFICIENT", "CUDNN", "FLASH_3_FP8", "FLASH_4_FP4", "SAGE", "NPU")
_INDICES = ("FLASH", "FLASH_3", "FLASH_4", "AITER")
_JOINT = ("joint_query", "joint_key", "joint_value")
_Attention = Callable[..., tuple[Tensor, Tensor | None]]


def _wrapper_with_arguments(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """:func:`wrapper` for ``function(original, arguments, *args, **kwargs)``; ``arguments`` are those by name."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        bind = inspect.signature(original).bind

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return function(original, bind(*args, **kwargs).arguments, *args, **kwargs)

        return replacement

    return wrap


# -- masks that are passed ---------------------------------------------------------------------------------------------


def mask_with_sdpa(registry: Mapping[Any, _Attention]) -> dict[Any, _Attention]:
    """xDiT's attention functions by backend; SDPA computes the calls with a mask that a function would ignore."""
    sdpa = next(function for backend, function in registry.items() if backend.name == "SDPA")
    return {
        backend: _with_mask(backend.name, function, sdpa) if backend.name in _NO_MASK + _INDICES else function
        for backend, function in registry.items()
    }


def _with_mask(name: str, function: _Attention, sdpa: _Attention) -> _Attention:
    @functools.wraps(function)
    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        attention_kwargs = kwargs.get("attention_kwargs") or {}
        mask: Any = attention_kwargs.get("attn_mask")
        indices: Any = attention_kwargs.get("indices_k")
        if not context.is_active() or (mask is None and indices is None) or (name in _INDICES and indices is not None):
            return function(query, key, value, *args, **kwargs)
        batch, tokens = key.shape[0], key.shape[2]
        from xfuser.core.distributed import get_ring_parallel_world_size

        global_indices = mask is None and get_ring_parallel_world_size() > 1
        if mask is None and not global_indices:
            mask = torch.zeros(batch * tokens, dtype=torch.bool, device=key.device)
            mask = mask.index_fill(0, indices, True).view(batch, 1, 1, tokens)
        if global_indices or mask.shape[-1] != tokens:
            raise NotImplementedError(
                f"a ring cannot mask keys: each step has the {tokens} keys of one rank, and SDPA returns no "
                f"log-sum-exp to merge the steps with; use --sp-plan with ring=1 for padded text"
            )
        context.note("calls with masked keys are computed by SDPA where the attention backend ignores masks")
        kwargs["attention_kwargs"] = {"attn_mask": mask}
        return sdpa(query, key, value, *args, **kwargs)

    return attention


@wrapper
def ltx2_mask_meta(get_mask_meta: Any, cache: dict[Any, Any], mask: Tensor | None) -> Any:
    """LTX-2 caches metadata by the address of its mask. The mask of a later request may have the same address."""
    if context.is_active() and cache.get("mask") is not mask:
        cache.clear()
        cache["mask"] = mask  # keeps the mask alive, so that no other mask gets its address
    return get_mask_meta(cache, mask)


@_wrapper_with_arguments
def krea2_forward(forward: Any, arguments: Mapping[str, Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Krea 2 has the same cache as LTX-2 (:func:`ltx2_mask_meta`)."""
    mask, tokens = arguments.get("encoder_attention_mask"), arguments["hidden_states"].shape[1]
    cached_mask, cached_tokens = getattr(self, "_mask_of_cache", (None, 0))
    if context.is_active() and not (cached_mask is mask and cached_tokens == tokens):
        self._attn_mask_cache, self._mask_of_cache = None, (mask, tokens)
    return forward(self, *args, **kwargs)


# -- batches of prompts of different length ----------------------------------------------------------------------------


@_wrapper_with_arguments
def qwen_forward(forward: Any, arguments: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The pipeline passes a mask if prompts have different lengths, and xDiT ignores it."""
    mask = arguments.get("encoder_hidden_states_mask")
    if not context.is_active() or mask is None:
        return forward(*args, **kwargs)
    with context.setting(prompt_lengths=_lengths("Qwen-Image", mask), padded_length=mask.shape[1]):
        return forward(*args, **kwargs)


@_wrapper_with_arguments
def hunyuan_forward(forward: Any, arguments: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """xDiT keeps the tokens that are valid for any prompt of the batch."""
    mask = arguments["encoder_attention_mask"]
    if not context.is_active() or mask.shape[0] == 1:
        return forward(*args, **kwargs)
    if "encoder_attention_mask_2" in arguments:  # HunyuanVideo 1.5: valid tokens of all three sequences come first
        image = arguments["image_embeds"]
        masks = [mask.bool(), arguments["encoder_attention_mask_2"].bool()]
        masks.append(mask.new_ones(image.shape[:2], dtype=torch.bool) & image.ne(0).any())
        lengths = torch.cat(masks, dim=1).sum(dim=1).tolist()
    else:
        lengths = _lengths("HunyuanVideo", mask)
    padded_length = max(lengths, default=0)
    with context.setting(prompt_lengths=lengths if len(set(lengths)) > 1 else (), padded_length=padded_length):
        return forward(*args, **kwargs)


def _lengths(model: str, mask: Tensor) -> list[int]:
    """Number of valid tokens of each row, which come first; empty if all are valid."""
    valid = mask.bool()
    if valid.all():
        return []
    if (valid[:, 1:] & ~valid[:, :-1]).any():
        raise NotImplementedError(f"{model}: padding before or between text tokens; pad prompts at their end")
    lengths: list[int] = valid.sum(dim=1).tolist()
    return lengths


def _local_lengths(batch: int) -> Sequence[int]:
    """Prompt lengths of this rank's samples: CFG parallelism splits the batch."""
    lengths = call.prompt_lengths
    if len(lengths) == batch:
        return lengths
    from xfuser.core.distributed import get_classifier_free_guidance_rank

    first = get_classifier_free_guidance_rank() * batch
    return lengths[first : first + batch]


def _split(x: Tensor, text: int, strategy: str) -> tuple[Tensor, Tensor]:
    """Text and image of ``x [B, H, S, D]``. ``strategy``: whether text is in ``"front"`` or ``"rear"``."""
    image = x.shape[2] - text
    if strategy == "front":
        return x[:, :, :text], x[:, :, text:]
    return x[:, :, image:], x[:, :, :image]


def _attend_by_sample(
    strategy: str, usp: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Call USP for each sample with its own text, if prompts have different lengths."""
    if not call.prompt_lengths or kwargs.get("attention_kwargs"):  # sparse attention has its own masks
        return usp(query, key, value, *args, **kwargs)
    from xfuser.core.distributed import get_sp_group

    context.note("each prompt of a batch attends to its own text where lengths differ")
    group = get_sp_group()
    image: Sequence[Tensor] = (query, key, value)
    replicated = bool(kwargs.get("joint_strategy"))
    if replicated:
        text = [kwargs[name] for name in _JOINT]
    else:  # each rank has a chunk of the text, next to its chunk of the image
        chunk = -(-call.padded_length // group.world_size)
        chunks, image = zip(*(_split(x, chunk, strategy) for x in image), strict=True)
        text = [group.all_gather(x.contiguous(), dim=2) for x in chunks]
    outputs = []
    for row, length in enumerate(_local_lengths(query.shape[0])):
        sample = slice(row, row + 1)
        kwargs |= {name: x[sample, :, :length] for name, x in zip(_JOINT, text, strict=True)}
        kwargs["joint_strategy"] = strategy
        text_out, image_out = _split(usp(*(x[sample] for x in image), *args, **kwargs), length, strategy)
        text_out = pad(text_out, (0, 0, 0, text[0].shape[2] - length))
        if not replicated:
            text_out = text_out.chunk(group.world_size, dim=2)[group.rank_in_group]
        outputs.append(torch.cat([text_out, image_out] if strategy == "front" else [image_out, text_out], dim=2))
    return torch.cat(outputs)


front_text_by_sample = wrapper(functools.partial(_attend_by_sample, "front"))
rear_text_by_sample = wrapper(functools.partial(_attend_by_sample, "rear"))
