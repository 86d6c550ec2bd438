"""Byte offsets in the GPU memory of one rank that its peers write to. ``device.py`` describes each region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

MAX_ROUNDS = 1024  # per call and pair of ranks: rings of 64 ranks on 4 machines, with KV in 4 parts, need 1008
_ALIGNMENT = 512  # bytes, as CUDA's allocators align


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Layout of one rank's block in a group of ``ranks``: head (words and flags), two halves, scratch.

    Example: ``Block(ranks=2, half_bytes=2 << 20, scratch_bytes=2 << 20)`` has its flags at 1024, the halves of even and
    odd epochs at 33792 and 2130944, and scratch at 4228096. ``flag(1, 3, half=1)`` is number 1024 * (2 * 1 + 1) + 3 =
    3075, at byte 1024 + 8 * 3075 = 25624.
    """

    ranks: int
    half_bytes: int
    scratch_bytes: int

    expected: ClassVar[int] = 0
    poison: ClassVar[int] = 4  # the high half of ``expected``
    begun: ClassVar[int] = 8
    ended: ClassVar[int] = 16
    checked: ClassVar[int] = 24
    others: ClassVar[int] = 32
    _ready: ClassVar[int] = _ALIGNMENT

    def ready(self, writer: int) -> int:
        return self._ready + 8 * writer

    @property
    def flags(self) -> int:
        return self._ready + round_up(8 * self.ranks, _ALIGNMENT)

    @property
    def num_flags(self) -> int:
        return 2 * MAX_ROUNDS * self.ranks

    @property
    def head_bytes(self) -> int:
        """Size of words and flags."""
        return round_up(self.flags + 8 * self.num_flags, _ALIGNMENT)

    @staticmethod
    def flag(writer: int, number: int, half: int) -> int:
        """Index among the flags."""
        return MAX_ROUNDS * (2 * writer + half) + number

    def half(self, half: int) -> int:
        return self.head_bytes + half * self.half_bytes

    @property
    def scratch(self) -> int:
        return self.head_bytes + 2 * self.half_bytes

    @property
    def nbytes(self) -> int:
        return self.scratch + self.scratch_bytes


def round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple


def round_up_window(nbytes: int, page: int) -> int:
    """Round up to a multiple of ``page`` and of an eighth of the power of two below ``nbytes``, so that calls of slowly
    growing size rarely reallocate."""
    return round_up(nbytes, max(page, 1 << max(0, nbytes.bit_length() - 4)))
