"""Local attention that returns its log-sum-exp, from PyTorch alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

AttendFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""``attend(q, k, v) -> (out, lse)``: q [B,H,Sq,D], k and v [B,H,Sk,D] (any strides, Sk > 0) to out [B,H,Sq,D] in the
input dtype and lse [B,H,Sq] fp32, natural log of the softmax denominator. Dense, not causal, scale 1/sqrt(D)."""


def sdpa_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's own fused attention: the CPU flash kernel, cuDNN on Hopper and newer, else the flash kernel.

    ``scale`` in place of 1/sqrt(D).
    """
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        return out, lse
    if torch.cuda.get_device_capability(q.device) >= (9, 0) and q.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
        return out, lse.reshape(lse.shape[0], lse.shape[1], -1)
    if q.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        return out, lse
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    return out, lse[..., : q.shape[2]]  # padded to a multiple of 32 on CUDA
