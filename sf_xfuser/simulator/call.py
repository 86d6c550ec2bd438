"""The base of simulated calls: the shape of a call, the seconds of its compute, and the prediction of a replay."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from sf_xfuser.layout.usp_layouts import Traffic
from sf_xfuser.simulator.cluster import Cluster, LinkSpec, PatternCost, require_count
from sf_xfuser.simulator.replay import Replay, Steps

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallShape:
    """One attention call: ``seq_len`` tokens over all ranks, for each of ``batch`` sequences. Every rank also holds
    ``joint_tokens`` keys, which it attends with its first KV."""

    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    dtype: str = "bfloat16"
    joint_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("seq_len", "heads", "kv_heads", "head_dim", "batch"):
            require_count(name, getattr(self, name))
        if self.heads % self.kv_heads:
            allowed = ", ".join(str(n) for n in range(1, self.heads + 1) if self.heads % n == 0)
            raise ValueError(f"kv_heads must divide {self.heads} heads (one of {allowed}), got {self.kv_heads}")
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"dtype must be one of {', '.join(ITEMSIZE)}, got {self.dtype!r}")

    @property
    def nbytes(self) -> int:
        """Bytes of Q: ``B*L*H*D`` elements."""
        return self.batch * self.seq_len * self.heads * self.head_dim * ITEMSIZE[self.dtype]

    @property
    def flops(self) -> float:
        keys = self.seq_len + self.joint_tokens
        return 4.0 * self.batch * self.heads * self.head_dim * self.seq_len * keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """``seconds``: the time of the slowest rank, at least that of its host. ``compute_s``: a rank's share of the
    attention at the full rate. ``exposed_s``: the time in which the slowest rank computes nothing (merges and copies
    count as compute). ``launches``: operations that the host of a rank starts, in ``host_s``.
    ``across_bytes``: sent to other machines by the busiest machine. ``inside_bytes``: sent inside a machine by the
    busiest rank. ``buffer_bytes``: memory of the call besides its inputs and result, windows included.
    ``timeline``: in the format of the benchmark's timelines."""

    seconds: float
    compute_s: float
    exposed_s: float
    launches: int
    host_s: float
    across_bytes: float
    inside_bytes: float
    buffer_bytes: float
    timeline: dict[str, Any] | None = None


class ComputeTimes:
    """Seconds of compute on one rank. If ranks share cores, simultaneous work takes longer. Without ``overlap``,
    short work (overheads) usually finds a free core, because chunks arrive at each rank at a different time."""

    def __init__(self, cluster: Cluster, shape: CallShape, *, overlap: bool = True) -> None:
        compute = cluster.compute
        self.shape, self.compute = shape, compute
        self.slowdown = max(1.0, cluster.world_size / compute.slots) if compute.slots else 1.0
        self.overhead_slowdown = self.slowdown if overlap else 1.0
        self.flop_rate = compute.attention_rate(shape.dtype, shape.head_dim)
        self.byte_rate = compute.memory_gbs * 1e9
        self.itemsize = ITEMSIZE[shape.dtype]
        self.total_s = shape.flops / cluster.world_size / self.flop_rate * self.slowdown

    def attention_s(self, rows: int, keys: int, heads: int, merge_bytes: int) -> float:
        """``rows`` queries x ``keys`` for ``heads`` local heads, and a merge of ``merge_bytes`` per element."""
        shape, compute = self.shape, self.compute
        seconds = 4.0 * shape.batch * rows * keys * heads * shape.head_dim / self.flop_rate
        if compute.num_sms:
            waves = math.ceil(self._num_tiles(rows, heads) / compute.num_sms)
            seconds = waves * 4.0 * compute.num_sms * compute.tile_rows * keys * shape.head_dim / self.flop_rate
        merged = rows * heads * shape.batch * shape.head_dim * merge_bytes
        overhead_s = compute.attend_us * 1e-6 * self.overhead_slowdown
        return (seconds + merged / self.byte_rate) * self.slowdown + overhead_s

    def host_s(self, cost: PatternCost, messages: int) -> float:
        """Time that sending ``messages`` takes on the compute thread."""
        return cost.host_us * 1e-6 * messages * self.overhead_slowdown

    def copy_s(self, nbytes: float) -> float:
        """Time to read and write ``nbytes``."""
        return 2.0 * nbytes / self.byte_rate * self.slowdown

    def occupies_all(self, rows: int, heads: int) -> bool:
        """Whether an attention call leaves no SM idle."""
        return self._num_tiles(rows, heads) >= self.compute.num_sms

    def _num_tiles(self, rows: int, heads: int) -> int:
        return self.shape.batch * heads * math.ceil(rows / self.compute.tile_rows)


