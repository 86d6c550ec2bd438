"""Torus Attention as data: (layout, position) -> the steps one rank takes in one attention call. Pure.

Positions, degrees and groups are those of ``plan.Layout``. ``X[src]`` is the *chunk* of X that holds ``src``'s tokens
and this rank's head group. KV arrives in *slabs*, one per machine of origin, each made of R_i *blocks* of U chunks:

    slab (i, j_x)   block j_i         sources (t-i, u', r_x-j_x, r_i-j_i) for all u', own u first

    stage           computes                                      meanwhile on the wire
    0               Q[own machine] x slab 0, block by block       Q chunks of machine t-1, t-2, ...
    Pull Q   i      Q[machine t-i] x slab 0                       remaining Q, then KV chunks
    Pull KV  k      all Q x slab k, block by block                the next slab
    Push O          last block: Q of remote machines first        each O chunk as soon as it is final

Machine order is a rotation (in: t-1, t-2, ...; out: t+1, t+2, ...), so a machine sends to one machine and receives
from one at a time. Exchanges are *rounds*: the k-th round of a lane on one rank matches the k-th round of that lane on
every peer, which is what NCCL's grouped sends and receives need. Rounds are posted ``LOOKAHEAD`` stages ahead: deep
enough that the wire never waits for compute, shallow enough that receive buffers stay few.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sf_xfuser.plan import Layout

LOOKAHEAD = 2
JOINT = -1
"""Pseudo source of the joint (text) keys and values, which every rank already holds."""

Lane = Literal["inside", "across"]
Tensor = Literal["q", "k", "v", "o"]


@dataclass(frozen=True, slots=True)
class Message:
    """Chunks of one tensor that go to, or come from, one peer. ``sources`` name whose tokens; they are adjacent in
    the buffers of both ends. For ``"o"`` the source is the rank the output returns to."""

    tensor: Tensor
    sources: tuple[int, ...]
    peer: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """Start sends and receives; returns at once. A send of received chunks first waits for them."""

    lane: Lane
    round: int
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Attend:
    """Attend ``queries`` to ``keys`` (sources; waits for both) and merge."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]


Step = Exchange | Attend


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One rank's call. ``queries`` and each slab of ``slabs`` list sources in the order of their buffers."""

    layout: Layout
    position: int
    queries: tuple[int, ...]
    slabs: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]


def build_schedule(layout: Layout, position: int, joint: Literal["front", "rear"] | None = None) -> Schedule:
    """The steps of ``position``. ``joint`` places the joint keys at the first or at the last KV, as xDiT's USP does."""
    return _Builder(layout, position, joint).build()


