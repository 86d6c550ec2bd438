"""Compresses head slices into one chunk of bytes for a transport, and restores them. Shapes: B batch, H heads, S
tokens, D head size.

Each function takes one or two *parts*: views [S, B, H, D] of tensors in any layout (``x_BHSD.permute(2, 0, 1, 3)``,
``x_BSHD.transpose(0, 1)``, with a slice of the heads). One part is Q, two are K and V. Each call is one launch on a GPU
with Triton (``triton_packing``), else a reference in plain PyTorch.

A chunk is laid out by ``CompressedLayout``. Each part has its own format: ``"none"`` keeps its dtype, ``"fp8"`` stores
e4m3 (3 bits of mantissa), ``"int8"`` stores int8. fp8 and int8 have one fp32 scale per token and head, for a block of D
values:

    part 0: values [S, B, H, D] | scales [S, B, H] fp32 | part 1: values | scales | ...

Every region starts at a multiple of 16 bytes. ``"none"`` has no scales. The scale is the block's largest magnitude /
127 (int8) or / 448 (fp8), so no value overflows. Values are rounded to nearest, ties to even. Example for int8: if the
largest magnitude is 2.54, the scale is 0.02, and 1.0 is stored as 50. A block with a non-finite value unpacks to NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sf_xfuser.kernels.checks import (
    describe,
    named,
    require_contiguous_rows,
    require_no_overlap,
    require_same_device,
    require_shape,
    uses_triton,
)

Format = Literal["none", "fp8", "int8"]
FORMATS: tuple[Format, ...] = ("none", "fp8", "int8")
MAX_PARTS = 2
MAX_STORED = {"fp8": 448.0, "int8": 127.0}
"""The stored value of a block's largest magnitude."""
MIN_MAGNITUDE = 2.0**-100
"""Lower bound of a block's largest magnitude, which keeps the scale and its inverse normal numbers."""

_STORED_DTYPE = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_ALIGNMENT = 16  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedLayout:
    """Byte offsets in a compressed chunk of parts with ``shape`` [S, B, H, D] and ``dtype``. Part ``i`` has format
    ``formats[i]``.

    Example: two bf16 parts of shape (3, 1, 5, 9) as ("none", "int8"). Part 0: 270 bytes of values at 0. Part 1: 135
    bytes of values at 272, 15 scales at 416. ``nbytes`` is 480.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    formats: tuple[Format, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.formats) <= MAX_PARTS or any(x not in FORMATS for x in self.formats):
            raise ValueError(f"formats {self.formats}: pass one of {FORMATS} for each of 1 to {MAX_PARTS} parts")
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{self.dtype} cannot be compressed: use float32, bfloat16 or float16")

    @property
    def num_blocks(self) -> int:
        return math.prod(self.shape[:3])

    def values_offset(self, part: int) -> int:
        return sum(self._values_bytes(x) + self._scales_bytes(x) for x in self.formats[:part])

    def scales_offset(self, part: int) -> int:
        return self.values_offset(part) + self._values_bytes(self.formats[part])

    @property
    def nbytes(self) -> int:
        return self.values_offset(len(self.formats))

    def _values_bytes(self, format: Format) -> int:
        itemsize = self.dtype.itemsize if format == "none" else 1
        return -(-math.prod(self.shape) * itemsize // _ALIGNMENT) * _ALIGNMENT

    def _scales_bytes(self, format: Format) -> int:
        return 0 if format == "none" else -(-4 * self.num_blocks // _ALIGNMENT) * _ALIGNMENT

    def values(self, chunk: torch.Tensor, part: int) -> torch.Tensor:
        """A view [S, B, H, D] of the chunk's bytes, in the stored dtype."""
        dtype = _STORED_DTYPE.get(self.formats[part], self.dtype)
        start = self.values_offset(part)
        return chunk[start : start + math.prod(self.shape) * dtype.itemsize].view(dtype).view(self.shape)

    def scales(self, chunk: torch.Tensor, part: int) -> torch.Tensor | None:
        """A view [S, B, H] fp32 of the chunk's bytes, or None for a part without scales."""
        if self.formats[part] == "none":
            return None
        start = self.scales_offset(part)
        return chunk[start : start + 4 * self.num_blocks].view(torch.float32).view(self.shape[:3])


def pack_compressed(parts: Sequence[torch.Tensor], chunk: torch.Tensor, formats: Sequence[Format]) -> None:
    """Compress parts [S, B, H, D] of one shape and dtype, any strides with D contiguous, into ``chunk``: uint8
    [``CompressedLayout.nbytes``], aligned to 16 bytes. Local; on the current stream.

    Raises ValueError before any write: mismatched shapes, dtypes or devices, strided D, parts that share memory with
    the chunk.
    """
    op = _pack_compressed_op if torch.compiler.is_compiling() else _pack_compressed
    op(list(parts), chunk, ",".join(formats))


