"""Every transformer of xDiT 0.7.0 that calls USP, as a tiny model with random weights, and inputs for it.

``MODELS`` is the table: how to build each model, its wrapper in xDiT, and the expected result under ``--sp-backend
torus``. ``run_transformers.py`` runs it on ranks, ``test_models.py`` checks the results, and ``support_table.py``
prints it for docs/models.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch

from sf_xfuser.bench.tiny_models import image_vae, unit_gain

HEADS, HEAD_DIM = 8, 16
WIDTH = HEADS * HEAD_DIM
TEXT = 32  # width of text embeddings


@dataclass(frozen=True, kw_only=True)
class Input:
    """Sizes of one call: latent frames, height and width, and text tokens. Odd ones divide by no group of ranks."""

    frames: int
    height: int
    width: int
    text: int


SIZES = {
    "even": Input(frames=2, height=8, width=8, text=16),
    "text 13": Input(frames=2, height=8, width=8, text=13),
    "odd": Input(frames=3, height=6, width=10, text=16),  # 3 * 6/2 * 10/2 = 45 tokens of video, 15 of a picture
}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A different result for one input size, one split of the ranks, or both. ``why`` is in docs/models.md.

    ``xdit``: xDiT's own result differs from that of one process, and torus equals xDiT's. ``falls back``: calls
    fall back to xDiT's USP, and ``reason`` is the reason it logs. ``fails``: every rank raises, with and without torus;
    ``reason`` is the error. ``never``: not run, because xDiT's ranks would wait for each other.
    """

    kind: Literal["xdit", "falls back", "fails", "never"]
    why: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One row: a model of diffusers, and its wrapper in xDiT.

    ``wrapper`` is ``module:class`` below ``xfuser.model_executor.models.transformers``, or the name of a pipeline.
    ``call(size)`` returns the arguments. ``limits``: by ``"case size"``, case, size, or for ``"all"``; without one,
    torus handles every call and equals diffusers in one process. ``split`` names arguments that xDiT's pipeline splits
    before the wrapper if the ranks divide them, with the dimension; ``"output"`` is gathered after it.
    ``prepare(model, state, size)`` does the remaining set-up of the pipeline or runner.
    ``repaired``: the log text of a repair, without which xDiT is wrong.
    """

    name: str
    wrapper: str
    build: Callable[[], Any]
    call: Callable[[Input], dict[str, Any]]
    limits: Mapping[str, Limit] = field(default_factory=dict)
    split: Mapping[str, int] = field(default_factory=dict)
    prepare: Callable[[Any, Any, Input], None] = lambda model, state, size: None
    repaired: str = ""

    @property
    def folder(self) -> str:
        return re.sub(r"\W+", "-", self.name.lower())

    @property
    def is_pipeline(self) -> bool:
        return self.wrapper.endswith("Pipeline")

    def exception(self, case: str, size: str) -> Limit | None:
        keys = ("all", f"{case} {size}", case, size)
        return next((self.limits[key] for key in keys if key in self.limits), None)

    def save(self, folder: Path) -> None:
        """Write the model with fixed random weights under ``folder``: a transformer, or a pipeline."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
            unit_gain(model.transformer if self.is_pipeline else model)
        model.save_pretrained(folder)

    def load(self, folder: Path) -> Any:
        """The saved model by diffusers' own class."""
        if self.is_pipeline:
            return diffusers.DiffusionPipeline.from_pretrained(folder, **self.options(folder))
        name = json.loads((folder / "config.json").read_text())["_class_name"]
        return getattr(diffusers, name).from_pretrained(folder, **self.options(folder)).eval()

    def options(self, folder: Path) -> dict[str, Any]:
        """For ``from_pretrained``: the components that a pipeline does without have to be named."""
        index = json.loads((folder / "model_index.json").read_text()) if self.is_pipeline else {}
        return {"torch_dtype": torch.float32, **{name: None for name, how in index.items() if how == [None, None]}}


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def grid(frames: int, height: int, width: int) -> torch.Tensor:
    """(t, h, w) of each token, [frames * height * width, 3]."""
    axes = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(axes, dim=-1).reshape(-1, 3)


