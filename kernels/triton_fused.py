# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The device side of ``fused``: attention over lists of chunks in one launch.

All that a launch is told lies in one table of 64-bit numbers in the GPU's memory: a head, then a row for each Q chunk
and each KV chunk. So the kernel has one signature whatever it is given, and nothing is concatenated. A *tile* is ROWS
queries of one head of one chunk; each program attends one tile to all KV chunks in the order of their list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sf_xfuser.kernels.fused import Chunks
from sf_xfuser.kernels.shipped import Shipped

_HEAD = tl.constexpr(4)  # numbers before the first row
_ROW = tl.constexpr(19)  # numbers in a row
_LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _place(entry, b, h, first, TYPE: tl.constexpr, ALIGNED: tl.constexpr, AGAIN: tl.constexpr = False):
    """Where (b, h, first) of a tensor lies, and its stride between tokens. ``entry``: its address and three strides.
    AGAIN: read them once more; else the compiler keeps every element's address in registers from the first time on,
    which then spill."""
    at = tl.load(entry, volatile=AGAIN).to(tl.pointer_type(TYPE))
    stride = tl.load(entry + 3, volatile=AGAIN)
    at += b * tl.load(entry + 1) + h * tl.load(entry + 2) + first * stride
    stride = stride.to(tl.int32)  # inside a block 32 bits do
    if ALIGNED:  # to 16 bytes, so that a thread moves as many at once
        at = tl.multiple_of(at, 16)
        stride = tl.multiple_of(stride, 128 // TYPE.primitive_bitwidth)
    return at, stride


@triton.jit
def _load(x, here, SOME: tl.constexpr, SIZE: tl.constexpr):
    """Rows of SIZE elements, padded with 0 to the width of ``x``; with SOME those not ``here`` are 0."""
    d = tl.arange(0, x.shape[1])[None, :]
    if SOME:
        if x.shape[1] > SIZE:
            loaded = tl.load(x, mask=here[:, None] & (d < SIZE), other=0.0)
        else:
            loaded = tl.load(x, mask=here[:, None], other=0.0)
    else:
        if x.shape[1] > SIZE:  # noqa: SIM108
            loaded = tl.load(x, mask=d < SIZE, other=0.0)
        else:
            loaded = tl.load(x)
    return loaded


@triton.jit
def _store(
    entry, b, h, first, here, total, total2,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """A tile's output, to the tensor that ``_place`` finds."""
    at, stride = _place(entry, b, h, first, TYPE, ALIGNED, True)
    rows = tl.arange(0, total.shape[0])[:, None] * stride
    tl.store(at + (rows + tl.arange(0, D1)[None, :]), total.to(TYPE), mask=here[:, None])
    if D2:
        d2 = D1 + tl.arange(0, D2)[None, :]
        tl.store(at + (rows + d2), total2.to(TYPE), mask=here[:, None] & (d2 < D))


@triton.jit
def _attend_keys(
    q, q2, k, k2, v, v2, here, total, total2, weight, largest, scale,
    SOME: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Attend to one block of keys: online softmax, in base 2. ``weight`` sums what the keys weigh relative to
    ``largest``, the largest score, and ``total`` their values."""
    scores = tl.dot(q, tl.trans(_load(k, here, SOME, D1)), input_precision="ieee")
    if D2:
        scores = tl.dot(q2, tl.trans(_load(k2, here, SOME, D - D1)), scores, input_precision="ieee")
    if SOME:
        scores = tl.where(here[None, :], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
    base = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # no key with a weight yet: -inf - -inf is NaN
    weights = tl.exp2(scores * scale - base[:, None])
    rescale = tl.exp2(largest - base)
    weight = weight * rescale + tl.sum(weights, 1)
    weights = weights.to(q.dtype)
    total = tl.dot(weights, _load(v, here, SOME, D1), total * rescale[:, None], input_precision="ieee")
    if D2:
        values = _load(v2, here, SOME, D - D1)
        total2 = tl.dot(weights, values, total2 * rescale[:, None], input_precision="ieee")
    return total, total2, weight, new_largest


@triton.jit
def attend_chunks_kernel(
    table,
    scale,  # of scores, to base 2
    TYPE: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,  # the head in two parts, since a block has a power of two: D1, and D - D1 padded to D2
    D2: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    ALIGNED: tl.constexpr,
    FINAL: tl.constexpr,  # write the output to the results, and the accumulator no more
):
    num_q, num_kv = tl.load(table), tl.load(table + 1).to(tl.int32)
    q_chunks = table + _HEAD
    kv_chunks = q_chunks + num_q * _ROW

    row = tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    d = tl.arange(0, D1)[None, :]
    # Which tile this is.
    tile = tl.program_id(0)
    chunk = q_chunks
    while tile >= tl.load(chunk):
        chunk += _ROW
    within = tile - tl.load(chunk + 1).to(tl.int32)
    num_rows = tl.load(chunk + 2).to(tl.int32)
    blocks = tl.cdiv(num_rows, ROWS)
    heads = tl.load(table + 2).to(tl.int32)
    first = within % blocks * ROWS
    b = within // blocks // heads
    h = within // blocks % heads
    h_kv = h // tl.load(table + 3).to(tl.int32)

    q_at, q_stride = _place(chunk + 3, b, h, first, TYPE, ALIGNED)
    is_row = row < num_rows - first
    q = _load(q_at + (row[:, None] * q_stride + d), is_row, True, D1)
    # What the accumulator holds already. A row that has seen no key may hold anything.
    out_at, out_stride = _place(chunk + 7, b, h, first, tl.float32, ALIGNED)
    lse_at, lse_stride = _place(chunk + 11, b, h, first, tl.float32, False)
    largest = tl.load(lse_at + row * lse_stride, mask=is_row, other=float("-inf")) / _LN2
    seen = largest != float("-inf")
    weight = tl.where(seen, 1.0, 0.0)
    total = _load(out_at + (row[:, None] * out_stride + d), seen, True, D1)
    if D2:
        d2 = D1 + tl.arange(0, D2)[None, :]
        q2 = _load(q_at + (row[:, None] * q_stride + d2), is_row, True, D - D1)
        total2 = _load(out_at + (row[:, None] * out_stride + d2), seen, True, D - D1)
    else:
        d2 = d
        q2 = q
        total2 = 0.0

    for kv in range(0, num_kv):
        keys = kv_chunks + kv * _ROW
        num_keys = tl.load(keys).to(tl.int32)
        k, k_stride = _place(keys + 1, b, h_kv, 0, TYPE, ALIGNED)
        v, v_stride = _place(keys + 5, b, h_kv, 0, TYPE, ALIGNED)
        k_rows = key[:, None] * k_stride
        v_rows = key[:, None] * v_stride
        whole = num_keys // KEYS * KEYS
        for _ in range(0, whole, KEYS):
            total, total2, weight, largest = _attend_keys(
                q, q2, k + (k_rows + d), k + (k_rows + d2), v + (v_rows + d), v + (v_rows + d2), key,
                total, total2, weight, largest, scale, False, D, D1, D2,
            )  # fmt: skip
            k += KEYS * k_stride
            v += KEYS * v_stride
        if whole < num_keys:
            total, total2, weight, largest = _attend_keys(
                q, q2, k + (k_rows + d), k + (k_rows + d2), v + (v_rows + d), v + (v_rows + d2),
                key < num_keys - whole, total, total2, weight, largest, scale, True, D, D1, D2,
            )  # fmt: skip

    weight = tl.where(largest == float("-inf"), 1.0, weight)
    total /= weight[:, None]
    if D2:
        total2 /= weight[:, None]
    if FINAL:
        _store(chunk + 15, b, h, first, is_row, total, total2, TYPE, ALIGNED, D, D1, D2)
    else:
        _store(chunk + 7, b, h, first, is_row, total, total2, tl.float32, ALIGNED, D, D1, D2)
        lse_at, lse_stride = _place(chunk + 11, b, h, first, tl.float32, False, True)
        tl.store(lse_at + row * lse_stride, (largest + tl.log2(weight)) * _LN2, mask=is_row)


@dataclass(frozen=True, slots=True)
class Config:
    """How a kernel is compiled: ``rows`` x ``keys`` is a block of scores; ``depth`` blocks of keys are held or on their
    way."""

    rows: int
    keys: int
    warps: int
    depth: int


# Cut down from the block shapes of Triton's and PyTorch's own attention kernels until nothing spills and, for 80, until
# the 99 KB of shared memory of compute capability 8.6, 8.9 and 12.0 suffice. None has been timed: there was no GPU.
CONFIGS: dict[tuple[int, int], Config] = {
    (80, 64): Config(128, 64, 4, 3),
    (80, 72): Config(128, 64, 8, 3),
    (80, 96): Config(128, 64, 8, 3),
    (80, 128): Config(128, 64, 8, 3),
    (80, 256): Config(64, 32, 8, 2),
    (90, 64): Config(128, 128, 8, 3),
    (90, 72): Config(128, 32, 8, 3),
    (90, 96): Config(128, 64, 8, 3),
    (90, 128): Config(128, 64, 8, 3),
    (90, 256): Config(128, 32, 8, 2),
    (100, 64): Config(128, 64, 8, 3),
    (100, 72): Config(128, 32, 8, 3),
    (100, 96): Config(128, 32, 8, 3),
    (100, 128): Config(64, 32, 4, 2),
    (100, 256): Config(32, 32, 4, 2),
}
"""By compute capability times 10, and D; for 16 bits."""

_SMALL = Config(32, 32, 4, 1)
"""For 32 bits, computed without tensor cores, and for Triton's interpreter."""


def _config(device: torch.device, dtype: torch.dtype, D: int) -> Config:
    if device.type == "cpu" or dtype == torch.float32:
        return _SMALL
    major, _ = torch.cuda.get_device_capability(device)
    return CONFIGS[{9: 90, 10: 100, 11: 100}.get(major, 80), D]


def _constants(type: tl.dtype, D: int, config: Config, *, aligned: bool, final: bool) -> dict[str, object]:
    D1 = 1 << (D.bit_length() - 1)
    return {
        "TYPE": type,
        "D": D,
        "D1": D1,
        "D2": 0 if D == D1 else max(16, triton.next_power_of_2(D - D1)),
        "ROWS": config.rows,
        "KEYS": config.keys,
        "ALIGNED": aligned,
        "FINAL": final,
    }


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def launch(chunks: Chunks) -> None:
    """As ``attend_twin``, of chunks that ``fused.check`` has passed. Enqueues one copy of the table and one kernel on
    the current stream."""
    q, k, v, out, _, results = chunks
    device, dtype, D = q[0].device, q[0].dtype, q[0].shape[-1]
    config = _config(device, dtype, D)
    q_rows, num_tiles = _q_rows(chunks, config.rows)
    if num_tiles == 0:
        return
    kv_rows = [[x.shape[2], *_place_of(x), *_place_of(y)] for x, y in zip(k, v, strict=True)]
    num_heads = q[0].shape[1]
    numbers = [len(q), len(k), num_heads, num_heads // k[0].shape[1] if k else 1]
    for row in (*q_rows, *kv_rows):
        numbers += [*row, *([0] * (_ROW.value - len(row)))]
    table = torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
    aligned = all(_is_aligned(x) for x in (*q, *k, *v, *out, *results))
    attend_chunks_kernel[(num_tiles,)](
        table,
        1 / (math.sqrt(D) * math.log(2.0)),
        **_constants(_TYPES[dtype], D, config, aligned=aligned, final=bool(results)),
        num_warps=config.warps,
        num_stages=config.depth,
        enable_fp_fusion=True,
    )


def _q_rows(chunks: Chunks, rows: int) -> tuple[list[list[int]], int]:
    """The table's rows for Q chunks, and how many tiles there are."""
    q, _, _, out, lse, results = chunks
    found: list[list[int]] = []
    end = 0
    for at, x in enumerate(q):
        B, H, S, _ = x.shape
        first, end = end, end + B * H * triton.cdiv(S, rows)
        result = _place_of(results[at]) if results else []
        found.append([end, first, S, *_place_of(x), *_place_of(out[at]), *_place_of(lse[at]), *result])
    return found, end


def _place_of(x: torch.Tensor) -> list[int]:
    """What ``_place`` reads."""
    return [x.data_ptr(), *x.stride()[:3]]


def _is_aligned(x: torch.Tensor) -> bool:
    return not any(nbytes % 16 for nbytes in (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3])))


def shipped() -> list[Shipped]:
    """What CI compiles ahead of time: bf16 of every head size, for the accumulator and for the result."""
    return [
        Shipped(
            label=f"attend chunks{' (last)' if final else ''} D={D}",
            kernel=attend_chunks_kernel,
            types={"table": "*i64", "scale": "fp32"},
            constants=_constants(tl.bfloat16, D, config, aligned=True, final=final),
            options={"num_warps": config.warps, "num_stages": config.depth, "enable_fp_fusion": True},
            only=(architecture,),
        )
        for (architecture, D), config in CONFIGS.items()
        for final in (False, True)
    ]
