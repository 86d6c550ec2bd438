"""Measures the rates and overheads of the cluster that runs this job, in 10 to 33 s, as a ``cluster.Cluster``.

It never runs a whole variant. It measures attention calls, a merge, each of xDiT's collectives alone on the groups that
xDiT would create, and torus calls without attention. Each is measured at a small size (the fixed overhead) and at a
large one (the rate), several calls in a row, since ranks leave the barrier at different times.
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
from sf_xfuser.layout.usp_layouts import XditConfig, ring_hop_traffic, ulysses_traffic
from sf_xfuser.simulator import MERGE_BYTES, CallShape, TorusVariant, predict
from sf_xfuser.simulator.cluster import PATTERNS, Cluster, Compute, LinkSpec, PatternCost
from sf_xfuser.torus.attention import attend_nothing, torus_attention
from sf_xfuser.torus.call import Tokens
from sf_xfuser.torus.mesh import Mesh

_REPEATS, _REPEAT_S = 3, 0.2  # number and duration of the repeats of each measurement
_TRANSFER_S = 0.1  # minimum duration of a large torus call without attention
_ATTEND_S = 0.04  # minimum duration of a large attention call
_MAX_TOKENS = 1 << 15  # maximum size of that call
_SHARED_CORES = 1.2  # slowdown above which ranks are assumed to share cores

Gather = Callable[[Any], list[Any]]
"""Gathers a value of every rank, in rank order. Collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """``attend`` runs on ``heads`` heads of ``head_dim`` in ``dtype``; collectives run at the size of a call with
    ``seq_len`` tokens. ``across_gbps``: the send rate of a machine (None: the fastest measured pattern)."""

    attend: AttendFunction
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    seq_len: int
    across_gbps: float | None = None

    def flop(self, tokens: int) -> float:
        """FLOPs of one attention call of ``tokens`` queries and keys."""
        return 4.0 * tokens**2 * self.heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """``seconds``: wall time of one call on the slowest rank; ``cpu_s``: CPU time of one call, summed over ranks."""

    seconds: float
    cpu_s: float


def measure(mesh: Mesh, settings: CalibrationSettings, gather: Gather) -> Cluster:
    """The cluster under ``mesh``. Groups that measure at the same time share the links, as in real
    attention calls. Collective over the group; every rank gets the same result."""
    return _Calibration(mesh, settings, gather).cluster()


class SpeedSampler:
    """Samples the speed of attention between other timed calls, because the clock and the load of a machine change from
    minute to minute."""

    def __init__(self, cluster: Cluster, mesh: Mesh, settings: CalibrationSettings, gather: Gather) -> None:
        """``cluster``: the result of ``measure`` with the same ``mesh``, ``settings`` and ``gather``."""
        self._cluster, self._calibration = cluster, _Calibration(mesh, settings, gather)
        compute, tokens = cluster.compute, 512
        rate = compute.attention_rate(_name(settings.dtype), settings.head_dim)
        while settings.flop(tokens) / rate < _ATTEND_S and tokens < _MAX_TOKENS:
            tokens *= 2
        slowdown = self._calibration.world_size / compute.slots if compute.slots else 1.0
        self._expected_s = settings.flop(tokens) / rate * slowdown
        self._attention = self._calibration.attention(tokens)
        self._samples_s: list[float] = []

    def sample(self) -> None:
        """All ranks attend once at the same time. Collective."""
        self._samples_s.append(self._calibration.time_calls(self._attention, 1).seconds)

    def cluster(self) -> Cluster:
        """The cluster with compute rates at the median of the samples."""
        slowdown = statistics.median(self._samples_s) / self._expected_s
        compute = self._cluster.compute
        scaled = replace(
            compute,
            attention_tflops=tuple((dtype, size, rate / slowdown) for dtype, size, rate in compute.attention_tflops),
            linear_tflops=compute.linear_tflops / slowdown,
            memory_gbs=compute.memory_gbs / slowdown,
            attend_us=compute.attend_us * slowdown,
        )
        source = f"while the variants were timed, attention ran at {1 / slowdown:.2f}x of the calibrated speed"
        return replace(self._cluster, compute=scaled, sources=(*self._cluster.sources, source))


