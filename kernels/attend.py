"""Local attention that returns its log-sum-exp, with PyTorch's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch

AttendFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""``attend(q, k, v) -> (out, lse)``, dense, not causal, scale 1/sqrt(D).

q [B,H,Sq,D]; k, v [B,H,Sk,D], Sk > 0, any strides. out [B,H,Sq,D] in the input dtype; lse [B,H,Sq], the natural log of
the softmax denominator, fp32 (fp64 for fp64 inputs)."""

Attention = AttendFunction | Literal["fused"]
"""A local attention: a function, or the fused kernel, which also merges the partial results."""

ScaledAttendFunction = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float | None], tuple[torch.Tensor, torch.Tensor]
]
"""An ``AttendFunction`` with an explicit scale. None: 1/sqrt(D)."""


def sdpa_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's fused attention by ``sdpa_backend``. ``scale`` replaces 1/sqrt(D)."""
    return SDPA[sdpa_backend(q.device, q.dtype)](q, k, v, scale)


def fix_fully_masked_lse(q: torch.Tensor, k: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The ``lse`` [B,H,Sq] of ``attend(q, k, v)`` on a CPU, with -inf for fully masked rows (all scores -inf). On a GPU
    ``lse`` itself, since ``merge_partial`` does the same there.

    For such a row, attention libraries return values that a merge would treat as a weight: 0 from PyTorch's CPU kernel,
    NaN from softmax, and +inf from flash attention on GPUs.
    """
    if lse.device.type != "cpu":  # inspecting rows would synchronize
        return lse
    ambiguous = ~((lse < float("inf")) & (lse != 0))  # 0 may also be the log of a true sum of 1
    if not ambiguous.any():
        return lse
    lse = lse.clone()
    for b, h in ambiguous.any(-1).nonzero().tolist():
        rows = ambiguous[b, h]
        scores = q[b, h, rows].to(lse.dtype) @ k[b, h].to(lse.dtype).T
        row_max = scores.amax(-1)
        lse[b, h, rows] = torch.where(row_max > float("-inf"), lse[b, h, rows], row_max)
    return lse


@cache
def sdpa_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The entry of ``SDPA`` that ``sdpa_attend`` uses: flash on CPUs; on GPUs the efficient kernel for fp32,
    cuDNN from sm_90 on, else flash."""
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


SDPA: dict[str, ScaledAttendFunction] = {"CUDNN": _cudnn, "SDPA_FLASH": _flash, "SDPA_EFFICIENT": _efficient}
"""PyTorch's attention kernels by xDiT's backend names."""
