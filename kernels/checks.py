"""What a kernel's public function asks of its tensors before any launch: ValueErrors that name the tensor."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache

import torch


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_kernel(x: torch.Tensor) -> bool:
    """Whether the Triton kernel serves this tensor: on a GPU where Triton is installed. Else its twin does."""
    return x.device.type == "cuda" and _has_triton()


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


def require_apart(written: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]) -> None:
    """Nothing that is written shares memory with anything else."""
    every = {**written, **read}
    spans = {name: _span(x) for name, x in every.items()}
    for position, name in enumerate(written):
        for other in list(spans)[position + 1 :]:
            (low, high), (other_low, other_high) = spans[name], spans[other]
            if low < other_high and other_low < high and not _side_by_side(every[name], every[other]):
                written_shape, shape = tuple(every[name].shape), tuple(every[other].shape)
                raise ValueError(
                    f"{name} {written_shape} is written, but {other} {shape} lies in the same memory; give "
                    f"{other}.clone()"
                )


def _side_by_side(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether their rows alternate, as those of ``x[:, 0]`` and ``x[:, 1]`` do."""
    if one.shape != other.shape or one.stride() != other.stride() or one.dtype != other.dtype:
        return False
    period, (low, high) = one.stride(0) * one.element_size(), _span(one[:1])
    apart = (other.data_ptr() - one.data_ptr()) % period if period else 0
    return high - low <= apart <= period - (high - low)


def _span(x: torch.Tensor) -> tuple[int, int]:
    """Addresses from the first byte to behind the last."""
    if x.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
