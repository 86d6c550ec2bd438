"""Tiny diffusion models with random weights: real diffusers pipelines in real model folders, created offline.

Each family consists of the classes of its published models (transformer, text encoders, tokenizers, VAE, scheduler)
with few layers, saved with ``DiffusionPipeline.save_pretrained``. Diffusers and xDiT load such a folder like a real
model, so tests and demos run the real loading and denoising code in seconds on a CPU. The images are noise, but the
numbers are reproducible and depend on every attention.

    python -m sf_xfuser.bench.tiny_models flux ./tiny-flux
"""

from __future__ import annotations

import argparse
import json
import math
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

#: The smallest input of each pipeline that splits over 4 sequence ranks: size in pixels and frames, and the guidance
#: scale (above 1: two passes per step for sd3, cogvideox and wan).
SMALL_INPUT: Mapping[str, Mapping[str, Any]] = {
    "flux": {"height": 128, "width": 128, "guidance_scale": 3.5},
    "sd3": {"height": 128, "width": 128, "guidance_scale": 2.0},
    "cogvideox": {"height": 128, "width": 64, "num_frames": 9, "guidance_scale": 3.0},
    "hunyuanvideo": {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 6.0},
    "wan": {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 3.0},
}
FAMILIES = tuple(SMALL_INPUT)

_LATENT_CHANNELS = 16  # as in all published models
_TEXT_DIM = 64  # T5, UMT5 and Llama hidden size
_CLIP_DIM = 32  # SD3 concatenates two CLIPs into one embedding of T5's width
_CLIP_POSITIONS = 77
_CLIP_TOKENS_SD3 = 64  # not 77: with the T5 tokens, the total must be divisible by the ranks
_VAE_CHANNELS = (8, 8, 8, 8)
_VAE_GROUPS = 4

_TEXT = """
A photo of a small cat on a wooden chair in the morning light. An old red car drives along the river under the bridge.
The artist paints a large green house near the sea while two children play with a yellow ball on the sand. A dog runs
over the snow, the wind moves the trees, and the camera turns slowly to the mountains. High quality, very detailed,
beautiful colors, soft shadows, cinematic style. Three birds fly above the city at night; the moon is white and the
streets are full of people who walk home from work. A robot holds a blue flower in its hand and looks at the stars.
"""


def save_tiny_model(
    family: str,
    folder: str | Path,
    *,
    heads: int = 8,
    head_dim: int = 16,
    layers: int = 2,
    single_layers: int | None = None,
    seed: int = 0,
) -> Path:
    """Save the tiny pipeline of ``family`` (one of ``FAMILIES``) under ``folder`` and return that path.

    ``heads * head_dim`` is the width of the transformer, ``layers`` its number of blocks. flux and hunyuanvideo also
    have ``single_layers`` single-stream blocks, by default as many as ``layers``. The same arguments give the same
    weights; the caller's random state does not change. ``small_input.json`` in the folder contains
    ``SMALL_INPUT[family]``, for programs that know only the folder. Raises ValueError for an unknown family and for
    sizes that xDiT cannot split.
    """
    if family not in _BUILDERS:
        raise ValueError(f"unknown model family {family!r}; choose one of {', '.join(FAMILIES)}")
    if heads < 4 or heads % 2:
        raise ValueError(f"heads={heads}: use an even number, at least 4, so that 2 ranks can split them")
    if head_dim < 16 or head_dim % 16:
        raise ValueError(f"head_dim={head_dim}: use a multiple of 16, so that the rotary axes have even sizes")
    if single_layers is not None and family not in _HYBRID:
        raise ValueError(f"single_layers={single_layers}: only {' and '.join(_HYBRID)} have single-stream blocks")
    if min(layers, single_layers or 0) < 0 or layers + (single_layers or 0) < 1:
        raise ValueError(f"layers={layers}, single_layers={single_layers}: use at least 1 block")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        counts = (layers, layers if single_layers is None else single_layers)
        pipeline = _BUILDERS[family](heads, head_dim, *counts[: 2 if family in _HYBRID else 1])
        unit_gain(pipeline.transformer)
    folder = Path(folder)
    pipeline.save_pretrained(folder)
    Path(folder, "small_input.json").write_text(json.dumps(SMALL_INPUT[family]) + "\n", encoding="utf-8")
    return folder


def unit_gain(transformer: torch.nn.Module) -> None:
    """Redraw the weights of linear and convolution layers with unit gain, in place.

    With the default weights (a third of that variance, also in the gates), the attention of a two-layer model
    changes the result by little more than rounding errors, and tests could not detect a wrong attention.
    """
    for module in transformer.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)):
            torch.nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                torch.nn.init.normal_(module.bias, std=0.02)


# ---- pipelines: (heads, head_dim, layers[, single_layers]) -> pipeline -----------------------------------------------


