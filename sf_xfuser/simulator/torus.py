"""Torus Attention, replayed from its schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from typing import Literal

from sf_xfuser.layout.memory_map import MemoryMap, Sizes
from sf_xfuser.layout.plan import Layout, head_ranges
from sf_xfuser.layout.schedule import (
    JOINT,
    Attend,
    Chunking,
    Exchange,
    Message,
    Piece,
    Schedule,
    build_schedule,
    choose_chunking,
)
from sf_xfuser.simulator.cluster import Cluster, Link, Way
from sf_xfuser.simulator.replay import Key, Program, Replay, Round
from sf_xfuser.simulator.variant import ITEMSIZE, CallShape, ReplayedVariant, Work

MERGE_BYTES = 18
"""Read and written for one element of a partial result by ``kernels.merge``: to fp32, then one lerp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorusVariant:
    """Torus Attention in a layout. ``pattern``: ``"put"`` (one-sided) or ``"message"`` (matched sends and receives);
    ``overlap`` False: each transfer is waited for at once. ``unstaged``: all attended in one call."""

    layout: Layout
    pattern: str = "put"
    overlap: bool = True
    unstaged: bool = False

    def __str__(self) -> str:
        return f"{self.layout}{'' if self.overlap else ', no overlap'}{', unstaged' if self.unstaged else ''}"


