"""xDiT's USP, flat Ulysses and Ring, replayed as xDiT and PyTorch run them."""

from __future__ import annotations

import math
from functools import cached_property

from sf_xfuser.layout.usp_layouts import Traffic, XditConfig, call_traffic, ring_hop_traffic, ulysses_traffic
from sf_xfuser.simulator.cluster import Cluster, Way
from sf_xfuser.simulator.replay import Program, Replay, Round
from sf_xfuser.simulator.variant import CallShape, ReplayedVariant, Work

_RING_MERGE_BYTES = 38  # by PyTorch's ring (_SDPAMerger): six elementwise steps in fp32


class Usp(ReplayedVariant):
    """All-to-all of Q, of K, of V, each waited for; the ring, block by block; all-to-all of O. PyTorch's ring gathers
    all KV at once while the first block is attended, or passes blocks on while it attends the last one it got."""

    def __init__(self, cluster: Cluster, shape: CallShape, config: XditConfig) -> None:
        super().__init__(cluster, shape, Work(cluster, shape))
        self.config = config
        grid = cluster.num_machines, cluster.ranks_per_machine
        self.exchanged: Traffic = ulysses_traffic(config, *grid)
        self.hop: Traffic = ring_hop_traffic(config, *grid)
        self.kv_bytes = shape.nbytes * shape.kv_heads / shape.heads
        self._seconds_per_byte: dict[tuple[str, str], float] = {}

    @cached_property
    def alike(self) -> bool:
        return True  # every collective goes as its slowest rank

    def sent(self, replay: Replay) -> Traffic:
        """Ranks alike in time need not send as much to other machines."""
        grid = self.cluster.num_machines, self.cluster.ranks_per_machine
        of_a_call = call_traffic(self.config, *grid, self.shape.kv_heads / self.shape.heads)
        return Traffic(*(tuple(x * self.shape.nbytes for x in link) for link in (of_a_call.inside, of_a_call.across)))

    def programs(self, replay: Replay) -> list[Program]:
        return [self._program(replay, number) for number in range(len(replay.ranks))]

    def _program(self, replay: Replay, number: int) -> Program:
        config, shape, work = self.config, self.shape, self.work
        rank_bytes = shape.nbytes / self.cluster.world_size
        if config.ulysses_degree > 1:
            for name, nbytes in (("q", shape.nbytes), ("k", self.kv_bytes), ("v", self.kv_bytes)):
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

    def _collective(
        self, replay: Replay, number: int, name: str, pattern: str, sent: Traffic, nbytes: float
    ) -> Program:
        self._start(replay, number, name, pattern, sent, nbytes, self.config.ulysses_degree, 1)
        for link in ("across", "inside"):
            replay.wait(number, (yield (number,), (link, self._rounds(replay, number) - 1)), name)

    def _start(
        self,
        replay: Replay,
        number: int,
        name: str,
        pattern: str,
        sent: Traffic,
        nbytes: float,
        members: int,
        hops: int,
    ) -> None:
        for link, fractions in (("across", sent.across), ("inside", sent.inside)):
            seconds, way, latency_s = self._collective_s(link, fractions, pattern, nbytes, members, hops)
            round = Round(
                posted_s=0.0,
                seconds=seconds,
                latency_s=latency_s,
                takes=way.takes if seconds and (link == "across" or not any(sent.across)) else 0.0,
                queues=way.queues,
                matched=False,
                receivers=(),
                senders=(),
                name=f"{name} {pattern}",
                nbytes=fractions[number] * nbytes,
            )
            replay.post(number, link, round)

    def _collective_s(
        self, link_name: str, fractions: tuple[float, ...], pattern: str, nbytes: float, members: int, hops: int
    ) -> tuple[float, Way, float]:
        """(seconds, the way, latency)"""
        link = self.cluster.across if link_name == "across" else self.cluster.inside
        way = link.way(pattern, members)
        if not any(fractions):
            return 0.0, way, 0.0
        if (per_byte := self._seconds_per_byte.get((link_name, pattern))) is None:
            per_byte = link.seconds(fractions, self.cluster.ranks_per_machine, way)
            self._seconds_per_byte[link_name, pattern] = per_byte
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
