"""Describes a request by a short text. Ranks that run the same request get the same text."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from numbers import Number
from typing import Any

import torch

_FIRST = ("prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "max_sequence_length")
_RESULT = ("output_type", "return_dict")  # may differ between ranks
_VALUE, _LENGTH = 60, 300


def describe(values: Mapping[str, Any]) -> str:
    """The arguments of a request in at most 300 characters. Different requests have different texts.

    Reads host values only (of tensors dtype and shape), to avoid a device synchronization. Without ``generator``,
    ``seed`` and ``latents`` the text contains the state of the default generator, because ranks that draw different
    noise produce a wrong picture. Skips None and callables.
    """
    arguments = {
        name: value
        for name, value in values.items()
        if value is not None and name not in _RESULT and (isinstance(value, torch.Tensor) or not callable(value))
    }
    seed = arguments.pop("generator", None)
    if seed is not None:
        seed = _text(seed)
    elif "seed" in arguments:
        seed = arguments.pop("seed")
    elif "latents" not in arguments:
        seed = f"drawn by this rank ({_text(_default_generator())})"
    names = [*(name for name in _FIRST if name in arguments), *sorted(arguments.keys() - set(_FIRST))]
    parts = [f"{name}={_cut(_text(arguments[name]), _VALUE)}" for name in names]
    if seed is not None:
        parts.insert(sum(name in arguments for name in _FIRST), f"seed={seed}")
    return _cut(", ".join(parts), _LENGTH)


def _text(value: Any) -> str:
    if isinstance(value, (str, Number)):
        return repr(value)
    if isinstance(value, torch.Generator):  # initial_seed() does not change with draws
        return f"{value.initial_seed()}, state {_digest(value.get_state().numpy().tobytes())}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    if hasattr(value, "tobytes"):  # a PIL image
        return f"picture {value.size} {_digest(value.tobytes())}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_text(value[key])}' for key in sorted(value, key=str))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return type(value).__name__


def _cut(text: str, length: int) -> str:
    """At most ``length`` characters; a truncated text ends in a digest of the whole text."""
    return text if len(text) <= length else f"{text[: length - 12]}... {_digest(text.encode())}"


def _digest(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def _default_generator() -> torch.Generator:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.default_generators[torch.cuda.current_device()]
    return torch.default_generator
