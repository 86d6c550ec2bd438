# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The device side of ``packing``: rows of D values from one strided view to another, converted on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sf_xfuser.kernels.packing import LARGEST, SMALLEST
from sf_xfuser.kernels.shipped import Shipped

_ELEMENTS = 4096  # of one program: 32 for each of 128 threads
_LARGEST_STEP = 16  # elements: more does not make loads wider
_VIEWS = ("source0", "target0", "source1", "target1")
_SIZES = ("num_tokens", "num_heads", "num_sequences", *(f"{x}_{dim}" for x in _VIEWS for dim in "sbh"))

_LARGEST_FP8 = tl.constexpr(LARGEST["fp8"])
_LARGEST_INT8 = tl.constexpr(LARGEST["int8"])
_SMALLEST = tl.constexpr(SMALLEST)


@triton.jit(do_not_specialize=_SIZES)
def pack_kernel(
    source0,
    target0,
    scales0,
    source1,
    target1,
    scales1,
    num_tokens,
    num_heads,
    num_sequences,  # batch x heads
    source0_s,
    source0_b,
    source0_h,
    target0_s,
    target0_b,
    target0_h,
    source1_s,
    source1_b,
    source1_h,
    target1_s,
    target1_b,
    target1_h,
    how0: tl.constexpr,
    how1: tl.constexpr,
    step: tl.constexpr,  # elements; strides are given in steps
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Each program moves BLOCK_S tokens of one head of one part. Heads are counted fastest: programs that run together
    then read and write what lies together."""
    program = tl.program_id(0)
    sequence = program % num_sequences
    first = (program // num_sequences).to(tl.int64) * BLOCK_S
    b = (sequence // num_heads).to(tl.int64)
    h = (sequence % num_heads).to(tl.int64)
    # To the block in 64 bits, inside it in 32; scales are contiguous [S, B, H].
    block = first * num_sequences + sequence
    if tl.program_id(1) == 0:
        source0 += (first * source0_s + b * source0_b + h * source0_h) * step
        target0 += (first * target0_s + b * target0_b + h * target0_h) * step
        strides = source0_s * step, target0_s * step, num_sequences
        _move_rows(source0, target0, scales0 + block, strides, num_tokens - first, how0, D, BLOCK_D, BLOCK_S)
    else:
        source1 += (first * source1_s + b * source1_b + h * source1_h) * step
        target1 += (first * target1_s + b * target1_b + h * target1_h) * step
        strides = source1_s * step, target1_s * step, num_sequences
        _move_rows(source1, target1, scales1 + block, strides, num_tokens - first, how1, D, BLOCK_D, BLOCK_S)


@triton.jit
def _move_rows(
    source,
    target,
    scales,
    strides,  # from token to token, of source, target and scales
    num_tokens,
    how: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)[None, :]
    here = s < num_tokens
    here_rows = here[:, None] & (d < D)
    source_s, target_s, scales_s = strides
    x = tl.load(source + s[:, None] * source_s + d, mask=here_rows, other=0)
    scales += s * scales_s
    if how == "to int8" or how == "to fp8":
        x = x.to(tl.float32)
        # As integers, magnitudes keep their order, with infinity and then NaN above all numbers.
        largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        finite = largest < 0x7F800000
        magnitude = tl.maximum(largest.to(tl.float32, bitcast=True), _SMALLEST)
        scale = magnitude / (_LARGEST_INT8 if how == "to int8" else _LARGEST_FP8)
        tl.store(scales, tl.where(finite, scale, float("nan")), mask=here)
        scaled = tl.where(finite[:, None], x * (1.0 / scale)[:, None], 0.0)
        x = _int8_of(scaled) if how == "to int8" else _fp8_of(scaled)
    elif how == "from int8" or how == "from fp8":
        scale = tl.load(scales, mask=here, other=0.0)[:, None]
        x = (x.to(tl.float32) if how == "from int8" else _of_fp8(x)) * scale
    tl.store(target + s[:, None] * target_s + d, x.to(target.dtype.element_ty), mask=here_rows)


@triton.jit
def _int8_of(x):
    """Rounded to the nearest integer, ties to even: adding 1.5 * 2^23 leaves it in the low bits."""
    return ((x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def _fp8_of(x):
    """The bits of e4m3, rounded to the nearest, ties to even, for magnitudes up to 448. In integers: GPUs before sm_89
    have no such instruction."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)  # to 3 bits of mantissa
    normal = (rounded >> 20) - (120 << 3)  # exponent bias 127 -> 7
    # Below 2^-6 the format is in steps of 2^-9: adding 2^23 leaves their number in the low bits.
    subnormal = (magnitude.to(tl.float32, bitcast=True) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _of_fp8(code):
    code = code.to(tl.int32)
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    return tl.where((code & 0x80) != 0, -value, value)


def launch(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    how: Sequence[str],
) -> None:
    """As ``packing.move_twin``, of tensors that ``pack`` has checked. Enqueues one kernel on the current stream."""
    S, B, H, D = sources[0].shape
    if sources[0].numel() == 0:
        return
    sources, targets = ([_as_bytes(x) for x in side] for side in (sources, targets))
    block_s, block_d = _blocks(D)
    views = [x for pair in zip(sources, targets, strict=True) for x in pair]
    step = math.gcd(_LARGEST_STEP, *(x.stride(dim) for x in views for dim in range(3)))
    strides = [x.stride(dim) // step for x in views for dim in range(3)]
    pointers = [
        x
        for source, target, scale in zip(sources, targets, scales, strict=True)
        for x in (source, target, target if scale is None else scale)
    ]
    if len(sources) == 1:  # the second part is never looked at
        pointers, strides = pointers * 2, strides * 2
    pack_kernel[(triton.cdiv(S, block_s) * B * H, len(sources))](
        *(*pointers, S, H, B * H, *strides),
        *(how[0], how[-1], step, D, block_d, block_s),
    )


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    """fp8 as the integers in which the kernel makes it."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _blocks(D: int) -> tuple[int, int]:
    """(BLOCK_S, BLOCK_D)"""
    block_d = triton.next_power_of_2(D)
    return max(1, _ELEMENTS // block_d), block_d


def shipped() -> list[Shipped]:
    """What CI compiles ahead of time: bf16 as it is, the last cast of O, and both formats, there and back."""
    ways = {
        "pack": ("copy", "*bf16", "*bf16"),
        "pack fp32 to bf16": ("copy", "*fp32", "*bf16"),
        "pack to fp8": ("to fp8", "*bf16", "*u8"),
        "pack to int8": ("to int8", "*bf16", "*i8"),
        "unpack from fp8": ("from fp8", "*u8", "*bf16"),
        "unpack from int8": ("from int8", "*i8", "*bf16"),
    }
    found = []
    for label, (how, source, target) in ways.items():
        for D in (72, 128):
            block_s, block_d = _blocks(D)
            scales = target if how == "copy" else "*fp32"
            types = {"source": source, "target": target, "scales": scales}
            constants = {"step": math.gcd(D, _LARGEST_STEP), "D": D, "BLOCK_D": block_d, "BLOCK_S": block_s}
            found.append(
                Shipped(
                    label=f"{label} D={D}",
                    kernel=pack_kernel,
                    types={f"{name}{part}": kind for name, kind in types.items() for part in (0, 1)},
                    constants=constants | {"how0": how, "how1": how},
                )
            )
    return found
