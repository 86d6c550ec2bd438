# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The Triton kernel of ``copies``: a table of int64 in GPU memory describes the copies, one row each:

| fields | meaning |
|---|---|
| 0, 1 | index of the source and of the target tensor |
| 2 to 5 | S, B, H, D |
| 6 to 9 | source: offset, strides of S, B and H, in elements |
| 10 to 13 | target: the same |

The addresses of the tensors are arguments of the kernel, so a launch uploads nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from sf_xfuser.kernels.copies import MAX_BASES, Copy
from sf_xfuser.kernels.shipped import ShippedConfig
from sf_xfuser.kernels.triton_merge import block_shape

_BLOCK_ELEMENTS = 4096  # per program: 32 per thread of 128
_ALIGNMENT = 16  # bytes: the widest load of a thread
_FIELDS = tl.constexpr(14)
_BASES = tuple(f"base{i}" for i in range(MAX_BASES))


@triton.jit
def _pointer(
    row, index, side, first, b, h,
    base0, base1, base2, base3, base4, base5, base6, base7,
    TYPE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Pointer to token ``first`` of head (b, h), and the stride of a token. ``index``: the field of the tensor's index;
    ``side``: the first field of its offset and strides."""
    tensor = tl.load(row + index)
    base = tl.where(tensor == 0, base0, base1)
    base = tl.where(tensor == 2, base2, base)
    base = tl.where(tensor == 3, base3, base)
    base = tl.where(tensor == 4, base4, base)
    base = tl.where(tensor == 5, base5, base)
    base = tl.where(tensor == 6, base6, base)
    base = tl.where(tensor == 7, base7, base)
    stride = tl.load(row + side + 1)
    offset = tl.load(row + side) + first * stride + b * tl.load(row + side + 2) + h * tl.load(row + side + 3)
    # The compiler must see that rows start at multiples of STEP. Otherwise it loads single elements.
    pointer = tl.multiple_of(base.to(tl.pointer_type(TYPE)) + offset, STEP * TYPE.primitive_bitwidth // 8)
    return pointer, tl.multiple_of(stride, STEP)


@triton.jit(do_not_specialize=_BASES)
def copy_kernel(
    # Addresses. An empty tensor has address 0, which without annotation would be of another type than all others.
    base0: tl.int64, base1: tl.int64, base2: tl.int64, base3: tl.int64,
    base4: tl.int64, base5: tl.int64, base6: tl.int64, base7: tl.int64,
    table,
    TYPE: tl.constexpr,  # an integer of the size of an element
    STEP: tl.constexpr,  # elements; divides the alignment of the tensors, and all offsets, strides and D
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program (i, j) copies BLOCK_S tokens of one head of copy ``j``. The head index varies fastest, so concurrent
    programs access adjacent memory. Programs beyond the end of a small copy do nothing."""
    row = table + tl.program_id(1) * _FIELDS
    num_tokens = tl.load(row + 2)
    num_sequences = (tl.load(row + 3) * tl.load(row + 4)).to(tl.int32)
    num_heads = tl.load(row + 4).to(tl.int32)
    D = tl.multiple_of(tl.load(row + 5), STEP)
    program = tl.program_id(0)
    sequence = program % num_sequences
    first = (program // num_sequences).to(tl.int64) * BLOCK_S
    b = sequence // num_heads
    h = sequence % num_heads
    source, source_s = _pointer(
        row, 0, 6, first, b, h, base0, base1, base2, base3, base4, base5, base6, base7, TYPE, STEP
    )
    target, target_s = _pointer(
        row, 1, 10, first, b, h, base0, base1, base2, base3, base4, base5, base6, base7, TYPE, STEP
    )
    s = tl.arange(0, BLOCK_S)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (s < num_tokens - first) & (d < D)
    tl.store(target + s * target_s + d, tl.load(source + s * source_s + d, mask=mask, other=0), mask=mask)


_TYPES = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
"""By the bytes of an element."""


def record(
    copies: Sequence[Copy], dtype: torch.dtype, device: torch.device
) -> Callable[[Sequence[torch.Tensor]], None]:
    """``Copies.run`` for one or more copies with elements: enqueues one kernel on the current stream."""
    rows = [
        [source.tensor, target.tensor, *shape, source.offset, *source.strides, target.offset, *target.strides]
        for source, target, shape in copies
    ]
    table = torch.tensor(rows, dtype=torch.int64).to(device)
    num_bases = 1 + max(max(row[:2]) for row in rows)
    itemsize = dtype.itemsize
    step = math.gcd(_ALIGNMENT // itemsize, *(x for row in rows for x in row[5:]))
    block_s, block_d = block_shape(max(D for *_, (*_, D) in copies), _BLOCK_ELEMENTS)
    num_programs = max(triton.cdiv(S, block_s) * B * H for *_, (S, B, H, _) in copies)
    launch = copy_kernel[(num_programs, len(copies))]

    def run(tensors: Sequence[torch.Tensor]) -> None:
        addresses = [x.data_ptr() for x in tensors[:num_bases]]
        alignment = math.gcd(_ALIGNMENT, *addresses) // itemsize
        unused = [addresses[0]] * (MAX_BASES - num_bases)
        launch(*addresses, *unused, table, _TYPES[itemsize], min(step, alignment), block_d, block_s)

    return run


def shipped() -> list[ShippedConfig]:
    """Copies of 16-bit elements."""
    configs = []
    for D in (64, 72, 128):
        block_s, block_d = block_shape(D, _BLOCK_ELEMENTS)
        constants = {"TYPE": tl.int16, "STEP": 8, "BLOCK_D": block_d, "BLOCK_S": block_s}
        types = dict.fromkeys(_BASES, "i64") | {"table": "*i64"}
        configs.append(ShippedConfig(label=f"copy D={D}", kernel=copy_kernel, types=types, constants=constants))
    return configs
