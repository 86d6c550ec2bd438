"""The end of a call on a GPU, in stream order: are the flags that this rank waited for those of this call, and is the
result valid? Each function is one launch on a GPU with Triton (``triton_flags``), else plain PyTorch."""

from __future__ import annotations

import torch

from sf_xfuser.kernels.checks import describe


def check_flags(
    flags: torch.Tensor, index: torch.Tensor, expected: torch.Tensor, poison: torch.Tensor, ended: torch.Tensor
) -> None:
    """Set ``poison`` to NaN unless ``flags[i]`` is ``expected`` for each ``i`` of ``index``. Then set these flags to 0,
    and at last add 1 to ``ended``. Unchecked. Local; on the current stream.

    ``flags`` int64 [n], written by other GPUs; ``index`` int64 [k], without repetition; ``expected`` int64 [];
    ``poison`` float32 [], 1 or NaN; ``ended`` int64 []. All are on one device, the flags contiguous.
    """
    poison.masked_fill_((flags[index] != expected).any(), float("nan"))
    flags[index] = 0
    ended += 1


def poison_result(result: torch.Tensor, poison: torch.Tensor) -> None:
    """Fill ``result`` with NaN unless ``poison``, float32 [], is 1. ``result``: any shape, float dtype and order of
    dimensions. Local; on the current stream; reads no memory of a valid result on a GPU. Raises ValueError for a
    ``result`` with gaps in memory."""
    if result.numel() == 0:
        return
    last = sum((size - 1) * stride for size, stride in zip(result.shape, result.stride(), strict=True))
    if last >= result.numel():
        raise ValueError(f"result is {describe(result)} with strides {result.stride()}: it must have no gaps in memory")
    result.masked_fill_(poison != 1, float("nan"))
