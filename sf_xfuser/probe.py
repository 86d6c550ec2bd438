"""Measures a cluster: how fast its ranks attend, and what each pattern of transfers makes of its links. A few seconds.

What is measured are pieces, never a whole arm: attention calls of two sizes, a merge, each collective of xDiT's alone
on the groups that xDiT would make, and the schedule's own transfers with nothing computed. The result is a
``cluster.Cluster`` for ``simulate.predict``.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.attention import attend_nothing, torus_attention
from sf_xfuser.cluster import Cluster, Compute, Link, Way
from sf_xfuser.kernels import AttendFunction, merge_
from sf_xfuser.mesh import Mesh
from sf_xfuser.plan import Layout
from sf_xfuser.simulate import MERGE_BYTES, CallShape, TorusArm, predict
from sf_xfuser.xdit_layouts import Sent, XditConfig, sent_by_a_hop, sent_by_ulysses

_ROWS, _KEYS = 1024, (256, 2048)
_REPEAT = 3
_SLOWED = 1.2  # by less than this, ranks that compute at once do not share what computes

Gather = Callable[[Any], list[Any]]
"""Every rank's value, in the order of ranks. Collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to measure with: ``attend`` on tensors of ``dtype``, ``heads`` heads of ``head_dim``; transfers of about
    ``transfer_s`` each. ``across_gbps``: what a machine can send, where known (None: the fastest pattern seen)."""

    attend: AttendFunction
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    transfer_s: float = 0.2
    across_gbps: float | None = None


def measure(mesh: Mesh, order: Order, gather: Gather) -> Cluster:
    """The cluster on which ``mesh`` lies. Collective over its ranks, which must be all of the job; the same on each."""
    return _Probe(mesh, order, gather).cluster()


class _Probe:
    def __init__(self, mesh: Mesh, order: Order, gather: Gather) -> None:
        self.mesh, self.order, self.gather = mesh, order, gather
        self.layout = mesh.layout
        self.grid = self.layout.num_machines, self.layout.ranks_per_machine
        self.world_size = self.layout.world_size
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self.slots: float | None = None

    def cluster(self) -> Cluster:
        n, m = self.grid
        compute = self._compute()
        self.slots = compute.slots
        across = self._link(compute, inside=False) if n > 1 else None
        inside = self._link(compute, inside=True) if m > 1 else None
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
            sources=("measured by the probe",),
        )
        return self._with_puts(found)

    # -- compute ------------------------------------------------------------------------------------------------------

    def _compute(self) -> Compute:
        order = self.order
        shape = (1, order.heads, _ROWS, order.head_dim)
        q = torch.randn(shape, device=order.device).to(order.dtype)
        kv = torch.randn((1, order.heads, _KEYS[1], order.head_dim), device=order.device).to(order.dtype)
        # Several in a row, so that ranks which share cores take turns.
        in_a_row = (4 * _KEYS[1] // _KEYS[0], 4)
        calls = [
            partial(_repeated, partial(order.attend, q, kv[:, :, :keys], kv[:, :, :keys]), times)
            for keys, times in zip(_KEYS, in_a_row, strict=True)
        ]
        small_s, large_s = (self._timed(call, alone=True) / n for call, n in zip(calls, in_a_row, strict=True))
        slower = self._timed(calls[1]) / in_a_row[1] / large_s
        slots = self.world_size / slower if slower > _SLOWED else None
        slower = slower if slots else 1.0
        flops = [4.0 * order.heads * _ROWS * keys * order.head_dim for keys in _KEYS]
        rate = (flops[1] - flops[0]) / max(large_s - small_s, 1e-9)
        out, lse = order.attend(q, kv[:, :, : _KEYS[0]], kv[:, :, : _KEYS[0]])
        total, total_lse = out.float().clone(), lse.float().clone()
        merge_s = self._timed(partial(_repeated, lambda: merge_(total, total_lse, out, lse), 8)) / 8
        return Compute(
            attention_tflops=((str(order.dtype).removeprefix("torch."), order.head_dim, rate / 1e12),),
            linear_tflops=rate / 1e12,
            memory_gbs=MERGE_BYTES * out.numel() / merge_s * slower / 1e9,
            attend_us=max(0.0, small_s - flops[0] / rate) * 1e6,
            slots=slots,
        )

    def _timed(self, call: Callable[[], object], *, alone: bool = False, repeat: int = _REPEAT) -> float:
        """Median of the slowest rank's time; ``alone``: of one rank, while the others wait."""
        idle = alone and dist.get_rank() != self.mesh.members[0]
        times = []
        for _ in range(repeat + 1):
            self._together()
            started = time.perf_counter()
            if not idle:
                call()
                self._synchronize()
            times.append(max(map(float, self.gather(0.0 if idle else time.perf_counter() - started))))
        return statistics.median(times[1:])

    def _together(self) -> None:
        self._synchronize()
        self.gather(None)

    def _synchronize(self) -> None:
        if self.order.device.type == "cuda":
            torch.cuda.synchronize()

    # -- xDiT's collectives -------------------------------------------------------------------------------------------

    def _link(self, compute: Compute, *, inside: bool) -> Link:
        """Ways of the collectives; those of the schedule's transfers come later. The rate is the fastest one seen."""
        m = self.grid[1]
        seen: list[tuple[str, int, float, float]] = []  # pattern, members, Gbit/s, takes
        for pattern, config in self._patterns(inside=inside):
            sent = sent_by_ulysses(config, *self.grid) if pattern == "exchange" else sent_by_a_hop(config, *self.grid)
            members = config.ulysses_degree if pattern == "exchange" else config.ring_degree
            hops = members - 1 if pattern == "allgather" else 1
            seconds, nbytes, takes = self._collective(pattern, config)
            parts = [part * nbytes * self.world_size * hops for part in (sent.inside if inside else sent.across)]
            # Out of a machine, or, inside, out of the rank that sends most.
            busiest = max(parts) if inside else Sent((), tuple(parts)).out_of_a_machine(m)
            seen.append((pattern, members, busiest * 8e-9 / seconds, takes))
        nominal = max(gbps for _, _, gbps, _ in seen)
        if not inside and self.order.across_gbps is not None:
            nominal = self.order.across_gbps
        ways = [(p, size, Way(efficiency=min(1.5, gbps / nominal), takes=takes)) for p, size, gbps, takes in seen]
        for pattern in ("put", "message", "exchange", "allgather", "alltoall"):
            if pattern not in {name for name, _, _ in ways}:
                ways.append((pattern, 2, replace(ways[0][2])))
        return Link(rank_gbps=nominal, machine_gbps=None if inside else nominal, ways=tuple(ways))

    def _patterns(self, *, inside: bool) -> Iterable[tuple[str, XditConfig]]:
        """The collectives that cross machines (or do not), on the groups of each pair of degrees."""
        m = self.grid[1]
        for u in (d for d in range(2, self.world_size + 1) if self.world_size % d == 0):
            if (u <= m) == inside and (m % u == 0 or u % m == 0):
                yield "exchange", XditConfig(ulysses_degree=u, ring_degree=self.world_size // u)
        if inside:
            return
        for ring in sorted({self.grid[0], 2 if self.grid[0] % 2 == 0 else self.grid[0]}):
            for rotation in ("allgather", "alltoall"):
                config = XditConfig(ulysses_degree=self.world_size // ring, ring_degree=ring, rotation=rotation)
                yield rotation, config

    def _collective(self, pattern: str, config: XditConfig) -> tuple[float, int, float]:
        """(seconds, bytes of this rank's tensor, fraction of all that computes which it took)."""
        from torch.distributed import _functional_collectives as functional

        groups = config.groups(*self.grid)[0 if pattern == "exchange" else 1]
        group = self._group(groups)
        size = dist.get_world_size(group)

        def run(tensor: torch.Tensor) -> None:
            if pattern == "exchange":
                dist.all_to_all_single(torch.empty_like(tensor), tensor, group=group)
            elif pattern == "allgather":
                dist.all_gather_into_tensor(tensor.new_empty(size * tensor.numel()), tensor, group=group)
            else:  # as PyTorch's ring passes KV on
                functional.wait_tensor(functional.permute_tensor(tensor, [*range(1, size), 0], group))  # type: ignore[no-untyped-call]

        numel = 1 << 14
        while True:  # until it takes as long as wanted
            tensor = torch.zeros(numel * size, dtype=torch.float32, device=self.order.device)
            took = self._timed(partial(run, tensor), repeat=1)
            wanted = max(1, min(64, math.ceil(self.order.transfer_s / max(took, 1e-6))))
            if wanted == 1 or numel >= 1 << 24:
                break
            numel *= wanted if took > self.order.transfer_s / 20 else 8
        before, started = _cpu_s(), time.perf_counter()
        seconds = self._timed(partial(run, tensor))
        return seconds, tensor.nbytes, self._took(before, started)

    def _took(self, cpu_before: float, started: float) -> float:
        """The fraction of all cores that this job's ranks used since then; 0 where ranks have their own."""
        wall = time.perf_counter() - started
        used = sum(self.gather(_cpu_s() - cpu_before))
        return min(0.9, used / (wall * self.slots)) if self.slots else 0.0

    def _group(self, groups: Sequence[tuple[int, ...]]) -> dist.ProcessGroup:
        mine: dist.ProcessGroup | None = None
        for positions in groups:
            ranks = tuple(sorted(self.mesh.members[p] for p in positions))
            if ranks not in self._made:
                self._made[ranks] = dist.new_group(list(ranks))
            if dist.get_rank() in ranks:
                mine = self._made[ranks]
        assert mine is not None, "groups cover every rank"
        return mine

    # -- the schedule's transfers -------------------------------------------------------------------------------------

    def _with_puts(self, cluster: Cluster) -> Cluster:
        """Calls with nothing computed, of two sizes: what grows with the bytes is the link's, the rest the host's."""
        pattern = "message" if self.mesh.transport == "two_sided" else "put"
        sizes: list[int] = []
        times: list[float] = []
        link = cluster.across if self.grid[0] > 1 else cluster.inside
        takes = link.way("alltoall", self.world_size).takes  # a byte costs as much, whoever sends it
        tokens = 64 * self.world_size
        while True:
            query = torch.zeros(
                (1, self.order.heads, tokens // self.world_size, self.order.head_dim),
                dtype=self.order.dtype,
                device=self.order.device,
            )
            counts = (query.shape[2],) * self.world_size

            in_a_row = 4 if not sizes else 1  # ranks leave the barrier at different times, which is not the call's
            seconds = self._timed(partial(self._exchange, query, counts, in_a_row)) / in_a_row
            sizes.append(tokens)
            times.append(seconds)
            if seconds > self.order.transfer_s or tokens > 1 << 17:
                break
            tokens *= 4
        return _fitted(cluster, self.layout, self.order, pattern, sizes, times, takes)

    def _exchange(self, query: torch.Tensor, counts: tuple[int, ...], calls: int) -> None:
        for _ in range(calls):
            torus_attention(
                query, query, query, mesh=self.mesh, attend=attend_nothing, q_tokens=counts, kv_tokens=counts
            )


def _fitted(
    cluster: Cluster,
    layout: Layout,
    order: Order,
    pattern: str,
    sizes: Sequence[int],
    times: Sequence[float],
    takes: float,
) -> Cluster:
    """``cluster`` whose ``pattern`` explains the times of calls with nothing computed. Pure."""
    dtype = str(order.dtype).removeprefix("torch.")
    nothing = replace(cluster.compute, attention_tflops=((dtype, order.head_dim, 1e9),), attend_us=0.0)

    def replayed(tokens: int, way: Way) -> float:
        changed = _with_way(replace(cluster, compute=nothing), pattern, way)
        shape = CallShape(seq_len=tokens, heads=order.heads, kv_heads=order.heads, head_dim=order.head_dim, dtype=dtype)
        return predict(changed, shape, TorusArm(layout=layout, pattern=pattern)).seconds

    host_us, efficiency = 0.0, 1.0
    for _ in range(8):  # each in turn: they hardly touch one another
        least = replayed(sizes[0], Way(efficiency=efficiency))
        per_us = (replayed(sizes[0], Way(efficiency=efficiency, host_us=100.0)) - least) / 100.0
        host_us = max(0.0, (times[0] - least) / per_us) if per_us > 0 else 0.0
        wire = replayed(sizes[-1], Way(efficiency=efficiency, host_us=host_us))
        efficiency = min(1.5, max(0.01, efficiency * wire / times[-1]))
    return _with_way(cluster, pattern, Way(efficiency=efficiency, host_us=host_us, takes=takes))


def _with_way(cluster: Cluster, pattern: str, way: Way) -> Cluster:
    # Inside machines the schedule's bytes are few: their host time is seen, their rate is not.
    inside = way if cluster.num_machines == 1 else replace(way, efficiency=1.0)

    def with_it(link: Link, way: Way) -> Link:
        kept = tuple(entry for entry in link.ways if entry[0] != pattern)
        return replace(link, ways=(*kept, (pattern, 2, way)))

    return replace(cluster, inside=with_it(cluster.inside, inside), across=with_it(cluster.across, way))


def _repeated(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
