"""Rank side of test_adapters.py: adapters and kinds of pipelines, with diffusers' own classes and tiny models.

    sf-xfuser cluster run --cluster 2x2 -- python adapters.py FOLDERS CASE:WAY...     # FOLDERS: JSON, {family: folder}

A case of ``CASES`` makes a pipeline and calls it. The calls run on a pipeline in one process, and on one that is split
over all ranks in one of three ways: ``parallelize`` (diffusers alone), ``transformer`` (xDiT's transformer in
diffusers' pipeline, as in xDiT's runner) and ``pipeline`` (xDiT's pipeline). Every rank reports a ``Measured``.
"""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from cases import report
from diffusers import DiffusionPipeline
from model_table import TEXT as QWEN_TEXT
from model_table import qwen as qwen_transformer
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from run_pipeline import PROMPT, SEED, STEPS, runner_classes
from xfuser import xFuserArgs, xFuserFluxPipeline, xFuserStableDiffusion3Pipeline
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import get_runtime_state, initialize_runtime_state
from xfuser.model_executor.models.transformers.transformer_qwen import xFuserQwenImageTransformerWrapper
from xfuser.model_executor.pipelines.pipeline_flux_control import xFuserPipelineFluxControlPipeline

import sf_xfuser
from sf_xfuser.bench.tiny_models import unit_gain
from sf_xfuser.integrations.fallback import DropIn
from sf_xfuser.integrations.xdit import session
from sf_xfuser.torus.call import Call

FOLDERS: Mapping[str, str] = json.loads(sys.argv[1])
TEXT = 16
OTHER = "A red boat"  # fewer tokens than PROMPT
SIZE = {"height": 128, "width": 128}
SD3 = {"max_sequence_length": 256}  # xDiT's pipeline has no other
VIDEO = {"height": 64, "width": 64, "num_frames": 9}
Calls = Iterator[torch.Tensor | None]


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


PICTURE, MASK = random(1, 3, 128, 128), (random(1, 1, 128, 128, seed=2) > 0.5).float()

# -- pipelines --------------------------------------------------------------------------------------------------------


def build(family: str, name: str | None = None, **more: Callable[[Any], Any]) -> Any:
    """The tiny pipeline of a family, or the pipeline class ``name`` with its parts and ``more`` parts made from it."""
    pipe = DiffusionPipeline.from_pretrained(FOLDERS[family], torch_dtype=torch.float32)
    if name is not None:
        kind = getattr(diffusers, name)
        parts = {**pipe.components, **{key: make(pipe.transformer) for key, make in more.items()}}
        pipe = kind(**{key: part for key, part in parts.items() if key in inspect.signature(kind).parameters})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def qwen(name: str = "QwenImagePipeline", **more: Callable[[Any], Any]) -> Any:
    """Without a text encoder: its calls give embeddings."""
    torch.manual_seed(0)
    transformer = qwen_transformer().eval()
    unit_gain(transformer)
    pipe = getattr(diffusers, name)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=None, tokenizer=None, transformer=transformer,
        **{key: make(transformer) for key, make in more.items()},
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_model(kind: type, config: Mapping[str, Any]) -> Any:
    torch.manual_seed(3)
    model = kind.from_config(config).eval()  # type: ignore[attr-defined]
    unit_gain(model)
    return model


def flux_controlnet(transformer: Any) -> Any:
    return random_model(diffusers.FluxControlNetModel, {**transformer.config, "num_layers": 1, "num_single_layers": 1})


def qwen_controlnet(transformer: Any) -> Any:
    return random_model(diffusers.QwenImageControlNetModel, {**transformer.config, "num_layers": 1})


def sd3_controlnet(transformer: Any) -> Any:
    return random_model(diffusers.SD3ControlNetModel, {**transformer.config, "num_layers": 1})


def flux_with_channels(transformer: Any, channels: int) -> Any:
    config = transformer.config
    more = {"in_channels": channels, "out_channels": config["in_channels"]}
    return random_model(diffusers.FluxTransformer2DModel, {**config, **more})


# -- calls ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(pipe: Any, **options: Any) -> torch.Tensor | None:
    """The latents; None on ranks to which xDiT's pipeline returns nothing."""
    given = {"prompt": PROMPT, "max_sequence_length": TEXT, "num_inference_steps": STEPS, "output_type": "latent",
             "generator": torch.Generator().manual_seed(SEED), "return_dict": False, **SIZE} | options  # fmt: skip
    result = pipe(**given)
    return result[0] if result else None


def draw_each(pipe: Any, *options: dict[str, Any], **common: Any) -> Calls:
    for one in options:
        yield draw(pipe, **common, **one)


