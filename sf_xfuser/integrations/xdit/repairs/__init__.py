"""Repairs of errors in xDiT 0.7 that make results inexact or runs fail. Each has a patch; most also have hooks.

Patches and hooks cannot share code: a patch edits lines inside xDiT's functions, for every user; a hook wraps whole
functions, acts only under ``--sp-backend``, and does not depend on xDiT's source text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sf_xfuser.integrations.hooks import Hook
from sf_xfuser.integrations.xdit.repairs import context, masks, processors, tokens
from sf_xfuser.integrations.xdit.repairs.context import used as used


class Repair(NamedTuple):
    """``tests`` names tests, or cases of ``test_repairs.py``. ``without_hook``: why ``_HOOKS`` has no row."""

    why: str
    tests: tuple[str, ...]
    without_hook: str = ""


# By the number of the patch in patches/0.7.0/repairs. The table in patches/README.md is generated from these records.
REPAIRS = {
    "0001": Repair(
        "yunchang assumes contiguous ranks: under tensor parallelism the Ulysses and Ring groups are wrong",
        ("tensor parallel",),
        without_hook="in `plugin.py`, which builds these groups itself",
    ),
    "0002": Repair("replicated text is attended to once per rank", ("flux text", "flux text, runner")),
    "0003": Repair(
        "the runner's padding function is misnamed; padding would be attended to. Needs `ring_degree` 1, else an error",
        ("flux image, runner",),
    ),
    "0004": Repair("padded text is attended to", ("qwen text",)),
    "0005": Repair("the processor updates the KV cache, and USP does it again, which raises", ("sd3 stale",)),
    "0006": Repair(
        "as 0005; with PipeFusion, as 0002; the runner splits text of any length (patch only)",
        ("flux2 pipefusion", "test_flux2_with_stale_keys", "test_flux2_text_in_the_patches"),
    ),
    "0007": Repair("attention over frames is split over the ranks, although each rank holds all frames", ("latte",)),
    "0008": Repair(
        "imports a name that yunchang lacks up to 0.6.4",
        ("test_options_and_imports",),
        without_hook="no: an error, not a wrong result",
    ),
    "0009": Repair(
        "the HTTP service ignores `--ring_degree`; options registered with dashes are rejected in either spelling",
        ("test_options_and_imports",),
        without_hook="no: `--sp-backend` sets the degrees",
    ),
    "0010": Repair(
        "the runner passes no height: rows of the default height are split, which fails on 3, 5 and 6 ranks",
        ("test_latents", "test_xdit_as_installed_and_patched"),
    ),
    "0011": Repair(
        "attention functions ignore masks (Krea 2, LTX-2, MiniMax-H3) or get one of an earlier request (Krea 2, LTX-2)",
        ("test_torus_equals", "test_patches_repair_the_same", "test_masks_of_an_earlier_request_are_not_reused"),
    ),
    "0012": Repair(
        "shorter prompts attend to the padding of the longest", ("test_torus_equals", "test_patches_repair_the_same")
    ),
}

_TRANSFORMER = "model_executor.models.transformers.transformer_"
_FLUX, _FLUX2, _QWEN = f"{_TRANSFORMER}flux", f"{_TRANSFORMER}flux2", f"{_TRANSFORMER}qwen"
_HUNYUAN, _HUNYUAN15 = f"{_TRANSFORMER}hunyuan_video", f"{_TRANSFORMER}hunyuan_video15"
_KREA2, _LTX2 = f"{_TRANSFORMER}krea2", f"{_TRANSFORMER}ltx2"
_RUNNER = "model_executor.models.runner_models.flux"
_PROCESSOR = "model_executor.layers.attention_processor"
_BACKEND = "core.distributed.attention_backend"
_CACHE = "core.cache_manager.cache_manager"

# Patch, module below xfuser, attribute, wrap, and a name that the patch adds to the module (see Hook.native).
# Of two hooks of one attribute the later one runs around the earlier one.
_HOOKS = (
    ("0011", _BACKEND, "ATTENTION_FUNCTION_REGISTRY", masks.mask_with_sdpa, "_masked_by_sdpa"),
    ("0011", _LTX2, "_get_mask_meta", masks.ltx2_mask_meta, "cached_attn_mask_with_meta"),
    ("0011", _KREA2, "xFuserKrea2Transformer2DWrapper.forward", masks.krea2_forward, "cached_attn_mask_with_meta"),
    ("0012", _QWEN, "USP", masks.front_text_by_sample, "USP_with_text"),
    ("0012", _QWEN, "xFuserQwenImageTransformerWrapper.forward", masks.qwen_forward, "USP_with_text"),
    ("0012", _HUNYUAN, "USP", masks.rear_text_by_sample, "USP_with_text"),
    ("0012", _HUNYUAN, "xFuserHunyuanVideoTransformer3DWrapper.forward", masks.hunyuan_forward, "USP_with_text"),
    ("0012", _HUNYUAN15, "USP", masks.rear_text_by_sample, "USP_with_text"),
    ("0012", _HUNYUAN15, "xFuserHunyuanVideo15Transformer3DWrapper.forward", masks.hunyuan_forward, "USP_with_text"),
    ("0002", _FLUX, "USP", tokens.joint_text, None),
    ("0002", _FLUX, "xFuserFluxTransformer2DWrapper.forward", tokens.flux_pipeline, None),
    (
        "0003",
        _FLUX,
        "xFuserFlux1Transformer2DWrapper.forward",
        tokens.pad_image,
        "_image_sp_padding_attention_kwargs",
    ),
    ("0010", _RUNNER, "xFuserFluxModel._run_pipe", tokens.set_flux_size, "_set_input_parameters"),
    ("0010", _RUNNER, "xFuserFluxKontextModel._run_pipe", tokens.set_flux_size, "_set_input_parameters"),
    ("0006", _FLUX2, "USP", tokens.joint_text, "_text_is_replicated"),
    ("0006", _FLUX2, "USP", processors.update_cache_once, "_text_is_replicated"),
    ("0006", _FLUX2, "xFuserFlux2Transformer2DModelWrapper.forward", tokens.flux_pipeline, "_text_is_replicated"),
    ("0004", _QWEN, "USP", tokens.joint_text, "get_runtime_state"),
    ("0004", _QWEN, "chunk_and_pad_sequence", tokens.replicate_text, "get_runtime_state"),
    ("0004", _QWEN, "xFuserQwenImageTransformerWrapper.forward", tokens.qwen_forward, "get_runtime_state"),
    ("0005", _CACHE, "CacheManager.update_and_get_kv_cache", processors.record_update, None),
    ("0005", _PROCESSOR, "USP", processors.update_cache_once, None),
    ("0007", _PROCESSOR, "USP", processors.local_over_frames, "attention"),
    ("0007", _PROCESSOR, "xFuserAttnProcessor2_0.__call__", processors.latte_call, "attention"),
)


def hooks(is_active: Callable[[], bool], log: Callable[[str], None]) -> tuple[Hook, ...]:
    """All hooks. ``is_active`` returns whether ``--sp-backend`` is given; ``log`` writes a line once per job."""
    context.is_active, context.log = is_active, log
    return tuple(
        Hook(
            module=f"xfuser.{module}",
            name=name,
            wrap=wrap,
            why=f"repair: {REPAIRS[patch].why}",
            remove_when=f"patches/0.7.0/repairs/{patch} is in xDiT",
            sweep=module == _BACKEND,
            required=False,
            native=native,
        )
        for patch, module, name, wrap, native in _HOOKS
    )
