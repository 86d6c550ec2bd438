"""Tiny Flux2, Latte and Qwen-Image, which xDiT 0.7 computes wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    LattePipeline,
    LatteTransformer3DModel,
    QwenImageTransformer2DModel,
)

from sf_xfuser.bench.tiny_models import image_vae, unit_gain

HEADS = {"num_attention_heads": 8, "attention_head_dim": 16}
TEXT = 32  # width of text embeddings


def flux2_pipeline() -> Flux2Pipeline:
    transformer = Flux2Transformer2DModel(
        **HEADS, in_channels=64, num_layers=2, num_single_layers=2, joint_attention_dim=TEXT,
        timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4))  # fmt: skip
    vae = AutoencoderKLFlux2(
        latent_channels=16, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return Flux2Pipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)


def latte_pipeline() -> LattePipeline:
    transformer = LatteTransformer3DModel(
        **HEADS, in_channels=16, out_channels=32, num_layers=2, cross_attention_dim=128, sample_size=32, patch_size=2,
        activation_fn="gelu-approximate", norm_type="ada_norm_single", num_embeds_ada_norm=1000, norm_eps=1e-6,
        norm_elementwise_affine=False, caption_channels=TEXT, video_length=4)  # fmt: skip
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    return LattePipeline(
        tokenizer=None, text_encoder=None, vae=image_vae(), scheduler=scheduler, transformer=transformer
    )


def qwen_transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(**HEADS, num_layers=2, joint_attention_dim=TEXT, axes_dims_rope=(4, 6, 6))


BUILDERS = {"flux2": flux2_pipeline, "latte": latte_pipeline, "qwen": qwen_transformer}


def save(family: str, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILDERS[family]()
        unit_gain(getattr(model, "transformer", model))
    model.save_pretrained(folder)
    (folder / "small_input.json").write_text("{}")
    return folder


def inputs(family: str, text: int, steps: int) -> dict[str, Any]:
    """Arguments of one call, equal on all ranks."""
    torch.manual_seed(1)
    if family == "qwen":
        return {
            "hidden_states": torch.randn(1, 64, 64), "encoder_hidden_states": torch.randn(1, text, TEXT),
            "timestep": torch.tensor([0.5]), "img_shapes": [[(1, 8, 8)]], "return_dict": False,
        }  # fmt: skip
    call = {"height": 128, "width": 128, "num_inference_steps": steps, "guidance_scale": 2.0, "return_dict": False,
            "generator": torch.Generator().manual_seed(3), "output_type": "latent"}  # fmt: skip
    if family == "flux2":
        return call | {"prompt_embeds": torch.randn(1, text, TEXT), "max_sequence_length": text}
    embeds = {f"{sign}prompt_embeds": torch.randn(1, text, TEXT) for sign in ("", "negative_")}
    return call | embeds | {"video_length": 4, "negative_prompt": None}


OPTIONS = {"torch_dtype": torch.float32, "text_encoder": None, "tokenizer": None}


@torch.no_grad()
def single(family: str, folder: Path, text: int, steps: int = 2) -> torch.Tensor:
    """The result of diffusers in one process."""
    if family == "qwen":
        model = QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    else:
        model = DiffusionPipeline.from_pretrained(folder, **OPTIONS)
        model.set_progress_bar_config(disable=True)
    return model(**inputs(family, text, steps))[0]
