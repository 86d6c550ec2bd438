"""Replays xDiT's USP, flat Ulysses and Ring as xDiT and PyTorch run them."""

from __future__ import annotations

import math
from functools import cache

from sf_xfuser.layout.usp_layouts import Traffic, XditConfig, call_traffic, ring_hop_traffic, ulysses_traffic
from sf_xfuser.simulator.call import CallShape, SimulatedCall
from sf_xfuser.simulator.cluster import Cluster
from sf_xfuser.simulator.replay import Replay, Round, RoundKey, Steps

_RING_MERGE_BYTES, _RING_MERGE_STEPS = 38, 6  # per element, and elementwise steps in fp32, of PyTorch's _SDPAMerger


class UspCall(SimulatedCall):
    """All-to-alls of Q, K and V, each followed by a wait; the ring, block by block; all-to-all of O. PyTorch's ring
    gathers all KV during the first block, or forwards each block while it attends the previous one."""

    is_symmetric = True  # a collective takes the time of its slowest rank

    def __init__(self, cluster: Cluster, shape: CallShape, config: XditConfig) -> None:
        super().__init__(cluster, shape)
        self.config = config
        grid = cluster.num_machines, cluster.ranks_per_machine
        self.exchange: Traffic = ulysses_traffic(config, *grid)
        self.hop: Traffic = ring_hop_traffic(config, *grid)
        self.traffic: Traffic = call_traffic(config, *grid, shape.kv_heads / shape.heads)
        self.kv_bytes = shape.nbytes * shape.kv_heads / shape.heads
        self._byte_s = cache(self._seconds_per_byte)

    def sent(self, replay: Replay) -> Traffic:
        """Ranks with equal times may send different numbers of bytes to other machines."""
        links = (self.traffic.inside, self.traffic.across)
        return Traffic(*(tuple(part * self.shape.nbytes for part in link) for link in links))

    @property
    def egress_bytes(self) -> float:
        return self.traffic.egress(self.cluster.ranks_per_machine) * self.shape.nbytes

    @property
    def num_launches(self) -> int:
        """Per collective a copy before it, the collective, and a wait; after an all-to-all another copy. Per block of
        the ring an attention call and the elementwise steps of its merge."""
        blocks = self.config.ring_degree
        exchanges = 4 * (self.config.ulysses_degree > 1)
        hops = (blocks > 1) if self.config.rotation == "allgather" else blocks - 1
        return 4 * exchanges + 3 * hops + blocks + _RING_MERGE_STEPS * (blocks - 1)

    @property
    def bound_s(self) -> float:
        exchanged = 2 * self.shape.nbytes + 2 * self.kv_bytes
        across_s = self._byte_s("across", "exchange") * exchanged
        across_s += self._byte_s("across", self.config.rotation) * 2 * self.shape.nbytes * (self.config.ring_degree - 1)
        return max(self.times.total_s, across_s)

    @property
    def buffer_bytes(self) -> float:
        """Q, K and V after the all-to-all, repeated KV, the ring's KV blocks, a partial result in fp32, and O."""
        rank, kv = self.shape.nbytes / self.cluster.world_size, self.kv_bytes / self.cluster.world_size
        held = (rank + 2 * kv) if self.config.ulysses_degree > 1 else 0.0
        if self.config.ring_degree > 1:
            gathered = self.config.ring_degree if self.config.rotation == "allgather" else 2
            held += 2 * rank * (gathered + 1) + 2 * rank * 4 / self.times.itemsize
        elif self.shape.kv_heads < self.shape.heads:
            held += 2 * rank
        return held + rank

    def steps(self, replay: Replay, number: int) -> Steps:
        config, shape, times = self.config, self.shape, self.times
        world_size, ring = self.cluster.world_size, config.ring_degree

        def copy(nbytes: float) -> None:
            replay.compute(number, times.copy_s(nbytes / world_size), "copy", occupies_all=False)

        def exchange(name: str, nbytes: float) -> Steps:
            copy(nbytes)
            for key in self._post(replay, number, name, "exchange", nbytes):
                replay.wait(number, (yield (number,), key), name)
            copy(nbytes)

        if config.ulysses_degree > 1:
            for name, nbytes in (("q", shape.nbytes), ("k", self.kv_bytes), ("v", self.kv_bytes)):
                yield from exchange(name, nbytes)
        if shape.kv_heads < shape.heads:  # xDiT repeats KV heads before the ring
            copy(shape.nbytes + self.kv_bytes)
        heads = shape.heads // config.ulysses_degree
        rows = math.ceil(shape.seq_len * config.ulysses_degree / world_size)
        pending: list[RoundKey] = []
        for block in range(ring):
            for key in pending:
                replay.wait(number, (yield (number,), key), "KV")
            pending = []
            if block < ring - 1 and (block == 0 or config.rotation == "alltoall"):
                copy(4 * shape.nbytes)
                pending = self._post(
                    replay, number, "kv", config.rotation, 2 * shape.nbytes * self._collective(config.rotation)[2]
                )
            keys = rows + (shape.joint_tokens if block == 0 else 0)
            merge = _RING_MERGE_BYTES if block else 4 + times.itemsize if ring > 1 else 0
            seconds, occupies_all = times.attention_s(rows, keys, heads, merge), times.occupies_all(rows, heads)
            if block == 2 and config.rotation == "allgather" and not replay.record_spans:
                # All blocks have arrived, so one step computes the rest.
                replay.compute(number, seconds * (ring - block), occupies_all=occupies_all)
                break
            replay.compute(number, seconds, f"block {block}", occupies_all)
        if config.ulysses_degree > 1:
            yield from exchange("o", shape.nbytes)

    def _post(self, replay: Replay, number: int, name: str, pattern: str, nbytes: float) -> list[RoundKey]:
        """Post a collective of ``nbytes`` over all ranks on both links."""
        traffic, group_size, hops = self._collective(pattern)
        messages = group_size - 1 if pattern == "exchange" else hops
        keys = []
        for link, parts in (("across", traffic.across), ("inside", traffic.inside)):
            round = Round(seconds=0.0, name=f"{name} {pattern}", nbytes=parts[number] * nbytes)
            if any(parts):
                cost = self.links[link].cost(pattern, group_size)
                round.seconds = self._byte_s(link, pattern) * nbytes
                round.seconds += (cost.start_us + cost.message_us * messages) * 1e-6
                round.latency_s = hops * self.links[link].latency_us * 1e-6
                round.needs_sms = cost.needs_sms
                if link == "across" or not any(traffic.across):
                    round.compute_share = cost.compute_share
            keys.append(replay.post(number, link, round))
        return keys

    def _collective(self, pattern: str) -> tuple[Traffic, int, int]:
        """The traffic of one tensor, the group size and the number of hops. An all-gather is R - 1 hops."""
        if pattern == "exchange":
            return self.exchange, self.config.ulysses_degree, 1
        return self.hop, self.config.ring_degree, self.config.ring_degree - 1 if pattern == "allgather" else 1

    def _seconds_per_byte(self, link: str, pattern: str) -> float:
        """Seconds per byte of a collective, without latency and overheads."""
        traffic, group_size, _ = self._collective(pattern)
        parts = traffic.across if link == "across" else traffic.inside
        spec = self.links[link]
        return spec.transfer_s(parts, self.cluster.ranks_per_machine, spec.cost(pattern, group_size))
