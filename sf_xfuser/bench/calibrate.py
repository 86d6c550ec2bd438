"""Measures a cluster: how fast its ranks attend, and what each pattern of transfers makes of its links. Some seconds.

What is measured are pieces, never a whole variant: attention calls, a merge, each collective of xDiT's alone on the groups
that xDiT would make, and the schedule's own transfers with nothing computed. Each is measured small (what it takes
whatever its size) and large (what grows with it), several in a row: ranks leave the barrier before it at different
times, which is no cost of theirs. The result is a ``cluster.Cluster`` for ``simulate.predict``.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.integrations.xdit.usp_groups import XditGroups
from sf_xfuser.kernels import AttendFunction, merge_
from sf_xfuser.layout.plan import Layout
from sf_xfuser.layout.usp_layouts import Sent, XditConfig, sent_by_a_hop, sent_by_ulysses
from sf_xfuser.simulator import MERGE_BYTES, CallShape, TorusVariant, predict
from sf_xfuser.simulator.cluster import PATTERNS, Cluster, Compute, Link, Way
from sf_xfuser.torus.attention import attend_nothing, torus_attention
from sf_xfuser.torus.mesh import Mesh

_TRIES, _TRY_S = 3, 0.2  # how often a piece is timed, and for how long each time
_TRANSFER_S = 0.1  # calls with nothing computed are made to take longer than this
_ATTEND_S = 0.04  # a large attention call takes longer than this
_MOST_TOKENS = 1 << 15  # of such a call
_SLOWED = 1.2  # by less than this, ranks that compute at once do not share what computes

Gather = Callable[[Any], list[Any]]
"""Every rank's value, in the order of ranks. Collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to measure with: ``attend`` on tensors of ``dtype``, ``heads`` heads of ``head_dim``. ``seq_len``: of the
    calls to come, at whose size collectives are measured. ``across_gbps``: what a machine can send, where known (None:
    the fastest pattern seen)."""

    attend: AttendFunction
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    seq_len: int
    across_gbps: float | None = None

    def flop(self, tokens: int) -> float:
        """Of one attention call of so many queries and keys."""
        return 4.0 * tokens**2 * self.heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Of one call of the slowest rank: ``seconds`` of the clock, and ``cpu_s`` of all ranks together."""

    seconds: float
    cpu_s: float


def measure(mesh: Mesh, order: Order, gather: Gather) -> Cluster:
    """The cluster on which ``mesh`` lies, as its group finds it: where the job has several and they measure at the
    same time, as they also attend, each sees its share of the links. Collective over the group; the same on its ranks.
    """
    return _Probe(mesh, order, gather).cluster()


class Pace:
    """How fast the ranks of ``cluster`` attend while other calls are timed: what else runs on a machine, and its clock,
    change that from one minute to the next. Samples alternate with those calls."""

    def __init__(self, cluster: Cluster, mesh: Mesh, order: Order, gather: Gather) -> None:
        """``cluster`` as ``measure`` found it with the same ``mesh``, ``order`` and ``gather``."""
        self._cluster, self._probe = cluster, _Probe(mesh, order, gather)
        compute, tokens = cluster.compute, 512
        rate = compute.attention_rate(_name(order.dtype), order.head_dim)
        while order.flop(tokens) / rate < _ATTEND_S and tokens < _MOST_TOKENS:
            tokens *= 2
        at_once = self._probe.world_size / compute.slots if compute.slots else 1.0
        self._expected_s = order.flop(tokens) / rate * at_once
        self._attention = self._probe.attention(tokens)
        self._seen_s: list[float] = []

    def sample(self) -> None:
        """All ranks attend once, at the same time. Collective."""
        self._seen_s.append(self._probe.tried(self._attention, 1).seconds)

    def cluster(self) -> Cluster:
        """The cluster at the median of the samples' pace."""
        slower = statistics.median(self._seen_s) / self._expected_s
        compute = self._cluster.compute
        paced = replace(
            compute,
            attention_tflops=tuple((dtype, size, rate / slower) for dtype, size, rate in compute.attention_tflops),
            linear_tflops=compute.linear_tflops / slower,
            memory_gbs=compute.memory_gbs / slower,
            attend_us=compute.attend_us * slower,
        )
        says = f"attention at {1 / slower:.2f}x of that pace while the variants were timed"
        return replace(self._cluster, compute=paced, sources=(*self._cluster.sources, says))


