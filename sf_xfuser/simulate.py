"""What one attention call takes on a cluster: the steps that the ranks run, replayed against its rates. Pure.

Torus Attention is replayed from ``schedule.build_schedule``, step by step, as ``attention._Run`` runs it; xDiT's USP,
flat Ulysses and Ring as xDiT 0.7 and PyTorch's ring template run them. A rank's rounds leave at its share of the link
while all of its machine send; when each may leave, and what slows computing down, ``replay`` says.

Where all ranks hold as many tokens and heads, a rotation of the mesh takes any rank to any other and the schedule with
it: all run in step, and what comes in a round comes when this rank's own has left. Then one rank is replayed for all.
``Replay`` of every rank gives the same times (a test holds it) and serves uneven calls and timelines.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from typing import Any, Literal

from sf_xfuser.cluster import Cluster, Link, Way
from sf_xfuser.places import Places, Sizes
from sf_xfuser.plan import Layout, head_ranges
from sf_xfuser.replay import Key, Program, Replay, Round
from sf_xfuser.schedule import JOINT, Attend, Cut, Exchange, Message, Piece, Schedule, build_schedule, choose_cut
from sf_xfuser.xdit_layouts import Sent, XditConfig, sent_by_a_hop, sent_by_ulysses, sent_in_a_call

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

MERGE_BYTES = 18
"""Read and written for one element of a partial result by ``kernels.merge``: to fp32, then one lerp."""
_RING_MERGE_BYTES = 38  # by PyTorch's ring (_SDPAMerger): six elementwise steps in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class CallShape:
    """One attention call: ``seq_len`` tokens of all ranks, of ``batch`` sequences, ``heads`` query and ``kv_heads`` key
    heads of ``head_dim``; ``joint_tokens`` that every rank holds besides, attended at the first KV."""

    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    dtype: str = "bfloat16"
    joint_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("seq_len", "heads", "kv_heads", "head_dim", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")
        if self.heads % self.kv_heads:
            fit = ", ".join(str(n) for n in range(1, self.heads + 1) if self.heads % n == 0)
            raise ValueError(f"kv_heads must divide {self.heads} heads (one of {fit}), got {self.kv_heads}")
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"dtype must be one of {', '.join(ITEMSIZE)}, got {self.dtype!r}")

    @property
    def nbytes(self) -> int:
        """Of Q: ``B*L*H*D`` elements."""
        return self.batch * self.seq_len * self.heads * self.head_dim * ITEMSIZE[self.dtype]

    @property
    def flops(self) -> float:
        keys = self.seq_len + self.joint_tokens
        return 4.0 * self.batch * self.heads * self.head_dim * self.seq_len * keys


@dataclass(frozen=True, slots=True, kw_only=True)
class TorusArm:
    """Torus Attention in a layout. ``pattern``: ``"put"`` (one-sided) or ``"message"`` (matched sends and receives);
    ``overlap`` False: each transfer is waited for at once. ``together``: no stages, all attended in one call."""

    layout: Layout
    pattern: str = "put"
    overlap: bool = True
    together: bool = False

    def __str__(self) -> str:
        return f"{self.layout}{'' if self.overlap else ', no overlap'}{', together' if self.together else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """``seconds`` of the slowest rank; ``compute_s``: its share of the call's attention at the full rate;
    ``exposed_s``: what the call takes longer than the rank computes (chunks, merges and copies count as computing).
    ``across_bytes`` leave the machine that sends most, ``inside_bytes`` the rank that sends most inside its machine;
    ``buffer_bytes``: what the call holds besides its inputs and result, windows included. ``timeline``: as the
    benchmark's, where it was asked for."""

    seconds: float
    compute_s: float
    exposed_s: float
    across_bytes: float
    inside_bytes: float
    buffer_bytes: float
    timeline: dict[str, Any] | None = None


