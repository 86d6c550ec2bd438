"""Flux, Flux.2 and Qwen-Image with numbers of text or image tokens that are not divisible by the number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sf_xfuser.integrations.hooks import wrapper
from sf_xfuser.integrations.xdit.repairs import context
from sf_xfuser.integrations.xdit.repairs.context import call


@wrapper
def joint_text(usp: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Pass replicated text, which is in front of the image, as joint tensors. Exclude padded image tokens."""
    text = 0 if kwargs.get("joint_strategy") else call.text
    if text:
        context.note("text that is not divisible by the number of ranks is passed to USP once")
        parts = [torch.split(tensor, [text, tensor.shape[2] - text], dim=2) for tensor in (query, key, value)]
        joint, (query, key, value) = zip(*parts, strict=True)
        kwargs |= dict(zip(("joint_query", "joint_key", "joint_value"), joint, strict=True))
        kwargs["joint_strategy"] = "front"
    if call.padding:
        kwargs["attention_kwargs"] = {"valid_kv_len": context.num_ranks() * key.shape[2] - call.padding}
    return usp(query, key, value, *args, **kwargs)


@wrapper
def flux_pipeline(
    forward: Any, self: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Flux and Flux.2 in xDiT's pipelines, which split the text before the call or leave it replicated."""
    from xfuser.core.distributed import get_runtime_state

    replicated = context.num_ranks() > 1 and not get_runtime_state().split_text_embed_in_sp
    with context.setting(text=encoder_hidden_states.shape[1] if replicated else 0):
        return forward(self, hidden_states, encoder_hidden_states, *args, **kwargs)


@wrapper
def pad_image(
    forward: Any, self: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
) -> Any:
    num_ranks = context.num_ranks()
    if num_ranks == 1:
        return forward(self, hidden_states, encoder_hidden_states, *args, **kwargs)
    padding, text = -hidden_states.shape[1] % num_ranks, encoder_hidden_states.shape[1]
    if padding:
        _check_padding(hidden_states.shape[1], num_ranks)
        context.note("image tokens are padded to a multiple of the number of ranks, and the padding is masked")
        hidden_states = pad(hidden_states, (0, 0, 0, padding))
        kwargs["img_ids"] = pad(kwargs["img_ids"], (0, 0, 0, padding))
    with context.setting(text=text if text % num_ranks else 0, padding=padding):
        output = forward(self, hidden_states, encoder_hidden_states, *args, **kwargs)
    if not padding:
        return output
    sample = output[0][:, :-padding]
    return (sample, *output[1:]) if isinstance(output, tuple) else output.__class__(sample)


def _check_padding(tokens: int, num_ranks: int) -> None:
    """The padding must be a suffix of the gathered keys, and only a single all-to-all gathers them in order."""
    from xfuser.core.distributed import get_ring_parallel_world_size

    if (ring := get_ring_parallel_world_size()) > 1:
        raise NotImplementedError(
            f"Flux with {tokens} image tokens, which are not divisible by {num_ranks} ranks, needs ring_degree=1, got "
            f"{ring}; use --sp-plan ulysses={num_ranks} or another height and width"
        )
    if -tokens % num_ranks > -(-tokens // num_ranks):
        raise NotImplementedError(f"{tokens} image tokens are too few for {num_ranks} ranks; use fewer ranks")


@wrapper
def set_flux_size(run_pipe: Any, self: Any, input_args: dict[str, Any]) -> Any:
    """The runner calls ``set_input_parameters`` without height and width, so the rows of the default height are split
    into patches. Only PipeFusion uses patches: without it the transformer splits tokens."""
    num_ranks = context.num_ranks()
    if num_ranks > 1:
        from xfuser.core.distributed import get_pipeline_parallel_world_size, get_runtime_state

        state = get_runtime_state()
        config = state.input_config
        if not state.ready and config.height // state.vae_scale_factor % num_ranks:
            context.note("Flux's runner does not cut the default height of 1024 into rows")
        size = input_args["height"], input_args["width"], self.config.batch_size or 1
        changed = size != (config.height, config.width, config.batch_size)
        config.height, config.width, config.batch_size = size
        # set_input_parameters computes patches if the state is not ready
        state.ready = get_pipeline_parallel_world_size() == 1 or (state.ready and not changed)
    return run_pipe(self, input_args)


@wrapper
def qwen_forward(
    forward: Any, self: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """``replicate_text`` recognizes the text by its length, so text as long as the image is not repaired."""
    text = encoder_hidden_states.shape[1]
    replicated = text % context.num_ranks() != 0 and text != hidden_states.shape[1]
    with context.setting(text=text if replicated else 0):
        return forward(self, hidden_states, encoder_hidden_states, *args, **kwargs)


@wrapper
def replicate_text(chunk_and_pad_sequence: Any, x: Tensor, *args: Any, dim: int) -> Any:
    return x if x.shape[dim] == call.text else chunk_and_pad_sequence(x, *args, dim=dim)