def unpack_compressed(chunk: torch.Tensor, parts: Sequence[torch.Tensor], formats: Sequence[Format]) -> None:
    """Inverse of ``pack_compressed``, up to rounding: write parts of the packed shape and dtype."""
    op = _unpack_compressed_op if torch.compiler.is_compiling() else _unpack_compressed
    op(chunk, list(parts), ",".join(formats))


# -- checked implementations, as operators for torch.compile -----------------------------------------------------------


def _pack_compressed(parts: list[torch.Tensor], chunk: torch.Tensor, formats: str) -> None:
    layout = _check_compressed(parts, chunk, formats.split(","))
    require_no_overlap({"chunk": chunk}, named(parts=parts))
    values = [layout.values(chunk, part) for part in range(len(parts))]
    scales = [layout.scales(chunk, part) for part in range(len(parts))]
    _convert(parts, values, scales, ["copy" if x == "none" else f"to {x}" for x in layout.formats])


def _unpack_compressed(chunk: torch.Tensor, parts: list[torch.Tensor], formats: str) -> None:
    layout = _check_compressed(parts, chunk, formats.split(","))
    require_no_overlap(named(parts=parts), {"chunk": chunk})
    values = [layout.values(chunk, part) for part in range(len(parts))]
    scales = [layout.scales(chunk, part) for part in range(len(parts))]
    _convert(values, parts, scales, ["copy" if x == "none" else f"from {x}" for x in layout.formats])


_pack_compressed_op = torch.library.custom_op("sf_xfuser::pack_compressed", _pack_compressed, mutates_args=("chunk",))
_unpack_compressed_op = torch.library.custom_op(
    "sf_xfuser::unpack_compressed", _unpack_compressed, mutates_args=("parts",)
)


def _convert(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    conversions: Sequence[str],
) -> None:
    """Write each source [S, B, H, D] to its target by ``"copy"``, ``"to int8"``, ``"from int8"``, ``"to fp8"`` or
    ``"from fp8"``."""
    if uses_triton(targets[0]):
        from sf_xfuser.kernels.triton_packing import launch

        launch(sources, targets, scales, conversions)
    else:
        convert_reference(sources, targets, scales, conversions)


def convert_reference(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    conversions: Sequence[str],
) -> None:
    """``_convert`` in plain PyTorch."""
    for source, target, scale, conversion in zip(sources, targets, scales, conversions, strict=True):
        if scale is None:
            target.copy_(source)
        elif conversion.startswith("to "):
            _compress(source.float(), target, scale, MAX_STORED[conversion.removeprefix("to ")])
        else:
            target.copy_(source.float() * scale.unsqueeze(-1))


def _compress(source: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, max_stored: float) -> None:
    magnitude = source.abs().amax(-1)  # NaN if a value is NaN
    finite = magnitude.isfinite()
    torch.div(magnitude.clamp(min=MIN_MAGNITUDE), max_stored, out=scale)
    values = source * (1.0 / scale).unsqueeze(-1)
    if target.dtype == torch.int8:
        values.round_()
    if not finite.all():
        values.masked_fill_(~finite.unsqueeze(-1), 0.0)
        scale.masked_fill_(~finite, float("nan"))
    target.copy_(values)


# -- checks ----------------------------------------------------------------------------------------------------------


def _check_compressed(parts: Sequence[torch.Tensor], chunk: torch.Tensor, formats: Sequence[str]) -> CompressedLayout:
    shape = _check_parts(parts)
    if len(formats) != len(parts):
        raise ValueError(f"formats {tuple(formats)}: pass one for each of {len(parts)} parts")
    layout = CompressedLayout(shape=shape, dtype=parts[0].dtype, formats=tuple(formats))  # type: ignore[arg-type]
    if chunk.dtype != torch.uint8 or not chunk.is_contiguous():
        raise ValueError(f"chunk is {describe(chunk)}: it must be contiguous torch.uint8")
    require_shape("chunk", chunk, (layout.nbytes,), f"{layout.formats} for {shape} {layout.dtype}")
    if chunk.data_ptr() % _ALIGNMENT or chunk.storage_offset() % _ALIGNMENT:
        raise ValueError(f"chunk {tuple(chunk.shape)} starts at {chunk.data_ptr():#x}, not a multiple of {_ALIGNMENT}")
    require_same_device({"chunk": chunk} | named(parts=parts))
    return layout


def _check_parts(parts: Sequence[torch.Tensor]) -> tuple[int, int, int, int]:
    if not 1 <= len(parts) <= MAX_PARTS:
        raise ValueError(f"{len(parts)} parts: pass 1 to {MAX_PARTS}")
    first = parts[0]
    for name, x in named(parts=parts).items():
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"{name} is {describe(x)}: it must be [S, B, H, D] and floating point")
        if x.shape != first.shape or x.dtype != first.dtype:
            raise ValueError(f"{name} is {describe(x)}, but parts[0] is {describe(first)}: use one shape and dtype")
    require_contiguous_rows(named(parts=parts))
    S, B, H, D = first.shape
    return S, B, H, D
