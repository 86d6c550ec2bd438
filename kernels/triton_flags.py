# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The Triton kernels of ``flags``. Other GPUs write flags and poison, so these loads are volatile: a cache could hold
old values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sf_xfuser.kernels.shipped import ShippedConfig

_BLOCK = 128  # flags at a time: more than most calls have
_BLOCK_ELEMENTS = 4096
_MAX_PROGRAMS = 256  # a valid result takes one load per program

_CHECKED = ("flags", "index", "expected", "poison", "ended")


@triton.jit(do_not_specialize=("num_checked",), do_not_specialize_on_alignment=_CHECKED)
def check_flags_kernel(flags, index, expected, poison, ended, num_checked, BLOCK: tl.constexpr):
    """One program. The last step is visible to other processors after all others."""
    value = tl.load(expected)
    wrong = tl.zeros([BLOCK], tl.int32)
    first = 0
    while first < num_checked:
        position = first + tl.arange(0, BLOCK)
        valid = position < num_checked
        flag = flags + tl.load(index + position, mask=valid, other=0)
        wrong |= (valid & (tl.load(flag, mask=valid, other=0, volatile=True) != value)).to(tl.int32)
        tl.store(flag, tl.zeros([BLOCK], tl.int64), mask=valid)
        first += BLOCK
    tl.store(poison, float("nan"), mask=tl.max(wrong, 0) != 0)
    tl.debug_barrier()  # between the threads of the program
    tl.atomic_add(ended, 1, sem="release", scope="sys")


@triton.jit(do_not_specialize=("num_elements",), do_not_specialize_on_alignment=("result", "poison"))
def poison_kernel(result, poison, num_elements: tl.int64, BLOCK: tl.constexpr):
    """Each program fills every n-th block, of n programs. ``result``: its elements in the order of memory."""
    if tl.load(poison, volatile=True) != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        while first < num_elements:
            element = first + tl.arange(0, BLOCK)
            nan = tl.full([BLOCK], float("nan"), tl.float32).to(result.dtype.element_ty)
            tl.store(result + element, nan, mask=element < num_elements)
            first += tl.num_programs(0) * BLOCK


def launch_check(
    flags: torch.Tensor, index: torch.Tensor, expected: torch.Tensor, poison: torch.Tensor, ended: torch.Tensor
) -> None:
    """``check_flags`` on the current stream."""
    check_flags_kernel[(1,)](flags, index, expected, poison, ended, index.numel(), _BLOCK)


def launch_poison(result: torch.Tensor, poison: torch.Tensor) -> None:
    """``poison_result`` on the current stream, for a checked ``result`` with elements."""
    num_programs = min(triton.cdiv(result.numel(), _BLOCK_ELEMENTS), _MAX_PROGRAMS)
    poison_kernel[(num_programs,)](result, poison, result.numel(), _BLOCK_ELEMENTS)


def shipped() -> list[ShippedConfig]:
    """The check of flags, and the poisoning of a bf16 result."""
    types = {"flags": "*i64", "index": "*i64", "expected": "*i64", "poison": "*fp32", "ended": "*i64"}
    result = {"result": "*bf16", "poison": "*fp32", "num_elements": "i64"}
    return [
        ShippedConfig(label="check flags", kernel=check_flags_kernel, types=types, constants={"BLOCK": _BLOCK}),
        ShippedConfig(label="poison result", kernel=poison_kernel, types=result, constants={"BLOCK": _BLOCK_ELEMENTS}),
    ]
