"""``sf-xfuser models``: the models of xDiT, what torus gives for them, and the degrees that it takes by default."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace

from sf_xfuser.bench import report
from sf_xfuser.bench.outputs import Outputs
from sf_xfuser.integrations.xdit.known_models import local_facts
from sf_xfuser.layout.plan import UNEVEN, make_plan

# Row of docs/models.md -> its results for lengths that the ranks divide, for other text lengths, and for other sizes.
SUPPORT = {
    "Flux, Flux Kontext": ("exact", "exact", "exact, no ring"),
    "Flux 2": ("exact", "xDiT cannot", "as xDiT"),
    "SD3 (pipeline)": ("exact", "exact", "xDiT cannot"),
    "HunyuanVideo": ("exact", "exact", "xDiT cannot"),
    "HunyuanVideo 1.5": ("exact", "exact", "as xDiT"),
    "Wan 2.1, 2.2": ("exact", "exact", "as xDiT"),
    "Wan image to video": ("exact", "exact", "as xDiT"),
    "Wan VACE": ("exact", "exact", "as xDiT"),
    "Qwen-Image": ("exact", "exact", "as xDiT"),
    "Z-Image": ("exact", "exact", "exact"),
    "Lumina 2": ("exact, no ring", "falls back", "falls back"),
    "Krea 2": ("exact", "as xDiT", "as xDiT"),
    "LTX-2": ("exact", "exact", "as xDiT"),
    "Cosmos 3": ("as xDiT", "as xDiT", "as xDiT"),
    "Ideogram 4": ("exact", "as xDiT", "as xDiT"),
    "MiniMax-H3": ("exact, no ring", "falls back", "falls back"),
    "CogVideoX (pipeline)": ("exact", "exact", "xDiT cannot"),
    "PixArt Alpha": ("exact", "exact", "xDiT cannot"),
    "PixArt Sigma": ("exact", "exact", "xDiT cannot"),
    "HunyuanDiT": ("exact", "exact", "xDiT cannot"),
    "Latte": ("exact", "exact", "xDiT cannot"),
    "ConsisID": ("exact", "exact", "xDiT cannot"),
}
_NOT_TESTED = ("not tested",) * 3

# Name of xDiT's runner, or a model for xDiT's pipelines -> row, hub id.
MODELS = {
    "FLUX.1-dev": ("Flux, Flux Kontext", "black-forest-labs/FLUX.1-dev"),
    "FLUX.1-Kontext-dev": ("Flux, Flux Kontext", "black-forest-labs/FLUX.1-Kontext-dev"),
    "FLUX.2-dev": ("Flux 2", "black-forest-labs/FLUX.2-dev"),
    "FLUX.2-klein-9B": ("Flux 2", "black-forest-labs/FLUX.2-klein-9B"),
    "FLUX.2-klein-4B": ("Flux 2", "black-forest-labs/FLUX.2-klein-4B"),
    "SD3.5": ("SD3 (pipeline)", "stabilityai/stable-diffusion-3.5-large"),
    "HunyuanVideo": ("HunyuanVideo", "tencent/HunyuanVideo"),
    "Hunyuanvideo-1.5": ("HunyuanVideo 1.5", "tencent/HunyuanVideo-1.5"),
    "Hunyuanvideo-1.5-Distilled": (
        "HunyuanVideo 1.5",
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v_distilled",
    ),
    "Hunyuanvideo-1.5-Sparse": ("", "tencent/HunyuanVideo-1.5-Sparse"),
    "Wan2.1-T2V": ("Wan 2.1, 2.2", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    "Wan2.2-T2V": ("Wan 2.1, 2.2", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
    "Wan2.2-TI2V": ("Wan 2.1, 2.2", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    "Wan2.1-I2V": ("Wan image to video", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
    "Wan2.2-I2V": ("Wan image to video", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
    "Wan2.2-Distilled-I2V": ("Wan image to video", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
    "Wan2.1-VACE-1.3B": ("Wan VACE", "Wan-AI/Wan2.1-VACE-1.3B-diffusers"),
    "Wan2.1-VACE-14B": ("Wan VACE", "Wan-AI/Wan2.1-VACE-14B-diffusers"),
    "CausalWan": ("", "FastVideo/CausalWan2.2-I2V-A14B-Preview-Diffusers"),
    "Qwen-Image": ("Qwen-Image", "Qwen/Qwen-Image"),
    "Qwen-Image-2512": ("Qwen-Image", "Qwen/Qwen-Image-2512"),
    "Qwen-Image-Edit": ("Qwen-Image", "Qwen/Qwen-Image-Edit"),
    "Qwen-Image-Edit-2509": ("Qwen-Image", "Qwen/Qwen-Image-Edit-2509"),
    "Qwen-Image-Edit-2511": ("Qwen-Image", "Qwen/Qwen-Image-Edit-2511"),
    "Z-Image": ("Z-Image", "Tongyi-MAI/Z-Image"),
    "Z-Image-Turbo": ("Z-Image", "Tongyi-MAI/Z-Image-Turbo"),
    "Lumina2": ("Lumina 2", "Alpha-VLLM/Lumina-Image-2.0"),
    "Krea-2-Raw": ("Krea 2", "krea/Krea-2-Raw"),
    "Krea-2-Turbo": ("Krea 2", "krea/Krea-2-Turbo"),
    "LTX-2": ("LTX-2", "Lightricks/LTX-2"),
    "LTX-2.3": ("", "dg845/LTX-2.3-Diffusers"),
    "LTX-2.5": ("", "Lightricks/LTX-2.5-Diffusers"),
    "LTX-2.5-full": ("", "Lightricks/LTX-2.5-Diffusers"),
    "Cosmos3-Super": ("Cosmos 3", "nvidia/Cosmos3-Super"),
    "Cosmos3-Nano": ("Cosmos 3", "nvidia/Cosmos3-Nano"),
    "Ideogram-4": ("Ideogram 4", "ideogram-ai/ideogram-4-fp8"),
    "MiniMax-H3": ("MiniMax-H3", "MiniMaxAI/MiniMax-H3"),
    "MiniMax-H3-Ref2VA": ("", "MiniMaxAI/MiniMax-H3"),
    "FastH3": ("", "FastVideo/FastVideo-FastH3-4-step-Preview-v1-VSA-DataFree"),
    "FastH3-Dense": ("", "FastVideo/FastVideo-FastH3-4-step-Preview-v1-Dense-DataFree"),
    "FastVideo/FastVideo-FastH3-8-Step-V2": ("", "FastVideo/FastVideo-FastH3-8-Step-V2"),
    "LingBot-Video-MoE": ("", "robbyant/lingbot-video-moe-30b-a3b"),
    "LingBot-Video-Dense": ("", "robbyant/lingbot-video-dense-1.3b"),
    "CogVideoX-5b": ("CogVideoX (pipeline)", "THUDM/CogVideoX-5b"),
    "PixArt-XL-2": ("PixArt Alpha", "PixArt-alpha/PixArt-XL-2-1024-MS"),
    "PixArt-Sigma-XL-2": ("PixArt Sigma", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
    "HunyuanDiT-v1.2": ("HunyuanDiT", "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers"),
    "Latte-1": ("Latte", "maxin-cn/Latte-1"),
    "ConsisID": ("ConsisID", "BestWishYsh/ConsisID-preview"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportedModel:
    """``heads``, ``layout``, ``flags``: None if the heads are unknown, or if no layout is legal, because of ``reason``.
    ``even``, ``text``, ``sizes``: the result for lengths that the ranks divide, other text lengths, other sizes.
    ``layout``: of torus; ``flags``: xDiT's degrees, which the plugin fills in."""

    model: str
    hub_id: str
    even: str
    text: str
    sizes: str
    heads: int | None = None
    kv_heads: int | None = None
    layout: str | None = None
    flags: str | None = None
    reason: str = ""


