# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The Triton kernel of ``merge``: one pass over the accumulator and the partial result."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from sf_xfuser.kernels.shipped import ShippedConfig

_BLOCK_ELEMENTS = 2048  # per program: 16 per thread of 128, enough loads in flight to saturate memory
_MAX_STEP = 16  # elements: larger steps do not widen loads
_STRIDES = ("out", "lse", "new_out", "new_lse", "result")
_SIZES = ("num_tokens", "num_heads", "num_sequences", *(f"{x}_{dim}" for x in _STRIDES for dim in "bhs"))


# A slice of a log-sum-exp may start anywhere. Specializing on its alignment would compile another kernel during a call.
@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=("lse", "new_lse"))
def merge_kernel(
    out, lse, new_out, new_lse, result,
    num_tokens, num_heads, num_sequences,  # num_sequences: batch x heads
    out_b, out_h, out_s,
    lse_b, lse_h, lse_s,
    new_out_b, new_out_h, new_out_s,
    new_lse_b, new_lse_h, new_lse_s,
    result_b, result_h, result_s,
    starts: tl.constexpr,  # the accumulator is undefined: store the partial result
    final: tl.constexpr,  # write ``result`` instead of the accumulator
    flash_lse: tl.constexpr,  # a log-sum-exp of +inf is that of a fully masked row, see ``merge.fix_flash_lse``
    step: tl.constexpr,  # elements; the unit of the strides of out, new_out and result
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Each program merges BLOCK_S tokens of one head. The head index varies fastest, so concurrent programs read
    adjacent memory of the accumulator, which is stored as [S, B, H, D]."""
    program = tl.program_id(0)
    sequence = program % num_sequences
    first = (program // num_sequences).to(tl.int64) * BLOCK_S
    b = (sequence // num_heads).to(tl.int64)
    h = (sequence % num_heads).to(tl.int64)
    # The compiler must see that rows start at multiples of ``step``. Otherwise it loads single elements.
    out_b, out_h, out_s = out_b * step, out_h * step, out_s * step
    new_out_b, new_out_h, new_out_s = new_out_b * step, new_out_h * step, new_out_s * step
    result_b, result_h, result_s = result_b * step, result_h * step, result_s * step
    # 64-bit offsets to the block, 32-bit offsets inside it.
    out += b * out_b + h * out_h + first * out_s
    lse += b * lse_b + h * lse_h + first * lse_s
    new_out += b * new_out_b + h * new_out_h + first * new_out_s
    new_lse += b * new_lse_b + h * new_lse_h + first * new_lse_s
    result += b * result_b + h * result_h + first * result_s
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)[None, :]
    valid = s < num_tokens - first
    mask = valid[:, None] & (d < D)

    part_lse = tl.load(new_lse + s * new_lse_s, mask=valid, other=0.0)
    if flash_lse:
        unknown = part_lse == float("inf")
        element = tl.load(new_out + s * new_out_s, mask=valid & unknown, other=0.0).to(part_lse.dtype)
        part_lse = tl.where(unknown, element - float("inf"), part_lse)
    new_out += s[:, None] * new_out_s + d
    if starts:
        merged = tl.load(new_out, mask=mask, other=0.0)
        merged_lse = part_lse
    else:
        old_lse = tl.load(lse + s * lse_s, mask=valid, other=0.0)
        use_part = part_lse != float("-inf")
        use_old = (old_lse != float("-inf")) | (part_lse == float("-inf"))  # an empty accumulator may hold any output
        old = tl.load(out + s[:, None] * out_s + d, mask=mask & use_old[:, None], other=0.0)
        part = tl.load(new_out, mask=mask & use_part[:, None], other=0.0).to(old.dtype)

        ratio = tl.exp(-tl.abs(part_lse - old_lse))
        smaller = tl.where(use_part, ratio / (1.0 + ratio), 0.0)
        part_is_larger = part_lse > old_lse
        part_weight = tl.where(part_is_larger, 1.0 - smaller, smaller)
        old_weight = tl.where(part_is_larger, smaller, 1.0 - smaller)
        merged = old_weight[:, None] * old + part_weight[:, None] * part
        max_lse = tl.maximum(old_lse, part_lse, propagate_nan=tl.PropagateNan.ALL)
        min_lse = tl.minimum(old_lse, part_lse)
        increase = tl.where(min_lse == float("-inf"), 0.0, tl.log(1.0 + tl.exp(min_lse - max_lse)))
        merged_lse = max_lse + increase
    if final:
        tl.store(result + s[:, None] * result_s + d, merged.to(result.dtype.element_ty), mask=mask)
    else:
        tl.store(out + s[:, None] * out_s + d, merged.to(out.dtype.element_ty), mask=mask)
        tl.store(lse + s * lse_s, merged_lse, mask=valid)


def launch(
    out: torch.Tensor,
    lse: torch.Tensor,
    new_out: torch.Tensor,
    new_lse: torch.Tensor,
    result: torch.Tensor | None,
    *,
    first: bool = False,
    flash_lse: bool = False,
) -> None:
    """``merge_reference``, or with ``flash_lse`` ``merge_partial``, for checked tensors. Enqueues one kernel on the
    current stream."""
    B, H, S, D = out.shape
    if out.numel() == 0:
        return
    target = out if result is None else result
    block_s, block_d = block_shape(D, _BLOCK_ELEMENTS)
    step = common_step(out, new_out, target)
    strides = [
        stride // unit
        for x, unit in ((out, step), (lse, 1), (new_out, step), (new_lse, 1), (target, step))
        for stride in x.stride()[:3]
    ]
    merge_kernel[(triton.cdiv(S, block_s) * B * H,)](
        *(out, lse, new_out, new_lse, target, S, H, B * H, *strides),
        *(first, result is not None, flash_lse, step, D, block_d, block_s),
    )


def block_shape(D: int, elements: int) -> tuple[int, int]:
    """(BLOCK_S, BLOCK_D) of a block with about ``elements`` elements."""
    block_d = triton.next_power_of_2(D)
    return max(1, elements // block_d), block_d


def common_step(*tensors: torch.Tensor) -> int:
    """Common divisor of all strides but the last, in elements, of at most ``_MAX_STEP``."""
    return math.gcd(_MAX_STEP, *(stride for x in tensors for stride in x.stride()[:3]))


def shipped() -> list[ShippedConfig]:
    """The merge of a bf16 partial result: the first, the next and the last one of a row."""
    configs = []
    for D in (64, 72, 128, 256):
        block_s, block_d = block_shape(D, _BLOCK_ELEMENTS)
        constants = {"flash_lse": True, "step": math.gcd(D, _MAX_STEP), "D": D, "BLOCK_D": block_d, "BLOCK_S": block_s}
        for label, first, final in (
            ("merge", False, False),
            ("merge (first)", True, False),
            ("merge (last)", False, True),
        ):
            configs.append(
                ShippedConfig(
                    label=f"{label} D={D}",
                    kernel=merge_kernel,
                    types={"out": "*fp32", "lse": "*fp32", "new_out": "*bf16", "new_lse": "*fp32"}
                    | {"result": "*bf16" if final else "*fp32"},
                    constants={"starts": first, "final": final} | constants,
                )
            )
    return configs
