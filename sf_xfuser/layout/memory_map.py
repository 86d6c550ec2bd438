"""The memory map of an attention call: rows and byte offsets of every piece in the buffers of one rank. No tensors.

Any rank can compute the map of any other rank, so a one-sided sender knows the offset of its chunk on the receiver. A
rank's *window* is the memory into which its peers write. The map gives offsets for the buffers in the window, which are
those that receive at least one chunk by a one-sided write. All other buffers are allocated when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from sf_xfuser.layout.schedule import JOINT, Exchange, Link, Message, Piece, Schedule

ALIGNMENT = 64  # bytes; alignment of a buffer in a window

HeadRange = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of one call. ``q_tokens[w]``, ``kv_tokens[w]``: token counts at position ``w``. ``q_heads[p]``,
    ``kv_heads[p]``: half-open head range of head group ``p``. ``itemsize`` in bytes."""

    batch: int
    head_size: int
    itemsize: int
    q_tokens: tuple[int, ...]
    kv_tokens: tuple[int, ...]
    joint_tokens: int
    q_heads: tuple[HeadRange, ...]
    kv_heads: tuple[HeadRange, ...]

    def row_bytes(self, tensor: str, head_group: int) -> int:
        """Bytes of one token of ``"q"``, ``"k"``, ``"v"``, ``"kv"`` (K and V) or ``"o"``, for the heads of a group."""
        low, high = (self.kv_heads if tensor in ("k", "v", "kv") else self.q_heads)[head_group]
        return (2 if tensor == "kv" else 1) * self.batch * (high - low) * self.head_size * self.itemsize


class Rows:
    """The rows of pieces in a buffer: ``rows[a, ..., b]`` is the slice from piece a to piece b."""

    def __init__(self, pieces: Sequence[Piece], tokens: Callable[[int], int]) -> None:
        ends = list(accumulate((high - low for low, high in (p.span(tokens(p.source)) for p in pieces)), initial=0))
        self.total = ends[-1]
        self._span = {piece: slice(ends[i], ends[i + 1]) for i, piece in enumerate(pieces)}

    def __getitem__(self, pieces: Sequence[Piece]) -> slice:
        return slice(self._span[pieces[0]].start, self._span[pieces[-1]].stop)


class Buffer(NamedTuple):
    """``"q"``: ``number`` is 0 for queries of the local machine, 1 for those of other machines. ``"k"``, ``"v"``:
    ``number`` is the slab. ``"o"``: ``number`` is the position of the rank that sends the output, ``part`` its part."""

    tensor: str
    number: int
    part: int = 0


class MemoryMap:
    """The buffers of one rank. ``schedule.remote`` queries have a buffer of their own. K and V of a slab are separate
    buffers, so that attention reads them in place."""

    def __init__(
        self,
        schedule: Schedule,
        sizes: Sizes,
        window_links: Collection[Link] = (),
        *,
        head_major: bool = False,
    ) -> None:
        """``window_links``: the links on which peers write into the window. ``head_major``: in the window, Q, K and V
        are [B, H, S, D], which CPU attention reads fastest; chunks are then not contiguous. Else [S, B, H, D]."""
        layout = schedule.layout
        self._group = layout.head_group(schedule.position)
        self._sizes, self._head_major = sizes, head_major
        self.queries = Rows(schedule.queries, sizes.q_tokens.__getitem__)
        self.remote_from = self.queries[schedule.remote].start if schedule.remote else self.queries.total
        self._remote = set(schedule.remote)
        self.slab_of = {piece: n for n, slab in enumerate(schedule.slabs) for piece in slab}
        self.slabs = [
            Rows(slab, lambda source: sizes.joint_tokens if source == JOINT else sizes.kv_tokens[source])
            for slab in schedule.slabs
        ]
        self.offset: dict[Buffer, int] = {}
        """In bytes from the start of the window, for each buffer in it."""
        self.window_bytes = 0
        for step in schedule.steps:
            for message in step.receives if isinstance(step, Exchange) and step.link in window_links else ():
                for buffer in self.buffers(message):
                    if buffer in self.offset:
                        continue
                    self.offset[buffer] = self.window_bytes
                    if buffer.tensor == "o":
                        low, high = message.pieces[0].span(sizes.q_tokens[schedule.position])
                        size = (high - low) * sizes.row_bytes("o", layout.head_group(message.peer))
                    else:
                        size = self.tokens(buffer) * sizes.row_bytes(buffer.tensor, self._group)
                    self.window_bytes += -(-size // ALIGNMENT) * ALIGNMENT

    def tokens(self, buffer: Buffer) -> int:
        """The rows of a ``"q"``, ``"k"`` or ``"v"`` buffer."""
        if buffer.tensor != "q":
            return self.slabs[buffer.number].total
        return self.queries.total - self.remote_from if buffer.number else self.remote_from

    def strides(self, buffer: Buffer) -> tuple[int, int, int]:
        """Elements between two tokens, batch items and heads of a ``"q"``, ``"k"`` or ``"v"`` buffer."""
        low, high = (self._sizes.q_heads if buffer.tensor == "q" else self._sizes.kv_heads)[self._group]
        D, heads = self._sizes.head_size, high - low
        if self._head_major and buffer in self.offset:
            return D, heads * self.tokens(buffer) * D, self.tokens(buffer) * D
        return self._sizes.batch * heads * D, heads * D, D

    def buffers(self, message: Message) -> tuple[Buffer, ...]:
        """The buffers that receive the message: one, or those of K and V."""
        first = message.pieces[0]
        if message.tensor == "q":
            return (Buffer("q", int(first in self._remote)),)
        if message.tensor == "kv":
            return Buffer("k", self.slab_of[first]), Buffer("v", self.slab_of[first])
        return (Buffer("o", message.peer, first.part),)

    def rows(self, tensor: str, pieces: Sequence[Piece]) -> slice:
        """The rows of pieces of ``"q"`` or ``"kv"`` in their buffers."""
        if tensor == "kv":
            return self.slabs[self.slab_of[pieces[0]]][pieces]
        rows = self.queries[pieces]
        first = self.remote_from if rows.start >= self.remote_from and pieces[0] in self._remote else 0
        return slice(rows.start - first, rows.stop - first)

    def destinations(self, message: Message) -> tuple[tuple[int, tuple[int, int, int] | None], ...]:
        """For each buffer of the message, the byte offset in the window at which it arrives, and the strides of its
        tokens, batch items and heads in elements; None: contiguous."""
        found: list[tuple[int, tuple[int, int, int] | None]] = []
        for buffer in self.buffers(message):
            if buffer.tensor == "o":
                found.append((self.offset[buffer], None))
                continue
            strides = self.strides(buffer)
            row = self.rows(message.tensor, message.pieces).start
            at = self.offset[buffer] + row * strides[0] * self._sizes.itemsize
            found.append((at, strides if self._head_major else None))
        return tuple(found)