def _flux(heads: int, head_dim: int, layers: int, single_layers: int) -> diffusers.DiffusionPipeline:
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=transformers.CLIPTextModel(_clip_config(clip_tokenizer)).eval(),
        tokenizer=clip_tokenizer,
        text_encoder_2=transformers.T5EncoderModel(_t5_config(transformers.T5Config, t5_tokenizer)).eval(),
        tokenizer_2=t5_tokenizer,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=4 * _LATENT_CHANNELS,  # 2x2 latent pixels are packed into one token
            num_layers=layers,
            num_single_layers=single_layers,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            joint_attention_dim=_TEXT_DIM,
            pooled_projection_dim=_CLIP_DIM,
            guidance_embeds=True,
            axes_dims_rope=_rotary_axes(head_dim),
        ),
    )


def _sd3(heads: int, head_dim: int, layers: int) -> diffusers.DiffusionPipeline:
    clip_tokenizers = [_clip_tokenizer(max_length=_CLIP_TOKENS_SD3) for _ in range(2)]
    clips = [transformers.CLIPTextModelWithProjection(_clip_config(tokenizer)).eval() for tokenizer in clip_tokenizers]
    t5_tokenizer = _t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=clips[0],
        tokenizer=clip_tokenizers[0],
        text_encoder_2=clips[1],
        tokenizer_2=clip_tokenizers[1],
        text_encoder_3=transformers.T5EncoderModel(_t5_config(transformers.T5Config, t5_tokenizer)).eval(),
        tokenizer_3=t5_tokenizer,
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=32,
            in_channels=_LATENT_CHANNELS,
            out_channels=_LATENT_CHANNELS,
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            joint_attention_dim=_TEXT_DIM,
            caption_projection_dim=heads * head_dim,
            pooled_projection_dim=2 * _CLIP_DIM,
            pos_embed_max_size=96,
            qk_norm="rms_norm",
        ),
    )


def _cogvideox(heads: int, head_dim: int, layers: int) -> diffusers.DiffusionPipeline:
    tokenizer = _t5_tokenizer()
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.T5EncoderModel(_t5_config(transformers.T5Config, tokenizer)).eval(),
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=_VAE_CHANNELS,
            latent_channels=_LATENT_CHANNELS,
            layers_per_block=1,
            norm_num_groups=_VAE_GROUPS,
        ),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=_LATENT_CHANNELS,
            out_channels=_LATENT_CHANNELS,
            time_embed_dim=64,
            text_embed_dim=_TEXT_DIM,
            num_layers=layers,
            sample_width=16,
            sample_height=16,
            sample_frames=9,
            use_rotary_positional_embeddings=True,  # learned positions fix the text length
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=1.0,
        ),
    )


def _hunyuanvideo(heads: int, head_dim: int, layers: int, single_layers: int) -> diffusers.DiffusionPipeline:
    tokenizer, clip_tokenizer = _llama_tokenizer(), _clip_tokenizer()
    llama = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_DIM,
        intermediate_size=2 * _TEXT_DIM,
        num_hidden_layers=3,  # the pipeline drops the last two
        num_attention_heads=4,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=transformers.LlamaModel(llama).eval(),
        tokenizer=tokenizer,
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=_LATENT_CHANNELS,
            out_channels=_LATENT_CHANNELS,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=layers,
            num_single_layers=single_layers,
            num_refiner_layers=1,
            guidance_embeds=True,
            text_embed_dim=_TEXT_DIM,
            pooled_projection_dim=_CLIP_DIM,
            rope_axes_dim=_rotary_axes(head_dim),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=_LATENT_CHANNELS,
            block_out_channels=_VAE_CHANNELS,
            layers_per_block=1,
            norm_num_groups=_VAE_GROUPS,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=transformers.CLIPTextModel(_clip_config(clip_tokenizer)).eval(),
        tokenizer_2=clip_tokenizer,
    )


def _wan(heads: int, head_dim: int, layers: int) -> diffusers.DiffusionPipeline:
    tokenizer = _t5_tokenizer()
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.UMT5EncoderModel(_t5_config(transformers.UMT5Config, tokenizer)).eval(),
        vae=diffusers.AutoencoderKLWan(base_dim=8, z_dim=_LATENT_CHANNELS, num_res_blocks=1),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=_LATENT_CHANNELS,
            out_channels=_LATENT_CHANNELS,
            text_dim=_TEXT_DIM,
            freq_dim=64,
            ffn_dim=2 * heads * head_dim,
            num_layers=layers,
        ),
    )


_HYBRID = ("flux", "hunyuanvideo")  # families with single-stream blocks after the double-stream ones
_BUILDERS: Mapping[str, Callable[..., diffusers.DiffusionPipeline]] = {
    "flux": _flux,
    "sd3": _sd3,
    "cogvideox": _cogvideox,
    "hunyuanvideo": _hunyuanvideo,
    "wan": _wan,
}


# ---- parts shared by several families -------------------------------------------------------------------------------


def _rotary_axes(head_dim: int) -> tuple[int, int, int]:
    """Split a head into (time, height, width) as 1:3:3, the published proportion; all even. 16 -> (4, 6, 6)."""
    spatial = 3 * head_dim // 8
    return head_dim - 2 * spatial, spatial, spatial


