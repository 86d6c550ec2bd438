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

_ALIGNMENT = 64  # bytes; alignment of a buffer in a window

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
        """Bytes of one token of ``"q"``, ``"kv"`` (K and V together) or ``"o"``, for the heads of a group."""
        low, high = (self.kv_heads if tensor == "kv" else self.q_heads)[head_group]
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
    """``"q"``: ``number`` is 0 for queries of the local machine, 1 for those of other machines. ``"kv"``: ``number`` is
    the slab. ``"o"``: ``number`` is the position of the rank that sends the output, ``part`` its part."""

    tensor: str
    number: int
    part: int = 0


class MemoryMap:
    """The buffers of one rank. ``schedule.remote`` queries have a buffer of their own, which is released earlier."""

    def __init__(
        self,
        schedule: Schedule,
        sizes: Sizes,
        window_links: Collection[Link] = (),
        *,
        head_major: bool = False,
    ) -> None:
        """``window_links``: the links on which peers write into the window. ``head_major``: in the window, Q is
        [B, H, S, D] and KV [2, B, H, S, D], which CPU attention reads fastest; chunks are then not contiguous."""
        layout = schedule.layout
        group = layout.head_group(schedule.position)
        self.queries = Rows(schedule.queries, sizes.q_tokens.__getitem__)
        self.remote_from = self.queries[schedule.remote].start if schedule.remote else self.queries.total
        self._remote = set(schedule.remote)
        self.slab_of = {piece: n for n, slab in enumerate(schedule.slabs) for piece in slab}
        self.slabs = [
            Rows(slab, lambda source: sizes.joint_tokens if source == JOINT else sizes.kv_tokens[source])
            for slab in schedule.slabs
        ]
        self._row_bytes = {tensor: sizes.row_bytes(tensor, group) for tensor in ("q", "kv")}
        self._head_size, self._itemsize, self._head_major = sizes.head_size, sizes.itemsize, head_major
        self.offset: dict[Buffer, int] = {}
        """In bytes from the start of the window, for each buffer in it."""
        self.window_bytes = 0
        for step in schedule.steps:
            for message in step.receives if isinstance(step, Exchange) and step.link in window_links else ():
                buffer = self.buffer(message)
                if buffer in self.offset:
                    continue
                self.offset[buffer] = self.window_bytes
                if buffer.tensor == "o":
                    low, high = message.pieces[0].span(sizes.q_tokens[schedule.position])
                    size = (high - low) * sizes.row_bytes("o", layout.head_group(message.peer))
                else:
                    size = self.tokens(buffer) * self._row_bytes[buffer.tensor]
                self.window_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT

    def tokens(self, buffer: Buffer) -> int:
        """The rows of a ``"q"`` or ``"kv"`` buffer."""
        if buffer.tensor == "kv":
            return self.slabs[buffer.number].total
        return self.queries.total - self.remote_from if buffer.number else self.remote_from

    def pitch(self, buffer: Buffer) -> int | None:
        """Elements between two heads of a head-major buffer in the window, else None."""
        if not self._head_major or buffer.tensor == "o":
            return None
        return self.tokens(buffer) * self._head_size

    def buffer(self, message: Message) -> Buffer:
        """The buffer that receives the message."""
        first = message.pieces[0]
        if message.tensor == "q":
            return Buffer("q", int(first in self._remote))
        return Buffer("kv", self.slab_of[first]) if message.tensor == "kv" else Buffer("o", message.peer, first.part)

    def destination(self, message: Message) -> tuple[int, int | None]:
        """The ``Parcel.offset`` and ``Parcel.pitch`` at which the window receives the message."""
        buffer = self.buffer(message)
        if buffer.tensor == "o":
            return self.offset[buffer], None
        row: int
        if buffer.tensor == "q":
            row = self.queries[message.pieces].start - (self.remote_from if buffer.number else 0)
        else:
            row = self.slabs[buffer.number][message.pieces].start
        pitch = self.pitch(buffer)
        row_bytes = self._row_bytes[buffer.tensor] if pitch is None else self._head_size * self._itemsize
        return self.offset[buffer] + row * row_bytes, pitch
