"""Log-sum-exp merge of a partial attention result into an accumulator. Shapes: B batch, H heads, S tokens, D head size.

``merge_`` accumulates in place. ``merge_into`` is the last merge of a row: it writes the result, in the result's dtype,
to its final tensor, which saves a pass over it. ``merge_partial`` is every merge of a call of Torus Attention. Each is
one launch on a GPU with Triton (``triton_merge``), else a reference in plain PyTorch.
"""

from __future__ import annotations

import torch

from sf_xfuser.kernels.checks import (
    describe,
    is_same_view,
    require_contiguous_rows,
    require_no_overlap,
    require_same_device,
    require_shape,
    uses_triton,
)


def merge_(out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor) -> None:
    """Merge ``(new_out, new_lse)`` into ``(out, lse)`` in place. Local; on the current stream.

    | argument | shape | dtype | layout |
    |---|---|---|---|
    | ``out`` | [B,H,S,D] | fp32 or fp64 | any strides, D contiguous |
    | ``lse``, ``new_lse`` | [B,H,S] | as ``out`` | any strides; natural log |
    | ``new_out`` | [B,H,S,D] | any float | any strides, D contiguous |

    ``out = (1-w)*out + w*new_out`` with ``w = sigmoid(new_lse - lse)``, and ``lse = logaddexp(lse, new_lse)``.
    Example: ``out`` 1.0 with lse 0 and ``new_out`` 5.0 with lse ln 3 (weights 1, 3): w = 0.75, out = 4.0, lse = ln 4.

    Only the smaller weight is computed, and the other is one minus it. So the weights sum to exactly one, which keeps
    many merges as accurate as one softmax. As in one softmax, values near overflow stay finite and infinite values stay
    infinite; ``out + w*(new_out - out)`` would turn them into NaN. ``lse = -inf`` marks a row without keys, in
    either input: its output is ignored. Deterministic.

    Raises ValueError before any write: mismatched shapes or devices, strided D, an accumulator that is neither fp32 nor
    fp64, a partial result that shares memory with it.
    """
    (_merge_op if torch.compiler.is_compiling() else _merge)(out, lse, new_out, new_lse, None)


def merge_into(
    result: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor
) -> None:
    """As ``merge_``, but write the output to ``result`` [B,H,S,D], any float dtype, any strides with D contiguous. The
    accumulator is undefined afterwards. ``result`` may be ``out`` itself, but must not overlap the others."""
    (_merge_op if torch.compiler.is_compiling() else _merge)(out, lse, new_out, new_lse, result)


def merge_partial(
    out: torch.Tensor,
    lse: torch.Tensor,
    new_out: torch.Tensor,
    new_lse: torch.Tensor,
    result: torch.Tensor | None,
    first: bool = False,
) -> None:
    """``merge_``, or ``merge_into`` with a ``result``, for valid ``out``, ``lse`` and ``result``. Checks only shapes,
    dtypes and the last stride of ``new_out`` and ``new_lse``: 1 us instead of 18.

    ``first``: the accumulator is undefined. So ``new_out`` and ``new_lse`` become the accumulator, or with a ``result``
    only ``new_out`` is stored, there. On a GPU, the log-sum-exp of fully masked rows may be as flash attention returns
    it, see ``fix_flash_lse``.
    """
    valid = new_lse.dtype is lse.dtype and new_out.shape == out.shape and new_lse.shape == lse.shape
    if not valid or new_out.stride(3) != 1:
        check(out, lse, new_out, new_lse, result)
    if uses_triton(out):
        from sf_xfuser.kernels.triton_merge import launch

        launch(out, lse, new_out, new_lse, result, first=first, flash_lse=True)
    else:
        merge_partial_reference(out, lse, new_out, new_lse, result, first)


def merge_partial_reference(
    out: torch.Tensor,
    lse: torch.Tensor,
    new_out: torch.Tensor,
    new_lse: torch.Tensor,
    result: torch.Tensor | None,
    first: bool,
) -> None:
    """``merge_partial`` in plain PyTorch."""
    if new_lse.device.type != "cpu":
        new_lse = fix_flash_lse(new_out, new_lse)
    if not first:
        merge_reference(out, lse, new_out, new_lse, result)
    elif result is not None:
        result.copy_(new_out)
    else:
        out.copy_(new_out)
        lse.copy_(new_lse)


def fix_flash_lse(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The ``lse`` [B,H,S] of flash attention on a GPU, with -inf for fully masked rows (all scores -inf).

    Flash attention returns +inf if the softmax denominator is 0 (output 0) or NaN (output NaN, and lse becomes NaN)."""
    return torch.where(lse == float("inf"), out[..., 0] - float("inf"), lse)


def merge_reference(
    out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor, result: torch.Tensor | None
) -> None:
    """``merge_``, or ``merge_into`` with a ``result``, in plain PyTorch."""
    masked = new_lse == float("-inf")
    ratio = torch.exp(-(new_lse - lse).abs())
    smaller = (ratio / (1 + ratio)).masked_fill_(masked, 0.0)  # if both are -inf, their difference is NaN
    new_is_larger = new_lse > lse
    new_weight = torch.where(new_is_larger, 1 - smaller, smaller).unsqueeze(-1)
    old_weight = torch.where(new_is_larger, smaller, 1 - smaller).unsqueeze(-1)
    new_out = new_out.to(out.dtype)
    if masked.any():
        new_out = new_out.masked_fill(masked.unsqueeze(-1), 0.0)
    empty = (lse == float("-inf")) & ~masked
    if empty.any():
        out.masked_fill_(empty.unsqueeze(-1), 0.0)
    target = result if result is not None and result.dtype == out.dtype else out
    torch.mul(out, old_weight, out=target).addcmul_(new_out, new_weight)
    if result is None:
        torch.logaddexp(lse, new_lse, out=lse)
    elif target is not result:
        result.copy_(target)


def _merge(
    out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor, result: torch.Tensor | None
) -> None:
    check(out, lse, new_out, new_lse, result)
    _run(out, lse, new_out, new_lse, result)


def _run(
    out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor, result: torch.Tensor | None
) -> None:
    if uses_triton(out):
        from sf_xfuser.kernels.triton_merge import launch

        launch(out, lse, new_out, new_lse, result)
    else:
        merge_reference(out, lse, new_out, new_lse, result)


_merge_op = torch.library.custom_op("sf_xfuser::merge", _merge, mutates_args=("out", "lse", "result"))


def check(
    out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor, result: torch.Tensor | None
) -> None:
    """Raises the errors of ``merge_``."""
    if out.dim() != 4 or out.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"out is {describe(out)}: the accumulator must be [B, H, S, D] in torch.float32 or torch.float64"
        )
    shape = tuple(out.shape)
    for name, x in (("lse", lse), ("new_lse", new_lse)):
        require_shape(name, x, shape[:3], f"out {shape}")
        if x.dtype != out.dtype:
            raise ValueError(f"{name} is {describe(x)}: log-sum-exps must have the dtype of out, {out.dtype}")
    rows = {"out": out, "new_out": new_out} | ({} if result is None else {"result": result})
    for name, x in rows.items():
        require_shape(name, x, shape, f"out {shape}")
        if not x.is_floating_point():
            raise ValueError(f"{name} is {describe(x)}: it must be floating point")
    require_contiguous_rows(rows)
    require_same_device(rows | {"lse": lse, "new_lse": new_lse})
    written = {"out": out, "lse": lse}
    if result is not None and not is_same_view(result, out):
        written["result"] = result
    require_no_overlap(written, {"new_out": new_out, "new_lse": new_lse})
