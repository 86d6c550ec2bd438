"""The description of a request: a short text that is the same on all ranks that run the same request."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from numbers import Number
from typing import Any

import torch

_FIRST = ("prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "max_sequence_length")
_RESULT = ("output_type", "return_dict")  # ranks may use the result in different ways
_VALUE, _LENGTH = 60, 300


def describe(values: Mapping[str, Any]) -> str:
    """At most 300 characters about the arguments of a request, by name. Requests that differ have different texts.

    Reads host values only, to avoid a device synchronization: of a tensor, dtype and shape. Without ``generator``,
    ``seed`` and ``latents`` the text has the state of the default generator, which the noise is drawn from: ranks that
    draw different noise make a wrong picture. Skips None and callables.
    """
    given = {
        name: value
        for name, value in values.items()
        if value is not None and name not in _RESULT and (isinstance(value, torch.Tensor) or not callable(value))
    }
    seed = given.pop("generator", None)
    if seed is not None:
        seed = _text(seed)
    elif "seed" in given:
        seed = given.pop("seed")
    elif "latents" not in given:
        seed = f"drawn by this rank ({_text(_default_generator())})"
    names = [*(name for name in _FIRST if name in given), *sorted(given.keys() - set(_FIRST))]
    parts = [f"{name}={_cut(_text(given[name]), _VALUE)}" for name in names]
    if seed is not None:
        parts.insert(sum(name in given for name in _FIRST), f"seed={seed}")
    return _cut(", ".join(parts), _LENGTH)


def _text(value: Any) -> str:
    if isinstance(value, (str, Number)):
        return repr(value)
    if isinstance(value, torch.Generator):  # initial_seed() does not show what has been drawn since
        return f"{value.initial_seed()}, state {_digest(value.get_state().numpy().tobytes())}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    if hasattr(value, "tobytes"):  # a picture of PIL
        return f"picture {value.size} {_digest(value.tobytes())}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_text(value[key])}' for key in sorted(value, key=str))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return type(value).__name__


def _cut(text: str, length: int) -> str:
    """At most ``length`` characters: where text is cut off, a digest of the whole."""
    return text if len(text) <= length else f"{text[: length - 12]}... {_digest(text.encode())}"


def _digest(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def _default_generator() -> torch.Generator:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.default_generators[torch.cuda.current_device()]
    return torch.default_generator
