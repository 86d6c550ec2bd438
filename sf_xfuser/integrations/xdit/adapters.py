"""Adapters, ControlNets and arguments of diffusers that xDiT ignores or does not split: supported, or refused.

``plugin.py`` applies ``HOOKED``. Without a mesh these functions only call the original.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import pad

from sf_xfuser.integrations.hooks import wrapper
from sf_xfuser.integrations.xdit import session
from sf_xfuser.integrations.xdit.repairs import context

CONTROLNET_SAMPLES = ("controlnet_block_samples", "controlnet_single_block_samples")
_ATTENTION_KWARGS = ("joint_attention_kwargs", "attention_kwargs")
_INSTEAD = "use diffusers' own pipeline with sf_xfuser.parallelize(pipe.transformer)"


@wrapper
def load_lora_adapter(original: Any, self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """xDiT's pipelines wrap attention modules, which renames layers (``attn.module.to_q``). Diffusers finds layers
    by name, and drops the weights of those that it does not find."""
    if session.current.mesh is None:
        return original(self, *args, **kwargs)
    with _unwrapped(self):
        return original(self, *args, **kwargs)


@wrapper
def manage_adapters(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Diffusers' pipelines look for adapters only in models of diffusers, which xDiT's pipelines wrap."""
    from xfuser.model_executor.models.transformers.base_transformer import xFuserTransformerBaseWrapper

    transformer = getattr(self, "transformer", None)
    if session.current.mesh is None or not isinstance(transformer, xFuserTransformerBaseWrapper):
        return original(self, *args, **kwargs)
    vars(self)["transformer"] = transformer.module
    try:
        return original(self, *args, **kwargs)
    finally:
        vars(self)["transformer"] = transformer


