"""Where the pieces of an attention call lie on a rank: arithmetic on token counts and heads, alike for every rank, so
that a sender knows where its chunk belongs in the memory of the receiver. No tensors.

A rank's *window* is the memory into which its peers write. It holds those buffers into which at least one chunk comes
that way; the others are made where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from sf_xfuser.layout.schedule import JOINT, Exchange, Link, Message, Piece, Schedule

_ALIGNMENT = 64  # bytes, of a buffer in a window

HeadRange = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The size of everything in one call. ``q_tokens[w]`` and ``kv_tokens[w]`` are the token counts at position ``w``;
    ``q_heads[p]`` and ``kv_heads[p]`` the half-open head ranges of head group ``p``; ``itemsize`` in bytes."""

    batch: int
    head_size: int
    itemsize: int
    q_tokens: tuple[int, ...]
    kv_tokens: tuple[int, ...]
    joint_tokens: int
    q_heads: tuple[HeadRange, ...]
    kv_heads: tuple[HeadRange, ...]

    def row_bytes(self, tensor: str, head_group: int) -> int:
        """Of one token of ``"q"``, ``"kv"`` (K and V together) or ``"o"``, with the heads of a group."""
        low, high = (self.kv_heads if tensor == "kv" else self.q_heads)[head_group]
        return (2 if tensor == "kv" else 1) * self.batch * (high - low) * self.head_size * self.itemsize


class Rows:
    """Where pieces lie in a buffer: ``rows[a, ..., b]`` is the slice from a to b."""

    def __init__(self, pieces: Sequence[Piece], tokens: Callable[[int], int]) -> None:
        ends = list(accumulate((high - low for low, high in (p.span(tokens(p.source)) for p in pieces)), initial=0))
        self.total = ends[-1]
        self._span = {piece: slice(ends[i], ends[i + 1]) for i, piece in enumerate(pieces)}

    def __getitem__(self, pieces: Sequence[Piece]) -> slice:
        return slice(self._span[pieces[0]].start, self._span[pieces[-1]].stop)


class Buffer(NamedTuple):
    """Queries of the own machine (0) or of others (1); a slab of KV, by its number; outputs from another rank, by its
    position and their part."""

    tensor: str
    which: int
    part: int = 0


class Places:
    """The buffers of one rank. ``schedule.remote`` queries lie apart from the others: they are done with sooner."""

    def __init__(
        self,
        schedule: Schedule,
        sizes: Sizes,
        written_by_peers: Collection[Link] = (),
        *,
        head_major: bool = False,
    ) -> None:
        """``written_by_peers``: the links on which chunks come into the window. ``head_major``: Q and K, V lie there as
        [B, H, S, D] and [2, B, H, S, D], as attention on a CPU reads them fastest; chunks are not contiguous then."""
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
        """Bytes from the start of the window, for each buffer in it."""
        self.window_bytes = 0
        for step in schedule.steps:
            for message in step.receives if isinstance(step, Exchange) and step.link in written_by_peers else ():
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
        """Of queries or of KV."""
        if buffer.tensor == "kv":
            return self.slabs[buffer.which].total
        return self.queries.total - self.remote_from if buffer.which else self.remote_from

    def pitch(self, buffer: Buffer) -> int | None:
        """Elements from one head to the next in a buffer of the window that is head-major, else None."""
        if not self._head_major or buffer.tensor == "o":
            return None
        return self.tokens(buffer) * self._head_size

    def buffer(self, message: Message) -> Buffer:
        """Where this rank receives the message."""
        first = message.pieces[0]
        if message.tensor == "q":
            return Buffer("q", int(first in self._remote))
        return Buffer("kv", self.slab_of[first]) if message.tensor == "kv" else Buffer("o", message.peer, first.part)

    def landing(self, message: Message) -> tuple[int, int | None]:
        """Where in the window this rank receives the message: ``Parcel.offset`` and ``Parcel.pitch``."""
        buffer = self.buffer(message)
        if buffer.tensor == "o":
            return self.offset[buffer], None
        row: int
        if buffer.tensor == "q":
            row = self.queries[message.pieces].start - (self.remote_from if buffer.which else 0)
        else:
            row = self.slabs[buffer.which][message.pieces].start
        pitch = self.pitch(buffer)
        row_bytes = self._row_bytes[buffer.tensor] if pitch is None else self._head_size * self._itemsize
        return self.offset[buffer] + row * row_bytes, pitch
