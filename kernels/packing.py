"""Head slices gathered into one piece of memory, as a transport sends them, and put back. Shapes: B batch, H heads, S
tokens, D head size.

Each function takes one part or two. A *part* is a view [S, B, H, D] of a tensor in any layout
(``x_BHSD.permute(2, 0, 1, 3)``, ``x_BSHD.transpose(0, 1)``, with a slice of its heads): Q, or K and V, of some tokens.
On a GPU each call is one launch (``triton_packing``); elsewhere, or without Triton, the twin in plain PyTorch.

**As it is**: ``pack`` and ``unpack`` of a tensor [S, parts, B, H, D] (one part: [S, B, H, D]), which is how chunks lie
in a window. The dtype may differ from the parts'.

**Compressed**: ``Compressed`` says which bytes hold what. Each part is stored by itself as it is (``"none"``), in fp8
(e4m3: 3 bits of mantissa) or in int8, with a scale for each block of D values, one token of one head, beside it:

    part 0: values [S, B, H, D] | scales [S, B, H] fp32 | part 1: values | scales | ...

each beginning at a multiple of 16 bytes; ``"none"`` has no scales. ``scale`` is the block's largest magnitude over 127
(int8) or 448 (fp8), so no value overflows; values are rounded to the nearest, ties to even. A block that holds a value
which is not finite comes back as NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sf_xfuser.kernels.checks import (
    described,
    require_apart,
    require_rows,
    require_shape,
    require_together,
    runs_kernel,
)

Format = Literal["none", "fp8", "int8"]
FORMATS: tuple[Format, ...] = ("none", "fp8", "int8")
MAX_PARTS = 2
LARGEST = {"fp8": 448.0, "int8": 127.0}
"""What the largest magnitude of a block is stored as."""
SMALLEST = 2.0**-100
"""A block's largest magnitude is taken to be at least this, so that its scale and the inverse are normal numbers."""

_STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_ALIGNMENT = 16  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """The bytes of one compressed chunk: ``parts`` views of ``shape`` [S, B, H, D] and ``dtype``, part ``i`` stored in
    ``formats[i]``. Plain arithmetic, alike at both ends."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    formats: tuple[Format, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.formats) <= MAX_PARTS or any(x not in FORMATS for x in self.formats):
            raise ValueError(f"formats {self.formats}: give one for each of 1 to {MAX_PARTS} parts, of {FORMATS}")
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{self.dtype} cannot be compressed: give float32, bfloat16 or float16")

    @property
    def blocks(self) -> int:
        return math.prod(self.shape[:3])

    def values_at(self, part: int) -> int:
        """Bytes from the start."""
        return sum(self._part_bytes(x) for x in self.formats[:part])

    def scales_at(self, part: int) -> int:
        """Bytes from the start; where its values end, if it has no scales."""
        return self.values_at(part) + self._values_bytes(self.formats[part])

    @property
    def nbytes(self) -> int:
        return self.values_at(len(self.formats))

    def _values_bytes(self, format: Format) -> int:
        itemsize = self.dtype.itemsize if format == "none" else 1
        return -(-math.prod(self.shape) * itemsize // _ALIGNMENT) * _ALIGNMENT

    def _part_bytes(self, format: Format) -> int:
        scales = 0 if format == "none" else -(-4 * self.blocks // _ALIGNMENT) * _ALIGNMENT
        return self._values_bytes(format) + scales

    def values(self, chunk: torch.Tensor, part: int) -> torch.Tensor:
        """Those of a part [S, B, H, D] in the dtype that stores them, as a view of the chunk's bytes."""
        dtype = _STORED.get(self.formats[part], self.dtype)
        start = self.values_at(part)
        return chunk[start : start + math.prod(self.shape) * dtype.itemsize].view(dtype).view(self.shape)

    def scales(self, chunk: torch.Tensor, part: int) -> torch.Tensor | None:
        """Those of a part [S, B, H] fp32, as a view of the chunk's bytes; None where it has none."""
        if self.formats[part] == "none":
            return None
        start = self.scales_at(part)
        return chunk[start : start + 4 * self.blocks].view(torch.float32).view(self.shape[:3])


def pack(parts: Sequence[torch.Tensor], into: torch.Tensor) -> None:
    """Copy parts [S, B, H, D], any strides with D contiguous, into ``into`` [S, parts, B, H, D] (one part:
    [S, B, H, D]), which is contiguous; float dtypes. Local; on the current stream.

    Raises ValueError before anything is written: shapes, dtypes or devices that do not fit, strided D, parts that share
    memory with ``into``.
    """
    if torch.compiler.is_compiling():
        _pack_op(list(parts), into)
    else:
        _pack(parts, into)