class _Calibration:
    def __init__(self, mesh: Mesh, settings: CalibrationSettings, gather: Gather) -> None:
        self.mesh, self.settings, self.gather = mesh, settings, gather
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
        link = across or inside
        assert link is not None, "a mesh has at least two ranks"
        cluster = Cluster(
            name="measured",
            num_machines=n,
            ranks_per_machine=m,
            compute=compute,
            inside=inside or link,
            across=across or link,
            device=self.settings.device.type,
        )
        cluster = self._with_torus_cost(cluster)
        duration_s = max(self.gather(time.perf_counter() - started_s))
        return replace(cluster, sources=(f"measured in {duration_s:.1f} s",))

    def _timed(self, call: Callable[[], object], *, alone: bool = False, fastest: bool = False) -> Timing:
        """Time one of several calls in a row: the median of the repeats, or the ``fastest`` if they differ only
        because of interference. ``alone``: run on one rank while the others wait."""
        warmup = self.time_calls(call, 1, alone)  # creates buffers and connections
        times = max(1, min(64, round(_REPEAT_S / warmup.seconds)))
        repeats = [self.time_calls(call, times, alone) for _ in range(_REPEATS)]
        pick = min if fastest else statistics.median
        return Timing(seconds=pick(t.seconds for t in repeats), cpu_s=pick(t.cpu_s for t in repeats))

    def time_calls(self, call: Callable[[], object], times: int, alone: bool = False) -> Timing:
        idle = alone and dist.get_rank() != self.mesh.members[0]
        self._synchronize()
        self.gather(None)
        cpu_s, started_s = _cpu_s(), time.perf_counter()
        for _ in range(0 if idle else times):
            call()
        self._synchronize()
        seconds = 0.0 if idle else time.perf_counter() - started_s
        reports = self.gather((seconds / times, (_cpu_s() - cpu_s) / times))
        return Timing(seconds=max(r[0] for r in reports), cpu_s=sum(r[1] for r in reports))

    def _synchronize(self) -> None:
        if self.settings.device.type == "cuda":
            torch.cuda.synchronize()

    # -- compute ------------------------------------------------------------------------------------------------------

    def _compute(self) -> Compute:
        settings, tokens = self.settings, 512
        while True:
            attend = self.attention(tokens)
            large_s = self._timed(attend, alone=True, fastest=True).seconds
            if large_s > _ATTEND_S or tokens >= _MAX_TOKENS:
                break
            tokens *= 2
        slowdown = self._timed(attend, fastest=True).seconds / large_s
        slots = self.world_size / slowdown if slowdown > _SHARED_CORES else None
        rate = settings.flop(tokens) / large_s
        small = 256
        small_s = self._timed(self.attention(small), alone=True, fastest=True).seconds
        out = torch.randn((1, settings.heads, 1024, settings.head_dim), device=settings.device).to(settings.dtype)
        total, lse = out.float().clone(), torch.zeros(out.shape[:3], device=settings.device)
        merge_s = self._timed(lambda: merge_(total, lse, out, lse.clone()), fastest=True).seconds
        return Compute(
            attention_tflops=((_name(settings.dtype), settings.head_dim, rate / 1e12),),
            linear_tflops=rate / 1e12,
            memory_gbs=MERGE_BYTES * out.numel() / merge_s * (slowdown if slots else 1.0) / 1e9,
            attend_us=max(0.0, small_s - settings.flop(small) / rate) * 1e6,
            slots=slots,
        )

    def attention(self, tokens: int) -> Callable[[], object]:
        shape = (1, self.settings.heads, tokens, self.settings.head_dim)
        x = torch.randn(shape, device=self.settings.device).to(self.settings.dtype)
        return partial(self.settings.attend, x, x.clone(), x.clone())

    # -- xDiT's collectives -------------------------------------------------------------------------------------------

    def _link(self, slots: float | None, *, inside: bool) -> LinkSpec:
        """Measure xDiT's collectives. The rate is that of the fastest. The other patterns get the first cost as a
        placeholder."""
        measured: list[tuple[str, int, float, PatternCost]] = []  # pattern, group size, Gbit/s, cost
        for pattern, config in self._patterns(inside=inside):
            is_exchange = pattern == "exchange"
            traffic = ulysses_traffic(config, *self.grid) if is_exchange else ring_hop_traffic(config, *self.grid)
            groups = config.groups(*self.grid)[0 if is_exchange else 1]
            size = len(groups[0])
            small, large, nbytes = self._collective(pattern, self._groups.own_group(groups, self.mesh.members))
            # Bytes sent per byte of a rank's tensor, by the busiest machine or, inside, by the busiest rank.
            busiest = max(traffic.inside) if inside else traffic.egress(self.grid[1])
            sent = busiest * self.world_size * (size - 1 if pattern == "allgather" else 1) * nbytes
            share = min(0.9, large.cpu_s / (large.seconds * slots)) if slots else 0.0
            transfer_s = max(large.seconds - small.seconds, large.seconds / 2)
            cost = PatternCost(efficiency=1.0, start_us=small.seconds * 1e6, compute_share=share)
            measured.append((pattern, size, sent * 8e-9 / transfer_s, cost))
        nominal = max(gbps for _, _, gbps, _ in measured)
        if not inside and self.settings.across_gbps is not None:
            nominal = self.settings.across_gbps
        costs = [
            (pattern, size, replace(cost, efficiency=min(1.5, gbps / nominal)))
            for pattern, size, gbps, cost in measured
        ]
        known = {pattern for pattern, _, _ in costs}
        costs += [(pattern, 2, costs[0][2]) for pattern in PATTERNS if pattern not in known]
        return LinkSpec(rank_gbps=nominal, machine_gbps=None if inside else nominal, costs=tuple(costs))

    def _patterns(self, *, inside: bool) -> Iterable[tuple[str, XditConfig]]:
        """The collectives that stay inside a machine, or cross machines, for each pair of degrees."""
        n, m = self.grid
        for size in (d for d in range(2, self.world_size + 1) if self.world_size % d == 0):
            if (size <= m) == inside and (m % size == 0 or size % m == 0):
                yield "exchange", XditConfig(ulysses_degree=size, ring_degree=self.world_size // size)
            for rotation in ("allgather", "alltoall"):
                # xDiT's rings cross machines if there are several.
                if (n == 1) == inside:
                    ulysses = self.world_size // size
                    yield rotation, XditConfig(ulysses_degree=ulysses, ring_degree=size, rotation=rotation)

    def _collective(self, pattern: str, group: dist.ProcessGroup) -> tuple[Timing, Timing, int]:
        """Returns the timings of a small and of a large tensor, and the bytes of the large one."""
        from torch.distributed import _functional_collectives as functional

        size = dist.get_world_size(group)
        # The calls of PyTorch's ring.
        gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor

        def run(tensor: torch.Tensor) -> None:
            if pattern == "exchange":
                dist.all_to_all_single(torch.empty_like(tensor), tensor, group=group)
            elif pattern == "allgather":
                functional.wait_tensor(gather(tensor, 0, group))  # type: ignore[no-untyped-call]
            else:
                functional.wait_tensor(functional.permute_tensor(tensor, [*range(1, size), 0], group))  # type: ignore[no-untyped-call]

        def call(numel: int) -> Callable[[], None]:
            return partial(run, torch.zeros(numel, dtype=dtype, device=self.settings.device))

        settings, dtype = self.settings, self.settings.dtype
        small = self._timed(call(64 * size))
        tensors = 1 if pattern == "exchange" else 2  # a ring sends K and V as one tensor
        numel = tensors * math.ceil(settings.seq_len / self.world_size) * settings.heads * settings.head_dim
        numel = math.ceil(numel / size) * size
        return small, self._timed(call(numel)), numel * dtype.itemsize

    # -- the schedule's transfers -------------------------------------------------------------------------------------

    def _with_torus_cost(self, cluster: Cluster) -> Cluster:
        """Time torus calls without attention at two sizes, to separate the link's rate from the host time."""
        pattern = "message" if self.mesh.transport == "two_sided" else "put"
        few = 4 * self.world_size
        small = self._timed(self._exchange(few))
        tokens = 4 * few
        while tokens < 1 << 17 and self.time_calls(self._exchange(tokens), 1).seconds < 2 * _TRANSFER_S:
            tokens *= 4
        large = self._timed(self._exchange(tokens))
        return _fitted(cluster, self.layout, self.settings, pattern, {few: small, tokens: large})

    def _exchange(self, tokens: int) -> Callable[[], object]:
        settings, share = self.settings, tokens // self.world_size
        x = torch.zeros((1, settings.heads, share, settings.head_dim), dtype=settings.dtype, device=settings.device)
        counts = (share,) * self.world_size
        return partial(
            torus_attention, x, x, x, mesh=self.mesh, attention=attend_nothing, tokens=Tokens(counts, counts)
        )


def _fitted(
    cluster: Cluster, layout: Layout, settings: CalibrationSettings, pattern: str, timings: dict[int, Timing]
) -> Cluster:
    """``cluster`` with the cost of ``pattern`` that fits ``{tokens: timing}`` of calls without attention. Pure."""
    (few, small), (many, large) = sorted(timings.items())
    dtype, slots = _name(settings.dtype), cluster.compute.slots
    no_attention = replace(cluster.compute, attention_tflops=((dtype, settings.head_dim, 1e9),), attend_us=0.0)

    def replayed(tokens: int, cost: PatternCost) -> tuple[float, float]:
        """(seconds of a call, seconds of its compute)"""
        changed = _with_cost(replace(cluster, compute=no_attention), pattern, cost)
        heads, head_dim = settings.heads, settings.head_dim
        shape = CallShape(seq_len=tokens, heads=heads, kv_heads=heads, head_dim=head_dim, dtype=dtype)
        predicted = predict(changed, shape, TorusVariant(layout=layout, pattern=pattern))
        return predicted.seconds, predicted.seconds - predicted.exposed_s

    def small_s(cost: PatternCost, host_us: float) -> float:
        return replayed(few, replace(cost, host_us=host_us))[0]

    def large_s(cost: PatternCost, slowdown: float) -> float:
        return replayed(many, replace(cost, efficiency=1 / slowdown))[0]

    cost = PatternCost(efficiency=1.0)
    for _ in range(3):  # one parameter at a time: they are nearly independent
        cost = replace(cost, host_us=_bisect(partial(small_s, cost), small.seconds, 0.0, 1e4))
        cost = replace(cost, efficiency=1 / _bisect(partial(large_s, cost), large.seconds, 0.67, 20.0))
        if slots:  # CPU time beyond the compute of the replay
            transfer_s = large.cpu_s / slots - replayed(many, cost)[1]
            cost = replace(cost, compute_share=min(0.9, max(0.0, transfer_s / large.seconds)))
    return _with_cost(cluster, pattern, cost)


def _bisect(increasing: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Solve ``increasing(x) == target`` in the interval; without a solution, return the nearer end."""
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < target else (low, middle)
    return (low + high) / 2


def _with_cost(cluster: Cluster, pattern: str, cost: PatternCost) -> Cluster:
    # The schedule sends few bytes inside machines: these calls measure the host time, not the rate.
    inside = cost if cluster.num_machines == 1 else replace(cost, efficiency=1.0)

    def replaced(link: LinkSpec, cost: PatternCost) -> LinkSpec:
        others = tuple(entry for entry in link.costs if entry[0] != pattern)
        return replace(link, costs=(*others, (pattern, 2, cost)))

    return replace(cluster, inside=replaced(cluster.inside, inside), across=replaced(cluster.across, cost))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