class _Builder:
    def __init__(self, layout: Layout, position: int, joint: Literal["front", "rear"] | None) -> None:
        self.layout = layout
        self.own = position
        self.joint = joint
        self.t, self.u, self.r_x, self.r_i = layout.coordinates(position)
        self.steps: list[Step] = []
        self.rounds: dict[Lane, int] = {"inside": 0, "across": 0}
        # Q sources by machine offset, and KV blocks by slab; own chunk first.
        self.q_by_machine = [self._local(i, 0, 0) for i in range(layout.torus)]
        self.slabs = [
            [self._local(i, j_x, j_i) for j_i in range(layout.ring_inside)]
            for i in range(layout.torus)
            for j_x in range(layout.ring_across)
        ]
        self.arrivals = [("q", i) for i in range(1, layout.torus)] + [("kv", k) for k in range(1, len(self.slabs))]
        self.posted = 0

    def _local(self, i: int, j_x: int, j_i: int) -> tuple[int, ...]:
        """The U ranks of one machine that hold block (i, j_x, j_i), own u first."""
        return tuple(
            self.layout.position(self.t - i, self.u + du, self.r_x - j_x, self.r_i - j_i)
            for du in range(self.layout.ulysses)
        )

    def build(self) -> Schedule:
        self._own_slab()
        for i in range(1, self.layout.torus):
            self._post_across(arriving=i - 1, present_slab=0)
            self.steps.append(Attend(self.q_by_machine[i], self._keys(0)))
        for k in range(1, len(self.slabs)):
            self._post_across(arriving=self.layout.torus - 1 + k - 1, present_slab=k)
            for block in range(self.layout.ring_inside):
                self._post_ring_inside(k, block)
                self._attend_block(k, block)
        slabs = [tuple(source for block in slab for source in block) for slab in self.slabs]
        if self.joint == "front":
            slabs[0] = (JOINT, *slabs[0])
        elif self.joint == "rear":
            slabs[-1] = (*slabs[-1], JOINT)
        return Schedule(
            layout=self.layout,
            position=self.own,
            queries=tuple(source for machine in self.q_by_machine for source in machine),
            slabs=tuple(slabs),
            steps=tuple(self.steps),
        )

    # -- stages ---------------------------------------------------------------------------------------------------

    def _own_slab(self) -> None:
        """Stage 0: the own chunk at once, then the other chunks of the machine as they arrive."""
        own, others = self.q_by_machine[0][:1], self.q_by_machine[0][1:]
        self._post_across(arriving=-1, present_slab=-1)
        if others:
            self._post_local_inputs()
            self.steps.append(Attend(own, self._keys(0, 0, slice(0, 1))))
            self._post_across(arriving=-1, present_slab=0)
            self._post_ring_inside(0, 0)
            self.steps.append(Attend(others, self._keys(0, 0)))
            if self._is_last(0, 0):
                self._push_outputs(0)
            self.steps.append(Attend(own, self._keys(0, 0, slice(1, None))))
        else:
            self._post_across(arriving=-1, present_slab=0)
            self._post_ring_inside(0, 0)
            self.steps.append(Attend(own, self._keys(0, 0)))
        for block in range(1, self.layout.ring_inside):
            self._post_ring_inside(0, block)
            self._attend_block(0, block)

    def _attend_block(self, k: int, block: int) -> None:
        machines = self.q_by_machine if k > 0 else self.q_by_machine[:1]
        keys = self._keys(k, block)
        if not self._is_last(k, block):
            self.steps.append(Attend(tuple(source for machine in machines for source in machine), keys))
            return
        for i in range(1, len(machines)):
            self.steps.append(Attend(machines[i], keys))
            self._push_outputs(i)
        own, others = machines[0][:1], machines[0][1:]
        if others:
            self.steps.append(Attend(others, keys))
            self._push_outputs(0)
        self.steps.append(Attend(own, keys))

    def _is_last(self, k: int, block: int) -> bool:
        return k == len(self.slabs) - 1 and block == self.layout.ring_inside - 1

    def _keys(self, k: int, block: int | None = None, part: slice = slice(None)) -> tuple[int, ...]:
        """Sources of a slab, a block of it, or a part of that block; with the joint keys where they belong."""
        blocks = self.slabs[k] if block is None else [self.slabs[k][block][part]]
        keys = tuple(source for one in blocks for source in one)
        if self.joint == "front" and keys[0] == self.own:
            return (JOINT, *keys)
        if self.joint == "rear" and keys[-1] == self.slabs[-1][-1][-1]:
            return (*keys, JOINT)
        return keys

    # -- rounds ---------------------------------------------------------------------------------------------------

    def _exchange(self, lane: Lane, sends: Iterator[Message], receives: Iterator[Message]) -> None:
        self.steps.append(Exchange(lane, self.rounds[lane], tuple(sends), tuple(receives)))
        self.rounds[lane] += 1

    def _post_local_inputs(self) -> None:
        """Q, K and V chunks between the U ranks of one machine that share a ring coordinate."""
        peers = self.q_by_machine[0][1:]
        self._exchange(
            "inside",
            (Message(x, (self.own,), peer) for peer in peers for x in ("q", "k", "v")),
            (Message(x, (peer,), peer) for peer in peers for x in ("q", "k", "v")),
        )

    def _post_across(self, arriving: int, present_slab: int) -> None:
        """Post the rounds between machines up to ``LOOKAHEAD`` beyond the arrival that is about to be consumed.

        A round that forwards a slab (ring across machines) cannot start before that slab is here.
        """
        while self.posted < len(self.arrivals) and self.posted <= arriving + LOOKAHEAD:
            kind, index = self.arrivals[self.posted]
            j_x = index % self.layout.ring_across
            if kind == "kv" and j_x > 0:
                if index - 1 > present_slab:
                    return
                self._forward_slab(index)
            else:
                i = index if kind == "q" else index // self.layout.ring_across
                self._pull_chunks(("q",) if kind == "q" else ("k", "v"), i)
            self.posted += 1

    def _pull_chunks(self, tensors: tuple[Tensor, ...], i: int) -> None:
        """Ulysses across machines: send to machine t+i, receive from machine t-i."""
        to = [self.layout.position(self.t + i, self.u + du, self.r_x, self.r_i) for du in range(self.layout.ulysses)]
        self._exchange(
            "across",
            (Message(x, (self.own,), peer) for peer in to for x in tensors),
            (Message(x, (source,), source) for source in self._local(i, 0, 0) for x in tensors),
        )

    def _forward_slab(self, k: int) -> None:
        """Ring across machines: pass the first block of slab k-1 on, receive that of slab k."""
        after = self.layout.position(self.t, self.u, self.r_x + 1, self.r_i)
        before = self.layout.position(self.t, self.u, self.r_x - 1, self.r_i)
        self._exchange(
            "across",
            (Message(x, self.slabs[k - 1][0], after) for x in ("k", "v")),
            (Message(x, self.slabs[k][0], before) for x in ("k", "v")),
        )

    def _post_ring_inside(self, k: int, block: int) -> None:
        """Ring inside the machine: pass this block on, receive the next one of the slab."""
        if block + 1 == self.layout.ring_inside:
            return
        after = self.layout.position(self.t, self.u, self.r_x, self.r_i + 1)
        before = self.layout.position(self.t, self.u, self.r_x, self.r_i - 1)
        self._exchange(
            "inside",
            (Message(x, self.slabs[k][block], after) for x in ("k", "v")),
            (Message(x, self.slabs[k][block + 1], before) for x in ("k", "v")),
        )

    def _push_outputs(self, i: int) -> None:
        """Return final outputs to machine t-i (the other ranks of the own machine for i = 0); receive from t+i."""
        if i == 0:
            owners = holders = self.q_by_machine[0][1:]
        else:
            owners = self.q_by_machine[i]
            holders = tuple(
                self.layout.position(self.t + i, self.u + du, self.r_x, self.r_i) for du in range(self.layout.ulysses)
            )
        self._exchange(
            "across" if i else "inside",
            (Message("o", (owner,), owner) for owner in owners),
            (Message("o", (self.own,), holder) for holder in holders),
        )