def unpack(packed: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """The inverse of ``pack``: write the parts from ``packed``."""
    if torch.compiler.is_compiling():
        _unpack_op(packed, list(parts))
    else:
        _unpack(packed, parts)


def pack_compressed(parts: Sequence[torch.Tensor], into: torch.Tensor, formats: Sequence[Format]) -> None:
    """Compress parts of one shape [S, B, H, D] and dtype, any strides with D contiguous, into the bytes ``into``: uint8
    [n], aligned to 16, n = ``Compressed(...).nbytes`` for their shape, their dtype and ``formats``. Local; on the
    current stream. Raises ValueError as ``pack`` does."""
    if torch.compiler.is_compiling():
        _pack_compressed_op(list(parts), into, ",".join(formats))
    else:
        _pack_compressed(parts, into, formats)


def unpack_compressed(packed: torch.Tensor, parts: Sequence[torch.Tensor], formats: Sequence[Format]) -> None:
    """The inverse of ``pack_compressed``, as near as the formats are: write the parts, which have the shape and dtype
    that were packed."""
    if torch.compiler.is_compiling():
        _unpack_compressed_op(packed, list(parts), ",".join(formats))
    else:
        _unpack_compressed(packed, parts, formats)


def place(parts: Sequence[torch.Tensor], into: torch.Tensor) -> None:
    """``pack`` for a caller that answers for the tensors, which may be of any dtype and have any strides and dimensions
    from the first or, of several parts, the first two of ``into`` on: one launch where the kernel serves them, else
    PyTorch's copies."""
    _place(parts, _slots(into, len(parts)))


def take(packed: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """The inverse of ``place``."""
    _place(_slots(packed, len(parts)), parts)


def _place(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    if runs_kernel(targets[0]) and all(_is_rows(x) for x in (*sources, *targets)):
        _move(sources, targets, [None] * len(sources), ["copy"] * len(sources))
    else:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)


def _is_rows(x: torch.Tensor) -> bool:
    return x.dim() == 4 and x.stride(3) == 1 and x.is_floating_point()


# -- the operators ---------------------------------------------------------------------------------------------------


def _pack(parts: Sequence[torch.Tensor], into: torch.Tensor) -> None:
    check_plain(parts, into, "into")
    require_apart({"into": into}, _named(parts))
    _move(parts, _slots(into, len(parts)), [None] * len(parts), ["copy"] * len(parts))


def _unpack(packed: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    check_plain(parts, packed, "packed")
    require_apart(_named(parts), {"packed": packed})
    _move(_slots(packed, len(parts)), parts, [None] * len(parts), ["copy"] * len(parts))


def _pack_compressed(parts: Sequence[torch.Tensor], into: torch.Tensor, formats: Sequence[str]) -> None:
    layout = check_compressed(parts, into, formats, "into")
    require_apart({"into": into}, _named(parts))
    stored = [layout.values(into, part) for part in range(len(parts))]
    scales = [layout.scales(into, part) for part in range(len(parts))]
    _move(parts, stored, scales, ["copy" if x == "none" else f"to {x}" for x in formats])


def _unpack_compressed(packed: torch.Tensor, parts: Sequence[torch.Tensor], formats: Sequence[str]) -> None:
    layout = check_compressed(parts, packed, formats, "packed")
    require_apart(_named(parts), {"packed": packed})
    stored = [layout.values(packed, part) for part in range(len(parts))]
    scales = [layout.scales(packed, part) for part in range(len(parts))]
    _move(stored, parts, scales, ["copy" if x == "none" else f"from {x}" for x in formats])


def _move(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    how: Sequence[str],
) -> None:
    """Each source [S, B, H, D] to its target, by ``"copy"``, ``"to int8"``, ``"from int8"``, ..."""
    if runs_kernel(targets[0]) and torch.float64 not in (sources[0].dtype, targets[0].dtype):
        from sf_xfuser.kernels.triton_packing import launch

        launch(sources, targets, scales, how)
    else:
        move_twin(sources, targets, scales, how)


def move_twin(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    how: Sequence[str],
) -> None:
    """The same in plain PyTorch."""
    for source, target, scale, way in zip(sources, targets, scales, how, strict=True):
        if scale is None:
            target.copy_(source)
        elif way.startswith("to "):
            _compress(source.float(), target, scale, LARGEST[way.removeprefix("to ")])
        else:
            target.copy_(source.float() * scale.unsqueeze(-1))


def _compress(source: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, largest: float) -> None:
    magnitude = source.abs().amax(-1)  # NaN where there is one
    finite = magnitude.isfinite()
    torch.div(magnitude.clamp(min=SMALLEST), largest, out=scale)
    values = source * (1.0 / scale).unsqueeze(-1)
    if target.dtype == torch.int8:
        values.round_()
    if not finite.all():
        values.masked_fill_(~finite.unsqueeze(-1), 0.0)
        scale.masked_fill_(~finite, float("nan"))
    target.copy_(values)


# -- checks ----------------------------------------------------------------------------------------------------------


def check_plain(parts: Sequence[torch.Tensor], packed: torch.Tensor, name: str) -> None:
    """Raises what ``pack`` raises, but for shared memory."""
    shape = _check_parts(parts)
    expected = shape if len(parts) == 1 else (shape[0], len(parts), *shape[1:])
    require_shape(name, packed, expected, f"{len(parts)} part(s) of shape {shape}")
    if not packed.is_contiguous() or not packed.is_floating_point():
        raise ValueError(
            f"{name} is {described(packed)} with strides {packed.stride()}: it must be contiguous and floating point"
        )
    require_together({name: packed} | _named(parts))


def check_compressed(
    parts: Sequence[torch.Tensor], packed: torch.Tensor, formats: Sequence[str], name: str
) -> Compressed:
    """The layout of these; raises what ``pack_compressed`` raises, but for shared memory."""
    shape = _check_parts(parts)
    if len(formats) != len(parts):
        raise ValueError(f"formats {tuple(formats)}: give one for each of {len(parts)} parts")
    layout = Compressed(shape=shape, dtype=parts[0].dtype, formats=tuple(formats))  # type: ignore[arg-type]
    if packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise ValueError(f"{name} is {described(packed)}: it must be contiguous torch.uint8")
    require_shape(name, packed, (layout.nbytes,), f"{layout.formats} for {shape} {layout.dtype}")
    if packed.data_ptr() % _ALIGNMENT or packed.storage_offset() % _ALIGNMENT:
        raise ValueError(f"{name} {tuple(packed.shape)} begins at {packed.data_ptr():#x}, no multiple of {_ALIGNMENT}")
    require_together({name: packed} | _named(parts))
    return layout


def _check_parts(parts: Sequence[torch.Tensor]) -> tuple[int, int, int, int]:
    if not 1 <= len(parts) <= MAX_PARTS:
        raise ValueError(f"{len(parts)} parts: give 1 to {MAX_PARTS}")
    first = parts[0]
    for name, x in _named(parts).items():
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"{name} is {described(x)}: it must be [S, B, H, D] and floating point")
        if x.shape != first.shape or x.dtype != first.dtype:
            raise ValueError(f"{name} is {described(x)}, but parts[0] is {described(first)}: give parts alike")
    require_rows(_named(parts))
    S, B, H, D = first.shape
    return S, B, H, D


def _named(parts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"parts[{at}]": x for at, x in enumerate(parts)}


def _slots(packed: torch.Tensor, num_parts: int) -> Sequence[torch.Tensor]:
    """The place of each part [S, B, H, D] in a tensor that holds them side by side."""
    return packed.unbind(1) if num_parts > 1 else (packed,)


# -- torch.compile: opaque operators ---------------------------------------------------------------------------------


@torch.library.custom_op("sf_xfuser::pack", mutates_args=("into",))
def _pack_op(parts: list[torch.Tensor], into: torch.Tensor) -> None:
    _pack(parts, into)


@torch.library.custom_op("sf_xfuser::unpack", mutates_args=("parts",))
def _unpack_op(packed: torch.Tensor, parts: list[torch.Tensor]) -> None:
    _unpack(packed, parts)


@torch.library.custom_op("sf_xfuser::pack_compressed", mutates_args=("into",))
def _pack_compressed_op(parts: list[torch.Tensor], into: torch.Tensor, formats: str) -> None:
    _pack_compressed(parts, into, formats.split(","))


@torch.library.custom_op("sf_xfuser::unpack_compressed", mutates_args=("parts",))
def _unpack_compressed_op(packed: torch.Tensor, parts: list[torch.Tensor], formats: str) -> None:
    _unpack_compressed(packed, parts, formats.split(","))


@_pack_op.register_fake
@_unpack_op.register_fake
@_pack_compressed_op.register_fake
@_unpack_compressed_op.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    return None
