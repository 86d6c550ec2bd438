# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The Triton kernel of ``packing``: copies rows of D values between strided views, with conversion."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sf_xfuser.kernels.packing import MAX_STORED, MIN_MAGNITUDE
from sf_xfuser.kernels.shipped import ShippedConfig
from sf_xfuser.kernels.triton_merge import block_shape, common_step

_BLOCK_ELEMENTS = 4096  # per program: 32 per thread of 128
_VIEWS = ("source0", "target0", "source1", "target1")
_SIZES = ("num_tokens", "num_heads", "num_sequences", *(f"{x}_{dim}" for x in _VIEWS for dim in "sbh"))

_MAX_FP8 = tl.constexpr(MAX_STORED["fp8"])
_MAX_INT8 = tl.constexpr(MAX_STORED["int8"])
_MIN_MAGNITUDE = tl.constexpr(MIN_MAGNITUDE)


@triton.jit(do_not_specialize=_SIZES)
def pack_kernel(
    source0, target0, scales0,
    source1, target1, scales1,
    num_tokens, num_heads, num_sequences,  # num_sequences: batch x heads
    source0_s, source0_b, source0_h,
    target0_s, target0_b, target0_h,
    source1_s, source1_b, source1_h,
    target1_s, target1_b, target1_h,
    conversion0: tl.constexpr, conversion1: tl.constexpr,
    step: tl.constexpr,  # elements; the unit of the strides
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Each program converts BLOCK_S tokens of one head of one part. The head index varies fastest, so concurrent
    programs access adjacent memory."""
    program = tl.program_id(0)
    sequence = program % num_sequences
    first = (program // num_sequences).to(tl.int64) * BLOCK_S
    b = (sequence // num_heads).to(tl.int64)
    h = (sequence % num_heads).to(tl.int64)
    # 64-bit offsets to the block, 32-bit offsets inside it. Scales are contiguous [S, B, H].
    block = first * num_sequences + sequence
    if tl.program_id(1) == 0:
        source0 += (first * source0_s + b * source0_b + h * source0_h) * step
        target0 += (first * target0_s + b * target0_b + h * target0_h) * step
        strides = source0_s * step, target0_s * step, num_sequences
        _convert_rows(source0, target0, scales0 + block, strides, num_tokens - first, conversion0, D, BLOCK_D, BLOCK_S)
    else:
        source1 += (first * source1_s + b * source1_b + h * source1_h) * step
        target1 += (first * target1_s + b * target1_b + h * target1_h) * step
        strides = source1_s * step, target1_s * step, num_sequences
        _convert_rows(source1, target1, scales1 + block, strides, num_tokens - first, conversion1, D, BLOCK_D, BLOCK_S)


@triton.jit
def _convert_rows(
    source, target, scales,
    strides,  # token strides of source, target and scales
    num_tokens,
    conversion: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)[None, :]
    valid = s < num_tokens
    mask = valid[:, None] & (d < D)
    source_s, target_s, scales_s = strides
    x = tl.load(source + s[:, None] * source_s + d, mask=mask, other=0)
    scales += s * scales_s
    if conversion == "to int8" or conversion == "to fp8":
        x = x.to(tl.float32)
        # The bits of magnitudes have the order of the magnitudes, with infinity and NaN above all numbers.
        max_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        finite = max_bits < 0x7F800000
        magnitude = tl.maximum(max_bits.to(tl.float32, bitcast=True), _MIN_MAGNITUDE)
        scale = magnitude / (_MAX_INT8 if conversion == "to int8" else _MAX_FP8)
        tl.store(scales, tl.where(finite, scale, float("nan")), mask=valid)
        scaled = tl.where(finite[:, None], x * (1.0 / scale)[:, None], 0.0)
        x = _to_int8(scaled) if conversion == "to int8" else _to_fp8(scaled)
    elif conversion == "from int8" or conversion == "from fp8":
        scale = tl.load(scales, mask=valid, other=0.0)[:, None]
        x = (x.to(tl.float32) if conversion == "from int8" else _from_fp8(x)) * scale
    tl.store(target + s[:, None] * target_s + d, x.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _to_int8(x):
    """Round to nearest, ties to even: adding 1.5 * 2^23 leaves the integer in the low bits."""
    return ((x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def _to_fp8(x):
    """The bits of e4m3, rounded to nearest, ties to even, for magnitudes up to 448. Integer arithmetic, since GPUs
    before sm_89 have no conversion instruction."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)  # to 3 bits of mantissa
    normal = (rounded >> 20) - (120 << 3)  # exponent bias 127 -> 7
    # Below 2^-6 values are multiples of 2^-9: adding 2^23 leaves the multiple in the low bits.
    subnormal = (magnitude.to(tl.float32, bitcast=True) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _from_fp8(code):
    code = code.to(tl.int32)
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    return tl.where((code & 0x80) != 0, -value, value)


def launch(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    conversions: Sequence[str],
) -> None:
    """``convert_reference`` for checked tensors. Enqueues one kernel on the current stream."""
    S, B, H, D = sources[0].shape
    if sources[0].numel() == 0:
        return
    sources, targets = ([_as_bytes(x) for x in side] for side in (sources, targets))
    block_s, block_d = block_shape(D, _BLOCK_ELEMENTS)
    views = [x for pair in zip(sources, targets, strict=True) for x in pair]
    step = common_step(*views)
    strides = [x.stride(dim) // step for x in views for dim in range(3)]
    pointers = [
        x
        for source, target, scale in zip(sources, targets, scales, strict=True)
        for x in (source, target, target if scale is None else scale)
    ]
    if len(sources) == 1:  # the kernel ignores the second part
        pointers, strides = pointers * 2, strides * 2
    pack_kernel[(triton.cdiv(S, block_s) * B * H, len(sources))](
        *(*pointers, S, H, B * H, *strides),
        *(conversions[0], conversions[-1], step, D, block_d, block_s),
    )


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    """View fp8 as uint8, since the kernel computes the bits of fp8 itself."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def shipped() -> list[ShippedConfig]:
    """bf16 copies, and both formats in both directions."""
    conversions = {
        "pack": ("copy", "*bf16", "*bf16"),
        "pack to fp8": ("to fp8", "*bf16", "*u8"),
        "pack to int8": ("to int8", "*bf16", "*i8"),
        "unpack from fp8": ("from fp8", "*u8", "*bf16"),
        "unpack from int8": ("from int8", "*i8", "*bf16"),
    }
    configs = []
    for label, (conversion, source, target) in conversions.items():
        for D in (72, 128):
            block_s, block_d = block_shape(D, _BLOCK_ELEMENTS)
            scales = target if conversion == "copy" else "*fp32"
            types = {"source": source, "target": target, "scales": scales}
            constants = {"step": math.gcd(D, 16), "D": D, "BLOCK_D": block_d, "BLOCK_S": block_s}
            configs.append(
                ShippedConfig(
                    label=f"{label} D={D}",
                    kernel=pack_kernel,
                    types={f"{name}{part}": kind for name, kind in types.items() for part in (0, 1)},
                    constants=constants | {"conversion0": conversion, "conversion1": conversion},
                )
            )
    return configs
