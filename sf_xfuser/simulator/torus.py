"""Replays Torus Attention from its schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from typing import Literal

from sf_xfuser.layout.chunking import CallSize, choose_chunking, choose_granularity
from sf_xfuser.layout.memory_map import MemoryMap, Sizes
from sf_xfuser.layout.plan import Layout, head_ranges
from sf_xfuser.layout.program import Program
from sf_xfuser.layout.recorder import Placement, record
from sf_xfuser.layout.schedule import (
    JOINT,
    Attend,
    Chunking,
    Exchange,
    Granularity,
    Message,
    Piece,
    Schedule,
    build_schedule,
)
from sf_xfuser.simulator.call import ITEMSIZE, CallShape, SimulatedCall
from sf_xfuser.simulator.cluster import Cluster
from sf_xfuser.simulator.replay import Dependency, Replay, Round, RoundKey, Steps

MERGE_BYTES = 18
"""Bytes that ``kernels.merge`` reads and writes per element of a partial result: to fp32, then one lerp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorusVariant:
    """Torus Attention in a layout. ``pattern``: ``"put"`` (one-sided) or ``"message"`` (matched sends and receives).
    Without ``overlap``, it waits for each transfer. ``granularity`` None: chosen by ``choose_granularity``."""

    layout: Layout
    pattern: str = "put"
    overlap: bool = True
    granularity: Granularity | None = None

    def __str__(self) -> str:
        granularity = f", {self.granularity}" if self.granularity else ""
        return f"{self.layout}{granularity}{'' if self.overlap else ', no overlap'}"