def lora_weights(family: str, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = build(family).transformer
    targets = ["to_q", "to_k", "to_out.0", "proj_out"]
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return {f"transformer.{name}": weight for name, weight in get_peft_model_state_dict(model).items()}


def lora(pipe: Any, family: str, scale: str = "joint_attention_kwargs", **options: Any) -> Calls:
    """Load, scale for one call and for all, add a second one, fuse, unload, load again, hot swap."""
    one, two = lora_weights(family, 1), lora_weights(family, 2)
    results = [draw(pipe, **options)]
    pipe.load_lora_weights(dict(one), adapter_name="one")
    results += draw_each(pipe, {}, {scale: {"scale": 0.3}}, **options)
    pipe.set_adapters(["one"], [0.5])
    results += draw_each(pipe, {}, **options)
    pipe.load_lora_weights(dict(two), adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.4, 0.7])
    pipe.fuse_lora()
    results += draw_each(pipe, {}, **options)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    results += draw_each(pipe, {}, **options)
    pipe.load_lora_weights(dict(two), adapter_name="one")
    results += draw_each(pipe, {}, **options)
    pipe.load_lora_weights(dict(one), adapter_name="one", hotswap=True)
    results += draw_each(pipe, {}, **options)
    if results[0] is not None:
        assert torch.allclose(results[7], results[1], atol=1e-4)
        assert all((result - results[0]).abs().max() > 0.1 for n, result in enumerate(results) if n not in (0, 5))
    yield from results


def ip_adapter(pipe: Any) -> Calls:
    config = pipe.transformer.config
    inner, text = config.num_attention_heads * config.attention_head_dim, config.joint_attention_dim
    attention = {}
    for name in (f"{n}.to_{x}_ip" for n in range(config.num_layers) for x in "kv"):
        attention |= {f"{name}.weight": random(inner, text) - 0.5, f"{name}.bias": random(inner)}
    projection = {"proj.weight": random(4 * text, 24) - 0.5, "proj.bias": random(4 * text),
                  "norm.weight": torch.ones(text), "norm.bias": torch.zeros(text)}  # fmt: skip
    weights = {"image_proj": projection, "ip_adapter": attention}
    pipe.load_ip_adapter(weights, weight_name="", image_encoder_pretrained_model_name_or_path=None)
    embeds = {
        "ip_adapter_image_embeds": [random(1, 1, 24)],
        "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, 24)],
    }
    yield draw(pipe, **embeds)
    pipe.set_ip_adapter_scale(0.4)
    yield draw(pipe, **embeds, true_cfg_scale=2.0, negative_prompt=OTHER)
    pipe.unload_ip_adapter()
    yield draw(pipe)


def qwen_text(*lengths: int, prefix: str = "") -> dict[str, Any]:
    """Embeddings of prompts with so many tokens, padded to the longest."""
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    embeds = random(*mask.shape, QWEN_TEXT, seed=len(prefix))
    return {"prompt": None, f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}


UNLIKE = {"prompt": [PROMPT, OTHER]}
CONTROL = {"control_image": PICTURE}
PAINT = {"image": PICTURE, "mask_image": MASK}
KONTEXT = {"max_area": 128 * 128, "_auto_resize": False}


def flux(name: str, *options: dict[str, Any], **more: Callable[[Any], Any]) -> tuple[Callable[[], Any], Any]:
    return partial(build, "flux", name, **more), lambda pipe: draw_each(pipe, *options)


CASES: Mapping[str, tuple[Callable[[], Any], Callable[[Any], Calls]]] = {
    "flux_lora": (partial(build, "flux"), partial(lora, family="flux")),
    "sd3_lora": (partial(build, "sd3"), partial(lora, family="sd3", **SD3)),
    "wan_lora": (partial(build, "wan"), partial(lora, family="wan", scale="attention_kwargs", **VIDEO)),
    "flux_ip_adapter": (partial(build, "flux"), ip_adapter),
    "flux_controlnet": flux(
        "FluxControlNetPipeline", CONTROL, CONTROL | UNLIKE | {"controlnet_conditioning_scale": 0.5},
        controlnet=flux_controlnet,
    ),
    "qwen_controlnet": (
        partial(qwen, "QwenImageControlNetPipeline", controlnet=qwen_controlnet),
        lambda pipe: draw_each(pipe, *(CONTROL | qwen_text(n) for n in (16, 13))),
    ),
    "sd3_controlnet": (
        partial(build, "sd3", "StableDiffusion3ControlNetPipeline", controlnet=sd3_controlnet),
        lambda pipe: draw_each(pipe, CONTROL),
    ),
    "flux_img2img": flux("FluxImg2ImgPipeline", {"image": PICTURE, "strength": 1.0}),
    "flux_inpaint": flux("FluxInpaintPipeline", PAINT | {"strength": 1.0}),
    "flux_fill": flux("FluxFillPipeline", PAINT, transformer=partial(flux_with_channels, channels=384)),
    "flux_control": flux("FluxControlPipeline", CONTROL, transformer=partial(flux_with_channels, channels=128)),
    "flux_kontext": flux(
        "FluxKontextPipeline", {"image": PICTURE, **KONTEXT},
        {"image": PICTURE, **KONTEXT, "true_cfg_scale": 2.0, "negative_prompt": OTHER},
    ),
    "flux_kontext_inpaint": flux("FluxKontextInpaintPipeline", PAINT | {"strength": 1.0, **KONTEXT}),
    "flux_true_cfg": flux(
        "FluxPipeline", *({"true_cfg_scale": 3.0, "negative_prompt": OTHER, **more} for more in ({}, UNLIKE))
    ),
    "flux_batches": flux("FluxPipeline", {"num_images_per_prompt": 3}, UNLIKE | {"num_images_per_prompt": 2}),
    "sd3_batches": (
        partial(build, "sd3"),
        lambda pipe: draw_each(
            pipe, {"num_images_per_prompt": 3}, UNLIKE | {"negative_prompt": [OTHER, PROMPT]}, **SD3
        ),
    ),
    "wan_batches": (
        partial(build, "wan"),
        lambda pipe: draw_each(pipe, {"num_videos_per_prompt": 2, "negative_prompt": OTHER}, UNLIKE, **VIDEO),
    ),
    "qwen_true_cfg": (
        qwen,
        lambda pipe: draw_each(
            pipe, *({"true_cfg_scale": 3.0, **qwen_text(n), **qwen_text(5, prefix="negative_")} for n in (16, 13))
        ),
    ),
    "qwen_batches": (
        qwen,
        lambda pipe: draw_each(
            pipe, qwen_text(13) | {"num_images_per_prompt": 2},
            {"true_cfg_scale": 3.0, **qwen_text(16, 7), **qwen_text(5, 13, prefix="negative_")},
        ),
    ),
}  # fmt: skip