class Torus(ReplayedVariant):
    def __init__(self, cluster: Cluster, shape: CallShape, variant: TorusVariant) -> None:
        super().__init__(cluster, shape, Work(cluster, shape, overlap=variant.overlap))
        self.variant, self.layout = variant, variant.layout
        self._head_group = cache(variant.layout.head_group)
        world_size, ways = cluster.world_size, variant.layout.ulysses_degree
        # Evenly dealt out as far as that goes; an unequal token more or less is nothing.
        tokens = (math.ceil(shape.seq_len / world_size),) * world_size
        q_heads, kv_heads = head_ranges(shape.heads, shape.kv_heads, ways)
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
        self._row_bytes = {(x, g): self.sizes.row_bytes(x, g) for x in ("q", "kv", "o") for g in range(ways)}
        self.joint: Literal["front"] | None = "front" if shape.joint_tokens else None
        self.cut: Chunking = choose_chunking(variant.layout, self.tokens, cluster.device, overlap=not variant.unstaged)
        self.links: dict[str, Link] = {"inside": cluster.inside, "across": cluster.across}
        self.ways: dict[str, Way] = {name: link.way(variant.pattern) for name, link in self.links.items()}
        self.seconds_per_byte = {
            name: 8e-9 / link.share_gbps(cluster.ranks_per_machine) / self.ways[name].efficiency
            for name, link in self.links.items()
        }

    @cached_property
    def alike(self) -> bool:
        sizes = {high - low for low, high in self.sizes.q_heads}, {high - low for low, high in self.sizes.kv_heads}
        return all(len(found) == 1 for found in sizes)

    @property
    def bound_s(self) -> float:
        """Each chunk of Q and O and each slab is a round between machines, each further block of a slab one inside."""
        layout = self.layout
        slabs = layout.num_machines
        ratio = Fraction(self.shape.kv_heads, self.shape.heads)
        share = float(layout.egress(ratio)) * self.shape.nbytes / layout.ranks_per_machine
        ulysses = 3 * (layout.torus - 1)  # Q, KV and O, U messages each
        messages = ulysses * layout.ulysses + slabs - layout.torus
        across, inside = self.ways["across"], self.ways["inside"]
        across_s = (across.start_us * (ulysses + slabs - layout.torus) + across.message_us * messages) * 1e-6
        across_s += share * self.seconds_per_byte["across"]
        block = float(2 * ratio) * self.shape.nbytes / layout.world_size / layout.torus  # K and V of one head group
        passed_on = block * slabs * (layout.ring_inside - 1)
        inside_s = (inside.start_us + inside.message_us) * 1e-6 * slabs * (layout.ring_inside - 1)
        inside_s += passed_on * self.seconds_per_byte["inside"]
        busy_s, small_s = self._busy_s()
        # What transfers take from computing, if they lie beside the calls that leave it to them as far as that goes,
        # and the two links beside each other.
        taken = (across.takes * max(0.0, across_s - small_s), inside.takes * max(0.0, inside_s - small_s))
        both_s = across.takes * inside.takes * max(0.0, min(across_s, inside_s) - small_s)
        return max(busy_s + sum(taken) - both_s, across_s, inside_s)

    def _busy_s(self) -> tuple[float, float]:
        """In attention calls and merges, at the least (joint keys are left out); and in those of them that may leave
        multiprocessors idle, at the most."""
        layout, cut, heads = self.layout, self.cut, self.heads
        own, blocks = self.tokens * layout.ulysses, layout.ring_inside
        others, last = own * (layout.torus - 1), own // cut.last_kv_parts
        calls = [(own, own, 0, blocks)]  # queries, keys, bytes of a merge, how many calls
        if not cut.overlap:
            calls = [(own * layout.torus, own * blocks * layout.num_machines, 0, 1)]
        elif not others:
            calls += [(own, own, MERGE_BYTES, blocks * (layout.num_machines - 1))]
        else:
            calls += [
                (own, own * blocks, 0, layout.torus - 1),
                (own, own * blocks, MERGE_BYTES, layout.num_machines - 1),
                (others, own, MERGE_BYTES, blocks * (layout.ring_across - 1)),
                (
                    others,
                    own // cut.kv_parts,
                    MERGE_BYTES,
                    blocks * layout.ring_across * (layout.torus - 2) * cut.kv_parts,
                ),
                (others, last, MERGE_BYTES, blocks * layout.ring_across * cut.last_kv_parts - 1),
                (own, last, MERGE_BYTES, layout.torus - 1),
            ]
        busy_s = small_s = 0.0
        for rows, keys, merge_bytes, times in calls:
            seconds = self.work.attend(rows, keys, heads, merge_bytes) * times
            busy_s += seconds
            if not self.work.fills(rows if rows > own else self.tokens, heads):  # a chunk may be attended by itself
                small_s += seconds
        return busy_s, small_s

    @cached_property
    def first(self) -> Schedule:
        return self.schedule(0)

    def schedule(self, position: int) -> Schedule:
        return build_schedule(self.layout, position, self.joint, self.cut)

    def programs(self, replay: Replay) -> list[Program]:
        return [self._program(replay, number) for number in range(len(replay.ranks))]

    def _program(self, replay: Replay, position: int) -> Program:
        schedule = self.schedule(position) if position else self.first
        group = self.layout.head_group(position)
        q_low, q_high = self.sizes.q_heads[group]
        arriving: dict[str, dict[Piece, tuple[tuple[int, ...], Key]]] = {"q": {}, "kv": {}}
        outputs: list[tuple[tuple[int, ...], Key]] = []
        begun: set[Piece] = set()
        wanted: tuple[tuple[int, ...], Key] | None
        for step in schedule.steps:
            if isinstance(step, Exchange):
                for message in step.sends:
                    if self._passes_on(message, group):
                        for piece in message.pieces:
                            if wanted := arriving[message.tensor].pop(piece, None):
                                replay.wait(position, (yield wanted), "to pass on")
                key = self._post(replay, position, group, step)
                if not replay.mirrored:
                    yield None
                for message in step.receives:
                    whose = (message.peer,)
                    if message.tensor == "o":
                        outputs.append((whose, key))
                    else:
                        arriving[message.tensor].update((piece, (whose, key)) for piece in message.pieces)
                if not self.variant.overlap:
                    replay.wait(position, (yield tuple(m.peer for m in step.receives), key), "each transfer")
                continue
            name = _name(step) if replay.keep_spans else "-"
            for tensor, pieces in (("q", step.queries), ("kv", step.keys)):
                for piece in pieces if arriving[tensor] else ():
                    if wanted := arriving[tensor].pop(piece, None):
                        replay.wait(position, (yield wanted), name)
            rows, keys = self._tokens(step.queries), self._tokens(step.keys)
            merge = MERGE_BYTES if not begun.isdisjoint(step.queries) else 4 + self.work.itemsize
            if len(begun) < len(schedule.queries):
                begun.update(step.queries)
            if rows and keys:
                heads = q_high - q_low
                replay.work(position, self.work.attend(rows, keys, heads, merge), name, self.work.fills(rows, heads))
                if not replay.mirrored:
                    yield None
        for wanted in outputs:
            replay.wait(position, (yield wanted), "outputs")
        result = self.tokens * self.shape.heads * self.shape.head_dim * self.shape.batch * self.work.itemsize
        replay.work(position, self.work.copy(result), "result", fills=False)

    def _passes_on(self, message: Message, group: int) -> bool:
        return message.tensor != "o" and self._head_group(message.peer) == group

    def _tokens(self, pieces: Sequence[Piece]) -> int:
        total = 0
        for source, part, parts in pieces:
            if source == JOINT:
                total += self.shape.joint_tokens
            else:
                total += self.tokens * (part + 1) // parts - self.tokens * part // parts
        return total

    def _post(self, replay: Replay, position: int, group: int, step: Exchange) -> Key:
        way, packed, nbytes, messages = self.ways[step.link], 0, 0, 0
        for message in step.sends:
            to = self._head_group(message.peer)
            size = self._row_bytes[message.tensor, group if message.tensor == "o" else to] * self._tokens(
                message.pieces
            )
            nbytes += size
            messages += size > 0
            if message.tensor == "o" or to != group:
                packed += size
        host_s = self.work.host(way, messages) + self.work.copy(packed)
        if host_s:
            replay.work(position, host_s, fills=False)
        replay.post(
            position,
            step.link,
            Round(
                posted_s=0.0,
                seconds=nbytes * self.seconds_per_byte[step.link] + (way.start_us + way.message_us * messages) * 1e-6,
                latency_s=self.links[step.link].latency_us * 1e-6,
                takes=way.takes,
                queues=way.queues,
                matched=self.variant.pattern == "message",
                receivers=tuple(m.peer for m in step.sends),
                senders=tuple(m.peer for m in step.receives),
                name=_round_name(step) if replay.keep_spans else "",
                nbytes=nbytes,
            ),
        )
        return step.link, step.round

    @property
    def buffer_bytes(self) -> float:
        return held_bytes(self.first, self.sizes, in_windows=self.variant.pattern == "put")