def predict(cluster: Cluster, shape: CallShape, arm: TorusArm | XditConfig, *, every_rank: bool = False) -> Prediction:
    """What ``arm`` takes for one call of ``shape``. ``every_rank`` replays them all and keeps their timeline; without
    it one stands for all where they are alike. Raises ValueError where the arm does not fit the cluster."""
    if isinstance(arm, XditConfig):
        return _Usp(cluster, shape, arm).predict(every_rank)
    if (arm.layout.num_machines, arm.layout.ranks_per_machine) != (cluster.num_machines, cluster.ranks_per_machine):
        raise ValueError(f"{arm.layout} does not fit {cluster.num_machines} x {cluster.ranks_per_machine} ranks")
    return _Torus(cluster, shape, arm).predict(every_rank)


def bound(cluster: Cluster, shape: CallShape, arm: TorusArm | XditConfig) -> float:
    """Seconds that no order of ``arm``'s steps could beat: all that it computes, or all that a lane carries."""
    if isinstance(arm, XditConfig):
        usp = _Usp(cluster, shape, arm)
        return max(usp.work.alone_s, usp.wire_s)
    return _Torus(cluster, shape, arm).bound_s


# -- what pieces of work take -----------------------------------------------------------------------------------------


class _Work:
    """Seconds of compute on one rank. Where ranks share cores, what all of them do at once takes longer. Ranks that
    wait for each transfer (``overlap`` False) find a core free for what is short: it comes with their chunks, which the
    ranks of a machine do not get in the same moment."""

    def __init__(self, cluster: Cluster, shape: CallShape, *, overlap: bool = True) -> None:
        compute = cluster.compute
        self.shape, self.compute = shape, compute
        self.slower = max(1.0, cluster.world_size / compute.slots) if compute.slots else 1.0
        self.short_slower = self.slower if overlap else 1.0
        self.rate = compute.attention_rate(shape.dtype, shape.head_dim)
        self.memory = compute.memory_gbs * 1e9
        self.itemsize = ITEMSIZE[shape.dtype]
        self.alone_s = shape.flops / cluster.world_size / self.rate * self.slower

    def attend(self, rows: int, keys: int, heads: int, merge_bytes: int) -> float:
        """``rows`` of queries, each with ``heads`` local heads, to ``keys``; and the merge."""
        shape, compute = self.shape, self.compute
        seconds = 4.0 * shape.batch * rows * keys * heads * shape.head_dim / self.rate
        if compute.units:
            tiles = shape.batch * heads * math.ceil(rows / compute.tile_rows)
            seconds *= max(1.0, compute.units / tiles)
        merged = rows * heads * shape.batch * shape.head_dim * merge_bytes
        return (seconds + merged / self.memory) * self.slower + compute.attend_us * 1e-6 * self.short_slower

    def host(self, way: Way, messages: int) -> float:
        """What messages take from the thread that computes."""
        return way.host_us * 1e-6 * messages * self.short_slower

    def fills(self, rows: int, heads: int) -> bool:
        """Whether an attention call leaves no multiprocessor idle."""
        return self.shape.batch * heads * math.ceil(rows / self.compute.tile_rows) >= self.compute.units

    def copy(self, nbytes: float) -> float:
        """Read and written."""
        return 2.0 * nbytes / self.memory * self.slower


# -- an arm ----------------------------------------------------------------------------------------------------------