# -- ranks ------------------------------------------------------------------------------------------------------------

XDIT_PIPELINES = {
    "FluxPipeline": xFuserFluxPipeline,
    "FluxControlPipeline": xFuserPipelineFluxControlPipeline,
    "StableDiffusion3Pipeline": xFuserStableDiffusion3Pipeline,
}


@dataclass
class Measured:
    """The largest difference of each call, the error that ended them, and how many attention calls ran where."""

    differences: list[float] = field(default_factory=list)
    error: str = ""
    handled: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    staged: bool = False


def parallelized(pipe: Any, engine_config: Any) -> tuple[Any, DropIn]:
    args = sf_xfuser.TorusArgs(backend="torus", plan="torus=2,ulysses=1,ring=2", timeout=30)
    return pipe, sf_xfuser.parallelize(pipe.transformer, args=args)


def with_xdit_transformer(pipe: Any, engine_config: Any) -> tuple[Any, DropIn]:
    plain = pipe.transformer
    family = {"FluxTransformer2DModel": "flux", "WanTransformer3DModel": "wan"}.get(type(plain).__name__)
    wrapper = runner_classes(family)[1] if family else xFuserQwenImageTransformerWrapper
    pipe.transformer = wrapper(**{name: value for name, value in plain.config.items() if name[0] != "_"}).eval()
    pipe.transformer.load_state_dict(plain.state_dict())
    initialize_runtime_state(pipe, engine_config)
    if family == "flux":  # as the runner does
        get_runtime_state().set_input_parameters(
            batch_size=1, num_inference_steps=STEPS, max_condition_sequence_length=TEXT, split_text_embed_in_sp=True
        )
    return pipe, counted()


def xdit_pipeline(pipe: Any, engine_config: Any) -> tuple[Any, DropIn]:
    return XDIT_PIPELINES[type(pipe).__name__](pipe, engine_config), counted()


def counted() -> DropIn:
    usp = session.current.usp
    assert usp is not None
    usp.handled = 0
    usp.fallbacks.clear()
    return usp


WAYS = {"parallelize": parallelized, "transformer": with_xdit_transformer, "pipeline": xdit_pipeline}


def measure(make: Any, calls: Any, way: str, engine_config: Any, wanted: list[torch.Tensor]) -> Measured:
    found, attention = Measured(), None
    try:
        pipe, attention = WAYS[way](make(), engine_config)
        for result, expected in zip(calls(pipe), wanted, strict=True):
            if result is not None:
                assert result.shape == expected.shape, (result.shape, expected.shape)
                found.differences.append((result - expected).abs().max().item())
    except Exception as error:  # of the plugin, xDiT or diffusers
        found.error = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    if attention is not None:
        found.handled, found.fallbacks = attention.handled, dict(attention.fallbacks)
        known = [call for call in attention.mesh.calls.values() if isinstance(call, Call)]
        found.staged = bool(known) and all(call.schedule.remote for call in known)
    return found


def main() -> None:
    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--model", "none", "--sp-backend", "torus", "--ulysses_degree", "2", "--ring_degree", "2"]
    engine_config, _ = xFuserArgs.from_cli_args(parser.parse_args(flags)).create_config()
    engine_config.runtime_config.dtype = torch.float32
    wanted: dict[str, list[torch.Tensor]] = {}
    for name, way in (argument.split(":") for argument in sys.argv[2:]):
        make, calls = CASES[name]
        if name not in wanted:
            wanted[name] = list(calls(make()))
        report(f"{name}:{way}", asdict(measure(make, calls, way, engine_config, wanted[name])))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
