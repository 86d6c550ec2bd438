"""Torus Attention: runs one rank's schedule. Shapes are in names: B batch, H heads, S tokens, D head size.

Chunks travel and wait as [S, B, H, D], so that chunks of several ranks lie one after the other in one buffer and each
is contiguous; ``attend`` sees [B, H, S, D] views of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch

from sf_xfuser.call import Call, agree
from sf_xfuser.kernels import AttendFunction, merge_, sdpa_attend
from sf_xfuser.mesh import Mesh
from sf_xfuser.schedule import JOINT, Attend, Exchange, Message
from sf_xfuser.transport import Parcel, Ticket

_SLOT = {"q": 0, "k": 1, "v": 2, "o": 3}


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
    """Where each source's tokens lie in a buffer of chunks: ``rows[a, ..., b]`` is the slice from a to b."""

    def __init__(self, sources: Sequence[int], tokens: Sequence[int]) -> None:
        ends = list(accumulate(tokens, initial=0))
        self.total = ends[-1]
        self._span = {source: slice(ends[i], ends[i + 1]) for i, source in enumerate(sources)}

    def __getitem__(self, sources: Sequence[int]) -> slice:
        return slice(self._span[sources[0]].start, self._span[sources[-1]].stop)


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
        self.local = {"q": query, "k": key, "v": value}
        self.joint = {"k": joint_key, "v": joint_value}
        schedule = call.schedule
        self.own = schedule.position
        group = mesh.layout.head_group(self.own)
        self.B, _, _, self.D = query.shape
        self.H, self.H_kv = (high - low for low, high in (call.q_heads[group], call.kv_heads[group]))

        self.q_rows = _Rows(schedule.queries, [call.q_tokens[s] for s in schedule.queries])
        self.q_SBHD = query.new_empty(self.q_rows.total, self.B, self.H, self.D)
        self.o_SBHD = query.new_empty(self.q_rows.total, self.B, self.H, self.D, dtype=torch.float32)
        self.lse_BHS = query.new_empty(self.B, self.H, self.q_rows.total, dtype=torch.float32)
        self.begun: set[int] = set()  # queries whose accumulator holds something
        self.slab_of = {source: n for n, slab in enumerate(schedule.slabs) for source in slab}
        self.kv_rows = [_Rows(slab, [self._kv_tokens(s) for s in slab]) for slab in schedule.slabs]
        self.kv_SBHD: dict[int, dict[str, torch.Tensor]] = {}
        self.arriving: dict[tuple[str, int], Ticket] = {}
        self.outputs: list[tuple[Ticket, Parcel, int]] = []

        self._place("q", self.own, self._head_slice("q", group))
        for name in ("k", "v"):
            self._place(name, self.own, self._head_slice(name, group))
            joint = self.joint[name]
            if joint is not None:
                low, high = call.kv_heads[group]
                self._place(name, JOINT, joint[:, low:high].permute(2, 0, 1, 3))

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
        ticket = self.mesh.lanes[step.lane].exchange(
            step.round,
            [parcel for parcel in sends if parcel.tensor.numel()],
            [parcel for _, parcel in receives if parcel.tensor.numel()],
        )
        for message, parcel in receives:
            if message.tensor == "o":
                self.outputs.append((ticket, parcel, message.peer))
            else:
                self.arriving.update({(message.tensor, source): ticket for source in message.sources})

    def _attend(self, step: Attend) -> None:
        """Attend queries to keys as soon as both are here, and merge."""
        slab = self.slab_of[step.keys[-1]]
        self.kv_SBHD.pop(slab - 1, None)  # slabs are attended in order: the one before is not needed any more
        q_rows, kv_rows = self.q_rows[step.queries], self.kv_rows[slab][step.keys]
        self._await("q", step.queries)
        self._await("k", step.keys)
        self._await("v", step.keys)
        if q_rows.start == q_rows.stop or kv_rows.start == kv_rows.stop:
            return
        q, k, v = (
            x[rows].permute(1, 2, 0, 3)
            for x, rows in (
                (self.q_SBHD, q_rows),
                (self.kv_SBHD[slab]["k"], kv_rows),
                (self.kv_SBHD[slab]["v"], kv_rows),
            )
        )
        if self.call.kv_of_q is not None:
            k, v = k.index_select(1, self.call.kv_of_q), v.index_select(1, self.call.kv_of_q)
        out, lse = self.attend(q, k, v)
        total_out, total_lse = self.o_SBHD[q_rows].permute(1, 2, 0, 3), self.lse_BHS[:, :, q_rows]
        if self.begun.isdisjoint(step.queries):
            total_out.copy_(out)
            total_lse.copy_(lse)
            self.begun.update(step.queries)
        else:
            merge_(total_out, total_lse, out, lse)

    def _collect(self) -> torch.Tensor:
        """Put the head groups of this rank's own tokens together; leave nothing posted."""
        call, layout = self.call, self.mesh.layout
        query = self.local["q"]
        out_BSHD = query.new_empty(self.B, query.shape[2], query.shape[1], self.D)
        low, high = call.q_heads[layout.head_group(self.own)]
        out_BSHD[:, :, low:high] = self.o_SBHD[self.q_rows[(self.own,)]].transpose(0, 1)
        for ticket, parcel, peer in self.outputs:
            ticket.wait()
            low, high = call.q_heads[layout.head_group(peer)]
            out_BSHD[:, :, low:high] = parcel.tensor.transpose(0, 1)
        for lane in self.mesh.lanes.values():
            lane.drain()
        return out_BSHD.transpose(1, 2)

    # -- chunks -------------------------------------------------------------------------------------------------------

    def _kv_tokens(self, source: int) -> int:
        return self.call.joint_tokens if source == JOINT else self.call.kv_tokens[source]

    def _head_slice(self, name: str, group: int) -> torch.Tensor:
        low, high = (self.call.q_heads if name == "q" else self.call.kv_heads)[group]
        return self.local[name][:, low:high].permute(2, 0, 1, 3)

    def _place(self, name: str, source: int, chunk_SBHD: torch.Tensor) -> None:
        self._buffer(name, (source,)).copy_(chunk_SBHD)

    def _buffer(self, name: str, sources: Sequence[int]) -> torch.Tensor:
        """The rows of ``sources`` in their buffer; a slab's buffers are made when first asked for."""
        if name == "q":
            return self.q_SBHD[self.q_rows[sources]]
        slab = self.slab_of[sources[0]]
        if slab not in self.kv_SBHD:
            shape = (self.kv_rows[slab].total, self.B, self.H_kv, self.D)
            self.kv_SBHD[slab] = {x: self.q_SBHD.new_empty(shape) for x in ("k", "v")}
        return self.kv_SBHD[slab][name][self.kv_rows[slab][sources]]

    def _incoming(self, message: Message) -> torch.Tensor:
        if message.tensor != "o":
            return self._buffer(message.tensor, message.sources)
        low, high = self.call.q_heads[self.mesh.layout.head_group(message.peer)]
        return self.q_SBHD.new_empty(self.call.q_tokens[self.own], self.B, high - low, self.D)

    def _outgoing(self, message: Message) -> torch.Tensor:
        """The chunk to send, contiguous: packed from the inputs, forwarded from a slab, or a final output."""
        if message.tensor == "o":
            return self.o_SBHD[self.q_rows[message.sources]].to(self.q_SBHD.dtype)
        if self.mesh.layout.head_group(message.peer) == self.mesh.layout.head_group(self.own):  # a ring neighbour
            self._await(message.tensor, message.sources)
            return self._buffer(message.tensor, message.sources)
        return self._head_slice(message.tensor, self.mesh.layout.head_group(message.peer)).contiguous()

    def _await(self, name: str, sources: Sequence[int]) -> None:
        for source in sources:
            ticket = self.arriving.pop((name, source), None)
            if ticket is not None:
                ticket.wait()
