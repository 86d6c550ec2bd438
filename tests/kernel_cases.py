"""Inputs that are hard on attention kernels, exact results, and kernels with one line changed."""

from __future__ import annotations

import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch


def attention64(q, k, v):
    """Plain softmax attention in float64."""
    return partial64(q, k, v)[0]


def partial64(q, k, v):
    """Its output and its log-sum-exp."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return torch.softmax(scores, dim=-1) @ v, torch.logsumexp(scores, dim=-1)


def _random(B, H, S, keys, D, dtype):
    return torch.randn(B, H, S, D).to(dtype), *(torch.randn(B, H, keys, D).to(dtype) for _ in range(2))


def _large_logits(B, H, S, keys, D, dtype):
    q, k, v = _random(B, H, S, keys, D, dtype)
    return q * 16, k * 16, v


def _dominant_key(B, H, S, keys, D, dtype):
    q, k, v = _random(B, H, S, keys, D, dtype)
    k[:, :, keys // 2] = q.mean(2) * 40
    return q, k, v


def _all_equal(B, H, S, keys, D, dtype):
    return (x[:, :, :1].expand(x.shape).contiguous() for x in _random(B, H, S, keys, D, dtype))


def _far_apart(B, H, S, keys, D, dtype):
    """Chunks whose log-sum-exps differ by hundreds: the lesser one must vanish, not overflow."""
    q, k, v = _random(B, H, S, keys, D, dtype)
    k[:, :, : keys // 2] = k[:, :, : keys // 2] / 4 + q[:, :, :1] * 50
    k[:, :, keys // 2 :] = k[:, :, keys // 2 :] / 4 - q[:, :, :1] * 50
    return q, k, v


ADVERSARIAL = {
    "random": _random,
    "large logits": _large_logits,
    "one dominant key": _dominant_key,
    "all equal": _all_equal,
    "far apart": _far_apart,
}


_ROOM = 1 << 16  # elements: more than a program that knows no end would touch


def with_room(*tensors):
    """Copies with the same strides, in memory that goes on behind them."""
    copies = []
    for x in tensors:
        extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        memory = torch.full((extent + _ROOM,), 7.0, dtype=x.dtype)
        copies.append(memory.as_strided(x.shape, x.stride()).copy_(x))
    return copies


def room_is_untouched(*tensors) -> bool:
    return all((x._base[-_ROOM:] == 7.0).all() for x in tensors)


def mutated(module: ModuleType, line: str, other: str) -> ModuleType:
    """The module with a piece of its source, which it has exactly once, replaced."""
    source = Path(module.__file__).read_text()
    assert source.count(line) == 1, f"{module.__name__} has {line!r} {source.count(line)} times"
    folder = tempfile.mkdtemp()  # Triton reads a kernel's source again when it is first run
    path = Path(folder, f"{module.__name__.rpartition('.')[2]}_mutated.py")
    path.write_text(source.replace(line, other))
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    changed = module_from_spec(spec)
    sys.modules.pop(path.stem, None)
    spec.loader.exec_module(changed)
    return changed