class TorusCall(SimulatedCall):
    def __init__(self, cluster: Cluster, shape: CallShape, variant: TorusVariant) -> None:
        super().__init__(cluster, shape, overlap=variant.overlap)
        self.variant, self.layout = variant, variant.layout
        grid = cluster.num_machines, cluster.ranks_per_machine
        if (self.layout.num_machines, self.layout.ranks_per_machine) != grid:
            raise ValueError(f"{self.layout} does not fit {grid[0]} x {grid[1]} ranks")
        self._head_group = cache(self.layout.head_group)
        num_groups = self.layout.ulysses_degree
        # Equal token counts on all ranks; one token more or less does not matter.
        tokens = (math.ceil(shape.seq_len / cluster.world_size),) * cluster.world_size
        q_heads, kv_heads = head_ranges(shape.heads, shape.kv_heads, num_groups)
        self.sizes = Sizes(
            batch=shape.batch,
            head_size=shape.head_dim,
            itemsize=ITEMSIZE[shape.dtype],
            q_tokens=tokens,
            kv_tokens=tokens,
            joint_tokens=shape.joint_tokens,
            q_heads=q_heads,
            kv_heads=kv_heads,
        )
        self.tokens = tokens[0]
        self.heads = max(high - low for low, high in q_heads)
        self._row_bytes = {(x, g): self.sizes.row_bytes(x, g) for x in ("q", "kv", "o") for g in range(num_groups)}
        self.joint: Literal["front"] | None = "front" if shape.joint_tokens else None
        size = CallSize(
            q_tokens=self.tokens,
            kv_tokens=self.tokens,
            heads=shape.heads,
            head_size=shape.head_dim,
            batch=shape.batch,
        )
        self.chosen_granularity = choose_granularity(self.layout, size, cluster.device)
        granularity = variant.granularity or self.chosen_granularity
        self.chunking: Chunking = choose_chunking(self.layout, size, cluster.device, granularity)
        self.costs = {name: link.cost(variant.pattern) for name, link in self.links.items()}
        # Rates when all ranks of a machine send the same number of bytes.
        equal = [1.0] * cluster.ranks_per_machine
        self.seconds_per_byte = {
            name: link.transfer_s(equal, len(equal), self.costs[name]) for name, link in self.links.items()
        }

    @cached_property
    def is_symmetric(self) -> bool:
        return all(len({high - low for low, high in x}) == 1 for x in (self.sizes.q_heads, self.sizes.kv_heads))

    @property
    def egress_bytes(self) -> float:
        return float(self.layout.egress(Fraction(self.shape.kv_heads, self.shape.heads))) * self.shape.nbytes

    @cached_property
    def bound_s(self) -> float:
        """Chunks of Q, KV and O and the ring's blocks between machines; the ring's blocks inside a machine."""
        layout, granularity = self.layout, self.chunking.granularity
        slabs = layout.num_machines
        others = layout.torus - 1
        ulysses = 3 * others  # chunks of Q, KV and O, of U messages each
        ring = slabs - layout.torus
        hops = slabs * (layout.ring_inside - 1)
        rounds = 2 * others + -(-others // self.chunking.machines_at_once) + ring
        rounds_inside = hops if granularity == "block" else slabs * (hops > 0)
        if granularity == "unstaged":
            rounds, rounds_inside = 2 * (others > 0) + (ring > 0), int(hops > 0)
        across, inside = self.costs["across"], self.costs["inside"]
        across_s = (across.start_us * rounds + across.message_us * (ulysses * layout.ulysses + ring)) * 1e-6
        across_s += self.egress_bytes / layout.ranks_per_machine * self.seconds_per_byte["across"]
        block = 2 * self.shape.nbytes * self.shape.kv_heads / self.shape.heads / layout.world_size / layout.torus
        inside_s = (inside.start_us * rounds_inside + inside.message_us * hops) * 1e-6
        inside_s += hops * block * self.seconds_per_byte["inside"]
        busy_s, small_s = self._busy_s()
        # Minimum slowdown: transfers overlap first with calls that leave SMs idle, then with each other.
        slowdown_s = (
            across.compute_share * max(0.0, across_s - small_s),
            inside.compute_share * max(0.0, inside_s - small_s),
        )
        both_s = across.compute_share * inside.compute_share * max(0.0, min(across_s, inside_s) - small_s)
        return max(busy_s + sum(slowdown_s) - both_s, across_s, inside_s)

    def _busy_s(self) -> tuple[float, float]:
        """(minimum time in attention calls and merges, without joint keys; maximum part of it that leaves SMs idle)"""
        own = self.tokens * self.layout.ulysses
        busy_s = small_s = 0.0
        for rows, keys, merge_bytes, count in self._attends():
            seconds = self.times.attention_s(rows, keys, self.heads, merge_bytes) * count
            busy_s += seconds
            if not self.times.occupies_all(rows if rows > own else self.tokens, self.heads):  # may be one chunk
                small_s += seconds
        return busy_s, small_s

    def _attends(self) -> list[tuple[int, int, int, int]]:
        """At least the attention calls of the schedule: (queries, keys, bytes of a merge, number of calls)."""
        layout, cut = self.layout, self.chunking
        own, slab, blocks = self.tokens * layout.ulysses, self.tokens * layout.ranks_per_machine, layout.ring_inside
        every, remote = own * layout.torus, own * (layout.torus - 1)
        slabs, ring = layout.num_machines, layout.ring_across
        if cut.granularity == "unstaged":
            return [(every, slab * slabs, 0, 1)]
        if cut.granularity == "block":
            first = [(own, own, 0, blocks)]
            if layout.torus == 1:
                return [*first, (own, own, MERGE_BYTES, blocks * (slabs - 1))]
            middle, last = own // cut.kv_parts, own // cut.last_kv_parts
            return [
                *first,
                (own, slab, 0, layout.torus - 1),
                (own, slab, MERGE_BYTES, slabs - 1),
                (remote, own, MERGE_BYTES, blocks * (ring - 1)),
                (remote, middle, MERGE_BYTES, blocks * ring * (layout.torus - 2) * cut.kv_parts),
                (remote, last, MERGE_BYTES, blocks * ring * cut.last_kv_parts - 1),
                (own, last, MERGE_BYTES, layout.torus - 1),
            ]
        if layout.torus == 1:
            return [(own, slab, 0, 1), (own, slab, MERGE_BYTES, slabs - 1)]
        middle, last = slab // cut.kv_parts, slab // cut.last_kv_parts
        groups, rest = divmod(layout.torus - 1, cut.machines_at_once)
        of_group = own * cut.machines_at_once
        return [
            (own, slab, 0, 1),
            (of_group, slab, 0, groups),
            (own * rest, slab, 0, rest > 0),
            (every, slab, MERGE_BYTES, ring - 1),
            (every, middle, MERGE_BYTES, ring * (layout.torus - 2) * cut.kv_parts),
            (every, last, MERGE_BYTES, (ring - 1) * cut.last_kv_parts),
            (remote, last, MERGE_BYTES, cut.last_kv_parts - 1),
            (of_group, last, MERGE_BYTES, groups),
            (own * rest, last, MERGE_BYTES, rest > 0),
            (own, slab, MERGE_BYTES, 1),
        ]

    @property
    def num_launches(self) -> int:
        return self._program.launches

    @cached_property
    def _program(self) -> Program:
        """Of rank 0, with all chunks in scratch memory."""
        maps = {0: MemoryMap(self.first_schedule, self.sizes)}
        return record(self.first_schedule, self.sizes, Placement(memory_maps=maps, strides=[(0, 0, 0, 1)] * 5))

    @cached_property
    def first_schedule(self) -> Schedule:
        return self._schedule(0)

    def _schedule(self, position: int) -> Schedule:
        return build_schedule(self.layout, position, self.joint, self.chunking)

    def steps(self, replay: Replay, number: int) -> Steps:
        schedule = self._schedule(number) if number else self.first_schedule
        group = self.layout.head_group(number)
        q_low, q_high = self.sizes.q_heads[group]
        arriving: dict[str, dict[Piece, Dependency]] = {"q": {}, "kv": {}}
        outputs: list[Dependency] = []
        started: set[Piece] = set()
        dependency: Dependency | None
        for step in schedule.steps:
            if isinstance(step, Exchange):
                forwarded = [
                    (message.tensor, piece)
                    for message in step.sends
                    if self._forwards(message, group)
                    for piece in message.pieces
                ]
                after: list[Dependency] = []
                for tensor, piece in forwarded:
                    if self.one_sided and self.cluster.device == "cuda":  # a stream of its own waits
                        after += [arriving[tensor][piece]] if piece in arriving[tensor] else []
                    elif dependency := arriving[tensor].pop(piece, None):
                        replay.wait(number, (yield dependency), "to forward")
                key = self._post(replay, number, group, step, after)
                if not replay.symmetric:
                    yield None
                for message in step.receives:
                    dependency = (message.peer,), key
                    if message.tensor == "o":
                        outputs.append(dependency)
                    else:
                        arriving[message.tensor].update((piece, dependency) for piece in message.pieces)
                if not self.variant.overlap:
                    replay.wait(number, (yield tuple(m.peer for m in step.receives), key), "each transfer")
                continue
            name = _name(step) if replay.record_spans else "-"
            for tensor, pieces in (("q", step.queries), ("kv", step.keys)):
                for piece in pieces if arriving[tensor] else ():
                    if dependency := arriving[tensor].pop(piece, None):
                        replay.wait(number, (yield dependency), name)
            rows, keys = self._tokens(step.queries), self._tokens(step.keys)
            merge = MERGE_BYTES if not started.isdisjoint(step.queries) else 4 + self.times.itemsize
            if len(started) < len(schedule.queries):
                started.update(step.queries)
            if rows and keys:
                heads = q_high - q_low
                seconds = self.times.attention_s(rows, keys, heads, merge)
                replay.compute(number, seconds, name, self.times.occupies_all(rows, heads))
                if not replay.symmetric:
                    yield None
        for dependency in outputs:
            replay.wait(number, (yield dependency), "outputs")
        result = self.tokens * self.shape.heads * self.shape.head_dim * self.shape.batch * self.times.itemsize
        replay.compute(number, self.times.copy_s(result), "result", occupies_all=False)

    def _forwards(self, message: Message, group: int) -> bool:
        """Whether this rank forwards a received chunk along a ring."""
        return message.tensor != "o" and self._head_group(message.peer) == group

    def _tokens(self, pieces: Sequence[Piece]) -> int:
        total = 0
        for source, part, parts in pieces:
            if source == JOINT:
                total += self.shape.joint_tokens
            else:
                total += self.tokens * (part + 1) // parts - self.tokens * part // parts
        return total

    def _post(self, replay: Replay, number: int, group: int, step: Exchange, after: Sequence[Dependency]) -> RoundKey:
        cost, packed, nbytes, messages = self.costs[step.link], 0, 0, 0
        for message in step.sends:
            to = self._head_group(message.peer)
            row_bytes = self._row_bytes[message.tensor, group if message.tensor == "o" else to]
            size = row_bytes * self._tokens(message.pieces)
            nbytes += size
            messages += size > 0
            if message.tensor == "o" or to != group:
                packed += size
        host_s = self.times.host_s(cost, messages) + self.times.copy_s(packed)
        if host_s:
            replay.compute(number, host_s, occupies_all=False)
        round = Round(
            seconds=nbytes * self.seconds_per_byte[step.link] + (cost.start_us + cost.message_us * messages) * 1e-6,
            latency_s=self.links[step.link].latency_us * 1e-6,
            compute_share=cost.compute_share,
            needs_sms=cost.needs_sms,
            matched=self.variant.pattern == "message",
            after=tuple(dict.fromkeys(after)),
            receivers=tuple(m.peer for m in step.sends),
            senders=tuple(m.peer for m in step.receives),
            name=_round_name(step) if replay.record_spans else "",
            nbytes=nbytes,
        )
        return replay.post(number, step.link, round)

    @property
    def buffer_bytes(self) -> float:
        """Scratch memory, and windows of two halves in place of the chunks that peers write."""
        windows = MemoryMap(self.first_schedule, self.sizes, ("inside", "across") if self.one_sided else ())
        return self._program.scratch_bytes + windows.window_bytes

    @property
    def one_sided(self) -> bool:
        return self.variant.pattern == "put"


def _name(step: Attend) -> str:
    """The span's name in a measured timeline."""
    queries, keys = ("+".join(str(s) for s in sorted({p.source for p in x})) for x in (step.queries, step.keys))
    return f"Q {queries} x KV {keys}".replace(str(JOINT), "joint")


def _round_name(step: Exchange) -> str:
    return f"{step.receives[0].tensor} from {'+'.join(str(m.peer) for m in step.receives)}"