class _Arm(ABC):
    """What both kinds of arms share."""

    def __init__(self, cluster: Cluster, shape: CallShape, work: _Work) -> None:
        self.cluster, self.shape, self.work = cluster, shape, work

    @abstractmethod
    def programs(self, replay: Replay) -> list[Program]:
        """One for each rank of the replay."""

    @property
    @abstractmethod
    def alike(self) -> bool:
        """Whether one rank can stand for all."""

    @property
    @abstractmethod
    def buffer_bytes(self) -> float:
        """What a rank holds besides inputs and result."""

    def sent(self, replay: Replay) -> Sent:
        """Bytes that each rank sends inside its machine and to others."""
        each = self.cluster.world_size // len(replay.ranks)
        inside, across = ([rank.sent.get(lane, 0.0) for rank in replay.ranks] * each for lane in ("inside", "across"))
        return Sent(tuple(inside), tuple(across))

    def predict(self, every_rank: bool) -> Prediction:
        mirrored = self.alike and not every_rank
        replay = Replay(self.cluster.world_size, mirrored=mirrored, spans=every_rank)
        replay.run(self.programs(replay))
        ranks = replay.ranks
        slowest = max(ranks, key=lambda rank: rank.now)
        sent = self.sent(replay)
        return Prediction(
            seconds=slowest.now,
            compute_s=self.work.alone_s,
            exposed_s=slowest.now - slowest.computed_s,
            across_bytes=sent.out_of_a_machine(self.cluster.ranks_per_machine),
            inside_bytes=max(sent.inside),
            buffer_bytes=self.buffer_bytes,
            timeline=self._timeline(replay, slowest.now) if every_rank else None,
        )

    def _timeline(self, replay: Replay, seconds: float) -> dict[str, Any]:
        found = []
        for number, rank in enumerate(replay.ranks):
            spans = list(rank.spans)
            for lane, rounds in rank.rounds.items():
                for r in rounds:
                    if r.nbytes and r.start_s is not None:
                        span = {"lane": lane, "name": r.name, "start_s": r.start_s, "end_s": r.end_s + r.latency_s}
                        spans.append({**span, "bytes": int(r.nbytes)})
            spans.sort(key=lambda span: (span["start_s"], span["end_s"]))
            found.append({"rank": number, "machine": number // self.cluster.ranks_per_machine, "spans": spans})
        return {"duration_s": seconds, "ranks": found}


# -- Torus Attention --------------------------------------------------------------------------------------------------


class _Torus(_Arm):
    def __init__(self, cluster: Cluster, shape: CallShape, arm: TorusArm) -> None:
        super().__init__(cluster, shape, _Work(cluster, shape, overlap=arm.overlap))
        self.arm, self.layout = arm, arm.layout
        self._head_group = cache(arm.layout.head_group)
        world_size, ways = cluster.world_size, arm.layout.ulysses_degree
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
        self.cut: Cut = choose_cut(arm.layout, self.tokens, cluster.device, together=arm.together)
        self.links: dict[str, Link] = {"inside": cluster.inside, "across": cluster.across}
        self.ways: dict[str, Way] = {lane: link.way(arm.pattern) for lane, link in self.links.items()}
        self.seconds_per_byte = {
            lane: 8e-9 / link.share_gbps(cluster.ranks_per_machine) / self.ways[lane].efficiency
            for lane, link in self.links.items()
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
        # and the two lanes beside each other.
        taken = (across.takes * max(0.0, across_s - small_s), inside.takes * max(0.0, inside_s - small_s))
        both_s = across.takes * inside.takes * max(0.0, min(across_s, inside_s) - small_s)
        return max(busy_s + sum(taken) - both_s, across_s, inside_s)

    def _busy_s(self) -> tuple[float, float]:
        """In attention calls and merges, at the least (joint keys are left out); and in those of them that may leave
        multiprocessors idle, at the most."""
        layout, cut, heads = self.layout, self.cut, self.heads
        own, blocks = self.tokens * layout.ulysses, layout.ring_inside
        others, last = own * (layout.torus - 1), own // cut.last_kv
        calls = [(own, own, 0, blocks)]  # queries, keys, bytes of a merge, how many calls
        if cut.together:
            calls = [(own * layout.torus, own * blocks * layout.num_machines, 0, 1)]
        elif not others:
            calls += [(own, own, MERGE_BYTES, blocks * (layout.num_machines - 1))]
        else:
            calls += [
                (own, own * blocks, 0, layout.torus - 1),
                (own, own * blocks, MERGE_BYTES, layout.num_machines - 1),
                (others, own, MERGE_BYTES, blocks * (layout.ring_across - 1)),
                (others, own // cut.kv, MERGE_BYTES, blocks * layout.ring_across * (layout.torus - 2) * cut.kv),
                (others, last, MERGE_BYTES, blocks * layout.ring_across * cut.last_kv - 1),
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
                if not self.arm.overlap:
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
        way, packed, nbytes, messages = self.ways[step.lane], 0, 0, 0
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
            step.lane,
            Round(
                posted_s=0.0,
                seconds=nbytes * self.seconds_per_byte[step.lane] + (way.start_us + way.message_us * messages) * 1e-6,
                latency_s=self.links[step.lane].latency_us * 1e-6,
                takes=way.takes,
                queues=way.queues,
                matched=self.arm.pattern == "message",
                receivers=tuple(m.peer for m in step.sends),
                senders=tuple(m.peer for m in step.receives),
                name=_round_name(step) if replay.keep_spans else "",
                nbytes=nbytes,
            ),
        )
        return step.lane, step.round

    @property
    def buffer_bytes(self) -> float:
        return held_bytes(self.first, self.sizes, in_windows=self.arm.pattern == "put")


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
    places = Places(schedule, sizes, ("inside", "across") if in_windows else ())
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


# -- xDiT's -----------------------------------------------------------------------------------------------------------


class _Usp(_Arm):
    """All-to-all of Q, of K, of V, each waited for; the ring, block by block; all-to-all of O. PyTorch's ring gathers
    all KV at once while the first block is attended, or passes blocks on while it attends the last one it got."""

    def __init__(self, cluster: Cluster, shape: CallShape, config: XditConfig) -> None:
        super().__init__(cluster, shape, _Work(cluster, shape))
        self.config = config
        grid = cluster.num_machines, cluster.ranks_per_machine
        self.exchanged: Sent = sent_by_ulysses(config, *grid)
        self.hop: Sent = sent_by_a_hop(config, *grid)
        self.kv_bytes = shape.nbytes * shape.kv_heads / shape.heads
        self._seconds_per_byte: dict[tuple[str, str], float] = {}

    @cached_property
    def alike(self) -> bool:
        return True  # every collective goes as its slowest rank

    def sent(self, replay: Replay) -> Sent:
        """Ranks alike in time need not send as much to other machines."""
        grid = self.cluster.num_machines, self.cluster.ranks_per_machine
        of_a_call = sent_in_a_call(self.config, *grid, self.shape.kv_heads / self.shape.heads)
        return Sent(*(tuple(x * self.shape.nbytes for x in lane) for lane in (of_a_call.inside, of_a_call.across)))

    def programs(self, replay: Replay) -> list[Program]:
        return [self._program(replay, number) for number in range(len(replay.ranks))]

    def _program(self, replay: Replay, number: int) -> Program:
        config, shape, work = self.config, self.shape, self.work
        rank_bytes = shape.nbytes / self.cluster.world_size
        if config.ulysses_degree > 1:
            inputs = (("q", shape.nbytes), ("k", self.kv_bytes), ("v", self.kv_bytes))
            for name, nbytes in (("qkv", shape.nbytes + 2 * self.kv_bytes),) if config.combine_qkv else inputs:
                replay.work(number, work.copy(nbytes / self.cluster.world_size), "copy", fills=False)
                yield from self._collective(replay, number, name, "exchange", self.exchanged, nbytes)
                replay.work(number, work.copy(nbytes / self.cluster.world_size), "copy", fills=False)
        if shape.kv_heads < shape.heads:  # xDiT repeats KV heads now, and the ring moves them so
            replay.work(number, work.copy(rank_bytes + self.kv_bytes / self.cluster.world_size), "copy", fills=False)
        heads = shape.heads // config.ulysses_degree
        rows = math.ceil(shape.seq_len * config.ulysses_degree / self.cluster.world_size)
        ring = config.ring_degree
        for block in range(ring):
            if block:
                yield from self._await_hop(replay, number, block)
            if block < ring - 1 and (block == 0 or config.rotation == "alltoall"):
                replay.work(number, work.copy(4 * rank_bytes), "copy", fills=False)
                hops = ring - 1 if config.rotation == "allgather" else 1
                self._start(replay, number, "kv", config.rotation, self.hop, 2 * shape.nbytes * hops, ring, hops)
            keys = rows + (shape.joint_tokens if block == 0 else 0)
            merge = _RING_MERGE_BYTES if block else 4 + work.itemsize if ring > 1 else 0
            seconds = work.attend(rows, keys, heads, merge)
            if block == 2 and config.rotation == "allgather" and not replay.keep_spans:
                # All blocks are here: the rest at once.
                replay.work(number, seconds * (ring - block), fills=work.fills(rows, heads))
                break
            replay.work(number, seconds, f"block {block}", work.fills(rows, heads))
        if config.ulysses_degree > 1:
            replay.work(number, work.copy(rank_bytes), "copy", fills=False)
            yield from self._collective(replay, number, "o", "exchange", self.exchanged, shape.nbytes)
            replay.work(number, work.copy(rank_bytes), "copy", fills=False)

    def _await_hop(self, replay: Replay, number: int, block: int) -> Program:
        if self.config.rotation == "allgather" and block > 1:
            return
        replay.wait(number, (yield (number,), ("across", self._rounds(replay, number) - 1)), "KV")
        replay.wait(number, (yield (number,), ("inside", self._rounds(replay, number) - 1)), "KV")

    def _rounds(self, replay: Replay, number: int) -> int:
        return len(replay.ranks[number].rounds["across"])

    def _collective(self, replay: Replay, number: int, name: str, pattern: str, sent: Sent, nbytes: float) -> Program:
        self._start(replay, number, name, pattern, sent, nbytes, self.config.ulysses_degree, 1)
        for lane in ("across", "inside"):
            replay.wait(number, (yield (number,), (lane, self._rounds(replay, number) - 1)), name)

    def _start(
        self,
        replay: Replay,
        number: int,
        name: str,
        pattern: str,
        sent: Sent,
        nbytes: float,
        members: int,
        hops: int,
    ) -> None:
        for lane, fractions in (("across", sent.across), ("inside", sent.inside)):
            seconds, way, latency_s = self._collective_s(lane, fractions, pattern, nbytes, members, hops)
            round = Round(
                posted_s=0.0,
                seconds=seconds,
                latency_s=latency_s,
                takes=way.takes if seconds and (lane == "across" or not any(sent.across)) else 0.0,
                queues=way.queues,
                matched=False,
                receivers=(),
                senders=(),
                name=f"{name} {pattern}",
                nbytes=fractions[number] * nbytes,
            )
            replay.post(number, lane, round)

    def _collective_s(
        self, lane: str, fractions: tuple[float, ...], pattern: str, nbytes: float, members: int, hops: int
    ) -> tuple[float, Way, float]:
        """(seconds, the way, latency)"""
        link = self.cluster.across if lane == "across" else self.cluster.inside
        way = link.way(pattern, members)
        if not any(fractions):
            return 0.0, way, 0.0
        if (per_byte := self._seconds_per_byte.get((lane, pattern))) is None:
            per_byte = link.seconds(fractions, self.cluster.ranks_per_machine, way)
            self._seconds_per_byte[lane, pattern] = per_byte
        messages = (members - 1) if pattern == "exchange" else hops
        return per_byte * nbytes + (way.start_us + way.message_us * messages) * 1e-6, way, hops * link.latency_us * 1e-6

    @property
    def wire_s(self) -> float:
        """All that crosses machines, one after the other."""
        ring, total = self.config.ring_degree, 0.0
        if self.config.ulysses_degree > 1:
            way = self.cluster.across.way("exchange", self.config.ulysses_degree)
            nbytes = 2 * self.shape.nbytes + 2 * self.kv_bytes
            total += self.cluster.across.seconds(
                [part * nbytes for part in self.exchanged.across], self.cluster.ranks_per_machine, way
            )
        if ring > 1:
            way = self.cluster.across.way(self.config.rotation, ring)
            nbytes = 2 * self.shape.nbytes * (ring - 1)
            total += self.cluster.across.seconds(
                [part * nbytes for part in self.hop.across], self.cluster.ranks_per_machine, way
            )
        return total

    @property
    def buffer_bytes(self) -> float:
        """Q, K, V after the all-to-all, repeated KV, what the ring gathers or passes on, a partial result in fp32, O as
        sent."""
        rank, kv = self.shape.nbytes / self.cluster.world_size, self.kv_bytes / self.cluster.world_size
        held = (rank + 2 * kv) if self.config.ulysses_degree > 1 else 0.0
        if self.config.ring_degree > 1:
            gathered = self.config.ring_degree if self.config.rotation == "allgather" else 2
            held += 2 * rank * (gathered + 1) + 2 * rank * 4 / self.work.itemsize
        elif self.shape.kv_heads < self.shape.heads:
            held += 2 * rank
        return held + rank
