# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The Triton kernel of ``fused``: attention over lists of chunks in one launch.

A table of int64 in GPU memory describes the chunks, so the kernel has one signature for any number of them:

| entry | fields |
|---|---|
| header | num_q, num_kv, heads, whether there is an accumulator, then the KV head of each query head |
| Q chunk | end of its tiles, first tile, tokens, whether a run passes the result, then 4 each for q, out, lse, result |
| KV chunk | tokens, then 4 each for k, v |

The 4 fields of a tensor are its address and its strides over batch, head and token. If a run passes the tensor, the
first field is an offset in bytes, and the address an argument of the kernel, 0 otherwise. So a launch uploads nothing.
A *tile* is ROWS queries of one head and batch. Each program attends one tile to all KV chunks in list order.

Example: B = 1, H = 2, ROWS = 128, Q chunks of 300 and 40 tokens. Chunk 0 has 2 * 3 tiles (0 to 5), chunk 1 has 2 (6 and
7). Tile 4 is rows 128 to 255 (4 % 3 = 1) of head 1 (4 // 3 = 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sf_xfuser.kernels.fused import Chunks
from sf_xfuser.kernels.shipped import ShippedConfig

_HEADER = tl.constexpr(4)  # fields before the KV heads
_ENTRY = tl.constexpr(20)  # fields of an entry
_ALIGNMENT = 16  # bytes: the widest load of a thread
_BASES = ("q_base", "k_base", "v_base", "result_base")
_LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _row_pointer(fields, base, b, h, first, TYPE: tl.constexpr, ALIGNED: tl.constexpr, RELOAD: tl.constexpr = False):
    """Pointer to row (b, h, first) of a tensor, and its token stride. ``fields``: the tensor's 4 fields, the first one
    relative to ``base``. RELOAD: load them again. Otherwise the compiler keeps the address of every element in
    registers, which then spill."""
    pointer = (tl.load(fields, volatile=RELOAD) + base).to(tl.pointer_type(TYPE))
    stride = tl.load(fields + 3, volatile=RELOAD)
    pointer += b * tl.load(fields + 1) + h * tl.load(fields + 2) + first * stride
    stride = stride.to(tl.int32)  # 32 bits suffice inside a block
    if ALIGNED:  # to 16 bytes, the widest load of a thread
        pointer = tl.multiple_of(pointer, 16)
        stride = tl.multiple_of(stride, 128 // TYPE.primitive_bitwidth)
    return pointer, stride


@triton.jit
def _load(x, valid, MASKED: tl.constexpr, SIZE: tl.constexpr):
    """Rows of SIZE elements, zero-padded to the width of ``x``. MASKED: rows that are not ``valid`` are 0."""
    d = tl.arange(0, x.shape[1])[None, :]
    if MASKED:
        if x.shape[1] > SIZE:
            loaded = tl.load(x, mask=valid[:, None] & (d < SIZE), other=0.0)
        else:
            loaded = tl.load(x, mask=valid[:, None], other=0.0)
    elif x.shape[1] > SIZE:
        loaded = tl.load(x, mask=d < SIZE, other=0.0)
    else:
        loaded = tl.load(x)
    return loaded


@triton.jit
def _store(
    fields, base, b, h, first, valid, acc, acc2,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Store the output of a tile."""
    pointer, stride = _row_pointer(fields, base, b, h, first, TYPE, ALIGNED, True)
    rows = tl.arange(0, acc.shape[0])[:, None] * stride
    tl.store(pointer + (rows + tl.arange(0, D1)[None, :]), acc.to(TYPE), mask=valid[:, None])
    if D2:
        d2 = D1 + tl.arange(0, D2)[None, :]
        tl.store(pointer + (rows + d2), acc2.to(TYPE), mask=valid[:, None] & (d2 < D))


@triton.jit
def _attend_keys(
    q, q2, k, k2, v, v2, valid, acc, acc2, row_sum, row_max, scale,
    MASKED: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """One online-softmax step in base 2 over a block of keys. ``row_max``: largest scaled score. ``row_sum`` and
    ``acc``: sums of the weights and weighted values, relative to ``row_max``."""
    scores = tl.dot(q, tl.trans(_load(k, valid, MASKED, D1)), input_precision="ieee")
    if D2:
        scores = tl.dot(q2, tl.trans(_load(k2, valid, MASKED, D - D1)), scores, input_precision="ieee")
    if MASKED:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    base = tl.where(new_max == float("-inf"), 0.0, new_max)  # fully masked so far: -inf - -inf would be NaN
    weights = tl.exp2(scores * scale - base[:, None])
    rescale = tl.exp2(row_max - base)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    weights = weights.to(q.dtype)
    acc = tl.dot(weights, _load(v, valid, MASKED, D1), acc * rescale[:, None], input_precision="ieee")
    if D2:
        values = _load(v2, valid, MASKED, D - D1)
        acc2 = tl.dot(weights, values, acc2 * rescale[:, None], input_precision="ieee")
    return acc, acc2, row_sum, new_max


@triton.jit(do_not_specialize=_BASES)
def attend_chunks_kernel(
    q_base: tl.int64, k_base: tl.int64, v_base: tl.int64, result_base: tl.int64,
    table,
    scale,  # log2(e) / sqrt(D)
    TYPE: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr,  # blocks have power-of-two sizes: the head is split into D1, and D - D1 padded to D2
    D2: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, ALIGNED: tl.constexpr,
    FINAL: tl.constexpr,  # write the results instead of the accumulator
):  # fmt: skip
    num_q, num_kv = tl.load(table), tl.load(table + 1).to(tl.int32)
    heads = tl.load(table + 2).to(tl.int32)
    has_accumulator = tl.load(table + 3).to(tl.int32)
    kv_heads = table + _HEADER
    q_chunks = kv_heads + heads
    kv_chunks = q_chunks + num_q * _ENTRY

    row = tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    d = tl.arange(0, D1)[None, :]
    tile = tl.program_id(0)
    chunk = q_chunks
    while tile >= tl.load(chunk):
        chunk += _ENTRY
    chunk_tile = tile - tl.load(chunk + 1).to(tl.int32)
    num_rows = tl.load(chunk + 2).to(tl.int32)
    blocks = tl.cdiv(num_rows, ROWS)
    first = chunk_tile % blocks * ROWS
    b = chunk_tile // blocks // heads
    h = chunk_tile // blocks % heads
    h_kv = tl.load(kv_heads + h)

    q_pointer, q_stride = _row_pointer(chunk + 4, q_base, b, h, first, TYPE, ALIGNED)
    valid_row = row < num_rows - first
    q = _load(q_pointer + (row[:, None] * q_stride + d), valid_row, True, D1)
    # A row without keys (lse = -inf) may hold any output.
    out_pointer, out_stride = _row_pointer(chunk + 8, 0, b, h, first, tl.float32, ALIGNED)
    lse_pointer, lse_stride = _row_pointer(chunk + 12, 0, b, h, first, tl.float32, False)
    accumulated = row < (num_rows - first) * has_accumulator
    row_max = tl.load(lse_pointer + row * lse_stride, mask=accumulated, other=float("-inf")) / _LN2
    has_keys = row_max != float("-inf")
    row_sum = tl.where(has_keys, 1.0, 0.0)
    acc = _load(out_pointer + (row[:, None] * out_stride + d), has_keys, True, D1)
    if D2:
        d2 = D1 + tl.arange(0, D2)[None, :]
        q2 = _load(q_pointer + (row[:, None] * q_stride + d2), valid_row, True, D - D1)
        acc2 = _load(out_pointer + (row[:, None] * out_stride + d2), has_keys, True, D - D1)
    else:
        d2 = d
        q2 = q
        acc2 = 0.0

    for kv in range(0, num_kv):
        keys = kv_chunks + kv * _ENTRY
        num_keys = tl.load(keys).to(tl.int32)
        k, k_stride = _row_pointer(keys + 1, k_base, b, h_kv, 0, TYPE, ALIGNED)
        v, v_stride = _row_pointer(keys + 5, v_base, b, h_kv, 0, TYPE, ALIGNED)
        k_rows = key[:, None] * k_stride
        v_rows = key[:, None] * v_stride
        full = num_keys // KEYS * KEYS
        for _ in range(0, full, KEYS):
            acc, acc2, row_sum, row_max = _attend_keys(
                q, q2, k + (k_rows + d), k + (k_rows + d2), v + (v_rows + d), v + (v_rows + d2), key,
                acc, acc2, row_sum, row_max, scale, False, D, D1, D2,
            )  # fmt: skip
            k += KEYS * k_stride
            v += KEYS * v_stride
        if full < num_keys:
            acc, acc2, row_sum, row_max = _attend_keys(
                q, q2, k + (k_rows + d), k + (k_rows + d2), v + (v_rows + d), v + (v_rows + d2),
                key < num_keys - full, acc, acc2, row_sum, row_max, scale, True, D, D1, D2,
            )  # fmt: skip

    row_sum = tl.where(row_max == float("-inf"), 1.0, row_sum)
    acc /= row_sum[:, None]
    if D2:
        acc2 /= row_sum[:, None]
    if FINAL:
        base = result_base * tl.load(chunk + 3)
        _store(chunk + 16, base, b, h, first, valid_row, acc, acc2, TYPE, ALIGNED, D, D1, D2)
    else:
        _store(chunk + 8, 0, b, h, first, valid_row, acc, acc2, tl.float32, ALIGNED, D, D1, D2)
        lse_pointer, lse_stride = _row_pointer(chunk + 12, 0, b, h, first, tl.float32, False, True)
        tl.store(lse_pointer + row * lse_stride, (row_max + tl.log2(row_sum)) * _LN2, mask=valid_row)


@dataclass(frozen=True, slots=True)
class Config:
    """``rows`` x ``keys``: block of scores. ``num_stages``: blocks of keys in flight."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# The block shapes of Triton's and PyTorch's attention kernels, reduced until nothing spills with Triton 3.7 to 3.9 and,
# for 80, until they fit the 99 KB of shared memory of compute capability 8.6, 8.9 and 12.0. Not yet timed on a GPU.
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
"""By (compute capability times 10, D), for 16-bit dtypes."""

_FP32_CONFIG = Config(32, 32, 4, 1)
"""For fp32, without tensor cores, and for Triton's interpreter."""


def _config(device: torch.device, dtype: torch.dtype, D: int) -> Config:
    if device.type == "cpu" or dtype == torch.float32:
        return _FP32_CONFIG
    major, _ = torch.cuda.get_device_capability(device)
    return CONFIGS[{9: 90, 10: 100, 11: 100}.get(major, 80), D]


def _constants(type: tl.dtype, D: int, config: Config, *, final: bool) -> dict[str, object]:
    D1 = 1 << (D.bit_length() - 1)
    return {
        "TYPE": type,
        "D": D,
        "D1": D1,
        "D2": 0 if D == D1 else max(16, triton.next_power_of_2(D - D1)),
        "ROWS": config.rows,
        "KEYS": config.keys,
        "FINAL": final,
    }


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def record(chunks: Chunks, kv_of_q: Sequence[int], first: bool) -> Callable[..., None]:
    """``FusedAttention.run`` for checked chunks: enqueues one kernel on the current stream."""
    q, k, v, out, _, results = chunks
    device, dtype, D = out[0].device, q[0].dtype, q[0].shape[-1]
    config = _config(device, dtype, D)
    q_entries, num_tiles = _q_entries(chunks, config.rows)
    kv_entries = [[x.shape[2], *_fields(x), *_fields(y)] for x, y in zip(k, v, strict=True)]
    fields = [len(q), len(k), len(kv_of_q), int(not first), *kv_of_q]
    for entry in (*q_entries, *kv_entries):
        fields += [*entry, *([0] * (_ENTRY.value - len(entry)))]
    table = torch.tensor(fields, dtype=torch.int64).to(device)
    aligned = all(_is_aligned(x) for x in (*q, *k, *v, *out, *results))
    constants = _constants(_TYPES[dtype], D, config, final=bool(results))
    launch, scale = attend_chunks_kernel[(num_tiles,)], 1 / (math.sqrt(D) * math.log(2.0))
    is_passed = [any(x.is_meta for x in tensors) for tensors in (q, k, v, results)]

    def run(*bases: Any) -> None:
        addresses = [x.data_ptr() if passed else 0 for x, passed in zip(bases, is_passed, strict=True)]
        launch(
            *addresses,
            table,
            scale,
            **constants,
            ALIGNED=aligned and math.gcd(_ALIGNMENT, *addresses) == _ALIGNMENT,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )

    return run if num_tiles else lambda *bases: None


def _q_entries(chunks: Chunks, rows: int) -> tuple[list[list[int]], int]:
    """The table's entries of the Q chunks, and the number of tiles."""
    q, _, _, out, lse, results = chunks
    entries: list[list[int]] = []
    end = 0
    for i, x in enumerate(q):
        B, H, S, _ = x.shape
        first, end = end, end + B * H * triton.cdiv(S, rows)
        passed, result = (int(results[i].is_meta), _fields(results[i])) if results else (0, [])
        entries.append([end, first, S, passed, *_fields(x), *_fields(out[i]), *_fields(lse[i]), *result])
    return entries, end


def _fields(x: torch.Tensor) -> list[int]:
    return [int(x.storage_offset()) * x.element_size() if x.is_meta else x.data_ptr(), *x.stride()[:3]]


def _is_aligned(x: torch.Tensor) -> bool:
    address, *strides = _fields(x)
    return math.gcd(_ALIGNMENT, address, *(stride * x.element_size() for stride in strides)) == _ALIGNMENT


def shipped() -> list[ShippedConfig]:
    """bf16 in every head size, with the accumulator and with the final result as output."""
    return [
        ShippedConfig(
            label=f"attend chunks{' (last)' if final else ''} D={D}",
            kernel=attend_chunks_kernel,
            types=dict.fromkeys(_BASES, "i64") | {"table": "*i64", "scale": "fp32"},
            constants=_constants(tl.bfloat16, D, config, final=final) | {"ALIGNED": True},
            options={"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True},
            architectures=(architecture,),
        )
        for (architecture, D), config in CONFIGS.items()
        for final in (False, True)
    ]