def flux_call(size: Input) -> dict[str, Any]:
    tokens = size.height * size.width // 4
    ids = grid(1, size.height // 2, size.width // 2).float()
    return {
        "hidden_states": rand(1, tokens, 64),
        "encoder_hidden_states": rand(1, size.text, TEXT),
        "pooled_projections": rand(1, TEXT),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(size.text, 3),
    }


def flux2_call(size: Input) -> dict[str, Any]:
    call = flux_call(size)
    del call["pooled_projections"]
    pad = torch.zeros(call["img_ids"].shape[0], 1)
    text = torch.zeros(size.text, 4)
    text[:, 3] = torch.arange(size.text)
    return {**call, "img_ids": torch.cat([call["img_ids"], pad], dim=1)[None], "txt_ids": text[None]}


def two_prompts(call: Callable[[Input], dict[str, Any]], mask: str) -> Callable[[Input], dict[str, Any]]:
    """``call`` for a batch of two prompts, the second five tokens shorter, as the argument ``mask`` says."""

    def both(size: Input) -> dict[str, Any]:
        first, second = call(size), call(size)
        found = {
            name: torch.cat([value, second[name]]) if isinstance(value, torch.Tensor) else value * 2
            for name, value in first.items()
        }
        valid = torch.arange(size.text)[None] < torch.tensor([[size.text], [size.text - 5]])
        return {**found, mask: valid.to(first.get(mask, valid).dtype)}

    return both


def hunyuan_video_call(size: Input) -> dict[str, Any]:
    return {
        "hidden_states": rand(1, 16, size.frames, size.height, size.width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": rand(1, size.text, TEXT),
        "encoder_attention_mask": torch.ones(1, size.text, dtype=torch.long),
        "pooled_projections": rand(1, TEXT),
        "guidance": torch.tensor([6000.0]),
    }


def hunyuan_video15_call(size: Input) -> dict[str, Any]:
    second = torch.zeros(1, 4, dtype=torch.long)
    second[:, : size.text % 2] = 1  # byte-level text: none, or one token
    return {
        "hidden_states": rand(1, 33, size.frames, size.height // 2, size.width // 2),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": rand(1, size.text, TEXT),
        "encoder_attention_mask": torch.ones(1, size.text, dtype=torch.long),
        "encoder_hidden_states_2": rand(1, 4, TEXT),
        "encoder_attention_mask_2": second,
        "image_embeds": torch.zeros(1, 3, TEXT),
    }


def wan_call(size: Input) -> dict[str, Any]:
    return {
        "hidden_states": rand(1, 16, size.frames, size.height, size.width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": rand(1, size.text, TEXT),
    }


def wan_i2v_call(size: Input) -> dict[str, Any]:
    return {
        **wan_call(size),
        "encoder_hidden_states": rand(1, 512, TEXT),  # fixed in xDiT
        "encoder_hidden_states_image": rand(1, 7, TEXT),
    }


def wan_vace_call(size: Input) -> dict[str, Any]:
    return {**wan_call(size), "control_hidden_states": rand(1, 96, size.frames, size.height, size.width)}


def qwen_call(size: Input) -> dict[str, Any]:
    return {
        "hidden_states": rand(1, size.height * size.width // 4, 64),
        "encoder_hidden_states": rand(1, size.text, TEXT),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, size.height // 2, size.width // 2)]],
    }


def z_image_call(size: Input) -> dict[str, Any]:
    return {
        "x": [rand(16, 1, size.height, size.width)],
        "t": torch.tensor([0.5]),
        "cap_feats": [rand(size.text, TEXT)],
    }


def lumina2_call(size: Input) -> dict[str, Any]:
    return {
        "hidden_states": rand(1, 16, size.height, size.width),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": rand(1, size.text, TEXT),
        "encoder_attention_mask": torch.ones(1, size.text, dtype=torch.bool),
    }


def krea2_call(size: Input, padded: int = 0) -> dict[str, Any]:
    positions = torch.cat([torch.zeros(size.text, 3), grid(1, size.height // 2, size.width // 2).float()])
    call = {
        "hidden_states": rand(1, size.height * size.width // 4, 64),
        "encoder_hidden_states": rand(1, size.text, 2, TEXT),
        "timestep": torch.tensor([0.5]),
        "position_ids": positions,
    }
    if padded:
        call["encoder_attention_mask"] = torch.arange(size.text)[None] < size.text - padded
    return call


def ltx2_call(size: Input, padded: int = 0) -> dict[str, Any]:
    height, width = size.height // 2, size.width // 2
    call = {
        "hidden_states": rand(1, size.frames * height * width, 16),
        "audio_hidden_states": rand(1, 9, 16),
        "encoder_hidden_states": rand(1, size.text, TEXT),
        "audio_encoder_hidden_states": rand(1, size.text, TEXT),
        "timestep": torch.tensor([500.0]),
        "num_frames": size.frames,
        "height": height,
        "width": width,
        "audio_num_frames": 9,
    }
    if padded:
        valid = (torch.arange(size.text)[None] < size.text - padded).long()
        call |= {"encoder_attention_mask": valid, "audio_encoder_attention_mask": valid}
    return call


def cosmos3_call(size: Input) -> dict[str, Any]:
    height, width = size.height // 2, size.width // 2
    tokens = size.frames * height * width
    total = size.text + tokens
    video = torch.arange(size.text, total)
    text_positions = torch.arange(size.text)[None].expand(3, -1)
    return {
        "input_ids": torch.randint(64, (size.text,)),
        "text_indexes": torch.arange(size.text),
        "position_ids": torch.cat([text_positions, size.text + grid(size.frames, height, width).T], dim=1),
        "und_len": size.text,
        "sequence_length": total,
        "vision_tokens": [rand(1, 16, size.frames, size.height, size.width)],
        "vision_token_shapes": [(size.frames, height, width)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.full((tokens,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(size.frames)],
    }


def ideogram4_call(size: Input) -> dict[str, Any]:
    picture = size.height * size.width // 4
    total = size.text + picture
    text = torch.arange(size.text)[:, None].expand(-1, 3)
    image = grid(1, size.height // 2, size.width // 2)
    return {
        "hidden_states": rand(1, total, 64),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": rand(1, total, TEXT),
        "position_ids": torch.cat([text, image])[None],
        "segment_ids": torch.zeros(1, total, dtype=torch.long),
        "indicator": torch.tensor([[3] * size.text + [2] * picture]),
    }


def minimax_h3_call(size: Input) -> dict[str, Any]:
    height, width, audio = size.height // 2, size.width // 2, 16 - size.text % 2
    video = size.frames * height * width
    total = size.text + audio + video
    order = torch.arange(total)
    flat = torch.arange(size.text + audio)[:, None].expand(-1, 3)
    return {
        "hidden_states": rand(1, video, 16 * 4),
        "audio_hidden_states": rand(1, audio, 16),
        "encoder_hidden_states": rand(1, size.text, TEXT),
        "timestep": torch.tensor([0.5]),
        "timestep_indices": torch.zeros(total, dtype=torch.long),
        "token_tags": torch.tensor([1] * size.text + [2] * audio + [0] * video),
        "position_ids": torch.cat([flat, grid(size.frames, height, width)]),
        "text_indices": order[: size.text],
        "audio_indices": order[size.text : size.text + audio],
        "video_indices": order[size.text + audio :],
    }


def pipeline_call(size: Input, **more: Any) -> dict[str, Any]:
    return {
        "height": 16 * size.height, "width": 8 * size.width, "num_inference_steps": 2, "guidance_scale": 2.0,
        "generator": torch.Generator().manual_seed(3), "output_type": "latent", "return_dict": False, **more,
    }  # fmt: skip


def pixart_call(size: Input) -> dict[str, Any]:
    return pipeline_call(
        size,
        use_resolution_binning=False,
        negative_prompt=None,
        prompt_embeds=rand(1, size.text, TEXT),
        prompt_attention_mask=torch.ones(1, size.text, dtype=torch.long),
        negative_prompt_embeds=rand(1, size.text, TEXT),
        negative_prompt_attention_mask=torch.ones(1, size.text, dtype=torch.long),
    )


def sd3_call(size: Input) -> dict[str, Any]:
    call = pipeline_call(size)
    for sign in ("", "negative_"):
        call[f"{sign}prompt_embeds"] = rand(1, size.text, TEXT)
        call[f"{sign}pooled_prompt_embeds"] = rand(1, TEXT)
    return call


def consisid_call(size: Input) -> dict[str, Any]:
    return {
        "hidden_states": rand(1, size.frames, 16, size.height, size.width),
        "encoder_hidden_states": rand(1, size.text, TEXT),
        "timestep": torch.tensor([500]),
    }


def consisid_state(model: Any, state: Any, size: Input) -> None:
    state.vae_scale_factor_spatial = 8
    state.set_input_parameters(
        height=8 * size.height, width=8 * size.width, batch_size=1, num_inference_steps=1,
        split_text_embed_in_sp=size.text % 4 == 0)  # fmt: skip


def hunyuan_dit_call(size: Input) -> dict[str, Any]:
    call = pipeline_call(size, use_resolution_binning=False)
    for suffix, tokens in (("", 77), ("_2", 256)):
        for sign in ("", "negative_"):
            call[f"{sign}prompt_embeds{suffix}"] = rand(1, tokens, TEXT)
            call[f"{sign}prompt_attention_mask{suffix}"] = torch.ones(1, tokens, dtype=torch.long)
    return call


def latte_call(size: Input) -> dict[str, Any]:
    return pipeline_call(
        size,
        video_length=4,
        negative_prompt=None,
        prompt_embeds=rand(1, size.text, TEXT),
        negative_prompt_embeds=rand(1, size.text, TEXT),
    )


ONCE = Limit(kind="xdit", why="xDiT attends to the text once for each rank")
PADDING = Limit(kind="xdit", why="xDiT attends to its own padding")
HEIGHT = Limit(kind="fails", why="xDiT requires a height that the ranks divide", reason="The height of the")
NO_RING = Limit(kind="never", why="xDiT has no ring for it")
MASK = Limit(kind="falls back", why="masked keys", reason="attention_kwargs['attn_mask'] needs keys in order")
BATCH = "each prompt of a batch attends to its own text where lengths differ"
MASKED = "calls with masked keys are computed by SDPA where the attention backend ignores masks"
HAS_HEADS = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
WAN = {**HAS_HEADS, "in_channels": 16, "out_channels": 16, "text_dim": TEXT, "freq_dim": 32, "ffn_dim": WIDTH,
       "num_layers": 2}  # fmt: skip


def hunyuan_video() -> torch.nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        **HAS_HEADS, num_layers=1, num_single_layers=1, num_refiner_layers=1, guidance_embeds=True,
        text_embed_dim=TEXT, pooled_projection_dim=TEXT, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def hunyuan_video15() -> torch.nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        **HAS_HEADS, in_channels=33, out_channels=16, num_layers=2, num_refiner_layers=1, text_embed_dim=TEXT,
        text_embed_2_dim=TEXT, image_embed_dim=TEXT, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def qwen() -> torch.nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        **HAS_HEADS, num_layers=2, joint_attention_dim=TEXT, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def ltx2() -> torch.nn.Module:
    return diffusers.LTX2VideoTransformer3DModel(
        **HAS_HEADS, in_channels=16, out_channels=16, cross_attention_dim=WIDTH, audio_in_channels=16,
        audio_out_channels=16, audio_num_attention_heads=4, audio_attention_head_dim=HEAD_DIM,
        audio_cross_attention_dim=4 * HEAD_DIM, num_layers=2, caption_channels=TEXT, rope_type="split",
    )  # fmt: skip


def krea2() -> torch.nn.Module:
    return diffusers.Krea2Transformer2DModel(
        **HAS_HEADS, num_layers=2, num_key_value_heads=2, intermediate_size=WIDTH, timestep_embed_dim=32,
        text_hidden_dim=TEXT, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=TEXT, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def pixart(version: str) -> Model:
    return Model(
        name=f"PixArt {version}",
        wrapper=f"xFuserPixArt{version}Pipeline",
        build=lambda: getattr(diffusers, f"PixArt{version}Pipeline")(
            tokenizer=None, text_encoder=None, vae=image_vae(),
            scheduler=diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction"),
            transformer=diffusers.PixArtTransformer2DModel(
                **HAS_HEADS, in_channels=16, out_channels=32, num_layers=2, cross_attention_dim=WIDTH, sample_size=32,
                caption_channels=TEXT, use_additional_conditions=False)),
        call=pixart_call,
        limits={"odd": HEIGHT},
    )  # fmt: skip


MODELS = (
    Model(
        name="Flux, Flux Kontext",
        wrapper="transformer_flux:xFuserFlux1Transformer2DWrapper",
        build=lambda: diffusers.FluxTransformer2DModel(
            **HAS_HEADS, num_layers=1, num_single_layers=1, joint_attention_dim=TEXT, pooled_projection_dim=TEXT,
            guidance_embeds=True, axes_dims_rope=(4, 6, 6)),
        call=flux_call,
        prepare=lambda model, state, size: state.set_input_parameters(
            batch_size=1, num_inference_steps=1, max_condition_sequence_length=size.text),
        limits={
            "2x2 odd": Limit(kind="fails", why="padding needs Ulysses over all ranks", reason="needs ring_degree=1"),
        },
    ),
    Model(
        name="Flux 2",
        wrapper="transformer_flux2:xFuserFlux2Transformer2DWrapper",
        build=lambda: diffusers.Flux2Transformer2DModel(
            **HAS_HEADS, in_channels=64, num_layers=1, num_single_layers=1, joint_attention_dim=TEXT,
            timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4)),
        call=flux2_call,
        limits={"text 13": Limit(kind="never", why="xDiT splits the text unevenly"), "odd": PADDING},
    ),
    Model(
        name="SD3.5 with dual attention",
        wrapper="xFuserStableDiffusion3Pipeline",
        build=lambda: diffusers.StableDiffusion3Pipeline(
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None,
            tokenizer_3=None, vae=image_vae(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            transformer=diffusers.SD3Transformer2DModel(
                **HAS_HEADS, sample_size=32, in_channels=16, out_channels=16, num_layers=2, joint_attention_dim=TEXT,
                caption_projection_dim=WIDTH, pooled_projection_dim=TEXT, pos_embed_max_size=32,
                dual_attention_layers=(0,), qk_norm="rms_norm")),
        call=sd3_call,
        limits={
            "odd": HEIGHT,
            **dict.fromkeys(
                ("even", "text 13"),
                Limit(kind="fails", why="xDiT's processor omits joint_strategy", reason="joint_strategy"),
            ),
        },
    ),
    Model(
        name="HunyuanVideo",
        wrapper="transformer_hunyuan_video:xFuserHunyuanVideoTransformer3DWrapper",
        build=hunyuan_video,
        call=hunyuan_video_call,
        limits={"odd": Limit(kind="never", why="xDiT splits the video unevenly")},
    ),
    Model(
        name="HunyuanVideo, prompts of different length",
        repaired=BATCH,
        wrapper="transformer_hunyuan_video:xFuserHunyuanVideoTransformer3DWrapper",
        build=hunyuan_video,
        call=two_prompts(hunyuan_video_call, "encoder_attention_mask"),
        limits={"odd": Limit(kind="never", why="xDiT splits the video unevenly")},
    ),
    Model(
        name="HunyuanVideo 1.5",
        wrapper="transformer_hunyuan_video15:xFuserHunyuanVideo15Transformer3DWrapper",
        build=hunyuan_video15,
        call=hunyuan_video15_call,
        limits={"odd": PADDING},
    ),
    Model(
        name="HunyuanVideo 1.5, prompts of different length",
        repaired=BATCH,
        wrapper="transformer_hunyuan_video15:xFuserHunyuanVideo15Transformer3DWrapper",
        build=hunyuan_video15,
        call=two_prompts(hunyuan_video15_call, "encoder_attention_mask"),
        limits={"odd": PADDING},
    ),
    Model(
        name="Wan 2.1, 2.2",
        wrapper="transformer_wan:xFuserWanTransformer3DWrapper",
        build=lambda: diffusers.WanTransformer3DModel(**WAN),
        call=wan_call,
        limits={"odd": PADDING},
    ),
    Model(
        name="Wan image to video",
        wrapper="transformer_wan:xFuserWanTransformer3DWrapper",
        build=lambda: diffusers.WanTransformer3DModel(**WAN, image_dim=TEXT, added_kv_proj_dim=WIDTH),
        call=wan_i2v_call,
        limits={"odd": PADDING},
    ),
    Model(
        name="Wan VACE",
        wrapper="transformer_wan_vace:xFuserWanVACETransformer3DWrapper",
        build=lambda: diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=96),
        call=wan_vace_call,
        limits={"odd": PADDING},
    ),
    Model(
        name="Qwen-Image",
        wrapper="transformer_qwen:xFuserQwenImageTransformerWrapper",
        build=qwen,
        call=qwen_call,
        limits={"odd": PADDING},
    ),
    Model(
        name="Qwen-Image, prompts of different length",
        repaired=BATCH,
        wrapper="transformer_qwen:xFuserQwenImageTransformerWrapper",
        build=qwen,
        call=two_prompts(qwen_call, "encoder_hidden_states_mask"),
        limits={"odd": PADDING},
    ),
    Model(
        name="Z-Image",
        wrapper="transformer_z_image:xFuserZImageTransformer2DWrapper",
        build=lambda: diffusers.ZImageTransformer2DModel(
            dim=WIDTH, n_layers=2, n_refiner_layers=1, n_heads=HEADS, n_kv_heads=HEADS, cap_feat_dim=TEXT,
            axes_dims=[4, 6, 6], axes_lens=[256, 64, 64]),
        call=z_image_call,
    ),
    Model(
        name="Lumina 2",
        wrapper="transformer_lumina2:xFuserLumina2Transformer2DWrapper",
        build=lambda: diffusers.Lumina2Transformer2DModel(
            hidden_size=WIDTH, num_layers=2, num_refiner_layers=1, num_attention_heads=HEADS, num_kv_heads=4,
            multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(64, 32, 32), cap_feat_dim=TEXT),
        call=lumina2_call,
        limits={"2x2": NO_RING, "text 13": MASK, "odd": MASK},
    ),
    Model(
        name="Krea 2",
        wrapper="transformer_krea2:xFuserKrea2Transformer2DWrapper",
        build=krea2,
        call=krea2_call,
        limits={"text 13": PADDING, "odd": PADDING},
    ),
    Model(
        name="Krea 2 with padded text",
        repaired=MASKED,
        wrapper="transformer_krea2:xFuserKrea2Transformer2DWrapper",
        build=krea2,
        call=lambda size: krea2_call(size, padded=3),
        limits={
            "2x2": Limit(kind="fails", why="a ring has no masks", reason="use --sp-plan with ring=1"),
            **dict.fromkeys(SIZES, MASK),
        },
    ),
    Model(
        name="LTX-2",
        wrapper="transformer_ltx2:xFuserLTX2VideoTransformer3DWrapper",
        build=ltx2,
        call=ltx2_call,
        limits={"odd": PADDING},
    ),
    Model(
        name="LTX-2 with padded text",
        repaired=MASKED,
        wrapper="transformer_ltx2:xFuserLTX2VideoTransformer3DWrapper",
        build=ltx2,
        call=lambda size: ltx2_call(size, padded=3),
        limits={"odd": PADDING},
    ),
    Model(
        name="Cosmos 3",
        wrapper="transformer_cosmos3:get_cosmos3_transformer_wrapper_class",
        build=lambda: diffusers.Cosmos3OmniTransformer(
            dtype="float32", head_dim=HEAD_DIM, hidden_size=WIDTH, intermediate_size=WIDTH, latent_channel=16,
            num_attention_heads=HEADS, num_hidden_layers=2, num_key_value_heads=HEADS, patch_latent_dim=64,
            vocab_size=64, rope_axes_dim=(4, 2, 2)),
        call=cosmos3_call,
        limits={"all": ONCE},
    ),
    Model(
        name="Ideogram 4",
        wrapper="transformer_ideogram4:get_ideogram4_transformer_wrapper_class",
        build=lambda: diffusers.Ideogram4Transformer2DModel(
            **HAS_HEADS, in_channels=64, num_layers=2, intermediate_size=WIDTH, adaln_dim=32, llm_features_dim=TEXT,
            mrope_section=(4, 2, 2)),
        call=ideogram4_call,
        prepare=lambda model, state, size: model._init_sp_state(),
        limits={"text 13": PADDING, "odd": PADDING},
    ),
    Model(
        name="MiniMax-H3",
        wrapper="transformer_minimax_h3:xFuserMiniMaxH3Transformer3DWrapper",
        build=lambda: diffusers.MiniMaxH3Transformer3DModel(
            **HAS_HEADS, hidden_size=WIDTH, num_layers=2, num_refiner_layers=1, ffn_dim=WIDTH, in_channels=16,
            audio_in_channels=16, text_dim=TEXT, freq_dim=32, time_embed_hidden_dim=32, time_embed_dim=32,
            rope_freq_dim=2),
        call=minimax_h3_call,
        limits={
            "2x2": NO_RING,
            **dict.fromkeys(
                ("text 13", "odd"),
                Limit(kind="falls back", why="padded keys", reason="attention_kwargs['indices_k'] needs keys in order"),
            ),
        },
    ),
    pixart("Alpha"),
    pixart("Sigma"),
    Model(
        name="HunyuanDiT",
        wrapper="xFuserHunyuanDiTPipeline",
        build=lambda: diffusers.HunyuanDiTPipeline(
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False, vae=image_vae(),
            scheduler=diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction"),
            transformer=diffusers.HunyuanDiT2DModel(
                **HAS_HEADS, in_channels=16, patch_size=2, hidden_size=WIDTH, num_layers=4, cross_attention_dim=TEXT,
                cross_attention_dim_t5=TEXT, pooled_projection_dim=TEXT)),
        call=hunyuan_dit_call,
        limits={"odd": HEIGHT},
    ),
    Model(
        name="Latte",
        wrapper="xFuserLattePipeline",
        build=lambda: diffusers.LattePipeline(
            tokenizer=None, text_encoder=None, vae=image_vae(),
            scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"),
            transformer=diffusers.LatteTransformer3DModel(
                **HAS_HEADS, in_channels=16, out_channels=32, num_layers=2, cross_attention_dim=WIDTH, sample_size=32,
                patch_size=2, activation_fn="gelu-approximate", norm_type="ada_norm_single", num_embeds_ada_norm=1000,
                norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=TEXT, video_length=4)),
        call=latte_call,
        limits={"odd": HEIGHT},
    ),
    Model(
        name="ConsisID",
        wrapper="consisid_transformer_3d:xFuserConsisIDTransformer3DWrapper",
        build=lambda: diffusers.ConsisIDTransformer3DModel(
            **HAS_HEADS, in_channels=16, out_channels=16, time_embed_dim=32, text_embed_dim=TEXT, num_layers=2,
            sample_width=8, sample_height=8, sample_frames=5, use_rotary_positional_embeddings=True),
        call=consisid_call,
        split={"hidden_states": -2, "encoder_hidden_states": -2, "output": -2},
        prepare=consisid_state,
        limits={"odd": HEIGHT},
    ),
    Model(
        name="Sana",
        wrapper="sana_transformer_2d:xFuserSanaTransformer2DWrapper",
        build=lambda: diffusers.SanaTransformer2DModel(
            **HAS_HEADS, in_channels=16, out_channels=16, num_layers=1, num_cross_attention_heads=HEADS,
            cross_attention_head_dim=HEAD_DIM, cross_attention_dim=WIDTH, caption_channels=TEXT),
        call=lambda size: {
            "hidden_states": rand(1, 16, size.height, size.width), "encoder_hidden_states": rand(1, size.text, TEXT),
            "timestep": torch.tensor([0.5])},
        limits={"all": Limit(kind="fails", why="its linear attention needs flash-attn, and a yunchang older than 0.6.4",
                        reason="TORCH")},
    ),
)  # fmt: skip
