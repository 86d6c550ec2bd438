"""The schedule of a Torus Attention call: the steps of one rank, as plain data. No tensors, no communication.

One call, seen from one rank:

1. The rank holds Q, K and V of its own tokens, and computes one head group: Q of T*U ranks against KV of all ranks.
2. It starts to receive Q from other machines (remote), then receives Q and KV from the ranks of its machine (local).
3. It attends each Q to the local KV while the remote KV arrives, and merges partial results by log-sum-exp.
4. It attends the remote Q to the remote KV next, and sends each remote output (O) back as soon as it is final.
5. It attends the local Q to the last remote KV at the end, while the outputs are sent.

Example: 2 machines x 2 ranks, T=2, U=2. Ranks 0 and 1 are on machine 0. ``Q2`` is Q of rank 2's tokens, for the heads
of the rank that attends it. KV between machines comes in two parts, ``a`` and ``b``.

    step    rank 0 attends        rank 2 attends        on the wire meanwhile
    1       Q0 x KV0              Q2 x KV2              across: Q, KVa     inside: Q, KV
    2       Q1 x KV0 KV1          Q3 x KV2 KV3          across: Q, KVa
    3       Q0 x KV1              Q2 x KV3              across: Q, KVa
    4       Q2 Q3 x KV0 KV1       Q0 Q1 x KV2 KV3       across: KVa, KVb
    5       Q2 Q3 x KV2a KV3a     Q0 Q1 x KV0a KV1a     across: KVb
    6       Q2 Q3 x KV2b KV3b     Q0 Q1 x KV0b KV1b     nothing: no O is final yet
    7       Q1 x KV2 KV3          Q3 x KV0 KV1          across: O2 O3 to machine 1, O0 O1 to machine 0
    8       Q0 x KV2 KV3          Q2 x KV0 KV1          inside: O1 to rank 1, O3 to rank 3, and back

``layout/plan.py`` defines the coordinates (t, u, r_x, r_i) of a rank. It receives KV in *slabs*, one per machine. Slab
(i, j_x) comes from machine (t-i, r_x-j_x), in parts. Each part has R_i *blocks*, one per step of the ring inside the
machine. Part p of block j_i holds part p of ranks (t-i, u', r_x-j_x, r_i-j_i) for all u', own u first.

Rules:

- Machines are visited in rotation (receive from t-1, t-2, ...; send to t+1, t+2, ...). So a machine sends to one
  machine and receives from one machine at a time.
- Exchanges are *rounds*. Round k of a link on one rank matches round k of that link on every peer. NCCL's grouped sends
  and receives need this.
- Rounds between machines are posted ``LOOKAHEAD`` arrivals ahead or more, in the order in which they are needed. So the
  wire does not wait for compute. The transport keeps the order.
- A remote slab is split into *parts* (``Chunking``). No O can be sent before the last KV part has arrived, and the wire
  idles from then until the first O is final (step 6). Smaller parts shorten that gap.
- The local Q attends the last ``DEFERRED_SLABS`` slabs at the end (``"slab"``: the last one). No other machine waits
  for this attention, so it covers the O transfers.
- ``Chunking.granularity`` is how much one attention call attends. Small calls hide more of the transfers, but each call
  costs a launch, a merge, and a GPU that is not full:

    ``"block"``     each block as it arrives (the example). The ring forwards blocks from rank to rank.
    ``"slab"``      a part of a slab at once: the ring inside the machine is one round, in which each rank sends its
                    first block to all others.
    ``"unstaged"``  everything at once, with the keys in sequence order: all inputs, one attention call, all outputs.
                    For short calls, and for ranks of one host, where chunks arrive at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, zip_longest
from typing import Literal, NamedTuple, TypeVar, get_args

from sf_xfuser.layout.plan import Layout

JOINT = -1
"""Pseudo source of the joint (text) keys and values, which every rank holds."""

LOOKAHEAD = 2
"""Arrivals between machines that are posted beyond the one about to be consumed. Two keep the wire busy; more only hold
more receive buffers."""

DEFERRED_SLABS = 2
"""Last slabs that the local machine's queries attend at the end. More slabs cover more of the O transfers, but hold
more KV in memory."""

_T = TypeVar("_T")
Link = Literal["inside", "across"]
Granularity = Literal["block", "slab", "unstaged"]
Tensor = Literal["q", "kv", "o"]
JointEnd = Literal["front", "rear"]
_INPUTS: tuple[Tensor, ...] = ("q", "kv")


class Piece(NamedTuple):
    """Part ``part`` of ``parts`` of the tokens of rank ``source``."""

    source: int
    part: int = 0
    parts: int = 1

    def span(self, tokens: int) -> tuple[int, int]:
        """Half-open row range of this piece among the ``tokens`` of its source."""
        return tokens * self.part // self.parts, tokens * (self.part + 1) // self.parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunking:
    """Number of parts per slab of KV from other machines (``kv_parts``) and of the last machine (``last_kv_parts``).
    ``granularity``: how much one attention call attends (the module's rules). ``"unstaged"`` does not split KV.
    ``machines_at_once``, only for ``"slab"``: other machines whose queries attend the local and the last slab together.
    """

    kv_parts: int = 1
    last_kv_parts: int = 1
    granularity: Granularity = "block"
    machines_at_once: int = 1

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"granularity must be one of {get_args(Granularity)}, got {self.granularity!r}")
        if self.granularity == "unstaged" and (self.kv_parts, self.last_kv_parts) != (1, 1):
            raise ValueError(f"{self}: unstaged needs kv_parts=1 and last_kv_parts=1")
        if self.granularity != "slab" and self.machines_at_once != 1:
            raise ValueError(f"{self}: {self.granularity} needs machines_at_once=1")


@dataclass(frozen=True, slots=True)
class Message:
    """Pieces of one tensor, sent to or received from ``peer``. They are adjacent in the buffers of both ranks. For
    ``"o"``, the source of a piece is the rank that receives the output."""

    tensor: Tensor
    pieces: tuple[Piece, ...]
    peer: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """Start sends and receives without waiting for them. Forwarding received pieces first waits for those."""

    link: Link
    round: int
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Attend:
    """Wait for ``queries`` and ``keys``, attend, and merge the result. ``keys_last``: no later step reads this slab.
    ``queries_last``: no later step reads these queries, so their output is final."""

    queries: tuple[Piece, ...]
    keys: tuple[Piece, ...]
    slab: int
    keys_last: bool = False
    queries_last: bool = False


Step = Exchange | Attend


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The steps of one rank. ``queries`` and each slab list their pieces in buffer order. ``remote``: the queries of
    other machines, at the end of ``queries``; empty if some step attends them together with local ones."""

    layout: Layout
    position: int
    queries: tuple[Piece, ...]
    remote: tuple[Piece, ...]
    slabs: tuple[tuple[Piece, ...], ...]
    steps: tuple[Step, ...]


def build_schedule(
    layout: Layout, position: int, joint: JointEnd | None = None, chunking: Chunking = Chunking()
) -> Schedule:
    """The steps of the rank at ``position``. ``joint``: attend the joint keys with the first or the last KV, as xDiT's
    USP does. ``chunking`` must be the same on every rank."""
    return _Builder(layout, position, joint, chunking).build()


class _Builder:
    def __init__(self, layout: Layout, position: int, joint: JointEnd | None, chunking: Chunking) -> None:
        self.layout, self.position, self.joint = layout, position, joint
        self.t, self.u, self.r_x, self.r_i = layout.coordinates(position)
        self.steps: list[Step] = []
        self.rounds: dict[Link, int] = {"inside": 0, "across": 0}
        self.granularity, self.machines_at_once = chunking.granularity, chunking.machines_at_once
        # By machine offset. KV of the local machine is not split.
        kv_parts = ([1] + [chunking.kv_parts] * (layout.torus - 2) + [chunking.last_kv_parts])[: layout.torus]
        # queries[i] and slabs[k][part][block] are the U pieces of one arrival.
        self.queries = [self._pieces(i, 0, 0, 0, 1) for i in range(layout.torus)]
        self.remote = _flatten(self.queries[1:])
        self.slabs = [
            [[self._block(i, j_x, j_i, part, parts) for j_i in range(layout.ring_inside)] for part in range(parts)]
            for i, parts in enumerate(kv_parts)
            for j_x in range(layout.ring_across)
        ]
        # (tensor, machine offset or slab, part), in order
        self.arrivals: list[tuple[Tensor, int, int]] = [("q", i, 0) for i in range(1, layout.torus)]
        self.arrivals += [("kv", k, part) for k in range(1, len(self.slabs)) for part in range(len(self.slabs[k]))]
        self.lookahead = max(LOOKAHEAD, self.machines_at_once)
        if layout.ring_across > 1:  # a forward must be posted before its slab is released
            self.lookahead = max(self.lookahead, *kv_parts)
        self.posted = 0

    def _pieces(self, i: int, j_x: int, j_i: int, part: int, parts: int) -> tuple[Piece, ...]:
        """One part of the U chunks of block (i, j_x, j_i), own u first."""
        return tuple(
            Piece(self.layout.position(self.t - i, self.u + du, self.r_x - j_x, self.r_i - j_i), part, parts)
            for du in range(self.layout.ulysses)
        )

    def _block(self, i: int, j_x: int, j_i: int, part: int, parts: int) -> tuple[Piece, ...]:
        """``_pieces`` in slab order: if unstaged, sequence order."""
        pieces = self._pieces(i, j_x, j_i, part, parts)
        return tuple(sorted(pieces)) if self.granularity == "unstaged" else pieces

    def build(self) -> Schedule:
        slabs: tuple[tuple[Piece, ...], ...]
        if self.granularity == "unstaged":
            slabs = (self._add_unstaged(),)
        else:
            (self._add_blocks if self.granularity == "block" else self._add_slabs)()
            slabs = tuple(self._with_joint(self._slab(k)) for k in range(len(self.slabs)))
        return Schedule(
            layout=self.layout,
            position=self.position,
            queries=_flatten(self.queries),
            remote=self.remote if self.granularity == "block" else (),
            slabs=slabs,
            steps=tuple(self._mark_last()),
        )

    def _add_unstaged(self) -> tuple[Piece, ...]:
        """All inputs, one attention call, all outputs. Returns the keys, in sequence order."""
        others = range(1, self.layout.torus)
        if others:
            self._pull_chunks([(tensor, i, 0) for i in others for tensor in _INPUTS])
        if self.layout.ulysses > 1:
            self._post_local_inputs()
        if self.layout.ring_across > 1:
            self._gather_across()
        if self.layout.ring_inside > 1:
            self._gather_inside([blocks for parts in self.slabs for blocks in parts])
        keys = tuple(sorted(_flatten(self._with_joint(self._slab(k)) for k in range(len(self.slabs)))))
        keys = (*keys[1:], keys[0]) if self.joint == "rear" else keys  # JOINT sorts first
        self.steps.append(Attend(_flatten(self.queries), keys, 0))
        if others:
            self._push_across(others)
        if self.layout.ulysses > 1:
            self._push_inside()
        return keys

    def _add_slabs(self) -> None:
        """Few attention calls with many queries: all queries attend a slab at once, except where that would delay the
        first attention call or the outputs."""
        local, last_slab, others = self.queries[0], len(self.slabs) - 1, range(1, self.layout.torus)
        groups = [others[n : n + self.machines_at_once] for n in range(0, len(others), self.machines_at_once)]
        self._post_across(arriving=-1)
        if self.layout.ulysses > 1:
            self._post_local_inputs()
            self._post_across(arriving=-1)
        self._attend(local, 0, self._gather_part(0, 0))
        for group in groups:
            self._post_across(arriving=group[-1] - 1)
            self._attend(_flatten(self.queries[i] for i in group), 0, self._slab(0))
        arriving = self.layout.torus - 2
        for k in range(1, len(self.slabs)):
            for part in range(len(self.slabs[k])):
                arriving += 1
                self._post_across(arriving)
                keys = self._gather_part(k, part)
                if not self._is_last(keys):
                    self._attend(_flatten(self.queries) if k < last_slab else self.remote, k, keys)
                    continue
                for group in groups:
                    self._attend(_flatten(self.queries[i] for i in group), k, keys)
                    self._push_across(group)
        if last_slab:
            self._attend(local, last_slab, self._slab(last_slab))
        if self.layout.ulysses > 1:
            self._push_inside()

    def _add_blocks(self) -> None:
        self._attend_local_slab()
        for i in range(1, self.layout.torus):
            self._post_across(arriving=i - 1)
            self._attend(self.queries[i], 0, self._slab(0))
        if self.layout.torus == 1:
            self._pull_kv_for_local_queries()
        else:
            self._pull_kv()

    # -- stages of "block" --------------------------------------------------------------------------------------------

    def _attend_local_slab(self) -> None:
        """Attend the rank's own chunk at once, then the other chunks of the machine as they arrive."""
        own, others = self.queries[0][:1], self.queries[0][1:]
        arrivals = self._ring_inside(0, 0)
        self._post_across(arriving=-1)
        if others:
            self._post_local_inputs()
            self._attend(own, 0, self.slabs[0][0][0][:1])
            self._post_across(arriving=-1)
            first = next(arrivals)
            self._attend(others, 0, first)
            if self._is_last(first):
                self._push_inside()
            self._attend(own, 0, first[1:])
        for keys in arrivals:
            self._attend_local_queries(0, keys)

    def _pull_kv_for_local_queries(self) -> None:
        """T=1: a ring across machines. There is no remote Q and no O between machines."""
        for k in range(1, len(self.slabs)):
            self._post_across(arriving=k - 1)
            for keys in self._ring_inside(k, 0):
                self._attend_local_queries(k, keys)

    def _attend_local_queries(self, k: int, keys: tuple[Piece, ...]) -> None:
        """If these are the last keys, attend the queries of other ranks first, so that their outputs leave early."""
        own, others = self.queries[0][:1], self.queries[0][1:]
        if others and self._is_last(keys):
            self._attend(others, k, keys)
            self._push_inside()
            self._attend(own, k, keys)
        else:
            self._attend(self.queries[0], k, keys)

    def _pull_kv(self) -> None:
        last_slab = len(self.slabs) - 1
        deferred = range(max(1, last_slab - DEFERRED_SLABS + 1), last_slab + 1)
        arriving = self.layout.torus - 2
        for k in range(1, len(self.slabs)):
            for part in range(len(self.slabs[k])):
                arriving += 1
                self._post_across(arriving)
                for keys in self._ring_inside(k, part):
                    if self._is_last(keys):
                        self._push_remote_outputs(k, keys)
                    else:
                        self._attend(self.remote, k, keys)
            if k not in deferred:
                self._attend_local_queries(k, self._slab(k))
        for k in deferred:
            self._attend_local_queries(k, self._slab(k))

    def _push_remote_outputs(self, k: int, keys: tuple[Piece, ...]) -> None:
        """Attend the last keys machine by machine, and send each O chunk as soon as it is final."""
        for i in range(1, self.layout.torus):
            self._attend(self.queries[i], k, keys)
            self._push_across([i])

    # -- keys ---------------------------------------------------------------------------------------------------------

    def _attend(self, queries: tuple[Piece, ...], k: int, keys: tuple[Piece, ...]) -> None:
        self.steps.append(Attend(queries, self._with_joint(keys), k))

    def _slab(self, k: int) -> tuple[Piece, ...]:
        return _flatten(_flatten(self.slabs[k]))

    def _is_last(self, keys: tuple[Piece, ...]) -> bool:
        return keys[-1] == self.slabs[-1][-1][-1][-1]

    def _with_joint(self, keys: tuple[Piece, ...]) -> tuple[Piece, ...]:
        """The joint keys go before the first or after the last keys."""
        if self.joint == "front" and keys[0] == self.slabs[0][0][0][0]:
            return (Piece(JOINT), *keys)
        if self.joint == "rear" and self._is_last(keys):
            return (*keys, Piece(JOINT))
        return keys

    def _mark_last(self) -> Iterator[Step]:
        attends = [(at, step) for at, step in enumerate(self.steps) if isinstance(step, Attend)]
        slab_at = {step.slab: at for at, step in attends}
        query_at = {piece: at for at, step in attends for piece in step.queries}
        for at, step in enumerate(self.steps):
            if isinstance(step, Attend):
                last, final = slab_at[step.slab] == at, all(query_at[piece] == at for piece in step.queries)
                if last or final:
                    step = replace(step, keys_last=last, queries_last=final)
            yield step

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _exchange(self, link: Link, sends: Iterable[Message], receives: Iterable[Message]) -> None:
        self.steps.append(Exchange(link, self.rounds[link], tuple(sends), tuple(receives)))
        self.rounds[link] += 1

    def _post_local_inputs(self) -> None:
        """Exchange Q, K and V chunks between the U ranks of the machine that share a ring coordinate."""
        peers = [piece.source for piece in self.queries[0][1:]]
        self._exchange(
            "inside",
            (Message(x, (Piece(self.position),), peer) for peer in peers for x in _INPUTS),
            (Message(x, (Piece(peer),), peer) for peer in peers for x in _INPUTS),
        )

    def _post_across(self, arriving: int) -> None:
        """Post rounds between machines, up to ``lookahead`` beyond the arrival about to be consumed. Stop at a round
        that forwards a part (ring across machines) which is not among the arrivals yet."""
        while self.posted < len(self.arrivals) and self.posted <= arriving + self.lookahead:
            kind, index, part = self.arrivals[self.posted]
            i, j_x = (index, 0) if kind == "q" else divmod(index, self.layout.ring_across)
            if j_x == 0:
                self._pull_chunks([(kind, i, part)])
            elif self._can_forward(index - 1, part, arriving):
                self._forward_slab(index, part)
            else:
                return
            self.posted += 1

    def _can_forward(self, k: int, part: int, arriving: int) -> bool:
        """Whether the part has been received, or for the local slab, whether its exchange has been posted."""
        if k == 0:
            return self.layout.ulysses == 1 or self.rounds["inside"] > 0
        return self.arrivals.index(("kv", k, part)) <= arriving

    def _pull_chunks(self, arrivals: Sequence[tuple[Tensor, int, int]]) -> None:
        """Ulysses across machines: for each (tensor, i, part), send own chunks to machine t+i, receive those of t-i."""
        sends: list[Message] = []
        receives: list[Message] = []
        for i, of_machine in groupby(arrivals, key=lambda arrival: arrival[1]):
            chunks = [
                (tensor, self.queries[i] if tensor == "q" else self.slabs[i * self.layout.ring_across][part][0])
                for tensor, _, part in of_machine
            ]
            own = [(tensor, pieces[0]._replace(source=self.position)) for tensor, pieces in chunks]
            sends += (Message(tensor, (piece,), peer) for peer in self._ranks_of_machine(i) for tensor, piece in own)
            receives += (Message(tensor, (piece,), piece.source) for tensor, pieces in chunks for piece in pieces)
        self._exchange("across", sends, receives)

    def _ranks_of_machine(self, i: int) -> list[int]:
        """The U ranks of machine t+i with the same ring coordinates."""
        return [self.layout.position(self.t + i, self.u + du, self.r_x, self.r_i) for du in range(self.layout.ulysses)]

    def _forward_slab(self, k: int, part: int) -> None:
        """Ring across machines: forward a part of the first block of slab k-1, receive that of slab k."""
        after = self.layout.position(self.t, self.u, self.r_x + 1, self.r_i)
        before = self.layout.position(self.t, self.u, self.r_x - 1, self.r_i)
        self._exchange(
            "across",
            (Message("kv", self.slabs[k - 1][part][0], after),),
            (Message("kv", self.slabs[k][part][0], before),),
        )

    def _ring_inside(self, k: int, part: int) -> Iterator[tuple[Piece, ...]]:
        """Ring inside the machine, for a part of a slab: forward each block, receive the next. Yields the blocks."""
        blocks = self.slabs[k][part]
        after = self.layout.position(self.t, self.u, self.r_x, self.r_i + 1)
        before = self.layout.position(self.t, self.u, self.r_x, self.r_i - 1)
        for block, following in zip_longest(blocks, blocks[1:]):
            if following:
                self._exchange("inside", [Message("kv", block, after)], [Message("kv", following, before)])
            yield block

    def _gather_part(self, k: int, part: int) -> tuple[Piece, ...]:
        """The keys of a part of a slab, from the ring inside the machine."""
        blocks = self.slabs[k][part]
        if len(blocks) > 1:
            self._gather_inside([blocks])
        return _flatten(blocks)

    def _gather_inside(self, slabs: Sequence[Sequence[tuple[Piece, ...]]]) -> None:
        """Ring inside the machine in one round: send the first block of each slab to all ranks of the ring, receive
        theirs."""
        shifts = range(1, self.layout.ring_inside)
        after, before = (
            [self.layout.position(self.t, self.u, self.r_x, self.r_i + sign * j_i) for j_i in shifts]
            for sign in (1, -1)
        )
        self._exchange(
            "inside",
            (Message("kv", blocks[0], peer) for peer in after for blocks in slabs),
            (Message("kv", blocks[j_i], peer) for j_i, peer in zip(shifts, before, strict=True) for blocks in slabs),
        )

    def _gather_across(self) -> None:
        """Ring across machines in one round: send the first block of each slab that came from its own rank to all ranks
        of the ring, receive theirs."""
        ring = self.layout.ring_across
        firsts = [parts[0][0] for parts in self.slabs]
        after, before = (
            [self.layout.position(self.t, self.u, self.r_x + sign * j_x, self.r_i) for j_x in range(1, ring)]
            for sign in (1, -1)
        )
        self._exchange(
            "across",
            (Message("kv", block, peer) for peer in after for block in firsts[::ring]),
            (Message("kv", block, peer) for j_x, peer in enumerate(before, 1) for block in firsts[j_x::ring]),
        )

    def _push_across(self, machines: Sequence[int]) -> None:
        """For each i, send a final O chunk to machine t-i, receive one from machine t+i."""
        self._exchange(
            "across",
            (Message("o", (piece,), piece.source) for i in machines for piece in self.queries[i]),
            (Message("o", (Piece(self.position),), peer) for i in machines for peer in self._ranks_of_machine(i)),
        )

    def _push_inside(self) -> None:
        """Send final outputs to the other ranks of the local machine, and receive theirs."""
        others = self.queries[0][1:]
        self._exchange(
            "inside",
            (Message("o", (piece,), piece.source) for piece in others),
            (Message("o", (Piece(self.position),), piece.source) for piece in others),
        )


def _flatten(groups: Iterable[Iterable[_T]]) -> tuple[_T, ...]:
    return tuple(chain.from_iterable(groups))