def image_vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(_VAE_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(_VAE_CHANNELS),
        block_out_channels=_VAE_CHANNELS,
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=_VAE_GROUPS,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip_config(tokenizer: transformers.CLIPTokenizer) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_CLIP_DIM,
        intermediate_size=2 * _CLIP_DIM,
        projection_dim=_CLIP_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_CLIP_POSITIONS,
        initializer_factor=2.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_config(config_class: type, tokenizer: transformers.T5TokenizerFast) -> Any:
    return config_class(
        vocab_size=len(tokenizer),
        d_model=_TEXT_DIM,
        d_kv=16,
        d_ff=2 * _TEXT_DIM,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )


# ---- tokenizers: small vocabularies from the text above, for any input -----------------------------------------------


def _clip_tokenizer(max_length: int = _CLIP_POSITIONS) -> transformers.CLIPTokenizer:
    """Byte-level BPE with CLIP's end-of-word marks; the vocabulary contains every byte, so no token is unknown."""
    start, end, mark = "<|startoftext|>", "<|endoftext|>", "</w>"
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=mark))
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    merges = _learn_merges(tokenizer, [_TEXT], num_merges=350, mark=mark)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + mark for byte in alphabet), *(a + b for a, b in merges), start, end]
    with tempfile.TemporaryDirectory() as folder:
        vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
        Path(folder, "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=max_length)


def _t5_tokenizer() -> transformers.T5TokenizerFast:
    """Unigram over whole words and single printable characters; other characters become ``<unk>``."""
    counts = Counter(_TEXT.split())
    total = sum(counts.values())
    pieces: dict[str, float] = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -8.0}
    pieces |= {character: -10.0 for character in string.printable if not character.isspace()}
    pieces |= {f"▁{word}": math.log(count / total) for word, count in sorted(counts.items())}
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=2))
    metaspace = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _from_tokenizer_json(transformers.T5TokenizerFast, tokenizer, extra_ids=0)


def _llama_tokenizer() -> transformers.LlamaTokenizerFast:
    """BPE with byte fall-back that splits HunyuanVideo's prompt template into as many tokens as the real tokenizer.

    The pipeline removes a fixed number of tokens (``crop_start``) from the front: the template, but not the prompt. The
    tokenizer has as many merges, most frequent first, as the template needs to shrink to that number.
    """
    instruction = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0]
    splitter = Tokenizer(models.BPE())
    splitter.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    merges = _learn_merges(splitter, [instruction, _TEXT], num_merges=2000)

    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    characters = sorted({"▁", *(c for c in string.printable if not c.isspace() or c == "\n")})
    base = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]

    def tokenizer_with(num_merges: int) -> Tokenizer:
        tokens = [*base, *(a + b for a, b in merges[:num_merges])]
        vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
        model = models.BPE(vocab, merges[:num_merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.add_special_tokens([*specials, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
        return tokenizer

    crop = DEFAULT_PROMPT_TEMPLATE["crop_start"]
    low, high = 0, len(merges)
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer_with(middle).encode(instruction).ids) > crop:
            low = middle + 1
        else:
            high = middle
    return _from_tokenizer_json(
        transformers.LlamaTokenizerFast, tokenizer_with(low), padding_side="right", pad_token="<pad>"
    )


def _learn_merges(splitter: Tokenizer, texts: list[str], num_merges: int, mark: str = "") -> list[tuple[str, str]]:
    """The BPE merges of ``texts``, most frequent first, within the words of ``splitter``, which end in ``mark``.

    Ties are broken alphabetically. The trainer of the tokenizers library breaks them differently in every process, so
    ranks that create their own models would get different tokens.
    """
    words: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        plain = splitter.normalizer.normalize_str(text) if splitter.normalizer else text
        for word, _ in splitter.pre_tokenizer.pre_tokenize_str(plain):
            words[(*word[:-1], word[-1] + mark)] += 1
    merges: list[tuple[str, str]] = []
    while len(merges) < num_merges:
        counts: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                counts[pair] += times
        if not counts:
            break
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        words = Counter({_merged(word, merges[-1]): times for word, times in words.items()})
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    symbols: list[str] = []
    for symbol in word:
        if symbols and (symbols[-1], symbol) == pair:
            symbols[-1] += symbol
        else:
            symbols.append(symbol)
    return tuple(symbols)


def _from_tokenizer_json(tokenizer_class: type, tokenizer: Tokenizer, **options: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder, "tokenizer.json")))
        return tokenizer_class.from_pretrained(folder, **options)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sf_xfuser.bench.tiny_models",
        description="Save a tiny diffusion model with random weights as a model folder that diffusers and xDiT load. "
        "Nothing is downloaded; the same arguments give the same weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("family", choices=FAMILIES, help="published model to imitate")
    parser.add_argument("folder", type=Path, help="output folder; created if missing")
    parser.add_argument("--heads", type=int, default=8, help="attention heads, an even number")
    parser.add_argument("--head-dim", type=int, default=16, help="size of one head, a multiple of 16")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks")
    parser.add_argument("--single-layers", type=int, help="single-stream blocks (flux, hunyuanvideo); as --layers")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    options = parser.parse_args(arguments)
    try:
        folder = save_tiny_model(**vars(options))
    except ValueError as error:
        parser.error(str(error))
    print(folder)


if __name__ == "__main__":
    main()
