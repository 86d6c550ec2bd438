"""Rank side of test_memory.py, test_compilation.py and test_caches.py: pipelines with one setting each.

    settings.py FOLDER WAY:SETTING...    # FOLDER has the tiny models flux and wan; runs on every rank

The way ``diffusers`` calls ``sf_xfuser.parallelize``. The way ``xdit`` has the transformer of xDiT's runner, under
``--sp-backend torus``. Every rank reports how its latents differ from those of one process with the same setting (for
xDiT's own caches: of xDiT's USP; for compilation: without it), and the attention calls.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import report  # the directory of a script is on its path
from diffusers import (
    DiffusionPipeline,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from run_pipeline import PROMPT, SEED, runner_classes, small_input
from xfuser import xFuserArgs
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import get_runtime_state, init_distributed_environment, initialize_runtime_state

import sf_xfuser
from sf_xfuser.integrations.xdit import session
from sf_xfuser.layout.schedule import Attend
from sf_xfuser.torus.call import Call

FOLDER = Path(sys.argv[1])
TEXT, STEPS = 16, 6
Change = Callable[[DiffusionPipeline], object]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """``change`` the pipeline, ``first``: before ``parallelize``. Call it in ``context``, once before in ``warm_up``.
    ``own_cache``: it exists in xDiT only. ``compiles``: one process does not. ``calibrates``: the result is the list
    that it prints. ``size``: options of the call."""

    change: Change = lambda pipe: None
    first: bool = False
    context: Callable[[], Any] = contextlib.nullcontext
    warm_up: Callable[[], Any] | None = None
    family: str = "flux"
    steps: int = 2
    own_cache: bool = False
    compiles: bool = False
    calibrates: bool = False
    size: tuple[tuple[str, int], ...] = ()


# -- runs -------------------------------------------------------------------------------------------------------------


@cache
def loaded(family: str, xdit: bool) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(FOLDER / family, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if xdit:
        wrapper = runner_classes(family)[1]
        pipe.transformer = wrapper.from_pretrained(FOLDER / family, subfolder="transformer", torch_dtype=torch.float32)
    return pipe


def denoise(pipe: DiffusionPipeline, setting: Setting) -> torch.Tensor:
    printed = io.StringIO()
    with torch.no_grad(), setting.context(), contextlib.redirect_stdout(printed):
        latents = pipe(
            prompt=PROMPT,
            max_sequence_length=TEXT,
            num_inference_steps=setting.steps,
            generator=torch.Generator("cpu").manual_seed(SEED),
            output_type="latent",
            return_dict=False,
            **{**small_input(FOLDER / setting.family), **dict(setting.size)},
        )[0]
    return torch.tensor(json.loads(printed.getvalue().splitlines()[-2])) if setting.calibrates else latents


def single(setting: Setting) -> torch.Tensor:
    """In one process."""
    pipe = copy.deepcopy(loaded(setting.family, xdit=False))
    setting.change(pipe)
    return denoise(pipe, setting)


@cache
def plain(family: str, steps: int, size: tuple[tuple[str, int], ...]) -> torch.Tensor:
    """In one process, without a setting."""
    return single(Setting(family=family, steps=steps, size=size))


def through_xdit(setting: Setting, engine_config: Any) -> DiffusionPipeline:
    pipe = copy.deepcopy(loaded(setting.family, xdit=True))
    initialize_runtime_state(pipe, engine_config)
    if setting.family == "flux":
        get_runtime_state().set_input_parameters(
            batch_size=1, num_inference_steps=setting.steps, max_condition_sequence_length=TEXT,
            split_text_embed_in_sp=True,
        )  # fmt: skip
    setting.change(pipe)
    return pipe


def run(way: str, setting: Setting, engine_config: Any) -> dict[str, Any]:
    if setting.own_cache:
        with session.without_torus():
            wanted = denoise(through_xdit(setting, engine_config), setting)
    elif setting.compiles:
        wanted = plain(setting.family, setting.steps, setting.size)
    else:
        wanted = single(setting)
    if way == "xdit":
        pipe = through_xdit(setting, engine_config)
        return compare(pipe, session.current.usp, setting, wanted)
    pipe = copy.deepcopy(loaded(setting.family, xdit=False))
    if setting.first:
        setting.change(pipe)
    torus = sf_xfuser.parallelize(pipe.transformer, args=sf_xfuser.TorusArgs(backend="torus", timeout=60))
    with contextlib.closing(torus.mesh):
        if not setting.first:
            setting.change(pipe)
        return compare(pipe, torus, setting, wanted)


def compare(pipe: DiffusionPipeline, torus: Any, setting: Setting, wanted: torch.Tensor) -> dict[str, Any]:
    torus.fallbacks.clear()
    if setting.warm_up is not None:
        with setting.warm_up():
            denoise(pipe, setting)
    before = torus.handled
    found = denoise(pipe, setting)
    calls = torus.handled - before
    without = wanted if setting.calibrates else plain(setting.family, setting.steps, setting.size)
    stages = [
        sum(isinstance(step, Attend) for step in call.schedule.steps)
        for call in torus.mesh.calls.values()
        if isinstance(call, Call)
    ]
    return {
        "error": _relative(found, wanted),
        "effect": _relative(wanted, without),
        "calls": calls,
        "stages": min(stages),
        "fell back": "; ".join(torus.fallbacks),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def _relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert x.shape == y.shape
    return ((x - y).abs().max() / y.abs().max()).item()


# -- memory -----------------------------------------------------------------------------------------------------------


def group_offload(kind: str, *, on_disk: bool = True) -> Change:
    """A CPU is the device that computes, so that only the disk is another place."""

    def change(pipe: DiffusionPipeline) -> None:
        folder = str(FOLDER / f"{kind} of rank {dist.get_rank()}, {id(pipe)}") if on_disk else None
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type=kind, num_blocks_per_group=1, offload_to_disk_path=folder
        )

    return change


def sequential_offload(pipe: DiffusionPipeline) -> None:
    """What ``enable_sequential_cpu_offload`` does with each model: weights are on "meta" until they are used."""
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)
    assert pipe.transformer.x_embedder.weight.is_meta


def cast_layers(pipe: DiffusionPipeline) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def torchao(config: str) -> Change:
    def change(pipe: DiffusionPipeline) -> None:
        from torchao import quantization

        quantization.quantize_(pipe.transformer, getattr(quantization, config)())

    return change


def bitsandbytes(layer: str, **options: Any) -> Change:
    """Diffusers quantizes on GPUs only; these are the layers that it creates."""

    def change(pipe: DiffusionPipeline) -> None:
        from bitsandbytes import nn

        for name, linear in list(pipe.transformer.named_modules()):
            if isinstance(linear, torch.nn.Linear) and "blocks" in name:
                new = getattr(nn, layer)(
                    linear.in_features, linear.out_features, bias=linear.bias is not None, **options
                )
                new.load_state_dict(linear.state_dict())
                pipe.transformer.set_submodule(name, new.to("cpu"))

    return change


MEMORY = {
    "group_offload_blocks": Setting(change=group_offload("block_level")),
    "group_offload_leaves": Setting(change=group_offload("leaf_level")),
    "group_offload_leaves_first": Setting(change=group_offload("leaf_level"), first=True),
    "group_offload_in_memory": Setting(change=group_offload("leaf_level", on_disk=False)),
    "model_offload": Setting(change=lambda pipe: pipe.enable_model_cpu_offload(device="cpu")),
    "sequential_offload": Setting(change=sequential_offload),
    "sequential_offload_first": Setting(change=sequential_offload, first=True),
    "layerwise_casting": Setting(change=cast_layers),
    "layerwise_casting_first": Setting(change=cast_layers, first=True),
    "torchao_weights": Setting(change=torchao("Int8WeightOnlyConfig")),
    "torchao_activations": Setting(change=torchao("Int8DynamicActivationInt8WeightConfig")),
    "bitsandbytes_nf4": Setting(change=bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32)),
    "bitsandbytes_int8": Setting(change=bitsandbytes("Linear8bitLt", has_fp16_weights=False)),
    "inference_mode_first": Setting(warm_up=torch.inference_mode),
    "inference_mode_afterwards": Setting(warm_up=contextlib.nullcontext, context=torch.inference_mode),
    "autocast": Setting(context=partial(torch.autocast, "cpu", torch.bfloat16)),
    "autocast_wan": Setting(context=partial(torch.autocast, "cpu", torch.bfloat16), family="wan"),
}


# -- compilation by Inductor ------------------------------------------------------------------------------------------


def compiled(**options: Any) -> Setting:
    return Setting(change=lambda pipe: pipe.transformer.compile(**options), compiles=True)


def compiled_blocks(*, first: bool = False) -> Setting:
    return Setting(change=lambda pipe: pipe.transformer.compile_repeated_blocks(), compiles=True, first=first)


COMPILATION = {
    "blocks": compiled_blocks(),
    "blocks_first": compiled_blocks(first=True),
    "whole": compiled(),
    "reduce_overhead": compiled(mode="reduce-overhead"),
}


# -- caches, each of which skips some of six steps --------------------------------------------------------------------


def enable_cache(config: Callable[[DiffusionPipeline], object]) -> Change:
    return lambda pipe: pipe.transformer.enable_cache(config(pipe))


def pyramid(pipe: DiffusionPipeline) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 950),
        current_timestep_callback=lambda: pipe.current_timestep,
        spatial_attention_block_identifiers=("blocks", "transformer_blocks", "single_transformer_blocks"),
    )


def db_cache(pipe: DiffusionPipeline, taylor: bool = False) -> None:
    import cache_dit

    calibrator = {"calibrator_config": cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)} if taylor else {}
    config = cache_dit.DBCacheConfig(
        max_warmup_steps=1, Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=THRESHOLD
    )
    cache_dit.enable_cache(pipe, cache_config=config, **calibrator)


def xdit_cache(method: str, threshold: float, **config: object) -> Setting:
    """As xDiT's runner applies ``--cache_method``."""

    def change(pipe: DiffusionPipeline) -> None:
        from xfuser.model_executor.cache.adapters import apply_cache
        from xfuser.model_executor.models.runner_models.flux import xFuserFluxModel

        of_model = xFuserFluxModel.settings.step_cache_config.get(method)
        options = {"preset_kwargs": of_model.preset, "adapter_config": of_model.adapter} if of_model else {}
        config_json = json.dumps({"residual_diff_threshold": threshold, **config})
        apply_cache(cache_method=method, num_steps=STEPS, pipe=pipe, cache_config=config_json, **options)

    return Setting(change=change, steps=STEPS, own_cache=True)