class SimulatedCall(ABC):
    """One variant of an attention call on a cluster."""

    def __init__(self, cluster: Cluster, shape: CallShape, *, overlap: bool = True) -> None:
        self.cluster, self.shape = cluster, shape
        self.times = ComputeTimes(cluster, shape, overlap=overlap)
        self.links: dict[str, LinkSpec] = {"inside": cluster.inside, "across": cluster.across}

    @abstractmethod
    def steps(self, replay: Replay, number: int) -> Steps:
        """The steps of one rank."""

    @property
    @abstractmethod
    def is_symmetric(self) -> bool:
        """Whether all ranks take the same time, so that replaying one rank is enough."""

    @property
    @abstractmethod
    def bound_s(self) -> float:
        """A lower bound for any order of the steps: the total compute, or the total transfers of one link."""

    @property
    @abstractmethod
    def num_launches(self) -> int:
        """Operations that the host of a rank starts."""

    @property
    @abstractmethod
    def egress_bytes(self) -> float:
        """Bytes that the busiest machine sends to others, by the layout's formula."""

    @property
    @abstractmethod
    def buffer_bytes(self) -> float:
        """Memory of a rank besides inputs and result."""

    def sent(self, replay: Replay) -> Traffic:
        """Bytes that each rank sends, by link."""
        copies = self.cluster.world_size // len(replay.ranks)
        inside, across = ([rank.sent.get(link, 0.0) for rank in replay.ranks] * copies for link in ("inside", "across"))
        return Traffic(tuple(inside), tuple(across))

    def predict(self, *, every_rank: bool = False) -> Prediction:
        symmetric = self.is_symmetric and not every_rank
        replay = Replay(self.cluster.world_size, symmetric=symmetric, record_spans=every_rank)
        replay.run([self.steps(replay, number) for number in range(len(replay.ranks))])
        slowest = max(replay.ranks, key=lambda rank: rank.now_s)
        host_s = self.num_launches * self.cluster.compute.launch_us * 1e-6
        seconds = max(slowest.now_s, host_s)
        sent = self.sent(replay)
        return Prediction(
            seconds=seconds,
            compute_s=self.times.total_s,
            exposed_s=seconds - slowest.computed_s,
            launches=self.num_launches,
            host_s=host_s,
            across_bytes=sent.egress(self.cluster.ranks_per_machine),
            inside_bytes=max(sent.inside),
            buffer_bytes=self.buffer_bytes,
            timeline=self._timeline(replay, seconds) if every_rank else None,
        )

    def _timeline(self, replay: Replay, seconds: float) -> dict[str, Any]:
        ranks = []
        for number, rank in enumerate(replay.ranks):
            spans = list(rank.spans)
            for link, rounds in rank.rounds.items():
                for r in rounds:
                    if r.nbytes and r.start_s is not None:
                        span = {"link": link, "name": r.name, "start_s": r.start_s, "end_s": r.end_s + r.latency_s}
                        spans.append({**span, "bytes": int(r.nbytes)})
            spans.sort(key=lambda span: (span["start_s"], span["end_s"]))
            ranks.append({"rank": number, "machine": number // self.cluster.ranks_per_machine, "spans": spans})
        return {"duration_s": seconds, "ranks": ranks}
