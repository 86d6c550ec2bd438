"""One denoising run of a tiny model: through xDiT on every rank (the script), or through plain diffusers (a function).

    torchrun --nproc_per_node 4 run_pipeline.py --family flux --model FOLDER --out latents.pt --text-length 16 \
        --ulysses_degree 2 --ring_degree 2 --attention_backend SDPA_FLASH

The script starts xDiT as xDiT's own examples and runner models do, takes every xFuserArgs flag, and does not import
this package. It writes ``{"world_size": W, "latents": {rank: tensor}}`` for the ranks on which xDiT returns the result.
Steps, sizes and guidance default to the model's small input.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxPipeline, HunyuanVideoPipeline, WanPipeline

FAMILIES = ("flux", "sd3", "cogvideox", "hunyuanvideo", "wan")
STEPS = 2
SEED = 42
# Longer than the text lengths of the tests in every tokenizer, so that text_length is the exact length.
PROMPT = "A small cat sits on a red chair near the window while the rain falls over the old city and people walk home."


def reference_latents(folder: str | Path, text_length: int, *, steps: int = STEPS, seed: int = SEED) -> torch.Tensor:
    """The final latents of the model in ``folder``, by plain diffusers in this process: the reference."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    return _denoise(pipeline, text_length, steps=steps, seed=seed, **small_input(folder))


def reference_picture(folder: str | Path, text_length: int) -> torch.Tensor:
    """As :func:`reference_latents`, decoded: pixels from 0 to 1."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    return _denoise(pipeline, text_length, steps=STEPS, seed=SEED, output_type="pt", **small_input(folder))


@torch.no_grad()
def _denoise(
    pipeline: Any,
    text_length: int,
    *,
    steps: int,
    seed: int,
    copies: int = 1,
    output_type: str = "latent",
    **size: Any,
) -> torch.Tensor | None:
    """Run ``pipeline``; None if another rank has the result. ``copies`` of the prompt, one per data-parallel group."""
    pipeline.set_progress_bar_config(disable=True)
    text = _text(pipeline, text_length)
    if copies > 1:
        text["prompt"] = [text["prompt"]] * copies
    result = pipeline(
        **text,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output_type,
        return_dict=False,
        **size,
    )
    latents = result[0] if result else None
    return latents if isinstance(latents, torch.Tensor) else None  # CogVideoX: a list of None


def _text(pipeline: Any, text_length: int) -> dict[str, Any]:
    if not hasattr(pipeline, "text_encoder_3"):
        return {"prompt": PROMPT, "max_sequence_length": text_length}
    # Encode SD3's prompt here: xDiT's pipeline ignores max_sequence_length and uses the default of 256.
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, pipeline.encode_prompt(PROMPT, None, None, max_sequence_length=text_length), strict=True))


def small_input(folder: str | Path) -> dict[str, Any]:
    return json.loads(Path(folder, "small_input.json").read_text(encoding="utf-8"))


def parse_arguments() -> argparse.Namespace:
    from xfuser import xFuserArgs
    from xfuser.config import FlexibleArgumentParser

    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser(description=__doc__))
    # xDiT's parser turns dashes into underscores before it looks an option up.
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="file for the latents")
    parser.add_argument("--text_length", type=int, default=16, help="text tokens of the T5, UMT5 or Llama encoder")
    parser.add_argument(
        "--wrapper",
        choices=("pipeline", "runner"),
        default="pipeline",
        help="flux: xDiT's pipeline class, or the transformer wrapper of its runner model",
    )
    parser.add_argument("--decode", action="store_true", help="write pixels in place of latents")
    parser.add_argument("--shard", action="store_true", help="shard the transformer's blocks over all ranks (FSDP)")
    parser.add_argument("--compile", metavar="BACKEND", help="torch.compile the transformer with this backend")
    parser.set_defaults(height=None, width=None, num_frames=None, guidance_scale=None, num_inference_steps=STEPS)
    arguments = parser.parse_args()
    for name, value in small_input(arguments.model).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def xdit_pipeline(arguments: argparse.Namespace, engine_config: Any) -> Any:
    """The pipeline of ``arguments.family`` as xDiT builds it, on CPU in float32."""
    from xfuser import xFuserCogVideoXPipeline, xFuserFluxPipeline, xFuserStableDiffusion3Pipeline

    pipelines = {"sd3": xFuserStableDiffusion3Pipeline, "cogvideox": xFuserCogVideoXPipeline}
    if arguments.wrapper == "pipeline":
        pipelines["flux"] = xFuserFluxPipeline
    if arguments.family in pipelines:
        return pipelines[arguments.family].from_pretrained(
            arguments.model,
            engine_config=engine_config,
            torch_dtype=torch.float32,
            cache_args={
                "use_teacache": arguments.use_teacache,  # required by xDiT 0.5, still accepted later
                "use_fbcache": arguments.use_fbcache,
                "num_steps": arguments.num_inference_steps,
                "rel_l1_thresh": 1e6,  # skip every step that may be skipped
            },
        )

    from xfuser.core.distributed import get_pipeline_parallel_world_size, get_runtime_state, initialize_runtime_state

    pipeline_class, transformer_class = runner_classes(arguments.family)
    transformer = transformer_class.from_pretrained(arguments.model, subfolder="transformer", torch_dtype=torch.float32)
    pipeline = pipeline_class.from_pretrained(arguments.model, transformer=transformer, torch_dtype=torch.float32)
    # DiffusionPipeline.from_pretrained would silently load its own transformer instead.
    assert pipeline.transformer is transformer
    initialize_runtime_state(pipeline, engine_config)
    if arguments.family == "flux":
        get_runtime_state().set_input_parameters(
            batch_size=1,
            num_inference_steps=arguments.num_inference_steps,
            max_condition_sequence_length=arguments.text_length,
            split_text_embed_in_sp=get_pipeline_parallel_world_size() == 1,
        )
    return pipeline


def runner_classes(family: str) -> tuple[type, type]:
    """The diffusers pipeline and xDiT's transformer for it, as in ``xfuser.model_executor.models.runner_models``."""
    if family == "flux":
        from xfuser.model_executor.models.transformers.transformer_flux import xFuserFlux1Transformer2DWrapper

        return FluxPipeline, xFuserFlux1Transformer2DWrapper
    if family == "hunyuanvideo":
        from xfuser.model_executor.models.transformers.transformer_hunyuan_video import (
            xFuserHunyuanVideoTransformer3DWrapper,
        )

        return HunyuanVideoPipeline, xFuserHunyuanVideoTransformer3DWrapper
    from xfuser.model_executor.models.transformers.transformer_wan import xFuserWanTransformer3DWrapper

    return WanPipeline, xFuserWanTransformer3DWrapper


