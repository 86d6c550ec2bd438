"""Log-sum-exp merge of a partial attention result into an accumulator."""

from __future__ import annotations

import torch


def merge_(out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor) -> None:
    """Merge ``(new_out, new_lse)`` into ``(out, lse)`` in place.

    ``out`` [B,H,S,D] fp32 and ``lse`` [B,H,S] fp32 (natural log) are the accumulator, any strides; ``new_out``
    [B,H,S,D] any float dtype, ``new_lse`` [B,H,S]. The result is ``out + w*(new_out - out)`` with
    ``w = sigmoid(new_lse - lse)``, and ``logaddexp(lse, new_lse)``. The two weights are w and 1-w, so they add up to
    one whatever the rounding of the log-sum-exps: that keeps many merges as exact as one softmax. A row that has seen
    no key has ``lse = -inf``. Elementwise, so the same inputs in the same order give the same bits.
    """
    weight = torch.sigmoid(new_lse - lse)
    weight.masked_fill_(new_lse == float("-inf"), 0.0)  # also where both are -inf and the difference is NaN
    out.lerp_(new_out.float(), weight.unsqueeze(-1))
    torch.logaddexp(lse, new_lse, out=lse)
