"""What a kernel's public function asks of its tensors before any launch: ValueErrors that name the tensor."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache

import torch


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_kernel(x: torch.Tensor) -> bool:
    """Whether the Triton kernel serves this tensor: on a GPU where Triton is installed. Else its twin does."""
    return x.device.type == "cuda" and has_triton()


def described(x: torch.Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def require_shape(name: str, x: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but {meaning} needs {shape}")


def require_together(tensors: Mapping[str, torch.Tensor]) -> None:
    """All on one device."""
    (first, leader), *others = tensors.items()
    for name, x in others:
        if x.device != leader.device:
            raise ValueError(f"{name} {described(x)} and {first} {described(leader)} must be on one device")


def require_rows(tensors: Mapping[str, torch.Tensor]) -> None:
    """Elements of the last dimension lie side by side."""
    for name, x in tensors.items():
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{name} {tuple(x.shape)} has strides {x.stride()}: its last dimension must be contiguous; give "
                f"{name}.contiguous()"
            )


def is_same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether both are one view of one memory."""
    return x.data_ptr() == y.data_ptr() and x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()


def require_apart(written: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]) -> None:
    """Nothing that is written shares memory with anything else."""
    tensors = {**written, **read}
    spans = {name: _span(x) for name, x in tensors.items()}
    for position, name in enumerate(written):
        for other in list(spans)[position + 1 :]:
            (low, high), (other_low, other_high) = spans[name], spans[other]
            if low < other_high and other_low < high and _share_elements(tensors[name], tensors[other]):
                raise ValueError(
                    f"{name} {tuple(written[name].shape)} is written, but {other} {tuple(tensors[other].shape)} "
                    f"lies in the same memory; give {other}.clone()"
                )


def _share_elements(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether an element of both lies at one address. Views that lie between one another, as slices of one tensor do,
    are told apart if they have the same strides; others, whose spans meet, are taken to share some."""
    if x.stride() != y.stride() or x.element_size() != y.element_size():
        return True
    offset, rest = divmod(y.data_ptr() - x.data_ptr(), x.element_size())
    dims = zip(x.stride(), x.shape, y.shape, strict=True)
    # An index of x less one of y: from 1 - size of y to size of x - 1.
    return bool(rest) or _is_sum(offset, sorted(((d, 1 - m, n - 1) for d, n, m in dims if d), reverse=True))


def _is_sum(offset: int, dims: list[tuple[int, int, int]]) -> bool:
    """Whether there are whole ``n`` with ``offset`` the sum of ``stride * n``, each from its lowest to its highest."""
    if not dims:
        return offset == 0
    (stride, lowest, highest), *others = dims
    first = -((sum(d * high for d, _, high in others) - offset) // stride)
    last = (offset - sum(d * low for d, low, _ in others)) // stride
    near = range(max(first, lowest), min(last, highest) + 1)
    return any(_is_sum(offset - stride * n, others) for n in near)


def _span(x: torch.Tensor) -> tuple[int, int]:
    """Addresses from the first byte to behind the last."""
    if x.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