def run_rank(arguments: argparse.Namespace) -> None:
    """Denoise once; rank 0 writes the results of all ranks. Collective over the world; xDiT stays initialised."""
    from xfuser import xFuserArgs

    engine_config, _ = xFuserArgs.from_cli_args(arguments).create_config()
    engine_config.runtime_config.dtype = torch.float32  # sizes PipeFusion's receive buffers
    pipeline = xdit_pipeline(arguments, engine_config)
    if arguments.compile:
        pipeline.transformer.compile(backend=arguments.compile)
    if arguments.shard:
        from xfuser.core.distributed.sharding import shard_component

        blocks = ["transformer_blocks", "single_transformer_blocks"]
        pipeline.transformer = shard_component(
            pipeline.transformer, blocks, device_id=torch.distributed.get_rank(), memory_efficient_init=True
        )
    size: Mapping[str, Any] = {name: getattr(arguments, name) for name in small_input(arguments.model)}
    latents = _denoise(
        pipeline,
        arguments.text_length,
        steps=arguments.num_inference_steps,
        seed=arguments.seed,
        copies=arguments.data_parallel_degree,
        output_type="pt" if arguments.decode else "latent",
        **size,
    )
    results: list[torch.Tensor | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(results, latents)
    if torch.distributed.get_rank() == 0:
        by_rank = {rank: latents for rank, latents in enumerate(results) if latents is not None}
        torch.save({"world_size": len(results), "latents": by_rank}, arguments.out)


def main() -> None:
    run_rank(parse_arguments())
    from xfuser.core.distributed import get_runtime_state

    get_runtime_state().destroy_distributed_env()


if __name__ == "__main__":
    main()
