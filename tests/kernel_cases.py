"""Adversarial inputs for attention kernels, float64 references, and kernels with one line changed."""

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
    """(out, lse) in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return torch.softmax(scores, dim=-1) @ v, torch.logsumexp(scores, dim=-1)


def sdpa_error(q, k, v, exact):
    """Largest error of single-device SDPA in the inputs' dtype, at least half a unit in the last place of ``exact``."""
    error = (torch.nn.functional.scaled_dot_product_attention(q, k, v).double() - exact).abs().max().item()
    return max(error, torch.finfo(q.dtype).eps * exact.abs().max().item() / 2)


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
    """Chunks with log-sum-exps that differ by hundreds: the smaller weight must become 0 without overflow."""
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


def interpret_bf16(monkeypatch) -> None:
    """Make Triton's interpreter multiply bf16 and round to bf16 as GPUs do. It stores bf16 as integers, which
    ``tl.dot`` would multiply, and truncates conversions to bf16. Up to Triton 3.6 it also fails for loops over a loaded
    number with NumPy 2.4 and later, which convert no array with one element to a number."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, patch_tensor = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    dot, truncate = builder.create_dot, builder.create_fp_trunc

    def widened(x):
        return x if x.dtype.scalar != tl.bfloat16 else builder.cast_impl(None, x, tl.float32)

    def create_dot(self, a, b, d, *arguments):
        return dot(self, widened(a), widened(b), d, *arguments)

    def create_fp_trunc(self, x, kind):
        if kind.scalar != tl.bfloat16 or x.dtype.scalar != tl.float32:
            return truncate(self, x, kind)
        rounded = torch.from_numpy(x.data.copy()).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, kind.scalar)

    def patch_index(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index)
    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "create_fp_trunc", create_fp_trunc)


_PADDING = 1 << 16  # elements: more than a program without a bounds check would touch


def padded(*tensors):
    """Copies with the same strides, followed by padding of 7.0."""
    copies = []
    for x in tensors:
        extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        memory = torch.full((extent + _PADDING,), 7.0, dtype=x.dtype)
        copies.append(memory.as_strided(x.shape, x.stride()).copy_(x))
    return copies


def padding_is_intact(*tensors) -> bool:
    return all((x._base[-_PADDING:] == 7.0).all() for x in tensors)


def mutated(module: ModuleType, line: str, other: str) -> ModuleType:
    """The module with one piece of its source replaced, which must occur exactly once."""
    source = Path(module.__file__).read_text()
    assert source.count(line) == 1, f"{module.__name__} has {line!r} {source.count(line)} times"
    folder = tempfile.mkdtemp()  # Triton rereads a kernel's source at its first run
    path = Path(folder, f"{module.__name__.rpartition('.')[2]}_mutated.py")
    path.write_text(source.replace(line, other))
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    changed = module_from_spec(spec)
    sys.modules[path.stem] = changed  # dataclasses look it up there
    spec.loader.exec_module(changed)
    return changed
