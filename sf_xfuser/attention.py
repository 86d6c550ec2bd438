"""Torus Attention: runs one rank's schedule. Shapes are in names: B batch, H heads, S tokens, D head size.

Chunks travel and wait as [S, B, H, D], so that chunks of several ranks lie one after the other in one buffer and each
is contiguous; ``attend`` sees [B, H, S, D] views of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Literal

import torch

from sf_xfuser.call import Call, agree
from sf_xfuser.kernels import AttendFunction, merge_, sdpa_attend
from sf_xfuser.mesh import Mesh
from sf_xfuser.schedule import JOINT, Attend, Exchange, Message, Piece
from sf_xfuser.transport import Parcel, Ticket

_SLOT = {"q": 0, "kv": 1, "o": 2}

# On a CPU, queries are attended in runs of rows whose partial result is still in the cache when it is merged. PyTorch's
# kernel works on fewer rows at a time, and more slowly, below 768.
_ELEMENTS_AT_ONCE = 64 << 10
_MIN_ROWS = 768


def torus_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mesh: Mesh,
    attend: AttendFunction = sdpa_attend,
    joint_key: torch.Tensor | None = None,
    joint_value: torch.Tensor | None = None,
    joint_strategy: Literal["front", "rear"] | None = None,
    q_tokens: Sequence[int] | None = None,
    kv_tokens: Sequence[int] | None = None,
) -> torch.Tensor:
    """Dense, non-causal attention over the tokens of all ranks of ``mesh``. Collective over the group.

    ``query`` [B, H, S_q, D] and ``key``, ``value`` [B, H_kv, S_kv, D] hold this rank's tokens and all heads, any
    strides; S_q and S_kv may differ from each other and from rank to rank (0 included), H_kv divides H. ``joint_key``
    and ``joint_value`` [B, H_kv, S_j, D] hold tokens that every rank has; they are attended once, at the first
    (``"front"``) or last (``"rear"``) KV. Returns [B, H, S_q, D] (a view of [B, S_q, H, D]) in the input dtype.

    ``q_tokens[w]`` and ``kv_tokens[w]`` are S_q and S_kv at each position ``w`` of ``mesh``. A caller that knows them
    gives both, and nothing but chunks is exchanged once a call shape has been seen; left out, the ranks tell each other
    their counts at every call, since a rank cannot know that another's have changed.

    ``attend`` computes one piece (see ``kernels.attend``); pieces are merged by log-sum-exp in fp32 in a fixed order,
    so the same call gives the same bits. On CUDA the work is on the current stream. Nothing stays posted afterwards.

    Raises ValueError on every rank when ranks disagree or a shape cannot be split, RuntimeError when a rank is missing
    and TransportError when a transfer is not done in time. Source: StreamFusion, arXiv 2601.20273, Torus Attention.
    """
    counts = None if q_tokens is None or kv_tokens is None else (tuple(q_tokens), tuple(kv_tokens))
    call = agree(mesh, (query, key, value, joint_key, joint_value), joint_strategy, counts)
    return _Run(mesh, call, attend, query, key, value, joint_key, joint_value).run()


class _Rows:
    """Where pieces lie in a buffer: ``rows[a, ..., b]`` is the slice from a to b."""

    def __init__(self, pieces: Sequence[Piece], tokens: Callable[[int], int]) -> None:
        ends = list(accumulate((high - low for low, high in (p.span(tokens(p.source)) for p in pieces)), initial=0))
        self.total = ends[-1]
        self._span = {piece: slice(ends[i], ends[i + 1]) for i, piece in enumerate(pieces)}

    def __getitem__(self, pieces: Sequence[Piece]) -> slice:
        return slice(self._span[pieces[0]].start, self._span[pieces[-1]].stop)


class _Local(Ticket):
    """Something that is here, once it has been put in place."""

    def __init__(self, place: Callable[[], object]) -> None:
        self._place = place

    def wait(self) -> None:
        self._place()


class _Run:
    """The buffers and open tickets of one call."""

    def __init__(
        self,
        mesh: Mesh,
        call: Call,
        attend: AttendFunction,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        joint_key: torch.Tensor | None,
        joint_value: torch.Tensor | None,
    ) -> None:
        self.mesh, self.call, self.attend = mesh, call, attend
        self.local = {"q": (query,), "kv": (key, value)}
        schedule = call.schedule
        self.own = schedule.position
        group = mesh.layout.head_group(self.own)
        self.B, _, _, self.D = query.shape
        self.H, self.H_kv = (high - low for low, high in (call.q_heads[group], call.kv_heads[group]))

        self.q_rows = _Rows(schedule.queries, call.q_tokens.__getitem__)
        self.q_SBHD = query.new_empty(self.q_rows.total, self.B, self.H, self.D)
        self.o_SBHD = query.new_empty(self.q_rows.total, self.B, self.H, self.D, dtype=torch.float32)
        self.lse_BHS = query.new_empty(self.B, self.H, self.q_rows.total, dtype=torch.float32)
        self.rows_at_once = self.q_rows.total
        if query.device.type == "cpu":
            self.rows_at_once = max(_MIN_ROWS, _ELEMENTS_AT_ONCE // (self.B * self.H * self.D))
        self.begun: set[Piece] = set()  # queries whose accumulator holds something
        self.slab_of = {piece: n for n, slab in enumerate(schedule.slabs) for piece in slab}
        self.kv_rows = [_Rows(slab, self._kv_tokens) for slab in schedule.slabs]
        self.kv_S2BHD: dict[int, torch.Tensor] = {}  # by slab: K and V of a token lie together, and travel together
        self.arriving: dict[tuple[str, Piece], Ticket] = {}
        # What this rank holds already is put in place when it is first asked for: the wire comes first.
        for name in ("q", "kv"):
            self.arriving[name, Piece(self.own)] = _Local(partial(self._pack, name, Piece(self.own), group, place=True))
        if joint_key is not None and joint_value is not None:
            self.arriving["kv", Piece(JOINT)] = _Local(partial(self._place_joint, joint_key, joint_value, group))
        self.outputs: list[tuple[Ticket, Parcel, Message]] = []
        self.posted: list[tuple[float, Ticket, Exchange, int]] = []  # for a trace: when, what, bytes to receive

    def run(self) -> torch.Tensor:
        for step in self.call.schedule.steps:
            if isinstance(step, Exchange):
                self._exchange(step)
            else:
                self._attend(step)
        return self._collect()

    # -- the verbs ----------------------------------------------------------------------------------------------------

    def _exchange(self, step: Exchange) -> None:
        """Start one round. Chunks of no tokens are not sent, alike at both ends."""
        index = self.mesh.peer_index[step.lane]
        sends = [Parcel(self._outgoing(m), index[m.peer], _SLOT[m.tensor]) for m in step.sends]
        receives = [(m, Parcel(self._incoming(m), index[m.peer], _SLOT[m.tensor])) for m in step.receives]
        started_s = time.perf_counter()
        ticket = self.mesh.lanes[step.lane].exchange(
            step.round,
            [parcel for parcel in sends if parcel.tensor.numel()],
            [parcel for _, parcel in receives if parcel.tensor.numel()],
        )
        if self.mesh.trace is not None:
            moved = sum(parcel.tensor.nbytes for _, parcel in receives)
            self.posted.append((started_s, ticket, step, moved))
        for message, parcel in receives:
            if message.tensor == "o":
                self.outputs.append((ticket, parcel, message))
            else:
                self.arriving.update({(message.tensor, piece): ticket for piece in message.pieces})

    def _attend(self, step: Attend) -> None:
        """Attend queries to keys as soon as both are here, and merge."""
        with self._traced("wait", step):
            self._await("q", step.queries)
            self._await("kv", step.keys)
        q_rows, kv_rows = self.q_rows[step.queries], self.kv_rows[step.slab][step.keys]
        if q_rows.start != q_rows.stop and kv_rows.start != kv_rows.stop:
            self._attend_rows(step, q_rows, kv_rows)
        if step.last:
            self.kv_S2BHD.pop(step.slab, None)

    def _attend_rows(self, step: Attend, q_rows: slice, kv_rows: slice) -> None:
        k, v = self.kv_S2BHD[step.slab][kv_rows].permute(1, 2, 3, 0, 4)
        if self.call.kv_of_q is not None:
            k, v = k.index_select(1, self.call.kv_of_q), v.index_select(1, self.call.kv_of_q)
        first = self.begun.isdisjoint(step.queries)
        self.begun.update(step.queries)
        with self._traced("compute", step):
            for start in range(q_rows.start, q_rows.stop, self.rows_at_once):
                rows = slice(start, min(start + self.rows_at_once, q_rows.stop))
                out, lse = self.attend(self.q_SBHD[rows].permute(1, 2, 0, 3), k, v)
                total_out, total_lse = self.o_SBHD[rows].permute(1, 2, 0, 3), self.lse_BHS[:, :, rows]
                if first:
                    total_out.copy_(out)
                    total_lse.copy_(lse)
                else:
                    merge_(total_out, total_lse, out, lse)

    def _collect(self) -> torch.Tensor:
        """Put the head groups of this rank's own tokens together; leave nothing posted."""
        call, layout = self.call, self.mesh.layout
        (query,) = self.local["q"]
        out_BSHD = query.new_empty(self.B, query.shape[2], query.shape[1], self.D)
        low, high = call.q_heads[layout.head_group(self.own)]
        out_BSHD[:, :, low:high] = self.o_SBHD[self.q_rows[(Piece(self.own),)]].transpose(0, 1)
        for ticket, parcel, message in self.outputs:
            ticket.wait()
            low, high = call.q_heads[layout.head_group(message.peer)]
            first, end = message.pieces[0].span(query.shape[2])
            out_BSHD[:, first:end, low:high] = parcel.tensor.transpose(0, 1)
        for lane in self.mesh.lanes.values():
            lane.drain()
        self._trace_wire()
        return out_BSHD.transpose(1, 2)

    # -- for a trace --------------------------------------------------------------------------------------------------

    def _traced(self, lane: str, step: Attend) -> AbstractContextManager[None]:
        if self.mesh.trace is None:
            return nullcontext()
        queries, keys = ("+".join(str(s) for s in sorted({p.source for p in x})) for x in (step.queries, step.keys))
        return self.mesh.trace.span(lane, f"Q {queries} x KV {keys}".replace(str(JOINT), "joint"), self.q_SBHD.device)

    def _trace_wire(self) -> None:
        """What arrived when, in rounds; where the transport knows."""
        if self.mesh.trace is None:
            return
        for started_s, ticket, step, moved in self.posted:
            if ticket.arrived_s is not None and moved:
                name = f"{step.receives[0].tensor} from {'+'.join(str(m.peer) for m in step.receives)}"
                self.mesh.trace.add(step.lane, name, started_s, ticket.arrived_s, moved)

    # -- chunks -------------------------------------------------------------------------------------------------------

    def _kv_tokens(self, source: int) -> int:
        return self.call.joint_tokens if source == JOINT else self.call.kv_tokens[source]

    def _pack(self, name: str, piece: Piece, group: int, place: bool = False) -> torch.Tensor:
        """This rank's own tokens in ``piece`` and the heads of ``group``, contiguous: [S,B,H,D] or [S,2,B,H,D]. In a
        tensor of their own, to be sent, or in their buffer."""
        low, high = (self.call.q_heads if name == "q" else self.call.kv_heads)[group]
        first, end = piece.span(self.local[name][0].shape[2])
        parts = [x[:, low:high, first:end].permute(2, 0, 1, 3) for x in self.local[name]]
        buffer = self._buffer(name, (piece,)) if place else None
        if name == "kv":
            return torch.stack(parts, dim=1, out=buffer)
        return parts[0].contiguous() if buffer is None else buffer.copy_(parts[0])

    def _place_joint(self, joint_key: torch.Tensor, joint_value: torch.Tensor, group: int) -> None:
        low, high = self.call.kv_heads[group]
        joint_S2BHD = self._buffer("kv", (Piece(JOINT),))
        for n, joint in enumerate((joint_key, joint_value)):
            joint_S2BHD[:, n] = joint[:, low:high].permute(2, 0, 1, 3)

    def _buffer(self, name: str, pieces: Sequence[Piece]) -> torch.Tensor:
        """The rows of ``pieces`` in their buffer; a slab's buffer is made when first asked for."""
        if name == "q":
            return self.q_SBHD[self.q_rows[pieces]]
        slab = self.slab_of[pieces[0]]
        if slab not in self.kv_S2BHD:
            self.kv_S2BHD[slab] = self.q_SBHD.new_empty(self.kv_rows[slab].total, 2, self.B, self.H_kv, self.D)
        return self.kv_S2BHD[slab][self.kv_rows[slab][pieces]]

    def _incoming(self, message: Message) -> torch.Tensor:
        if message.tensor != "o":
            return self._buffer(message.tensor, message.pieces)
        low, high = self.call.q_heads[self.mesh.layout.head_group(message.peer)]
        first, end = message.pieces[0].span(self.call.q_tokens[self.own])
        return self.q_SBHD.new_empty(end - first, self.B, high - low, self.D)

    def _outgoing(self, message: Message) -> torch.Tensor:
        """The chunk to send, contiguous: packed from the inputs, forwarded from a slab, or a final output."""
        if message.tensor == "o":
            return self.o_SBHD[self.q_rows[message.pieces]].to(self.q_SBHD.dtype)
        group = self.mesh.layout.head_group(message.peer)
        if group == self.mesh.layout.head_group(self.own):  # a ring neighbour
            self._await(message.tensor, message.pieces)
            return self._buffer(message.tensor, message.pieces)
        return self._pack(message.tensor, message.pieces[0], group)

    def _await(self, name: str, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            ticket = self.arriving.pop((name, piece), None)
            if ticket is not None:
                ticket.wait()
