"""Local attention that returns its log-sum-exp, from PyTorch alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch

AttendFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""``attend(q, k, v) -> (out, lse)``: q [B,H,Sq,D], k and v [B,H,Sk,D] (any strides, Sk > 0) to out [B,H,Sq,D] in the
input dtype and lse [B,H,Sq] fp32 (fp64 inputs: fp64), natural log of the softmax denominator. Dense, not causal, scale
1/sqrt(D)."""

Attention = AttendFunction | Literal["fused"]
"""What computes a piece: a function, or the fused kernel, which also merges it."""

Scaled = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], tuple[torch.Tensor, torch.Tensor]]
"""An ``AttendFunction`` with a scale in place of 1/sqrt(D), where it is not None."""


def sdpa_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's own fused attention: the CPU flash kernel, cuDNN on Hopper and newer, else the flash kernel.

    ``scale`` in place of 1/sqrt(D).
    """
    return SDPA[sdpa_backend(q.device, q.dtype)](q, k, v, scale)


def without_weightless(q: torch.Tensor, k: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp that ``attend(q, k, v)`` returned, -inf for each query whose scores (of any scale
    above 0) are all -inf.

    Attention libraries mark such a row in ways that a merge would take for a weight: PyTorch's CPU kernel with 0, flash
    attention on GPUs with +inf (its mark of a NaN in the scores, too, which stays NaN), softmax with NaN.
    """
    if lse.device.type != "cpu":  # no row is looked at: that would wait for the GPU. Output 0 - inf is -inf, NaN is NaN
        return torch.where(lse == float("inf"), out[..., 0] - float("inf"), lse)
    doubtful = ~((lse < float("inf")) & (lse != 0))  # NaN included; a sum of weights may be 1, too
    if not doubtful.any():
        return lse
    lse = lse.clone()
    for b, h in doubtful.any(-1).nonzero().tolist():
        rows = doubtful[b, h]
        scores = q[b, h, rows].to(lse.dtype) @ k[b, h].to(lse.dtype).T
        largest = scores.amax(-1)
        lse[b, h, rows] = torch.where(largest > float("-inf"), lse[b, h, rows], largest)
    return lse


@cache
def sdpa_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Which function of ``SDPA`` ``sdpa_attend`` calls."""
    if device.type == "cpu":
        return "SDPA_FLASH"
    if dtype not in (torch.float16, torch.bfloat16):
        return "SDPA_EFFICIENT"
    return "CUDNN" if torch.cuda.get_device_capability(device) >= (9, 0) else "SDPA_FLASH"


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    return out, lse.reshape(lse.shape[0], lse.shape[1], -1)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out, lse


def _efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    return out, lse[..., : q.shape[2]]  # padded to a multiple of 32 on CUDA


SDPA: dict[str, Scaled] = {"CUDNN": _cudnn, "SDPA_FLASH": _flash, "SDPA_EFFICIENT": _efficient}
"""PyTorch's own attention functions, by xDiT's names for them."""