def add_models_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``sf-xfuser models``."""
    add = parser.add_argument
    add("--machines", type=int, default=4, metavar="N", help="number of machines. Default: 4")
    add("--gpus-per-machine", type=int, default=8, metavar="M", help="GPUs per machine. Default: 8")
    add("--json", metavar="FILE", help="write the models as JSON; - for standard output instead of a table")


def models_command(options: argparse.Namespace) -> int:
    """Print the models. Returns 2 for an invalid request, 1 if the output could not be written."""
    machines, gpus = options.machines, options.gpus_per_machine
    try:
        outputs = Outputs("sf-xfuser models", options)
        for name, number in (("--machines", machines), ("--gpus-per-machine", gpus)):
            if not 1 <= number <= 4096:
                raise ValueError(f"{name} must be 1 to 4096, got {number}")
    except ValueError as error:
        print(f"sf-xfuser models: {error}", file=sys.stderr)
        return 2
    models = [_supported(name, machines, gpus) for name in MODELS]
    outputs.json({"machines": machines, "gpus_per_machine": gpus, "models": [asdict(model) for model in models]})
    if not outputs.on_stdout:
        report.console().print(_table(models, f"{machines} machines x {gpus}"))
    return int(outputs.failed)


def _supported(name: str, machines: int, gpus: int) -> SupportedModel:
    row, hub_id = MODELS[name]
    even, text, sizes = SUPPORT.get(row, _NOT_TESTED)
    model = SupportedModel(model=name, hub_id=hub_id, even=even, text=text, sizes=sizes)
    if (facts := local_facts(hub_id, {})) is None:
        return replace(model, reason="torus reads the heads from the model's config, in the local cache or on the hub")
    model = replace(model, heads=facts.heads, kv_heads=facts.kv_heads)
    try:
        plan = make_plan(machines, gpus, heads=facts.heads, kv_heads=facts.kv_heads, max_imbalance=UNEVEN)
    except ValueError as error:
        return replace(model, reason=str(error))
    degrees = f"--ulysses_degree {plan.even.ulysses_degree} --ring_degree {plan.even.ring_degree}"
    return replace(model, layout=str(plan.layout), flags=degrees)


def _table(models: list[SupportedModel], cluster: str) -> report.FittedTable:
    def heads(model: SupportedModel) -> str:
        return f"{model.heads}" if model.kv_heads == model.heads else f"{model.heads}/{model.kv_heads}"

    planned = [model for model in models if model.layout is not None]
    return report.FittedTable(
        columns=("model", "heads", "torus", "default degrees", "other text", "other sizes"),
        lines=[
            (model.model, heads(model), model.even, model.layout or "", model.text, model.sizes) for model in planned
        ],
        title=f"Models of xDiT with --sp-backend torus on {cluster}",
        reasons=[(model.model, f"{model.even}; {model.reason}", "dim") for model in models if model.layout is None],
        caption="torus: the result against one process, where the ranks divide all lengths; other text, other sizes: "
        "where they do not. no ring: only with ring=1. as xDiT: the result of xDiT's own USP, which differs from one "
        "process there. falls back: xDiT's own USP runs. --sp-plan changes the degrees; sf-xfuser plan compares them.",
    )
