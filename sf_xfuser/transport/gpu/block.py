"""Where things lie in GPU memory into which peers write (``device.py`` says what they mean): arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

CHUNKS = 1024  # of one epoch between two ranks, at most: rings of 64 ranks on 4 machines, with KV in 4 parts, need 1008
_ALIGNMENT = 512  # bytes; what allocators and copy engines like


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Byte offsets in the memory of one rank among ``ranks``."""

    ranks: int
    half_bytes: int

    poison: ClassVar[int] = 0
    flags: ClassVar[int] = _ALIGNMENT

    @property
    def head_bytes(self) -> int:
        """``poison`` and all flags, for epochs of either parity."""
        return rounded(self.flags + 8 * 2 * CHUNKS * self.ranks, _ALIGNMENT)

    def flag(self, writer: int, number: int, epoch: int) -> int:
        return self.flags + 8 * (CHUNKS * (2 * writer + epoch % 2) + number)

    def half(self, epoch: int) -> int:
        return self.head_bytes + epoch % 2 * self.half_bytes

    @property
    def staging(self) -> int:
        return self.head_bytes + 2 * self.half_bytes

    @property
    def nbytes(self) -> int:
        return self.staging + self.half_bytes


class Staging:
    """Hands out places for chunks that are packed before they are sent. As large as a half, which holds any chunk: a
    rank with more tokens than others may send more than fits, and starts over."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._used = 0

    def restart(self) -> None:
        self._used = 0

    def take(self, nbytes: int) -> tuple[int, bool]:
        """(Where, whether that starts over, so that what was there has to have left first)."""
        over = self._used + nbytes > self._nbytes
        at = 0 if over else self._used
        self._used = at + rounded(nbytes, _ALIGNMENT)
        return at, over


def rounded(nbytes: int, step: int) -> int:
    """Up to a multiple of ``step``."""
    return -(-nbytes // step) * step


def grown(nbytes: int, least: int) -> int:
    """Up to a multiple of an eighth of the power of two below, or of ``least``: windows that grow with each call grow
    seldom."""
    return rounded(nbytes, max(least, 1 << max(0, nbytes.bit_length() - 4)))
