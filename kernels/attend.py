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


_LOW_PRECISION = (torch.float16, torch.bfloat16)


def sdpa_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's fused attention by ``sdpa_backend``. ``scale`` replaces 1/sqrt(D)."""
    return SDPA[sdpa_backend(q, k)](q, k, v, scale)


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


def sdpa_backend(q: torch.Tensor, k: torch.Tensor) -> str:
    """The entry of ``SDPA`` that ``sdpa_attend`` uses: flash on CPUs; on GPUs the efficient kernel for fp32 and fp64,
    else cuDNN or flash by ``uses_cudnn``."""
    if q.device.type == "cpu":
        return "SDPA_FLASH"
    if q.dtype not in _LOW_PRECISION:
        return "SDPA_EFFICIENT"
    cudnn = uses_cudnn(*_gpu(q.device), q.dtype, q.shape[3], q.shape[2], k.shape[2])
    return "CUDNN" if cudnn else "SDPA_FLASH"


def uses_cudnn(
    capability: tuple[int, int], cudnn_version: int, dtype: torch.dtype, D: int, num_queries: int, num_keys: int
) -> bool:
    """Whether cuDNN attends, else flash. ``cudnn_version``: 91002 is 9.10.2. Pure.

    These are the conditions of PyTorch 2.8 to 2.13 (``check_prefer_cudnn_attention``, ``can_use_cudnn_attention`` and
    ``check_cudnn_tensor_shapes`` in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp), the strictest where versions
    differ. A direct call of the operator, as in ``SDPA``, skips them.
    """
    if capability[0] not in (9, 10) or cudnn_version < 90000 or dtype not in _LOW_PRECISION:
        return False
    if cudnn_version <= 91500 and (num_queries % 128 or num_keys % 128):  # accesses out of bounds: pytorch issue 169849
        return False
    hopper_256 = capability == (9, 0) and 91000 <= cudnn_version < 91100  # 9.11 to 9.22 fail for some head sizes
    later_256 = capability in ((9, 0), (10, 0), (10, 3)) and cudnn_version > 92200
    max_head_size = 256 if hopper_256 or later_256 else 128
    return D % 8 == 0 and max_head_size >= D and num_queries > 1 and num_keys > 1


@cache
def _gpu(device: torch.device) -> tuple[tuple[int, int], int]:
    """(compute capability, cuDNN version or 0)."""
    return torch.cuda.get_device_capability(device), torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]


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
