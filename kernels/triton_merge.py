# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The device side of ``merge``: one pass over the accumulator and the partial result."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from sf_xfuser.kernels.shipped import Shipped

_ELEMENTS = 2048  # of one program: 16 for each of 128 threads, enough loads on their way to fill the memory's pipes
_LARGEST_STEP = 16  # elements: more does not make loads wider
_STRIDES = ("out", "lse", "new_out", "new_lse", "result")
_SIZES = ("num_tokens", "num_heads", "num_sequences", *(f"{x}_{dim}" for x in _STRIDES for dim in "bhs"))


# A run of rows may begin anywhere in a log-sum-exp: were its alignment compiled in, one that begins elsewhere would be
# compiled in the middle of a call.
@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=("lse", "new_lse"))
def merge_kernel(
    out,
    lse,
    new_out,
    new_lse,
    result,
    num_tokens,
    num_heads,
    num_sequences,  # batch x heads
    out_b,
    out_h,
    out_s,
    lse_b,
    lse_h,
    lse_s,
    new_out_b,
    new_out_h,
    new_out_s,
    new_lse_b,
    new_lse_h,
    new_lse_s,
    result_b,
    result_h,
    result_s,
    final: tl.constexpr,  # write the output to ``result``, and the accumulator no more
    step: tl.constexpr,  # elements; strides of out, new_out and result are given in steps
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Each program merges BLOCK_S tokens of one head. Heads are counted fastest: programs that run together then read
    what lies together in the accumulator, which is stored [S, B, H, D]."""
    program = tl.program_id(0)
    sequence = program % num_sequences
    first = (program // num_sequences).to(tl.int64) * BLOCK_S
    b = (sequence // num_heads).to(tl.int64)
    h = (sequence % num_heads).to(tl.int64)
    # The compiler has to see that rows begin at multiples of ``step``, or it loads element by element.
    out_b, out_h, out_s = out_b * step, out_h * step, out_s * step
    new_out_b, new_out_h, new_out_s = new_out_b * step, new_out_h * step, new_out_s * step
    result_b, result_h, result_s = result_b * step, result_h * step, result_s * step
    # To the block in 64 bits, inside it in 32.
    out += b * out_b + h * out_h + first * out_s
    lse += b * lse_b + h * lse_h + first * lse_s
    new_out += b * new_out_b + h * new_out_h + first * new_out_s
    new_lse += b * new_lse_b + h * new_lse_h + first * new_lse_s
    result += b * result_b + h * result_h + first * result_s
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)[None, :]
    here = s < num_tokens - first
    here_rows = here[:, None] & (d < D)

    old_lse = tl.load(lse + s * lse_s, mask=here, other=0.0)
    part_lse = tl.load(new_lse + s * new_lse_s, mask=here, other=0.0)
    seen = part_lse != float("-inf")
    known = (old_lse != float("-inf")) | (part_lse == float("-inf"))  # else what ``out`` holds is of no consequence
    old = tl.load(out + s[:, None] * out_s + d, mask=here_rows & known[:, None], other=0.0)
    part = tl.load(new_out + s[:, None] * new_out_s + d, mask=here_rows & seen[:, None], other=0.0).to(old.dtype)

    ratio = tl.exp(-tl.abs(part_lse - old_lse))
    lesser = tl.where(seen, ratio / (1.0 + ratio), 0.0)
    heavier = part_lse > old_lse
    weight = tl.where(heavier, 1.0 - lesser, lesser)
    rest = tl.where(heavier, lesser, 1.0 - lesser)
    merged = rest[:, None] * old + weight[:, None] * part
    if final:
        tl.store(result + s[:, None] * result_s + d, merged.to(result.dtype.element_ty), mask=here_rows)
    else:
        tl.store(out + s[:, None] * out_s + d, merged, mask=here_rows)
        larger = tl.maximum(old_lse, part_lse, propagate_nan=tl.PropagateNan.ALL)
        smaller = tl.minimum(old_lse, part_lse)
        gained = tl.where(smaller == float("-inf"), 0.0, tl.log(1.0 + tl.exp(smaller - larger)))
        tl.store(lse + s * lse_s, larger + gained, mask=here)


def launch(
    out: torch.Tensor,
    lse: torch.Tensor,
    new_out: torch.Tensor,
    new_lse: torch.Tensor,
    result: torch.Tensor | None,
) -> None:
    """As ``merge_twin``, of tensors that ``merge.check`` has passed. Enqueues one kernel on the current stream."""
    B, H, S, D = out.shape
    if out.numel() == 0:
        return
    target = out if result is None else result
    block_s, block_d = _blocks(D)
    step = math.gcd(_LARGEST_STEP, *(x.stride(dim) for x in (out, new_out, target) for dim in range(3)))
    strides = [
        stride // unit
        for x, unit in ((out, step), (lse, 1), (new_out, step), (new_lse, 1), (target, step))
        for stride in x.stride()[:3]
    ]
    merge_kernel[(triton.cdiv(S, block_s) * B * H,)](
        *(out, lse, new_out, new_lse, target, S, H, B * H, *strides),
        *(result is not None, step, D, block_d, block_s),
    )


def _blocks(D: int) -> tuple[int, int]:
    """(BLOCK_S, BLOCK_D)"""
    block_d = triton.next_power_of_2(D)
    return max(1, _ELEMENTS // block_d), block_d


def shipped() -> list[Shipped]:
    """What CI compiles ahead of time: the merge of a bf16 partial result, and the last one."""
    found = []
    for D in (64, 72, 128, 256):
        block_s, block_d = _blocks(D)
        for final in (False, True):
            found.append(
                Shipped(
                    label=f"merge{' (last)' if final else ''} D={D}",
                    kernel=merge_kernel,
                    types={"out": "*fp32", "lse": "*fp32", "new_out": "*bf16", "new_lse": "*fp32"}
                    | {"result": "*bf16" if final else "*fp32"},
                    constants={
                        "final": final,
                        "step": math.gcd(D, _LARGEST_STEP),
                        "D": D,
                        "BLOCK_D": block_d,
                        "BLOCK_S": block_s,
                    },
                )
            )
    return found
