"""Log-sum-exp merge of a partial attention result into an accumulator. Shapes: B batch, H heads, S tokens, D head size.

``merge_`` keeps accumulating; ``merge_into`` is the last merge, which writes the result in its own dtype where it
belongs, so that no pass over it follows. On a GPU each is one launch (``triton_merge``); elsewhere, or without Triton,
the twin in plain PyTorch.
"""

from __future__ import annotations

import torch

from sf_xfuser.kernels.checks import (
    described,
    is_same,
    require_apart,
    require_rows,
    require_shape,
    require_together,
    runs_kernel,
)


def merge_(out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor) -> None:
    """Merge ``(new_out, new_lse)`` into ``(out, lse)`` in place. Local; on the current stream.

    ``out`` [B,H,S,D] and ``lse`` [B,H,S] (natural log) are the accumulator, both fp32 or both fp64, any strides with D
    contiguous; ``new_out`` [B,H,S,D] any float dtype, ``new_lse`` [B,H,S], its natural log. The result is
    ``(1-w)*out + w*new_out`` with ``w = sigmoid(new_lse - lse)``, and ``logaddexp(lse, new_lse)``. The lesser of the
    two weights is computed and the other is one minus it, so they add up to one whatever the rounding of the
    log-sum-exps: that keeps many merges as exact as one softmax. Values near overflow stay finite and infinite ones
    infinite, as in one softmax; ``out + w*(new_out - out)`` would make them NaN. A row that has seen no key has
    ``lse = -inf``: where ``new_lse`` is -inf the accumulator stays as it is, where only ``lse`` is -inf it becomes
    ``new_out``, whatever the other output holds. Elementwise, so the same inputs in the same order give the same bits.

    Raises ValueError before anything is written: shapes or devices that do not fit, strided D, an accumulator that is
    neither fp32 nor fp64, a partial result that shares memory with it.
    """
    (_merge_op if torch.compiler.is_compiling() else _merge)(out, lse, new_out, new_lse, None)


def merge_into(
    result: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor
) -> None:
    """As ``merge_``, for the last time: the merged output goes to ``result`` [B,H,S,D], any float dtype and any strides
    with D contiguous, and the accumulator holds nothing of use afterwards. ``result`` may be ``out`` itself, nothing
    else that shares memory with the others."""
    (_merge_op if torch.compiler.is_compiling() else _merge)(out, lse, new_out, new_lse, result)


def merge_part(
    out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor, result: torch.Tensor | None
) -> None:
    """``merge_``, or with a ``result`` ``merge_into``, for a caller that answers for ``out``, ``lse`` and ``result``:
    of what an attention library returned only shapes and dtypes are looked at, which takes a microsecond where all
    checks take 18."""
    fits = new_lse.dtype is lse.dtype and new_out.shape == out.shape and new_lse.shape == lse.shape
    if not fits or new_out.stride(3) != 1:
        check(out, lse, new_out, new_lse, result)
    _run(out, lse, new_out, new_lse, result)


def merge_twin(
    out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor, result: torch.Tensor | None
) -> None:
    """``merge_``, or with a ``result`` ``merge_into``, in plain PyTorch."""
    unseen = new_lse == float("-inf")
    ratio = torch.exp(-(new_lse - lse).abs())
    lesser = (ratio / (1 + ratio)).masked_fill_(unseen, 0.0)  # also where both are -inf and the difference is NaN
    heavier = new_lse > lse
    weight = torch.where(heavier, 1 - lesser, lesser).unsqueeze(-1)
    rest = torch.where(heavier, lesser, 1 - lesser).unsqueeze(-1)
    new_out = new_out.to(out.dtype)
    if unseen.any():
        new_out = new_out.masked_fill(unseen.unsqueeze(-1), 0.0)
    first = (lse == float("-inf")) & ~unseen
    if first.any():
        out.masked_fill_(first.unsqueeze(-1), 0.0)
    into = result if result is not None and result.dtype == out.dtype else out
    torch.mul(out, rest, out=into).addcmul_(new_out, weight)
    if result is None:
        torch.logaddexp(lse, new_lse, out=lse)
    elif into is not result:
        result.copy_(into)


def _merge(
    out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor, result: torch.Tensor | None
) -> None:
    check(out, lse, new_out, new_lse, result)
    _run(out, lse, new_out, new_lse, result)


def _run(
    out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor, result: torch.Tensor | None
) -> None:
    if runs_kernel(out):
        from sf_xfuser.kernels.triton_merge import launch

        launch(out, lse, new_out, new_lse, result)
    else:
        merge_twin(out, lse, new_out, new_lse, result)


_merge_op = torch.library.custom_op("sf_xfuser::merge", _merge, mutates_args=("out", "lse", "result"))


@_merge_op.register_fake
def _(out, lse, new_out, new_lse, result):  # type: ignore[no-untyped-def]
    return None


def check(
    out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor, result: torch.Tensor | None
) -> None:
    """Raises what ``merge_`` raises."""
    if out.dim() != 4 or out.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"out is {described(out)}: the accumulator must be [B, H, S, D] in torch.float32 or torch.float64"
        )
    shape = tuple(out.shape)
    for name, x in (("lse", lse), ("new_lse", new_lse)):
        require_shape(name, x, shape[:3], f"out {shape}")
        if x.dtype != out.dtype:
            raise ValueError(f"{name} is {described(x)}: log-sum-exps must be {out.dtype}, as out is")
    rows = {"out": out, "new_out": new_out} | ({} if result is None else {"result": result})
    for name, x in rows.items():
        require_shape(name, x, shape, f"out {shape}")
        if not x.is_floating_point():
            raise ValueError(f"{name} is {described(x)}: it must be floating point")
    require_rows(rows)
    lses = {"lse": lse, "new_lse": new_lse}
    require_together(rows | lses)
    written = {"out": out, "lse": lse}
    if result is not None and not is_same(result, out):
        written["result"] = result
    require_apart(written, {"new_out": new_out, "new_lse": new_lse})
