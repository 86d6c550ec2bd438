"""The buffers of one attention call on one rank. Shapes are in names: B batch, H heads, S tokens, D head size.

Chunks are sent and stored as [S, B, H, D], K and V of a token together as [S, 2, B, H, D]. So the chunks of several
ranks are adjacent in one buffer, and each is contiguous. Attention gets [B, H, S, D] views. In shared memory, chunks
need not be contiguous, and the buffers are head-major.

Buffers that peers write are in the window. All others are allocated at first use and released after the last step that
reads them. Outputs are accumulated in fp32 (fp64 for fp64 inputs). The last merge writes them straight to the result or
to the chunk to send.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import TypeVar

import torch

from sf_xfuser.kernels import pack_unchecked, unpack_unchecked
from sf_xfuser.layout.memory_map import Buffer
from sf_xfuser.layout.schedule import JOINT, Message, Piece
from sf_xfuser.torus.call import Call
from sf_xfuser.transport.base import Parcel, window_view

Tensors = tuple[torch.Tensor, ...]
_T = TypeVar("_T")
_SLOT = {"q": 0, "kv": 1, "o": 2}


class Buffers:
    """The buffers of one call, laid out by its ``MemoryMap``. Own tokens that need no buffer are read from the caller's
    tensors. Views of the window are cached from call to call, since the address of each half stays the same."""

    def __init__(self, call: Call, local: Mapping[str, Tensors], joint: Tensors, window: torch.Tensor | None) -> None:
        """``local``: this rank's ``"q"`` and ``"kv"`` (key and value), each [B, H, S, D] with all heads. ``joint``: key
        and value of the joint tokens, or empty. ``window``: the bytes that peers write during this call."""
        self._call, self._local, self._joint, self._window = call, local, joint, window
        self._views = {} if window is None else call.views.setdefault(window.data_ptr(), {})
        schedule, sizes = call.schedule, call.sizes
        self._map = call.memory_maps[schedule.position]
        self._own = Piece(schedule.position)
        self._group = call.head_groups[schedule.position]
        (self._query,) = local["q"]
        self.B, _, self.S, self.D = self._query.shape
        self.H, self.H_kv = (high - low for low, high in (sizes.q_heads[self._group], sizes.kv_heads[self._group]))

        self.q_rows = self._map.queries
        self._remote = set(schedule.remote)
        self._q_SBHD: dict[bool, torch.Tensor] = {}  # by whether they are remote
        if len(schedule.queries) == len(schedule.remote) + 1:
            self._q_SBHD[False] = self._in_place("q")[0]

        self._kv_S2BHD: dict[int, torch.Tensor] = {}  # by slab
        alone = schedule.slabs[0] == (self._own,) and schedule.layout.ring_degree == 1
        self._own_kv_SBHD = self._in_place("kv") if alone else ()

    # -- for attention ------------------------------------------------------------------------------------------------

    def queries(self, rows: slice) -> torch.Tensor:
        """[B, H, S, D]"""
        buffer = Buffer("q", int(rows.start >= self._map.remote_from))
        return self._cached(buffer, (rows.start, rows.stop), lambda: self._queries_at(rows).permute(1, 2, 0, 3))

    def keys(self, pieces: Sequence[Piece]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """K and V, each [B, H_kv, S, D]; None if the pieces have no tokens."""
        slab = self._map.slab_of[pieces[0]]
        rows = self._map.slabs[slab][pieces]
        if rows.start == rows.stop:
            return None
        in_place = self._own_kv_SBHD if slab == 0 else ()

        def views() -> tuple[torch.Tensor, torch.Tensor]:
            k, v = in_place or self._slab(slab)[rows].unbind(1)
            return k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)

        return self._cached(Buffer("kv", slab), pieces, views)

    def with_all_heads(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of ``keys``, heads repeated for grouped queries: each [B, H, S, D]."""
        repeat = self._call.kv_of_q
        return (k, v) if repeat is None else (k.index_select(1, repeat), v.index_select(1, repeat))

    def accumulator(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, H, S, D] and log-sum-exp [B, H, S] of these queries so far, in fp32 or fp64."""
        o_SBHD, lse_BHS = self._accumulators
        return o_SBHD[rows].permute(1, 2, 0, 3), lse_BHS[:, :, rows]

    @cached_property
    def _accumulators(self) -> Tensors:
        dtype = torch.promote_types(self._query.dtype, torch.float32)
        o_SBHD = self._query.new_empty(self.q_rows.total, self.B, self.H, self.D, dtype=dtype)
        return o_SBHD, self._query.new_empty(self.B, self.H, self.q_rows.total, dtype=dtype)

    @cached_property
    def result_BSHD(self) -> torch.Tensor:
        """The result of the call: all heads of this rank's tokens."""
        return self._query.new_empty(self.B, self.S, self._query.shape[1], self.D)

    def outputs(self, rows: slice) -> list[tuple[slice, torch.Tensor]]:
        """Destinations of the final output of these queries, as (rows, [B, H, S, D] in the input dtype): the result for
        this rank's own queries, which come first, and the chunks to send for all others."""
        low, high = self._call.sizes.q_heads[self._group]
        found = []
        if own := range(rows.start, min(rows.stop, self.S)):
            result = self.result_BSHD[:, own.start : own.stop, low:high]
            found.append((slice(own.start, own.stop), result.transpose(1, 2)))
        if others := range(max(rows.start, self.S), rows.stop):
            chunk = self._outgoing_SBHD[others.start - self.S : others.stop - self.S]
            found.append((slice(others.start, others.stop), chunk.permute(1, 2, 0, 3)))
        return found

    def finish(self, out: torch.Tensor) -> None:
        """Store the final outputs of all queries, [B, H, S, D] in the input dtype, without accumulation."""
        low, high = self._call.sizes.q_heads[self._group]
        self.result_BSHD[:, :, low:high].copy_(out[:, :, : self.S].transpose(1, 2))
        self._outgoing_SBHD = out[:, :, self.S :].permute(2, 0, 1, 3)

    @cached_property
    def _outgoing_SBHD(self) -> torch.Tensor:
        """Final outputs for other ranks; the accumulator itself if it has the input dtype."""
        others = self._accumulators[0][self.S :]
        return others if self._query.dtype == others.dtype else torch.empty_like(others, dtype=self._query.dtype)

    def release_keys(self, pieces: Sequence[Piece]) -> None:
        """Release the slab of these pieces."""
        self._kv_S2BHD.pop(self._map.slab_of[pieces[0]], None)

    def release_queries(self, pieces: Sequence[Piece]) -> None:
        """Release the buffer of remote queries once all of them have been passed to this method."""
        self._remote.difference_update(pieces)
        if not self._remote:
            self._q_SBHD.pop(True, None)

    # -- chunks to send and receive -----------------------------------------------------------------------------------

    def is_forward(self, message: Message) -> bool:
        """Whether the message forwards a received buffer to a ring neighbour."""
        return message.tensor != "o" and self._call.head_groups[message.peer] == self._group

    def outgoing(self, message: Message, offset: int = 0, pitch: int | None = None) -> Parcel:
        """The chunk to send: views of the inputs, of a slab, or of a final output. ``offset``, ``pitch``: the
        destination in the peer's window."""
        parts: Tensors
        if message.tensor == "o":
            rows = self.q_rows[message.pieces]
            parts = (self._outgoing_SBHD[rows.start - self.S : rows.stop - self.S],)
        elif self.is_forward(message):
            parts = (self._buffer(message.tensor, message.pieces),)
        else:
            (piece,) = message.pieces
            parts = self._own_chunk(message.tensor, piece, self._call.head_groups[message.peer])
        return Parcel(parts, self._query.dtype, message.peer, _SLOT[message.tensor], offset, pitch)

    def incoming(self, message: Message) -> Parcel:
        """The chunk to receive, with its destination: rows of a buffer, or for an output, a tensor of its own."""
        buffer = self._map.buffer(message)

        def parcel() -> Parcel:
            if message.tensor != "o":
                chunk = self._buffer(message.tensor, message.pieces)
            else:
                low, high = self._call.sizes.q_heads[self._call.head_groups[message.peer]]
                first, end = message.pieces[0].span(self.S)
                chunk = self._new(buffer, end - first, self.B, high - low, self.D)
            return Parcel((chunk,), self._query.dtype, message.peer, _SLOT[message.tensor])

        return self._cached(buffer, message, parcel)

    def store_output(self, message: Message, chunk: torch.Tensor) -> None:
        """Copy a received output into the result."""
        low, high = self._call.sizes.q_heads[self._call.head_groups[message.peer]]
        first, end = message.pieces[0].span(self.S)
        unpack_unchecked(chunk, (self.result_BSHD[:, first:end, low:high].transpose(0, 1),))

    # -- chunks of this rank ------------------------------------------------------------------------------------------

    def local_pieces(self) -> list[tuple[str, Piece]]:
        """Pieces of this rank that ``copy_in`` must copy to a buffer before they are attended or forwarded."""
        found = [("q", self._own)] if False not in self._q_SBHD else []
        found += [] if self._own_kv_SBHD else [("kv", self._own)]
        return found + ([("kv", Piece(JOINT))] if self._joint else [])

    def copy_in(self, name: str, piece: Piece) -> None:
        buffer = self._buffer(name, (piece,))
        if piece.source == JOINT:
            low, high = self._call.sizes.kv_heads[self._group]
            parts = tuple(_part(x, low, high, 0, x.shape[2]) for x in self._joint)
        else:
            parts = self._own_chunk(name, piece, self._group)
        pack_unchecked(parts, buffer)

    def _own_chunk(self, name: str, piece: Piece, group: int) -> Tensors:
        """Views of this rank's tokens in ``piece`` and the heads of ``group``: Q, or K and V, each [S, B, H, D]."""
        low, high = (self._call.sizes.q_heads if name == "q" else self._call.sizes.kv_heads)[group]
        first, end = piece.span(self._local[name][0].shape[2])
        return tuple(_part(x, low, high, first, end) for x in self._local[name])

    def _in_place(self, name: str) -> Tensors:
        """Views of this rank's tokens and heads, each [S, B, H, D]; copies if D is strided, which PyTorch's CPU kernel
        reads wrong."""
        chunk = self._own_chunk(name, self._own, self._group)
        return tuple(x if x.stride(3) == 1 else x.contiguous() for x in chunk)

    def _cached(self, buffer: Buffer, key: Hashable, make: Callable[[], _T]) -> _T:
        """The result of ``make``; cached across calls if the buffer is in the window."""
        found: _T | None = self._views.get(key)
        if found is None:
            found = make()
            if self._window is not None and buffer in self._map.offset:
                self._views[key] = found
        return found

    # -- buffers ------------------------------------------------------------------------------------------------------

    def _buffer(self, name: str, pieces: Sequence[Piece]) -> torch.Tensor:
        if name == "q":
            return self._queries_at(self.q_rows[pieces])
        slab = self._map.slab_of[pieces[0]]
        return self._slab(slab)[self._map.slabs[slab][pieces]]

    def _queries_at(self, rows: slice) -> torch.Tensor:
        """[S, B, H, D]"""
        first = self._map.remote_from
        remote = rows.start >= first
        offset = first if remote else 0
        if remote not in self._q_SBHD:
            tokens = self.q_rows.total - first if remote else first
            self._q_SBHD[remote] = self._new(Buffer("q", int(remote)), tokens, self.B, self.H, self.D)
        return self._q_SBHD[remote][rows.start - offset : rows.stop - offset]

    def _slab(self, slab: int) -> torch.Tensor:
        """[S, 2, B, H, D]"""
        if slab not in self._kv_S2BHD:
            tokens = self._map.slabs[slab].total
            self._kv_S2BHD[slab] = self._new(Buffer("kv", slab), tokens, 2, self.B, self.H_kv, self.D)
        return self._kv_S2BHD[slab]

    def _new(self, buffer: Buffer, *shape: int) -> torch.Tensor:
        """A view of the window if the buffer is in it, else a new tensor."""
        offset = self._map.offset.get(buffer)
        if offset is None or self._window is None:
            return self._query.new_empty(shape)
        return window_view(self._window, offset, shape, self._query.dtype, self._map.pitch(buffer))


def _part(x_BHSD: torch.Tensor, low: int, high: int, first: int, end: int) -> torch.Tensor:
    """``x_BHSD[:, low:high, first:end].permute(2, 0, 1, 3)`` in one step; every sent chunk is such a view."""
    b, h, s, d = x_BHSD.stride()
    shape = end - first, x_BHSD.shape[0], high - low, x_BHSD.shape[3]
    return x_BHSD.as_strided(shape, (s, b, h, d), x_BHSD.storage_offset() + low * h + first * s)
