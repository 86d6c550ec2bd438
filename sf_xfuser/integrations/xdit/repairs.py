"""What is wrong in xDiT 0.7 itself and makes a result inexact, repaired as hook records.

Each is also a patch against xDiT, in ``patches/0.7.0/repairs``; ``patches/README.md`` lists them, with those that are
patches alone. Without ``--sp-backend`` every wrapper calls the original and nothing else: xDiT then gives its own
result. Older versions of xDiT get none of them. A repair says so once, when a call first needs it, and ``explain()``
lists those that were used.

``_Now`` is the call under way. Transformers note in it what their attention calls have to know: xDiT's ``USP`` gets
``[B, H, S, D]`` tensors and no word on which tokens of S are text or padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from sf_xfuser.integrations.hooks import Hook
from sf_xfuser.integrations.xdit import masks


@dataclass
class _Now:
    """``text``: tokens in front of query, key and value that every rank holds whole. ``padding``: image tokens at the
    end of the last rank's that are not there in truth. ``temporal``: attention over frames, which every rank has all
    of. ``cached``: the layer whose KV cache its processor has just updated."""

    text: int = 0
    padding: int = 0
    temporal: bool = False
    cached: Any = None


_now = _Now()
used: list[str] = []  # descriptions of the repairs that a call needed, in the order of their first use


@contextmanager
def _noting(**values: Any) -> Iterator[None]:
    before = {name: getattr(_now, name) for name in values}
    for name, value in values.items():
        setattr(_now, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(_now, name, value)


def hooks(in_force: Callable[[], bool], log: Callable[[str], None]) -> tuple[Hook, ...]:
    """The records. ``in_force``: whether ``--sp-backend`` was given; ``log``: once per job."""

    def ranks() -> int:
        """Size of the sequence-parallel group; 1 where nothing is to be repaired."""
        if not in_force():
            return 1
        from xfuser.core.distributed import get_sequence_parallel_world_size

        return int(get_sequence_parallel_world_size())

    def note(what: str) -> None:
        if not torch.compiler.is_compiling() and what not in used:
            used.append(what)
            log(f"repaired in xDiT: {what}")

    # -- text that is whole on every rank, and padding of images -------------------------------------------------------

    def joint_text(original: Callable[..., Any]) -> Callable[..., Any]:
        """USP as Flux, Flux2 and Qwen call it: with text in front of the image tokens."""

        @functools.wraps(original)
        def USP(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            text = 0 if kwargs.get("joint_strategy") else _now.text
            if text:
                note("text that the ranks do not divide is passed to USP once, not once per rank")
                parts = [torch.split(tensor, [text, tensor.shape[2] - text], dim=2) for tensor in (query, key, value)]
                joint, (query, key, value) = zip(*parts, strict=True)
                kwargs |= dict(zip(("joint_query", "joint_key", "joint_value"), joint, strict=True))
                kwargs["joint_strategy"] = "front"
            if _now.padding:
                kwargs["attention_kwargs"] = {"valid_kv_len": ranks() * key.shape[2] - _now.padding}
            return original(query, key, value, *args, **kwargs)

        return USP

    def flux_pipeline_forward(original: Callable[..., Any]) -> Callable[..., Any]:
        """Flux and Flux2 in xDiT's pipelines, which cut the text before the call, or leave it whole."""

        @functools.wraps(original)
        def forward(
            self: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            from xfuser.core.distributed import get_runtime_state

            whole = ranks() > 1 and not get_runtime_state().split_text_embed_in_sp
            with _noting(text=encoder_hidden_states.shape[1] if whole else 0):
                return original(self, hidden_states, encoder_hidden_states, *args, **kwargs)

        return forward

    def flux_runner_forward(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(
            self: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            num_ranks = ranks()
            if num_ranks == 1:
                return original(self, hidden_states, encoder_hidden_states, *args, **kwargs)
            padding, text = -hidden_states.shape[1] % num_ranks, encoder_hidden_states.shape[1]
            if padding:
                _check_padding(hidden_states.shape[1], num_ranks)
                note("image tokens that the ranks do not divide are padded, and the padding is not attended to")
                hidden_states = pad(hidden_states, (0, 0, 0, padding))
                kwargs["img_ids"] = pad(kwargs["img_ids"], (0, 0, 0, padding))
            with _noting(text=text if text % num_ranks else 0, padding=padding):
                output = original(self, hidden_states, encoder_hidden_states, *args, **kwargs)
            if not padding:
                return output
            sample = output[0][:, :-padding]
            return (sample, *output[1:]) if isinstance(output, tuple) else output.__class__(sample)

        return forward

    def qwen_forward(original: Callable[..., Any]) -> Callable[..., Any]:
        """Its text is recognised by its length where xDiT pads and cuts: text of the image's length is left alone."""

        @functools.wraps(original)
        def forward(
            self: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            num_ranks = ranks()
            text = encoder_hidden_states.shape[1]
            whole = text % num_ranks != 0 and text != hidden_states.shape[1]
            with _noting(text=text if whole else 0):
                return original(self, hidden_states, encoder_hidden_states, *args, **kwargs)

        return forward

    def leave_text_whole(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(original)
        def chunk_and_pad_sequence(x: torch.Tensor, *args: Any, dim: int) -> torch.Tensor:
            return x if x.shape[dim] == _now.text else original(x, *args, dim=dim)

        return chunk_and_pad_sequence

    # -- the size of Flux's pictures in the runner ---------------------------------------------------------------------

    def flux_run_pipe(original: Callable[..., Any]) -> Callable[..., Any]:
        """It calls ``set_input_parameters`` without height and width, which then cuts the rows of the default height
        into patches. Only PipeFusion uses patches: without it the transformer cuts tokens."""

        @functools.wraps(original)
        def _run_pipe(self: Any, input_args: dict[str, Any]) -> Any:
            num_ranks = ranks()
            if num_ranks > 1:
                from xfuser.core.distributed import get_pipeline_parallel_world_size, get_runtime_state

                state = get_runtime_state()
                config = state.input_config
                if not state.ready and config.height // state.vae_scale_factor % num_ranks:
                    note("Flux's runner does not cut the default height of 1024 into rows")
                size = input_args["height"], input_args["width"], self.config.batch_size or 1
                changed = size != (config.height, config.width, config.batch_size)
                config.height, config.width, config.batch_size = size
                # set_input_parameters computes patches where the state is not ready
                state.ready = get_pipeline_parallel_world_size() == 1 or (state.ready and not changed)
            return original(self, input_args)

        return _run_pipe

    # -- PipeFusion's KV cache -----------------------------------------------------------------------------------------

    def note_cached(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def update_and_get_kv_cache(self: Any, new_kv: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
            found = original(self, new_kv, layer, *args, **kwargs)
            if in_force():
                _now.cached = layer
            return found

        return update_and_get_kv_cache

    def cache_once(original: Callable[..., Any]) -> Callable[..., Any]:
        """USP as SD3's and Flux2's processors call it, which may have updated the KV cache of ``attn_layer``."""

        @functools.wraps(original)
        def USP(*args: Any, **kwargs: Any) -> Any:
            layer = kwargs.get("attn_layer")
            if layer is not None and _now.cached is layer:
                if _pipefusion():
                    note("PipeFusion's KV cache is updated once for each attention call")
                kwargs["attn_layer"], kwargs["head_balance_layer"] = None, layer
            try:
                return original(*args, **kwargs)
            finally:
                _now.cached = None

        return USP

    # -- Latte ---------------------------------------------------------------------------------------------------------

    def latte_call(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _noting(temporal=bool(kwargs.get("latte_temporal_attention")) and ranks() > 1):
                return original(self, *args, **kwargs)

        return __call__

    def local_over_frames(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def USP(*args: Any, **kwargs: Any) -> Any:
            if not _now.temporal:
                return original(*args, **kwargs)
            from xfuser.model_executor.layers.usp import attention

            note("Latte's temporal attention stays on its rank")
            return attention(*args, **kwargs)

        return USP

    def hook(module: str, name: str, wrap: Callable[[Any], Any], why: str, patch: str, **options: Any) -> Hook:
        return Hook(
            module=f"xfuser.{module}",
            name=name,
            wrap=wrap,
            why=f"repair: {why}",
            remove_when=f"patches/0.7.0/repairs/{patch} is in xDiT",
            required=False,
            **options,
        )

    flux, flux2, qwen = (f"model_executor.models.transformers.transformer_{name}" for name in ("flux", "flux2", "qwen"))
    processors = "model_executor.layers.attention_processor"
    runner = "model_executor.models.runner_models.flux"
    text = "text that sequence parallelism does not divide is counted once per rank"
    twice = "a processor updates the KV cache of PipeFusion, and USP does it again: it raises"
    frames = "temporal attention, of which every rank has all frames, runs over the ranks"
    of_flux2 = {"patch": "0006", "native": "_text_is_replicated"}
    of_qwen = {"patch": "0004", "native": "get_runtime_state"}
    return (
        *masks.hooks(in_force, note, hook),  # first: joint_text then runs around them
        hook(flux, "USP", joint_text, text, "0002"),
        hook(flux, "xFuserFluxTransformer2DWrapper.forward", flux_pipeline_forward, text, "0002"),
        hook(
            flux,
            "xFuserFlux1Transformer2DWrapper.forward",
            flux_runner_forward,
            f"{text}; _pad_to_sp_divisible is missing for the image, and padding would be attended to",
            "0003",
            native="_image_sp_padding_attention_kwargs",
        ),
        *(
            hook(
                runner,
                f"{name}._run_pipe",
                flux_run_pipe,
                "cuts the default height of 1024 into rows, which fails on 3, 5 and 6 ranks, whatever the real height",
                "0010",
                native="_set_input_parameters",
            )
            for name in ("xFuserFluxModel", "xFuserFluxKontextModel")
        ),
        hook(flux2, "USP", joint_text, "text under PipeFusion is counted once per rank", **of_flux2),
        hook(flux2, "USP", cache_once, twice, **of_flux2),
        hook(
            flux2,
            "xFuserFlux2Transformer2DModelWrapper.forward",
            flux_pipeline_forward,
            "text under PipeFusion is counted once per rank",
            **of_flux2,
        ),
        hook(qwen, "USP", joint_text, "padded text tokens are attended to", **of_qwen),
        hook(qwen, "chunk_and_pad_sequence", leave_text_whole, "padded text tokens are attended to", **of_qwen),
        hook(
            qwen,
            "xFuserQwenImageTransformerWrapper.forward",
            qwen_forward,
            "padded text tokens are attended to",
            **of_qwen,
        ),
        hook("core.cache_manager.cache_manager", "CacheManager.update_and_get_kv_cache", note_cached, twice, "0005"),
        hook(processors, "USP", cache_once, twice, "0005"),
        hook(processors, "USP", local_over_frames, frames, "0007", native="attention"),
        hook(processors, "xFuserAttnProcessor2_0.__call__", latte_call, frames, "0007", native="attention"),
    )


def _pipefusion() -> bool:
    from xfuser.core.distributed import get_runtime_state

    return bool(get_runtime_state().num_pipeline_patch > 1)


def _check_padding(tokens: int, num_ranks: int) -> None:
    """Padding is cut off as a suffix of the gathered keys: one all-to-all has to put them in order."""
    from xfuser.core.distributed import get_ring_parallel_world_size

    if get_ring_parallel_world_size() > 1:
        raise NotImplementedError(
            f"Flux with {tokens} image tokens, which {num_ranks} ranks do not divide, needs ring_degree=1, got "
            f"{get_ring_parallel_world_size()}; use --sp-plan ulysses={num_ranks} or another height and width"
        )
    if -tokens % num_ranks > -(-tokens // num_ranks):
        raise NotImplementedError(f"{tokens} image tokens are too few for {num_ranks} ranks; use fewer ranks")
