"""Byte offsets in the GPU memory of one rank that its peers write to. ``device.py`` describes each region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

MAX_CHUNKS = 1024  # per call and pair of ranks: rings of 64 ranks on 4 machines, with KV in 4 parts, need 1008
_ALIGNMENT = 512  # bytes, as CUDA's allocators align


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Layout of one rank's block in a group of ``ranks``: poison, flags, two halves, staging.

    Example: ``Block(ranks=2, half_bytes=2 << 20)`` has its flags at 512, the halves of even and odd epochs at 33280 and
    2130432, and staging at 4227584. ``flag(1, 3, epoch=7)`` is 512 + 8 * (1024 * (2 * 1 + 1) + 3) = 25112.
    """

    ranks: int
    half_bytes: int

    poison: ClassVar[int] = 0
    flags: ClassVar[int] = _ALIGNMENT

    @property
    def head_bytes(self) -> int:
        """Size of poison and flags."""
        return round_up(self.flags + 8 * 2 * MAX_CHUNKS * self.ranks, _ALIGNMENT)

    def flag(self, writer: int, chunk: int, epoch: int) -> int:
        return self.flags + 8 * (MAX_CHUNKS * (2 * writer + epoch % 2) + chunk)

    def half(self, epoch: int) -> int:
        return self.head_bytes + epoch % 2 * self.half_bytes

    @property
    def staging(self) -> int:
        return self.head_bytes + 2 * self.half_bytes

    @property
    def nbytes(self) -> int:
        return self.staging + self.half_bytes


class Staging:
    """Bump allocator for chunks that are packed before they are sent. It has the size of a half, which holds any chunk.
    A rank with more tokens than its peers may send more than that; the allocator then wraps around."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._used = 0

    def reset(self) -> None:
        self._used = 0

    def allocate(self, nbytes: int) -> tuple[int, bool]:
        """(offset, wrapped). After a wrap, earlier sends must complete before the bytes are written."""
        wrapped = self._used + nbytes > self._nbytes
        offset = 0 if wrapped else self._used
        self._used = offset + round_up(nbytes, _ALIGNMENT)
        return offset, wrapped


def round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple


def round_up_window(nbytes: int, page: int) -> int:
    """Round up to a multiple of ``page`` and of an eighth of the power of two below ``nbytes``, so that calls of slowly
    growing size rarely reallocate."""
    return round_up(nbytes, max(page, 1 << max(0, nbytes.bit_length() - 4)))