def cache_by_rank(pipe: DiffusionPipeline) -> None:
    """A cache that decides from the tokens of one rank, as TeaCache's scripts for diffusers would."""
    first, second = pipe.transformer.transformer_blocks
    forward, residuals = second.forward, [torch.ones(())]

    def observe(block: Any, args: Any, kwargs: dict[str, torch.Tensor], output: tuple[torch.Tensor, ...]) -> None:
        residuals.append(output[1] - kwargs["hidden_states"])

    def skip(hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **options: Any) -> Any:
        before, now = residuals[-2:]
        if (now - before).abs().mean() < THRESHOLD * before.abs().mean():
            return encoder_hidden_states, hidden_states
        return forward(hidden_states, encoder_hidden_states, **options)

    first.register_forward_hook(observe, with_kwargs=True)
    second.forward = skip


# The hidden states of tiny models change by 0.69 to 0.83 in a step, differently on each rank.
THRESHOLD = 0.76
FIRST_BLOCK = enable_cache(lambda pipe: FirstBlockCacheConfig(threshold=THRESHOLD))
MAG = enable_cache(
    lambda pipe: MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, threshold=0.5, retention_ratio=0.2)
)
UNEVEN = (("height", 144), ("width", 144))  # 81 tokens

CACHES = {
    "first_block": Setting(change=FIRST_BLOCK, steps=STEPS),
    "first_block_first": Setting(change=FIRST_BLOCK, steps=STEPS, first=True),
    "first_block_uneven": Setting(change=FIRST_BLOCK, steps=STEPS, size=UNEVEN),
    "first_block_wan": Setting(change=FIRST_BLOCK, steps=STEPS, family="wan"),
    "mag": Setting(change=MAG, steps=STEPS),
    "mag_wan": Setting(change=MAG, steps=STEPS, family="wan"),
    "mag_calibration": Setting(
        change=enable_cache(lambda pipe: MagCacheConfig(num_inference_steps=STEPS, calibrate=True)),
        steps=STEPS,
        calibrates=True,
    ),
    "pyramid": Setting(change=enable_cache(pyramid), steps=STEPS),
    "pyramid_wan": Setting(change=enable_cache(pyramid), steps=STEPS, family="wan"),
    "taylor": Setting(
        change=enable_cache(lambda pipe: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2)),
        steps=STEPS,
    ),
    "taylor_lite": Setting(
        change=enable_cache(
            lambda pipe: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, use_lite_mode=True)
        ),
        steps=STEPS,
    ),
    "sea_wan": Setting(change=enable_cache(lambda pipe: SeaCacheConfig(threshold=0.9)), steps=STEPS, family="wan"),
    "own": Setting(change=cache_by_rank, steps=STEPS),
    "tea": xdit_cache("teacache", 1e6),
    "fb": xdit_cache("fbcache", THRESHOLD),
    "db": xdit_cache("dbcache", THRESHOLD, max_warmup_steps=1, Fn_compute_blocks=1, scm_policy=None),
    # Last, because cache-dit changes the classes of pipelines for the rest of the process.
    "db_cache": Setting(change=db_cache, steps=STEPS),
    "db_cache_taylor": Setting(change=partial(db_cache, taylor=True), steps=STEPS),
}


def main() -> None:
    init_distributed_environment()
    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
    flags = parser.parse_args(["--model", str(FOLDER / "flux"), "--sp-backend", "torus"])
    engine_config, _ = xFuserArgs.from_cli_args(flags).create_config()
    engine_config.runtime_config.dtype = torch.float32
    for name in sys.argv[2:]:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        kind, way, setting = name.split(":")
        try:
            settings = {"memory": MEMORY, "compilation": COMPILATION, "caches": CACHES}[kind]
            result: object = run(way, settings[setting], engine_config)
        except Exception as error:
            traceback.print_exc()
            result = f"{type(error).__name__}: {error}"
        report(name, result)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
