"""The heads of a model before it is loaded: in its folder, the local cache, the table below, or on the hub."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sf_xfuser.config import did_you_mean
from sf_xfuser.files import read_json
from sf_xfuser.integrations.xdit.degrees import ModelFacts, facts_of_config, read_model_facts

FETCH_TIMEOUT_S = 30.0

_PUBLISHED = {
    "FluxTransformer2DModel": {
        "black-forest-labs/FLUX.1-dev": 24,
        "black-forest-labs/FLUX.1-Kontext-dev": 24,
    },
    "Flux2Transformer2DModel": {
        "black-forest-labs/FLUX.2-dev": 48,
        "black-forest-labs/FLUX.2-klein-4B": 24,
        "black-forest-labs/FLUX.2-klein-9B": 32,
    },
    "CogVideoXTransformer3DModel": {"THUDM/CogVideoX-5b": 48},
    "ConsisIDTransformer3DModel": {"BestWishYsh/ConsisID-preview": 48},
    "HunyuanDiT2DModel": {"Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers": 16},
    "LatteTransformer3DModel": {"maxin-cn/Latte-1": 16},
    "PixArtTransformer2DModel": {
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": 16,
        "PixArt-alpha/PixArt-XL-2-1024-MS": 16,
    },
    "SD3Transformer2DModel": {"stabilityai/stable-diffusion-3.5-large": 38},
    "HunyuanVideoTransformer3DModel": {"tencent/HunyuanVideo": 24},
    "HunyuanVideo15Transformer3DModel": {
        "tencent/HunyuanVideo-1.5": 16,
        "tencent/HunyuanVideo-1.5-Sparse": 16,
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v": 16,
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v": 16,
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v_distilled": 16,
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v": 16,
    },
    "WanTransformer3DModel": {
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": 40,
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": 40,
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 40,
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 40,
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 24,
    },
    "WanVACETransformer3DModel": {
        "Wan-AI/Wan2.1-VACE-1.3B-diffusers": 12,
        "Wan-AI/Wan2.1-VACE-14B-diffusers": 40,
    },
    "QwenImageTransformer2DModel": {
        "Qwen/Qwen-Image": 24,
        "Qwen/Qwen-Image-2512": 24,
        "Qwen/Qwen-Image-Edit": 24,
        "Qwen/Qwen-Image-Edit-2509": 24,
        "Qwen/Qwen-Image-Edit-2511": 24,
    },
    "ZImageTransformer2DModel": {"Tongyi-MAI/Z-Image": 30, "Tongyi-MAI/Z-Image-Turbo": 30},
    "LTX2VideoTransformer3DModel": {"Lightricks/LTX-2": 32},
}
"""Transformer -> hub id -> heads (as many KV heads), from the models' transformer/config.json."""

_SHORT_NAMES = {
    "Hunyuanvideo-1.5": "tencent/HunyuanVideo-1.5",
    "Hunyuanvideo-1.5-Distilled": "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v_distilled",
    "Wan2.1-VACE-1.3B": "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
    "Wan2.1-VACE-14B": "Wan-AI/Wan2.1-VACE-14B-diffusers",
}
"""Names of xDiT's registry whose settings do not name a hub id."""


def hub_ids(model: str, registry: Mapping[str, Any]) -> list[str]:
    """The names under which files of ``--model`` may be found. ``registry``: xDiT's, name -> class; may be empty."""
    registered = getattr(getattr(registry.get(model), "settings", None), "model_name", None)
    return list(dict.fromkeys(name for name in (model, registered, _SHORT_NAMES.get(model)) if name))


def local_facts(model: str, registry: Mapping[str, Any]) -> ModelFacts | None:
    """Facts of ``--model`` from its folder, the local cache or the table; None if unknown. No network."""
    names = hub_ids(model, registry)
    return next(filter(None, (*map(read_model_facts, names), *map(_published_facts, names))), None)


def _published_facts(name: str) -> ModelFacts | None:
    for transformer, models in _PUBLISHED.items():
        if heads := models.get(name):
            source = f"the published configuration of {name}"
            return ModelFacts(heads=heads, kv_heads=heads, source=source, transformer=transformer)
    return None


def require_registered(model: str, registry: Mapping[str, Any]) -> None:
    """Raise ValueError if xDiT's runner, which loads only models of its registry, does not have ``--model``."""
    if model not in registry:
        names = ", ".join(sorted(name for name in registry if "/" not in name))
        hint = did_you_mean(model, registry) or f"; its runner has {names}"
        raise ValueError(f"--model {model} is not in xDiT's registry{hint}")


def runs_xdits_runner() -> bool:
    """Whether this program is xDiT's own runner."""
    return Path(getattr(sys.modules["__main__"], "__file__", None) or "").parts[-2:] == ("xfuser", "runner.py")


def fetched_facts(model: str, registry: Mapping[str, Any]) -> ModelFacts:
    """Facts from ``transformer/config.json`` on the hub, downloaded into the local cache as xDiT would do when it loads
    the model. Bounded. Raises ValueError with the reason if there are none."""
    name = hub_ids(model, registry)[-1]
    path, problem = _fetch(name)
    facts = facts_of_config(read_json(path), path) if path else None
    if facts is None:
        raise ValueError(problem or f"{path} has no number of heads")
    return facts


@functools.cache
def _fetch(name: str) -> tuple[str | None, str]:
    """The downloaded file, or why there is none."""
    from huggingface_hub import constants, errors, hf_hub_download

    from sf_xfuser.transport.rendezvous import run_with_timeout

    def download() -> str:
        return hf_hub_download(name, "transformer/config.json")

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of each retry, on every rank
    try:
        return run_with_timeout(download, FETCH_TIMEOUT_S, "the hub", "it did not answer"), ""
    except errors.GatedRepoError:
        return None, (
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth login` or set "
            f"HF_TOKEN"
        )
    except errors.RepositoryNotFoundError:
        known = [other for models in _PUBLISHED.values() for other in models]
        return None, f"{name} is not on the hub, or private{did_you_mean(name, known)}"
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return None, f"{name} is not in the local cache, and {why}"
    except errors.EntryNotFoundError:
        return None, f"{name} has no transformer/config.json"
    except Exception as error:
        return None, f"{name}: {error}"
    finally:
        logger.setLevel(level)
