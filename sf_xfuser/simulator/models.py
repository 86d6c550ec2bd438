"""The attention calls of a diffusion transformer, from its configuration and the size of the image or video. Pure.

Figures come from diffusers' configurations and pipelines. The VAE (8 pixels per latent; video: 4 frames) is not part of
a transformer's configuration, so each model family defines it here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sf_xfuser.files import read_json, transformer_configs
from sf_xfuser.simulator import CallShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """``layers``: attention calls of one forward pass, each over all tokens. ``patch``: (frames, height, width) latents
    per token. ``vae``: (frames, pixels) per latent. ``text_tokens`` are attended with the image or video. ``batch``:
    sequences per call. ``passes``: forward passes per step (classifier-free guidance doubles ``batch`` or ``passes``).
    ``pads_frames``: latent frames are padded to a multiple of the patch."""

    name: str
    heads: int
    head_dim: int
    layers: int
    patch: tuple[int, int, int]
    vae: tuple[int, int]
    text_tokens: int
    batch: int = 1
    passes: int = 1
    pads_frames: bool = False

    @property
    def is_video(self) -> bool:
        return self.vae[0] > 1

    @property
    def calls(self) -> int:
        """Attention calls of one denoising step."""
        return self.layers * self.passes

    def tokens(self, height: int, width: int, frames: int | None) -> int:
        """Tokens of the image or video, without text. Raises ValueError for sizes that do not give whole tokens."""
        if self.is_video != (frames is not None):
            problem = "is a video model: set --frames" if self.is_video else "is an image model: omit --frames"
            raise ValueError(f"{self.name} {problem}")
        sides = []
        for name, pixels, patch in (("height", height, self.patch[1]), ("width", width, self.patch[2])):
            unit = self.vae[1] * patch
            if pixels < unit or pixels % unit:
                near = max(unit, pixels // unit * unit)
                raise ValueError(
                    f"--{name} {pixels} is not a multiple of {unit} ({self.vae[1]} pixels per latent, {patch} latents "
                    f"per token of {self.name}); use {near} or {near + unit}"
                )
            sides.append(pixels // unit)
        return self._latent_frames(frames) // self.patch[0] * sides[0] * sides[1]

    def _latent_frames(self, frames: int | None) -> int:
        if frames is None:
            return 1
        if frames < 1:
            raise ValueError(f"--frames must be at least 1, got {frames}")
        latents, patch = (frames - 1) // self.vae[0] + 1, self.patch[0]
        if latents % patch and not self.pads_frames:
            raise ValueError(
                f"--frames {frames} gives {latents} latent frames, not a multiple of the patch of {self.name}: {patch}"
            )
        return -(-latents // patch) * patch

    def call(self, world_size: int, height: int, width: int, frames: int | None, dtype: str = "bfloat16") -> CallShape:
        """One attention call. As in xDiT, text tokens are split if the ranks divide them; else every rank holds all of
        them (joint tokens)."""
        tokens, split = self.tokens(height, width, frames), self.text_tokens % world_size == 0
        return CallShape(
            seq_len=tokens + (self.text_tokens if split else 0),
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.head_dim,
            batch=self.batch,
            dtype=dtype,
            joint_tokens=0 if split else self.text_tokens,
        )


MODELS = {
    model.name: model
    for model in (
        # FLUX.1: 19 double and 38 single blocks. The pipeline packs 2x2 latents, the transformer's own patch is 1.
        Model(name="flux", heads=24, head_dim=128, layers=57, patch=(1, 2, 2), vae=(1, 8), text_tokens=512),
        # HunyuanVideo: 20 double and 40 single blocks; guidance is distilled.
        Model(name="hunyuanvideo", heads=24, head_dim=128, layers=60, patch=(1, 2, 2), vae=(4, 8), text_tokens=256),
        # CogVideoX-5B; guidance doubles the batch.
        Model(
            name="cogvideox", heads=48, head_dim=64, layers=42, patch=(1, 2, 2), vae=(4, 8), text_tokens=226, batch=2
        ),
        # CogVideoX1.5-5B: two latent frames per token.
        Model(
            name="cogvideox1.5",
            heads=48,
            head_dim=64,
            layers=42,
            patch=(2, 2, 2),
            vae=(4, 8),
            text_tokens=224,
            batch=2,
            pads_frames=True,
        ),
        # Wan2.1-14B: each rank attends text in a separate local call; guidance is a second pass.
        Model(name="wan", heads=40, head_dim=128, layers=40, patch=(1, 2, 2), vae=(4, 8), text_tokens=0, passes=2),
    )
}


_FAMILIES = {
    "FluxTransformer2DModel": "flux",
    "HunyuanVideoTransformer3DModel": "hunyuanvideo",
    "CogVideoXTransformer3DModel": "cogvideox1.5",
    "WanTransformer3DModel": "wan",
}
"""Transformer class -> model with the defaults for values that are missing in its configuration."""


def find_model(name: str) -> Model:
    """A model of ``MODELS``, or the model of a ``config.json``, or of a folder or repository as in
    ``files.transformer_configs``. Raises ValueError."""
    if name in MODELS:
        return MODELS[name]
    path = name if os.path.isfile(name) else next(transformer_configs(name), None)
    if path is None:
        raise ValueError(f"--model {name} is neither one of {', '.join(MODELS)} nor a transformer's config.json")
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {path} cannot be read as JSON: {error}") from None
    return _from_config(str(path), config)


def _from_config(path: str, config: Any) -> Model:
    if not isinstance(config, Mapping):
        raise ValueError(f"--model {path} must hold a JSON object, got {type(config).__name__}")
    kind = config.get("_class_name")
    if kind not in _FAMILIES:
        raise ValueError(
            f"--model {path} has _class_name={kind!r}; supported: {', '.join(_FAMILIES)}. "
            f"For other models use --heads, --head-dim and --seq-len"
        )
    base = MODELS[_FAMILIES[kind]]
    number = partial(_number, path, config)
    patch, vae, text_tokens = base.patch, base.vae, base.text_tokens
    if base.name == "wan":
        sizes = config.get("patch_size")
        if not (isinstance(sizes, list) and len(sizes) == 3 and all(isinstance(x, int) and x > 0 for x in sizes)):
            raise ValueError(f"--model {path} needs patch_size=[frames, height, width], got {sizes!r}")
        patch = (sizes[0], sizes[1], sizes[2])
    elif base.name != "flux":
        is_cogvideox = base.name == "cogvideox1.5"
        side = number("patch_size")
        patch = (1 if is_cogvideox and not config.get("patch_size_t") else number("patch_size_t"), side, side)
        if is_cogvideox:
            vae = (number("temporal_compression_ratio", 4), vae[1])
            text_tokens = number("max_text_seq_length", 226)
    heads, head_dim, layers = (number(x) for x in ("num_attention_heads", "attention_head_dim", "num_layers"))
    if base.name in ("flux", "hunyuanvideo"):
        layers += number("num_single_layers")
    return replace(
        base,
        name=path,
        heads=heads,
        head_dim=head_dim,
        layers=layers,
        patch=patch,
        vae=vae,
        text_tokens=text_tokens,
    )


def _number(path: str, config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name, default)
    minimum = 0 if name == "num_single_layers" else 1
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        problem = f"lacks {name}" if value is None else f"has {name}={value!r}, not a count"
        raise ValueError(f"--model {path} {problem}; use the complete config.json of a transformer")
    return value
