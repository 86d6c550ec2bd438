"""Repairs of xDiT 0.7 where it drops the mask of padded text: the padding is then attended to.

Two ways to keep it out. Where xDiT passes the mask to an attention function that ignores it, SDPA computes that call.
Where xDiT passes no mask at all, as for a batch of prompts of different length, each sample attends by itself to its
own text, which is whole on every rank as joint tensors. ``repairs.py`` says what a repair is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from sf_xfuser.integrations.hooks import Hook

# Attention functions of xDiT that ignore masks of keys, and those that use ``indices_k`` alone.
_NO_MASK = ("SDPA_FLASH", "SDPA_EFFICIENT", "CUDNN", "FLASH_3_FP8", "FLASH_4_FP4", "SAGE", "NPU")
_INDICES = ("FLASH", "FLASH_3", "FLASH_4", "AITER")
_JOINT = ("joint_query", "joint_key", "joint_value")


@dataclass
class _Text:
    """Of the forward that runs now. ``lengths``: valid text tokens of each sample; empty where none are padding.
    ``tokens``: how many a sample has with padding."""

    lengths: Sequence[int] = ()
    tokens: int = 0


def hooks(in_force: Callable[[], bool], note: Callable[[str], None], hook: Callable[..., Hook]) -> tuple[Hook, ...]:
    """The records; ``note`` and ``hook`` as in ``repairs.hooks``."""
    now = _Text()

    @contextmanager
    def text_of(lengths: Sequence[int], tokens: int) -> Iterator[None]:
        now.lengths, now.tokens = lengths, tokens
        try:
            yield
        finally:
            now.lengths = ()

    def masked(name: str, function: Callable[..., Any], sdpa: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            wanted = kwargs.get("attention_kwargs") or {}
            mask: Any = wanted.get("attn_mask")
            indices: Any = wanted.get("indices_k")
            if not in_force() or (mask is None and indices is None) or (name in _INDICES and indices is not None):
                found: tuple[torch.Tensor, torch.Tensor | None] = function(query, key, value, *args, **kwargs)
                return found
            batch, tokens = key.shape[0], key.shape[2]
            from xfuser.core.distributed import get_ring_parallel_world_size

            of_others = mask is None and get_ring_parallel_world_size() > 1  # what the indices count
            if mask is None and not of_others:
                mask = torch.zeros(batch * tokens, dtype=torch.bool, device=key.device)
                mask = mask.index_fill(0, indices, True).view(batch, 1, 1, tokens)
            if of_others or mask.shape[-1] != tokens:
                raise NotImplementedError(
                    f"masked keys in a ring, which sees the {tokens} keys of one rank at a time and merges results "
                    f"that SDPA does not give: use --sp-plan with ring=1 for text that is padded"
                )
            note("calls with masked keys are computed by SDPA where the attention backend ignores masks")
            kwargs["attention_kwargs"] = {"attn_mask": mask}
            found = sdpa(query, key, value, *args, **kwargs)
            return found

        return call

    def registry(original: dict[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
        sdpa = next(function for backend, function in original.items() if backend.name == "SDPA")
        return {
            backend: masked(backend.name, function, sdpa) if backend.name in _NO_MASK + _INDICES else function
            for backend, function in original.items()
        }

    def mask_of_this_call(original: Callable[..., Any]) -> Callable[..., Any]:
        """LTX-2 caches what it made of a mask by its address, which a later request's mask may have, too."""

        @functools.wraps(original)
        def _get_mask_meta(cache: dict[Any, Any], mask: torch.Tensor | None) -> Any:
            if in_force() and cache.get("mask") is not mask:
                cache.clear()
                cache["mask"] = mask  # keeps the address
            return original(cache, mask)

        return _get_mask_meta

    def krea_forward(original: Callable[..., Any]) -> Callable[..., Any]:
        """As ``mask_of_this_call``."""
        bind = inspect.signature(original).bind

        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = bind(self, *args, **kwargs).arguments
            mask, tokens = given.get("encoder_attention_mask"), given["hidden_states"].shape[1]
            kept = getattr(self, "_mask_of_cache", (None, 0))
            if in_force() and not (kept[0] is mask and kept[1] == tokens):
                self._attn_mask_cache, self._mask_of_cache = None, (mask, tokens)
            return original(self, *args, **kwargs)

        return forward

    # -- batches of prompts of different length ------------------------------------------------------------------------

    def qwen_forward(original: Callable[..., Any]) -> Callable[..., Any]:
        """Its pipeline passes a mask where prompts have different lengths, and xDiT ignores it."""
        bind = inspect.signature(original).bind

        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            mask = bind(self, *args, **kwargs).arguments.get("encoder_hidden_states_mask")
            if not in_force() or mask is None:
                return original(self, *args, **kwargs)
            with text_of(_lengths("Qwen-Image", mask), mask.shape[1]):
                return original(self, *args, **kwargs)

        return forward

    def hunyuan_forward(original: Callable[..., Any]) -> Callable[..., Any]:
        """It keeps the tokens that any prompt has."""
        bind = inspect.signature(original).bind

        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = bind(self, *args, **kwargs).arguments
            mask = given["encoder_attention_mask"]
            if not in_force() or mask.shape[0] == 1:
                return original(self, *args, **kwargs)
            if "encoder_attention_mask_2" in given:  # HunyuanVideo 1.5: valid tokens of all three come first
                image = given["image_embeds"]
                rows = [mask.bool(), given["encoder_attention_mask_2"].bool()]
                rows.append(mask.new_ones(image.shape[:2], dtype=torch.bool) & image.ne(0).any())
                valid = torch.cat(rows, dim=1).sum(dim=1).tolist()
            else:
                valid = _lengths("HunyuanVideo", mask)
            with text_of(valid if len(set(valid)) > 1 else (), max(valid, default=0)):
                return original(self, *args, **kwargs)

        return forward

    def sample_by_sample(original: Callable[..., Any], front: bool) -> Callable[..., Any]:
        """USP with text in front of the image tokens, or behind them."""

        def split(x: torch.Tensor, text: int) -> tuple[torch.Tensor, torch.Tensor]:
            """Text and image."""
            one, other = torch.split(x, [text, x.shape[2] - text] if front else [x.shape[2] - text, text], dim=2)
            return (one, other) if front else (other, one)

        @functools.wraps(original)
        def USP(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not now.lengths or kwargs.get("attention_kwargs"):  # sparse attention has masks of its own
                return original(query, key, value, *args, **kwargs)
            from xfuser.core.distributed import get_sp_group

            note("each prompt of a batch attends to its own text where lengths differ")
            group = get_sp_group()
            image: Sequence[torch.Tensor] = (query, key, value)
            whole = bool(kwargs.get("joint_strategy"))
            if whole:
                text = [kwargs[name] for name in _JOINT]
            else:  # each rank has a part of the text, next to its part of the image
                parts, image = zip(*(split(x, -(-now.tokens // group.world_size)) for x in image), strict=True)
                text = [group.all_gather(x.contiguous(), dim=2) for x in parts]
            outputs = []
            for row, length in enumerate(_rows(now.lengths, query.shape[0])):
                own = slice(row, row + 1)
                for name, x in zip(_JOINT, text, strict=True):
                    kwargs[name] = x[own, :, :length]
                kwargs["joint_strategy"] = "front" if front else "rear"
                text_out, image_out = split(original(*(x[own] for x in image), *args, **kwargs), length)
                text_out = pad(text_out, (0, 0, 0, text[0].shape[2] - length))
                if not whole:
                    text_out = text_out.chunk(group.world_size, dim=2)[group.rank_in_group]
                outputs.append(torch.cat([text_out, image_out] if front else [image_out, text_out], dim=2))
            return torch.cat(outputs)

        return USP

    transformers = "model_executor.models.transformers.transformer_"
    stale = "a mask is cached by its address, which the mask of a later request may have"
    batch = "in a batch, shorter prompts attend to the padding of the longest"
    cached = {"native": "cached_attn_mask_with_meta"}
    found = [
        hook(
            "core.distributed.attention_backend",
            "ATTENTION_FUNCTION_REGISTRY",
            registry,
            "attention functions ignore the mask of padded keys",
            "0011",
            native="_masked_by_sdpa",
            sweep=True,
        ),
        hook(f"{transformers}ltx2", "_get_mask_meta", mask_of_this_call, stale, "0011", **cached),
        hook(f"{transformers}krea2", "xFuserKrea2Transformer2DWrapper.forward", krea_forward, stale, "0011", **cached),
    ]
    for module, wrapper, forward in (
        ("qwen", "xFuserQwenImageTransformerWrapper", qwen_forward),
        ("hunyuan_video", "xFuserHunyuanVideoTransformer3DWrapper", hunyuan_forward),
        ("hunyuan_video15", "xFuserHunyuanVideo15Transformer3DWrapper", hunyuan_forward),
    ):
        for name, wrap in (
            ("USP", functools.partial(sample_by_sample, front=module == "qwen")),
            (f"{wrapper}.forward", forward),
        ):
            found.append(hook(f"{transformers}{module}", name, wrap, batch, "0012", native="USP_with_text"))
    return tuple(found)


def _lengths(model: str, mask: torch.Tensor) -> list[int]:
    """Valid tokens of each row, which come first; empty where all are valid."""
    valid = mask.bool()
    if valid.all():
        return []
    if (valid[:, 1:] & ~valid[:, :-1]).any():
        raise NotImplementedError(f"{model}: padding in front of or between text tokens; pad prompts at their end")
    found: list[int] = valid.sum(dim=1).tolist()
    return found


def _rows(lengths: Sequence[int], batch: int) -> Sequence[int]:
    """Those of this rank, where CFG parallelism splits the batch."""
    if len(lengths) == batch:
        return lengths
    from xfuser.core.distributed import get_classifier_free_guidance_rank

    first = get_classifier_free_guidance_rank() * batch
    return lengths[first : first + batch]
