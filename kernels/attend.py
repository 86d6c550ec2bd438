"""Local attention that returns its log-sum-exp, from PyTorch alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

AttendFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""``attend(q, k, v) -> (out, lse)``: q [B,H,Sq,D], k and v [B,H,Sk,D] (any strides, Sk > 0) to out [B,H,Sq,D] in the
input dtype and lse [B,H,Sq] fp32, natural log of the softmax denominator. Dense, not causal, scale 1/sqrt(D)."""


Scaled = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], tuple[torch.Tensor, torch.Tensor]]
"""An ``AttendFunction`` with a scale in place of 1/sqrt(D), where it is not None."""


def sdpa_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's own fused attention: the CPU flash kernel, cuDNN on Hopper and newer, else the flash kernel.

    ``scale`` in place of 1/sqrt(D).
    """
    return SDPA[sdpa_backend(q.device, q.dtype)](q, k, v, scale)


@cache
def sdpa_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Which of ``SDPA`` serves ``sdpa_attend``."""
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