class _Probe:
    def __init__(self, mesh: Mesh, order: Order, gather: Gather) -> None:
        self.mesh, self.order, self.gather = mesh, order, gather
        self.layout = mesh.layout
        self.grid = self.layout.num_machines, self.layout.ranks_per_machine
        self.world_size = self.layout.world_size
        self._groups = XditGroups(mesh.members, self.layout.ranks_per_machine)

    def cluster(self) -> Cluster:
        n, m = self.grid
        started_s = time.perf_counter()
        compute = self._compute()
        across = self._link(compute.slots, inside=False) if n > 1 else None
        inside = self._link(compute.slots, inside=True) if m > 1 else None
        known = across or inside
        assert known is not None, "a mesh has at least two ranks"
        found = Cluster(
            name="measured",
            num_machines=n,
            ranks_per_machine=m,
            compute=compute,
            inside=inside or known,
            across=across or known,
            device=self.order.device.type,
        )
        found = self._with_puts(found)
        took_s = max(self.gather(time.perf_counter() - started_s))
        return replace(found, sources=(f"measured by the probe in {took_s:.1f} s",))

    def _timed(self, call: Callable[[], object], *, alone: bool = False, fastest: bool = False) -> Timing:
        """One of several calls in a row, the median of some tries, or the ``fastest`` where only interference makes a
        difference; ``alone``: on one rank, while the others wait."""
        first = self.tried(call, 1, alone)  # makes buffers and connections warm
        times = max(1, min(64, round(_TRY_S / first.seconds)))
        tries = [self.tried(call, times, alone) for _ in range(_TRIES)]
        pick = min if fastest else statistics.median
        return Timing(seconds=pick(t.seconds for t in tries), cpu_s=pick(t.cpu_s for t in tries))

    def tried(self, call: Callable[[], object], times: int, alone: bool = False) -> Timing:
        idle = alone and dist.get_rank() != self.mesh.members[0]
        self._synchronize()
        self.gather(None)
        cpu_s, started_s = _cpu_s(), time.perf_counter()
        for _ in range(0 if idle else times):
            call()
        self._synchronize()
        took_s = 0.0 if idle else time.perf_counter() - started_s
        reports = self.gather((took_s / times, (_cpu_s() - cpu_s) / times))
        return Timing(seconds=max(r[0] for r in reports), cpu_s=sum(r[1] for r in reports))

    def _synchronize(self) -> None:
        if self.order.device.type == "cuda":
            torch.cuda.synchronize()

    # -- compute ------------------------------------------------------------------------------------------------------

    def _compute(self) -> Compute:
        order, tokens = self.order, 512
        while True:
            attend = self.attention(tokens)
            large_s = self._timed(attend, alone=True, fastest=True).seconds
            if large_s > _ATTEND_S or tokens >= _MOST_TOKENS:
                break
            tokens *= 2
        slower = self._timed(attend, fastest=True).seconds / large_s
        slots = self.world_size / slower if slower > _SLOWED else None
        rate = order.flop(tokens) / large_s
        small = 256
        small_s = self._timed(self.attention(small), alone=True, fastest=True).seconds
        out = torch.randn((1, order.heads, 1024, order.head_dim), device=order.device).to(order.dtype)
        total, lse = out.float().clone(), torch.zeros(out.shape[:3], device=order.device)
        merge_s = self._timed(lambda: merge_(total, lse, out, lse.clone()), fastest=True).seconds
        return Compute(
            attention_tflops=((_name(order.dtype), order.head_dim, rate / 1e12),),
            linear_tflops=rate / 1e12,
            memory_gbs=MERGE_BYTES * out.numel() / merge_s * (slower if slots else 1.0) / 1e9,
            attend_us=max(0.0, small_s - order.flop(small) / rate) * 1e6,
            slots=slots,
        )

    def attention(self, tokens: int) -> Callable[[], object]:
        shape = (1, self.order.heads, tokens, self.order.head_dim)
        x = torch.randn(shape, device=self.order.device).to(self.order.dtype)
        return partial(self.order.attend, x, x.clone(), x.clone())

    # -- xDiT's collectives -------------------------------------------------------------------------------------------

    def _link(self, slots: float | None, *, inside: bool) -> Link:
        """Ways of the collectives; those of the schedule's transfers come later. The rate is the fastest one seen."""
        seen: list[tuple[str, int, float, float, float]] = []  # pattern, members, start_s, Gbit/s, takes
        for pattern, config in self._patterns(inside=inside):
            sent = sent_by_ulysses(config, *self.grid) if pattern == "exchange" else sent_by_a_hop(config, *self.grid)
            groups = config.groups(*self.grid)[0 if pattern == "exchange" else 1]
            members = len(groups[0])
            hops = members - 1 if pattern == "allgather" else 1
            # Of one byte on each rank: what goes out of a machine, or, inside, out of the rank that sends most.
            parts = [part * self.world_size * hops for part in (sent.inside if inside else sent.across)]
            busiest = max(parts) if inside else Sent((), tuple(parts)).out_of_a_machine(self.grid[1])
            small, large, nbytes = self._collective(pattern, self._groups.own_group(groups, self.mesh.members))
            takes = min(0.9, large.cpu_s / (large.seconds * slots)) if slots else 0.0
            moved_s = max(large.seconds - small.seconds, large.seconds / 2)
            seen.append((pattern, members, small.seconds, busiest * nbytes * 8e-9 / moved_s, takes))
        nominal = max(gbps for _, _, _, gbps, _ in seen)
        if not inside and self.order.across_gbps is not None:
            nominal = self.order.across_gbps
        ways = [
            (pattern, members, Way(efficiency=min(1.5, gbps / nominal), start_us=start_s * 1e6, takes=takes))
            for pattern, members, start_s, gbps, takes in seen
        ]
        known = {pattern for pattern, _, _ in ways}
        ways += [(pattern, 2, ways[0][2]) for pattern in PATTERNS if pattern not in known]
        return Link(rank_gbps=nominal, machine_gbps=None if inside else nominal, ways=tuple(ways))

    def _patterns(self, *, inside: bool) -> Iterable[tuple[str, XditConfig]]:
        """The collectives that cross machines (or do not), on the groups of each pair of degrees."""
        n, m = self.grid
        for size in (d for d in range(2, self.world_size + 1) if self.world_size % d == 0):
            if (size <= m) == inside and (m % size == 0 or size % m == 0):
                yield "exchange", XditConfig(ulysses_degree=size, ring_degree=self.world_size // size)
            for rotation in ("allgather", "alltoall"):
                # xDiT's rings cross machines wherever there are several; inside lie those of one.
                if (n == 1) == inside:
                    ulysses = self.world_size // size
                    yield rotation, XditConfig(ulysses_degree=ulysses, ring_degree=size, rotation=rotation)

    def _collective(self, pattern: str, group: dist.ProcessGroup) -> tuple[Timing, Timing, int]:
        """(small, large, bytes of this rank's tensor in the large one)"""
        from torch.distributed import _functional_collectives as functional

        size = dist.get_world_size(group)
        # As PyTorch's ring gathers KV, or passes it on.
        gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor

        def run(tensor: torch.Tensor) -> None:
            if pattern == "exchange":
                dist.all_to_all_single(torch.empty_like(tensor), tensor, group=group)
            elif pattern == "allgather":
                functional.wait_tensor(gather(tensor, 0, group))  # type: ignore[no-untyped-call]
            else:
                functional.wait_tensor(functional.permute_tensor(tensor, [*range(1, size), 0], group))  # type: ignore[no-untyped-call]

        def of(numel: int) -> Callable[[], None]:
            return partial(run, torch.zeros(numel, dtype=dtype, device=self.order.device))

        dtype = self.order.dtype
        small = self._timed(of(64 * size))
        tensors = 1 if pattern == "exchange" else 2  # a ring moves K and V at once
        numel = tensors * math.ceil(self.order.seq_len / self.world_size) * self.order.heads * self.order.head_dim
        numel = math.ceil(numel / size) * size
        return small, self._timed(of(numel)), numel * dtype.itemsize

    # -- the schedule's transfers -------------------------------------------------------------------------------------

    def _with_puts(self, cluster: Cluster) -> Cluster:
        """Calls with nothing computed, of two sizes: what grows with the bytes is the link's, the rest the host's."""
        pattern = "message" if self.mesh.transport == "two_sided" else "put"
        least = 4 * self.world_size
        small = self._timed(self._exchange(least))
        tokens = 4 * least
        while tokens < 1 << 17 and self.tried(self._exchange(tokens), 1).seconds < 2 * _TRANSFER_S:
            tokens *= 4
        large = self._timed(self._exchange(tokens))
        return _fitted(cluster, self.layout, self.order, pattern, {least: small, tokens: large})

    def _exchange(self, tokens: int) -> Callable[[], object]:
        order, each = self.order, tokens // self.world_size
        x = torch.zeros((1, order.heads, each, order.head_dim), dtype=order.dtype, device=order.device)
        counts = (each,) * self.world_size
        return partial(
            torus_attention, x, x, x, mesh=self.mesh, attend=attend_nothing, q_tokens=counts, kv_tokens=counts
        )


def _fitted(cluster: Cluster, layout: Layout, order: Order, pattern: str, seen: dict[int, Timing]) -> Cluster:
    """``cluster`` whose ``pattern`` explains calls with nothing computed, of ``{tokens: timing}``. Pure."""
    (few, small), (many, large) = sorted(seen.items())
    dtype, slots = _name(order.dtype), cluster.compute.slots
    nothing = replace(cluster.compute, attention_tflops=((dtype, order.head_dim, 1e9),), attend_us=0.0)

    def replayed(tokens: int, way: Way) -> tuple[float, float]:
        """(seconds, those in which a rank computes)"""
        changed = _with_way(replace(cluster, compute=nothing), pattern, way)
        shape = CallShape(seq_len=tokens, heads=order.heads, kv_heads=order.heads, head_dim=order.head_dim, dtype=dtype)
        found = predict(changed, shape, TorusVariant(layout=layout, pattern=pattern))
        return found.seconds, found.seconds - found.exposed_s

    def with_host(way: Way, host_us: float) -> float:
        return replayed(few, replace(way, host_us=host_us))[0]

    def slowed(way: Way, times: float) -> float:
        return replayed(many, replace(way, efficiency=1 / times))[0]

    way = Way(efficiency=1.0)
    for _ in range(3):  # each in turn: they hardly touch one another
        way = replace(way, host_us=_solved(partial(with_host, way), small.seconds, 0.0, 1e4))
        way = replace(way, efficiency=1 / _solved(partial(slowed, way), large.seconds, 0.67, 20.0))
        if slots:  # what its ranks used of the cores beyond what the replay has them compute
            moving_s = large.cpu_s / slots - replayed(many, way)[1]
            way = replace(way, takes=min(0.9, max(0.0, moving_s / large.seconds)))
    return _with_way(cluster, pattern, way)


def _solved(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where ``rising`` is ``wanted``, or the end that is nearer."""
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2


def _with_way(cluster: Cluster, pattern: str, way: Way) -> Cluster:
    # Inside machines the schedule's bytes are few: their host time is seen, their rate is not.
    inside = way if cluster.num_machines == 1 else replace(way, efficiency=1.0)

    def with_it(link: Link, way: Way) -> Link:
        kept = tuple(entry for entry in link.ways if entry[0] != pattern)
        return replace(link, ways=(*kept, (pattern, 2, way)))

    return replace(cluster, inside=with_it(cluster.inside, inside), across=with_it(cluster.across, way))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