def _name(step: Attend) -> str:
    """As ``attention._Run`` names it."""
    queries, keys = ("+".join(str(s) for s in sorted({p.source for p in x})) for x in (step.queries, step.keys))
    return f"Q {queries} x KV {keys}".replace(str(JOINT), "joint")


def _round_name(step: Exchange) -> str:
    return f"{step.receives[0].tensor} from {'+'.join(str(m.peer) for m in step.receives)}"


def held_bytes(schedule: Schedule, sizes: Sizes, *, in_windows: bool) -> int:
    """The most that a rank holds at once during a call, besides its inputs and result: accumulators (fp32), queries,
    slabs of KV and outputs that came from other ranks. ``in_windows``: what peers write lies in a window, which has all
    of it at once, twice (calls use its halves in turn)."""
    layout, group = schedule.layout, schedule.layout.head_group(schedule.position)
    places = MemoryMap(schedule, sizes, ("inside", "across") if in_windows else ())
    low, high = sizes.q_heads[group]
    accumulator = places.queries.total * sizes.batch * (high - low) * (sizes.head_size + 1) * 4
    if sum(isinstance(step, Attend) for step in schedule.steps) == 1:  # nothing to accumulate: what the call returned
        accumulator = places.queries.total * sizes.row_bytes("o", group)
    row = {tensor: sizes.row_bytes(tensor, group) for tensor in ("q", "kv")}
    if in_windows:
        return accumulator + 2 * places.window_bytes
    held = most = places.queries.total * row["q"]
    slabs: set[int] = set()
    for step in schedule.steps:
        if isinstance(step, Exchange):
            for message in step.receives:
                if message.tensor == "o":
                    tokens = sum(h - w for w, h in (p.span(sizes.q_tokens[p.source]) for p in message.pieces))
                    held += tokens * sizes.row_bytes("o", layout.head_group(message.peer))
                elif message.tensor == "kv" and (slab := places.slab_of[message.pieces[0]]) not in slabs:
                    slabs.add(slab)
                    held += places.slabs[slab].total * row["kv"]
        else:
            if step.slab not in slabs:
                slabs.add(step.slab)
                held += places.slabs[step.slab].total * row["kv"]
            most = max(most, held)
            if step.keys_last:
                held -= places.slabs[step.slab].total * row["kv"]
    return accumulator + max(most, held)