@wrapper
def scale_lora(forward: Any, self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Apply the ``scale`` of the attention arguments, which these transformers of xDiT ignore."""
    scales = [(kwargs.get(name) or {}).get("scale", 1.0) for name in _ATTENTION_KWARGS]
    scale = next((scale for scale in scales if scale != 1.0), None)
    if session.current.mesh is None or scale is None:
        return forward(self, *args, **kwargs)
    utils = importlib.import_module("diffusers.utils")
    utils.scale_lora_layers(self, scale)
    try:
        return forward(self, *args, **kwargs)
    finally:
        utils.unscale_lora_layers(self, scale)


@contextmanager
def _unwrapped(model: torch.nn.Module) -> Iterator[None]:
    """Give the layers inside ``model`` the names that they have in diffusers."""
    wrappers = _wrapped_layers(model)
    for parent, name, layer in wrappers:
        setattr(parent, name, layer.module)
    try:
        yield
    finally:
        for parent, name, layer in wrappers:
            layer.module = getattr(parent, name)  # an adapter may have replaced it
            setattr(parent, name, layer)


def _wrapped_layers(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, Any]]:
    """(parent, name, layer) of each layer that xDiT's pipelines have wrapped."""
    from xfuser.model_executor.layers.base_layer import xFuserLayerBaseWrapper

    children = ((parent, name, layer) for parent in model.modules() for name, layer in parent.named_children())
    return [child for child in children if isinstance(child[2], xFuserLayerBaseWrapper)]


@wrapper
def load_ip_adapter(original: Any, self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Raise ValueError inside xDiT's pipelines, which have no IP-Adapter."""
    if session.current.mesh is not None and _wrapped_layers(self):
        raise ValueError(f"xDiT's pipelines would ignore an IP-Adapter; {_INSTEAD}")
    return original(self, *args, **kwargs)


@wrapper
def split_samples(forward: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Give each rank its part of the samples of a ControlNet, padded as the transformer pads the image tokens."""
    from xfuser.core.distributed import get_sequence_parallel_rank

    num_ranks = context.num_ranks()
    for name in CONTROLNET_SAMPLES if num_ranks > 1 else ():
        if kwargs.get(name) is not None:
            whole = [pad(x, (0, 0, 0, -x.shape[1] % num_ranks)) for x in kwargs[name]]
            kwargs[name] = [x.chunk(num_ranks, dim=1)[get_sequence_parallel_rank()] for x in whole]
    return forward(self, *args, **kwargs)


@wrapper
def set_processor(original: Any, self: Any, processor: Any, *args: Any, **kwargs: Any) -> None:
    """Raise ValueError if a processor of diffusers replaces one of xDiT, as ``load_ip_adapter`` does: it attends to the
    tokens of one rank only."""
    before = type(getattr(self, "processor", None))
    if session.current.mesh is not None and _of_xdit(before) and not _of_xdit(type(processor)):
        raise ValueError(
            f"{type(processor).__name__} cannot replace xDiT's {before.__name__}: it would attend to the tokens of one "
            f"rank only; {_INSTEAD}"
        )
    original(self, processor, *args, **kwargs)


def _of_xdit(kind: type) -> bool:
    return kind.__module__.startswith("xfuser.")


def require_known(pipeline: Any, call: Any, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if xDiT's ``pipeline`` ignores an argument that diffusers' pipeline uses. ``call``: its
    ``__call__``. Local; ranks with the same arguments raise the same error."""
    wrapped = vars(pipeline).get("module")  # diffusers' pipeline inside an xFuserPipelineBaseWrapper
    if session.current.mesh is None or wrapped is None:
        return
    known, of_diffusers = (inspect.signature(function).parameters for function in (call, type(wrapped).__call__))
    ignored = [
        name
        for name, value in arguments.items()
        if name not in known and name in of_diffusers and value is not None and not _equals(value, of_diffusers[name])
    ]
    ignored += [
        f"{name}[{key!r}]" for name in _ATTENTION_KWARGS for key in (arguments.get(name) or {}) if key != "scale"
    ]
    if ignored:
        raise ValueError(f"{type(pipeline).__name__} would ignore {', '.join(ignored)}; leave that out, or {_INSTEAD}")


def _equals(value: Any, parameter: inspect.Parameter) -> bool:
    return isinstance(value, (int, float, str)) and value == parameter.default


_MODELS = "xfuser.model_executor.models.transformers.transformer_"
_SCALE = "xDiT ignores the scale of a LoRA in the attention arguments"
_SPLIT = "xDiT does not split the samples of a ControlNet"
_FIND = "diffusers does not find the adapters of a transformer that xDiT's pipeline wraps"
_LOCAL = "an IP-Adapter replaces xDiT's attention processors by local ones"

# Module, attribute, wrap, why
HOOKED = (
    ("diffusers.loaders.peft", "PeftAdapterMixin.load_lora_adapter", load_lora_adapter,
     "xDiT's pipelines rename the layers of attention, and diffusers drops their LoRA weights"),
    *(("diffusers.loaders.lora_base", f"LoraBaseMixin.{name}", manage_adapters, _FIND)
      for name in ("unload_lora_weights", "fuse_lora", "unfuse_lora", "set_adapters", "disable_lora", "enable_lora",
                   "delete_adapters", "get_active_adapters", "get_list_adapters", "set_lora_device")),
    (f"{_MODELS}wan", "xFuserWanTransformer3DWrapper.forward", scale_lora, _SCALE),
    (f"{_MODELS}wan_vace", "xFuserWanVACETransformer3DWrapper.forward", scale_lora, _SCALE),
    (f"{_MODELS}hunyuan_video", "xFuserHunyuanVideoTransformer3DWrapper.forward", scale_lora, _SCALE),
    (f"{_MODELS}hunyuan_video15", "xFuserHunyuanVideo15Transformer3DWrapper.forward", scale_lora, _SCALE),
    (f"{_MODELS}krea2", "xFuserKrea2Transformer2DWrapper.forward", scale_lora, _SCALE),
    (f"{_MODELS}flux2", "xFuserFlux2Transformer2DModelWrapper.forward", scale_lora, _SCALE),
    (f"{_MODELS}flux", "xFuserFlux1Transformer2DWrapper.forward", split_samples, _SPLIT),
    (f"{_MODELS}qwen", "xFuserQwenImageTransformerWrapper.forward", split_samples, _SPLIT),
    ("diffusers.models.attention", "AttentionModuleMixin.set_processor", set_processor, _LOCAL),
    ("diffusers.models.attention_processor", "Attention.set_processor", set_processor, _LOCAL),
    ("diffusers.loaders.transformer_flux", "FluxTransformer2DLoadersMixin._load_ip_adapter_weights", load_ip_adapter,
     "xDiT's pipelines ignore an IP-Adapter"),
    ("diffusers.loaders.transformer_sd3", "SD3Transformer2DLoadersMixin._load_ip_adapter_weights", load_ip_adapter,
     "xDiT's pipelines ignore an IP-Adapter"),
)  # fmt: skip
