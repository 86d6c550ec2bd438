"""Where the pieces of one attention call lie on a rank. Shapes are in names: B batch, H heads, S tokens, D head size.

Chunks travel and wait as [S, B, H, D] (K and V of a token together, as [S, 2, B, H, D]), so that chunks of several
ranks lie one after the other in one buffer and each is contiguous (in shared memory, which needs no contiguous chunks,
the same shapes lie head by head); attention sees [B, H, S, D] views of it. A buffer into which peers write lies in the
window; another is made when it is first asked for and let go once the schedule says that nothing reads it any more.
Outputs are kept in fp32 (of fp64 inputs in fp64) until they are final; those go where they belong at once.
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
    """The buffers of one call; ``places`` says what lies where. What this rank alone attends of its own tokens stays
    where the caller put it. Views of the window are kept from call to call: it lies where it did, in each half."""

    def __init__(self, call: Call, local: Mapping[str, Tensors], joint: Tensors, window: torch.Tensor | None) -> None:
        """``local``: this rank's ``"q"`` and ``"kv"`` (key and value), each [B, H, S, D] with all heads; ``joint``: key
        and value of the joint tokens, or nothing; ``window``: the bytes into which peers write during this call."""
        self._call, self._local, self._joint, self._window = call, local, joint, window
        self._views = {} if window is None else call.views.setdefault(window.data_ptr(), {})
        schedule, sizes = call.schedule, call.sizes
        self.places = call.places[schedule.position]
        self._own = Piece(schedule.position)
        self._group = call.head_groups[schedule.position]
        (self._query,) = local["q"]
        self.B, _, self.S, self.D = self._query.shape
        self.H, self.H_kv = (high - low for low, high in (sizes.q_heads[self._group], sizes.kv_heads[self._group]))

        self.q_rows = self.places.queries
        self._remote = set(schedule.remote)
        self._q_SBHD: dict[bool, torch.Tensor] = {}  # by whether they come from other machines
        if len(schedule.queries) == len(schedule.remote) + 1:
            self._q_SBHD[False] = self._readable("q")[0]

        self._kv_S2BHD: dict[int, torch.Tensor] = {}  # by slab
        alone = schedule.slabs[0] == (self._own,) and schedule.layout.ring_degree == 1
        self._own_kv_SBHD = self._readable("kv") if alone else ()

    # -- for attention ------------------------------------------------------------------------------------------------

    def queries(self, rows: slice) -> torch.Tensor:
        """[B, H, S, D]"""
        buffer = Buffer("q", int(rows.start >= self.places.remote_from))
        return self._kept(buffer, (rows.start, rows.stop), lambda: self._queries_at(rows).permute(1, 2, 0, 3))

    def keys(self, pieces: Sequence[Piece]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """K and V, each [B, H_kv, S, D]; None where the pieces hold no token."""
        slab = self.places.slab_of[pieces[0]]
        rows = self.places.slabs[slab][pieces]
        if rows.start == rows.stop:
            return None
        in_place = self._own_kv_SBHD if slab == 0 else ()

        def views() -> tuple[torch.Tensor, torch.Tensor]:
            k, v = in_place or self._slab(slab)[rows].unbind(1)
            return k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)

        return self._kept(Buffer("kv", slab), pieces, views)

    def with_all_heads(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of ``keys`` with a head for each query head, each [B, H, S, D]."""
        repeat = self._call.kv_of_q
        return (k, v) if repeat is None else (k.index_select(1, repeat), v.index_select(1, repeat))

    def accumulator(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, H, S, D] and log-sum-exp [B, H, S] of these queries, in the dtype of ``_accumulators``."""
        o_SBHD, lse_BHS = self._accumulators
        return o_SBHD[rows].permute(1, 2, 0, 3), lse_BHS[:, :, rows]

    @cached_property
    def _accumulators(self) -> Tensors:
        dtype = torch.promote_types(self._query.dtype, torch.float32)
        o_SBHD = self._query.new_empty(self.q_rows.total, self.B, self.H, self.D, dtype=dtype)
        return o_SBHD, self._query.new_empty(self.B, self.H, self.q_rows.total, dtype=dtype)

    @cached_property
    def result_BSHD(self) -> torch.Tensor:
        """What the call returns: all heads of the own tokens."""
        return self._query.new_empty(self.B, self.S, self._query.shape[1], self.D)

    def outcome(self, rows: slice) -> list[tuple[slice, torch.Tensor]]:
        """Where the final output of these queries belongs, [B, H, S, D] in the input dtype, run by run: in the result,
        if they are this rank's own, which come first; else in the chunk that leaves."""
        low, high = self._call.sizes.q_heads[self._group]
        found = []
        if own := range(rows.start, min(rows.stop, self.S)):
            found.append(
                (slice(own.start, own.stop), self.result_BSHD[:, own.start : own.stop, low:high].transpose(1, 2))
            )
        if others := range(max(rows.start, self.S), rows.stop):
            leaving = self._leaving_SBHD[others.start - self.S : others.stop - self.S]
            found.append((slice(others.start, others.stop), leaving.permute(1, 2, 0, 3)))
        return found

    def finish(self, out: torch.Tensor) -> None:
        """Take the final outputs of all queries, [B, H, S, D] in the input dtype; nothing is accumulated then."""
        low, high = self._call.sizes.q_heads[self._group]
        self.result_BSHD[:, :, low:high].copy_(out[:, :, : self.S].transpose(1, 2))
        self._leaving_SBHD = out[:, :, self.S :].permute(2, 0, 1, 3)

    @cached_property
    def _leaving_SBHD(self) -> torch.Tensor:
        """Final outputs for other ranks; those in the accumulator's dtype stay in it."""
        others = self._accumulators[0][self.S :]
        return others if self._query.dtype == others.dtype else torch.empty_like(others, dtype=self._query.dtype)

    def let_go_keys(self, pieces: Sequence[Piece]) -> None:
        """Of the slab that these belong to."""
        self._kv_S2BHD.pop(self.places.slab_of[pieces[0]], None)

    def let_go_queries(self, pieces: Sequence[Piece]) -> None:
        """Those of other machines, when the last of them are named."""
        self._remote.difference_update(pieces)
        if not self._remote:
            self._q_SBHD.pop(True, None)

    # -- for the wire -------------------------------------------------------------------------------------------------

    def passes_on(self, message: Message) -> bool:
        """Whether a ring neighbour is sent what lies in a buffer here, which has to have arrived."""
        return message.tensor != "o" and self._call.head_groups[message.peer] == self._group

    def outgoing(self, message: Message, offset: int = 0, pitch: int | None = None) -> Parcel:
        """The chunk to send: views of the inputs, of a slab, or of a final output. ``offset``, ``pitch``: where it is
        to lie in the peer's window."""
        parts: Tensors
        if message.tensor == "o":
            rows = self.q_rows[message.pieces]
            parts = (self._leaving_SBHD[rows.start - self.S : rows.stop - self.S],)
        elif self.passes_on(message):
            parts = (self._buffer(message.tensor, message.pieces),)
        else:
            (piece,) = message.pieces
            parts = self._own_chunk(message.tensor, piece, self._call.head_groups[message.peer])
        return Parcel(parts, self._query.dtype, message.peer, _SLOT[message.tensor], offset, pitch)

    def incoming(self, message: Message) -> Parcel:
        """What is to arrive, and where: in its buffer, or, an output, by itself."""
        buffer = self.places.buffer(message)

        def parcel() -> Parcel:
            if message.tensor != "o":
                chunk = self._buffer(message.tensor, message.pieces)
            else:
                low, high = self._call.sizes.q_heads[self._call.head_groups[message.peer]]
                first, end = message.pieces[0].span(self.S)
                chunk = self._new(buffer, end - first, self.B, high - low, self.D)
            return Parcel((chunk,), self._query.dtype, message.peer, _SLOT[message.tensor])

        return self._kept(buffer, message, parcel)

    def take_back(self, message: Message, chunk: torch.Tensor) -> None:
        """Put an output that has arrived where it belongs in the result."""
        low, high = self._call.sizes.q_heads[self._call.head_groups[message.peer]]
        first, end = message.pieces[0].span(self.S)
        unpack_unchecked(chunk, (self.result_BSHD[:, first:end, low:high].transpose(0, 1),))

    # -- what this rank holds from the start --------------------------------------------------------------------------

    def to_place(self) -> list[tuple[str, Piece]]:
        """What has to be copied into its buffer (``place``) before it is attended or passed on."""
        held = [("q", self._own)] if False not in self._q_SBHD else []
        held += [] if self._own_kv_SBHD else [("kv", self._own)]
        return held + ([("kv", Piece(JOINT))] if self._joint else [])

    def place(self, name: str, piece: Piece) -> None:
        buffer = self._buffer(name, (piece,))
        if piece.source == JOINT:
            low, high = self._call.sizes.kv_heads[self._group]
            parts = tuple(_part(x, low, high, 0, x.shape[2]) for x in self._joint)
        else:
            parts = self._own_chunk(name, piece, self._group)
        pack_unchecked(parts, buffer)

    def _own_chunk(self, name: str, piece: Piece, group: int) -> Tensors:
        """Views of the own tokens in ``piece`` and the heads of ``group``: Q, or K and V, each [S, B, H, D]."""
        low, high = (self._call.sizes.q_heads if name == "q" else self._call.sizes.kv_heads)[group]
        first, end = piece.span(self._local[name][0].shape[2])
        return tuple(_part(x, low, high, first, end) for x in self._local[name])

    def _readable(self, name: str) -> Tensors:
        """The own tokens and heads where they lie, each [S, B, H, D]; copied where D is strided, which PyTorch's CPU
        kernel reads wrong."""
        chunk = self._own_chunk(name, self._own, self._group)
        return tuple(x if x.stride(3) == 1 else x.contiguous() for x in chunk)

    def _kept(self, buffer: Buffer, key: Hashable, make: Callable[[], _T]) -> _T:
        """What ``make`` makes of a buffer; what it made in an earlier call, if the buffer is in the window."""
        found: _T | None = self._views.get(key)
        if found is None:
            found = make()
            if self._window is not None and buffer in self.places.offset:
                self._views[key] = found
        return found

    # -- buffers ------------------------------------------------------------------------------------------------------

    def _buffer(self, name: str, pieces: Sequence[Piece]) -> torch.Tensor:
        if name == "q":
            return self._queries_at(self.q_rows[pieces])
        slab = self.places.slab_of[pieces[0]]
        return self._slab(slab)[self.places.slabs[slab][pieces]]

    def _queries_at(self, rows: slice) -> torch.Tensor:
        """[S, B, H, D]"""
        first = self.places.remote_from
        remote = rows.start >= first
        offset = first if remote else 0
        if remote not in self._q_SBHD:
            tokens = self.q_rows.total - first if remote else first
            self._q_SBHD[remote] = self._new(Buffer("q", int(remote)), tokens, self.B, self.H, self.D)
        return self._q_SBHD[remote][rows.start - offset : rows.stop - offset]

    def _slab(self, slab: int) -> torch.Tensor:
        """[S, 2, B, H, D]"""
        if slab not in self._kv_S2BHD:
            tokens = self.places.slabs[slab].total
            self._kv_S2BHD[slab] = self._new(Buffer("kv", slab), tokens, 2, self.B, self.H_kv, self.D)
        return self._kv_S2BHD[slab]

    def _new(self, buffer: Buffer, *shape: int) -> torch.Tensor:
        """In the window where peers write into it."""
        offset = self.places.offset.get(buffer)
        if offset is None or self._window is None:
            return self._query.new_empty(shape)
        return window_view(self._window, offset, shape, self._query.dtype, self.places.pitch(buffer))


def _part(x_BHSD: torch.Tensor, low: int, high: int, first: int, end: int) -> torch.Tensor:
    """``x_BHSD[:, low:high, first:end].permute(2, 0, 1, 3)`` in one step: every chunk that leaves is such a view."""
    b, h, s, d = x_BHSD.stride()
    shape = end - first, x_BHSD.shape[0], high - low, x_BHSD.shape[3]
    return x_BHSD.as_strided(shape, (s, b, h, d), x_BHSD.storage_offset() + low * h + first * s)
