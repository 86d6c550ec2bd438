"""What the replayed variants share: the call's shape, seconds of compute, and what is said of a replay."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from sf_xfuser.layout.usp_layouts import Traffic
from sf_xfuser.simulator.cluster import Cluster, Way
from sf_xfuser.simulator.replay import Program, Replay

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


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


class Work:
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


class ReplayedVariant(ABC):
    """What both kinds of variants share."""

    def __init__(self, cluster: Cluster, shape: CallShape, work: Work) -> None:
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

    def sent(self, replay: Replay) -> Traffic:
        """Bytes that each rank sends inside its machine and to others."""
        each = self.cluster.world_size // len(replay.ranks)
        inside, across = ([rank.sent.get(link, 0.0) for rank in replay.ranks] * each for link in ("inside", "across"))
        return Traffic(tuple(inside), tuple(across))

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
            across_bytes=sent.egress(self.cluster.ranks_per_machine),
            inside_bytes=max(sent.inside),
            buffer_bytes=self.buffer_bytes,
            timeline=self._timeline(replay, slowest.now) if every_rank else None,
        )

    def _timeline(self, replay: Replay, seconds: float) -> dict[str, Any]:
        found = []
        for number, rank in enumerate(replay.ranks):
            spans = list(rank.spans)
            for link, rounds in rank.rounds.items():
                for r in rounds:
                    if r.nbytes and r.start_s is not None:
                        span = {"link": link, "name": r.name, "start_s": r.start_s, "end_s": r.end_s + r.latency_s}
                        spans.append({**span, "bytes": int(r.nbytes)})
            spans.sort(key=lambda span: (span["start_s"], span["end_s"]))
            found.append({"rank": number, "machine": number // self.cluster.ranks_per_machine, "spans": spans})
        return {"duration_s": seconds, "ranks": found}
