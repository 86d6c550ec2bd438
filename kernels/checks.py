"""Argument checks of the kernels, run before any launch. They raise ValueError with the tensor's name."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache

import torch


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_triton(x: torch.Tensor) -> bool:
    """Whether the Triton kernel runs: on a GPU with Triton installed. Otherwise the PyTorch reference runs."""
    return x.device.type == "cuda" and has_triton()


def describe(x: torch.Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def named(**lists: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name the tensors of lists: ``named(q=[a, b])`` is ``{"q[0]": a, "q[1]": b}``."""
    return {f"{name}[{i}]": x for name, tensors in lists.items() for i, x in enumerate(tensors)}


def require_shape(name: str, x: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but {meaning} needs {shape}")


def require_same_device(tensors: Mapping[str, torch.Tensor]) -> None:
    (first_name, first), *others = tensors.items()
    for name, x in others:
        if x.device != first.device:
            raise ValueError(f"{name} {describe(x)} and {first_name} {describe(first)} must be on one device")


def require_contiguous_rows(tensors: Mapping[str, torch.Tensor]) -> None:
    """Require stride 1 in the last dimension."""
    for name, x in tensors.items():
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{name} {tuple(x.shape)} has strides {x.stride()}: its last dimension must be contiguous; pass "
                f"{name}.contiguous()"
            )


def is_same_view(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()


def require_no_overlap(written: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]) -> None:
    """Require that no written tensor shares memory with any other."""
    tensors = {**written, **read}
    spans = {name: _span(x) for name, x in tensors.items()}
    for position, name in enumerate(written):
        for other in list(spans)[position + 1 :]:
            (low, high), (other_low, other_high) = spans[name], spans[other]
            if low < other_high and other_low < high and _share_elements(tensors[name], tensors[other]):
                raise ValueError(
                    f"{name} {tuple(written[name].shape)} is written, but {other} {tuple(tensors[other].shape)} "
                    f"shares its memory; pass {other}.clone()"
                )


def _share_elements(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether some element of both has the same address. Exact for views with equal strides, such as interleaved slices
    of one tensor. Other views with overlapping spans count as sharing."""
    if x.stride() != y.stride() or x.element_size() != y.element_size():
        return True
    offset, remainder = divmod(y.data_ptr() - x.data_ptr(), x.element_size())
    dims = zip(x.stride(), x.shape, y.shape, strict=True)
    # Per dimension, an index of x minus an index of y ranges from 1 - size of y to size of x - 1.
    ranges = sorted(((stride, 1 - m, n - 1) for stride, n, m in dims if stride), reverse=True)
    return bool(remainder) or _is_reachable(offset, ranges)


def _is_reachable(offset: int, dims: list[tuple[int, int, int]]) -> bool:
    """Whether ``offset`` is a sum of ``stride * n`` over (stride, lowest n, highest n)."""
    if not dims:
        return offset == 0
    (stride, lowest, highest), *others = dims
    first = -((sum(d * high for d, _, high in others) - offset) // stride)
    last = (offset - sum(d * low for d, low, _ in others)) // stride
    candidates = range(max(first, lowest), min(last, highest) + 1)
    return any(_is_reachable(offset - stride * n, others) for n in candidates)


def _span(x: torch.Tensor) -> tuple[int, int]:
    """The half-open range of the tensor's addresses."""
    if x.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
