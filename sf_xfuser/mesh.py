"""From a plan to process groups: who exchanges with whom, cross-checked on all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from fractions import Fraction
from typing import Any

import torch.distributed as dist

from sf_xfuser.agreement import Agreement
from sf_xfuser.args import TorusArgs
from sf_xfuser.plan import EVEN, Layout, Plan, make_plan
from sf_xfuser.schedule import Lane
from sf_xfuser.topology import MachineGrid, RankFacts, Topology, probe
from sf_xfuser.trace import Trace
from sf_xfuser.transport import Nvshmem, OneSided, Shm, SymmMem, Transport, TransportError, TwoSided, shm, symm_mem, tcp

Lanes = dict[Lane, Transport]


@dataclass(eq=False)
class Mesh:
    """One sequence-parallel group as seen by this rank. Made by :func:`build_mesh`; holds no tensors.

    ``position`` is this rank's machine-major place in ``plan.layout``; ``members[w]`` the global rank at place ``w``.
    ``lanes`` moves chunks inside a machine and across machines; ``peer_index[lane][w]`` is ``w``'s rank in that
    lane's process group. ``ulysses_group`` and ``ring_group`` are process groups for code that wants collectives
    (xDiT's own USP): ascending global ranks. ``transport``: what the lanes are, in words. ``connect`` makes them anew
    after a failure, where that can be done. ``calls`` caches what was agreed per call shape. ``trace``, where set,
    collects what each call did and when.
    """

    plan: Plan
    grid: MachineGrid
    topology: Topology
    position: int
    lanes: Lanes
    peer_index: dict[Lane, dict[int, int]]
    ulysses_group: dist.ProcessGroup
    ring_group: dist.ProcessGroup
    agreement: Agreement
    transport: str
    connect: Callable[[Agreement], Lanes] | None = None
    calls: dict[Any, Any] = field(default_factory=dict)
    trace: Trace | None = None
    failures: int = 0
    failed: bool = False

    @property
    def layout(self) -> Layout:
        return self.plan.layout

    @property
    def members(self) -> tuple[int, ...]:
        return self.grid.members

    @property
    def window(self) -> OneSided | None:
        """The transport that writes into windows."""
        return next((lane.one_sided for lane in self.lanes.values() if lane.one_sided is not None), None)

    @property
    def window_lanes(self) -> Collection[Lane]:
        return [name for name, lane in self.lanes.items() if lane.one_sided is not None]

    def close(self) -> None:
        """Let go of what the lanes hold; idempotent. Local. No call may follow."""
        for lane in self.lanes.values():
            lane.close()

    def retire(self) -> None:
        """After a failed call: let go of the lanes, so that the peers fail, too, instead of waiting. Local."""
        self.failed = True
        self.close()

    def join_again(self) -> None:
        """Before the call that follows a failed one: lanes afresh. Collective, and as every call fails on all ranks or
        on none, all of them come; RuntimeError or TransportError where one does not."""
        if self.connect is None:
            raise TransportError(
                f"an earlier call has failed, and {self.transport} cannot start afresh: restart the job"
            )
        self.failures += 1
        self.agreement = self.agreement.afresh(self.failures)
        self.lanes = self.connect(self.agreement)
        self.calls.clear()
        self.failed = False

    def __str__(self) -> str:
        note = f"; {self.grid.note}" if self.grid.note else ""
        return f"{self.plan}; ranks {list(self.members)}, topology from {self.topology.source}{note}; {self.transport}"

    def lines(self) -> list[str]:
        """The mesh as text: topology, plan with its alternatives, and where this rank stands."""
        t, u, r_x, r_i = self.layout.coordinates(self.position)
        text = [f"topology from {self.topology.source}: sequence-parallel group {list(self.members)}"]
        if self.grid.note:
            text.append(self.grid.note)
        text += self.plan.lines()
        text.append(f"chunks move by {self.transport}")
        rank = self.members[self.position]
        text.append(f"this rank: {rank} at torus {t}, ulysses {u}, ring {r_x} across and {r_i} inside")
        return text


def gather_topology(args: TorusArgs, agreement: Agreement, world_size: int) -> Topology:
    """The job's topology, the same on every rank. Collective over the world, also where it is pretended.

    Raises ValueError on every rank if ranks were started with different ``--sp-*`` flags.
    """
    agreement.require_same("flags", {f"--sp-{name}": value for name, value in asdict(args).items()})
    if args.topology != "auto":
        return Topology.parse(args.topology, world_size)
    return Topology.from_facts([RankFacts(**facts) for facts in agreement.gather("host", asdict(probe()))])


def build_mesh(
    sp_rank_lists: Sequence[Sequence[int]],
    args: TorusArgs,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    ulysses_degree: int | None = None,
    ring_degree: int | None = None,
    backend: str | None = None,
    max_imbalance: Fraction = EVEN,
) -> Mesh:
    """The mesh of this rank's sequence-parallel group. Collective over the world: every rank passes the same lists.

    ``sp_rank_lists``: the global ranks of every sequence-parallel group, each ascending; together every rank once.
    The degrees are kept where given (``ring_degree`` is checked), else planned, with heads no less even than
    ``max_imbalance`` allows (see ``make_plan``). ``backend`` is torch.distributed's.
    Raises ValueError (bad degrees, heads, flags) or RuntimeError (a rank is missing), on every rank alike.
    """
    world_size = dist.get_world_size()
    rank = dist.get_rank()
    world = Agreement.of_world(args.timeout)
    topology = gather_topology(args, world, world_size)
    for ranks in sp_rank_lists:
        if list(ranks) != sorted(set(ranks)):
            raise ValueError(f"a sequence-parallel group must list ascending distinct ranks, got {list(ranks)}")

    # Every plan is made on every rank before any group: a refusal of one is seen by all.
    grids = [topology.fold(ranks) for ranks in sp_rank_lists]
    plans = [_plan(grid, args, heads, kv_heads, ulysses_degree, ring_degree, max_imbalance) for grid in grids]
    wanted = _transport(args, backend or dist.get_backend())
    with_groups = wanted in ("two_sided", "symm_mem")
    mine: Mesh | None = None
    for index, (grid, plan) in enumerate(zip(grids, plans, strict=True)):
        groups = _Groups(backend, args.timeout)
        members, layout = grid.members, plan.layout
        positions = range(layout.world_size)
        inside = [groups.new([p for p in positions if layout.machine(p) == n], members, bounded=True)
                  for n in range(layout.num_machines) if with_groups]  # fmt: skip
        across = [groups.new(list(positions), members, bounded=True)] if with_groups else []
        ulysses = [groups.new(list(g), members) for g in sorted({layout.ulysses_group(p) for p in positions})]
        ring = [groups.new(list(g), members) for g in sorted({layout.ring_group(p) for p in positions})]
        if rank not in members:
            continue
        position = members.index(rank)
        agreement = world.of_group(index, members)
        connect: Callable[[Agreement], Lanes] | None
        group_of: dict[Lane, _Group] = {}
        shared: list[Lane] = []
        if with_groups:
            group_of = {"inside": _of(inside, position), "across": _of(across, position)}
            words = f"two_sided ({backend or dist.get_backend()})"
            shared, transport = _mapped_lanes(agreement, layout, words) if wanted == "symm_mem" else ([], words)
            connect = functools.partial(_connect_gpus, layout, members, position, shared, args.timeout, group_of)
        elif wanted == "nvshmem":
            peers = [peer for lane in _peers(layout, position).values() for peer in lane]
            connect, transport = functools.partial(_connect_nvshmem, members, position, peers, args.timeout), "nvshmem"
        else:
            shared, transport = _shared_lanes(agreement, layout, wanted)
            connect = functools.partial(_connect, layout, members, position, shared, args.timeout)
        lanes = connect(agreement)
        peer_index: dict[Lane, dict[int, int]] = {
            name: group_of[name].index if isinstance(lane, TwoSided) else {p: p for p in positions}
            for name, lane in lanes.items()
        }
        if any(isinstance(lane, TwoSided) for lane in lanes.values()):
            connect = None  # torch.distributed cannot start afresh
        mine = Mesh(
            plan=plan,
            grid=grid,
            topology=topology,
            position=position,
            lanes=lanes,
            peer_index=peer_index,
            ulysses_group=_of(ulysses, position).handle,
            ring_group=_of(ring, position).handle,
            agreement=agreement,
            transport=transport,
            connect=connect,
        )
    if mine is None:
        raise ValueError(f"rank {rank} is in none of the sequence-parallel groups {[list(r) for r in sp_rank_lists]}")
    return mine


def _transport(args: TorusArgs, backend: str) -> str:
    """What moves chunks: a name of ``args.TRANSPORTS``; ``"auto"`` between CPU ranks only."""
    if args.transport in ("shm", "tcp") and backend != "gloo":
        raise ValueError(
            f"--sp-transport {args.transport} moves tensors of CPU ranks, but torch.distributed's backend is {backend}"
        )
    return "two_sided" if args.transport == "auto" and backend != "gloo" else args.transport


def _shared_lanes(agreement: Agreement, layout: Layout, wanted: str) -> tuple[list[Lane], str]:
    """The lanes whose ranks share memory and are to use it, and all lanes in words. Collective over the group.

    Raises ValueError on every rank where shared memory is demanded and missing.
    """
    if wanted == "tcp":
        return [], "tcp"
    reports = agreement.gather("shared memory", [shm.identity(), shm.unavailable()])
    shared = _joined([None if reason else str(home) for home, reason in reports], layout)
    if len(shared) == 2:
        return shared, "shm"
    if wanted == "shm":
        raise ValueError(
            f"--sp-transport shm needs ranks that share the memory of one host; they say "
            f"{[reason or home for home, reason in reports]}. auto uses it inside each host, and tcp between hosts"
        )
    return shared, "shm inside, tcp across" if shared else "tcp"


def _mapped_lanes(agreement: Agreement, layout: Layout, otherwise: str) -> tuple[list[Lane], str]:
    """The lanes whose GPUs can write to each other's memory, and all lanes in words; ``otherwise``: what the others
    are. Collective over the group. Raises ValueError on every rank where no lane can."""
    reports = agreement.gather("NVLink domain", [symm_mem.identity(), symm_mem.unavailable()])
    shared = _joined([None if reason else str(home) for home, reason in reports], layout)
    if not shared:
        raise ValueError(
            f"--sp-transport symm_mem needs several ranks of each machine on GPUs of one NVLink domain; they say "
            f"{[reason or home for home, reason in reports]}. two_sided and nvshmem work between machines"
        )
    return shared, "symm_mem" if len(shared) == 2 else f"symm_mem inside, {otherwise} across"


def _joined(homes: Sequence[str | None], layout: Layout) -> list[Lane]:
    """The lanes all of whose ranks have one home, by that of each position; None: no home. Pure."""
    by_machine: dict[int, set[str | None]] = {}
    for position, home in enumerate(homes):
        by_machine.setdefault(layout.machine(position), set()).add(home)
    if len(set(homes)) == 1 and homes[0] is not None:
        return ["inside", "across"]
    if layout.ranks_per_machine > 1 and all(len(seen) == 1 and None not in seen for seen in by_machine.values()):
        return ["inside"]
    return []


def _connect(
    layout: Layout,
    members: Sequence[int],
    position: int,
    shared: Collection[Lane],
    timeout_s: float,
    agreement: Agreement,
) -> Lanes:
    """The lanes of a CPU rank: one in shared memory for all that ``shared`` names, TCP for the others. Collective."""
    peers = _peers(layout, position)
    others = {lane: found for lane, found in peers.items() if lane not in shared}
    lanes: Lanes = {**tcp.connect(agreement, members, position, others, timeout_s)} if others else {}
    if shared:
        joined = Shm(agreement, members, position, [p for lane in shared for p in peers[lane]], timeout_s)
        lanes.update(dict.fromkeys(shared, joined))
    return lanes


def _connect_gpus(
    layout: Layout,
    members: Sequence[int],
    position: int,
    shared: Collection[Lane],
    timeout_s: float,
    group_of: Mapping[Lane, _Group],
    agreement: Agreement,
) -> Lanes:
    """The lanes over process groups: one of symmetric memory for all that ``shared`` names, matched sends and receives
    for the others. Collective."""
    lanes: Lanes = {name: TwoSided(group.handle, name, timeout_s) for name, group in group_of.items()}
    if shared:
        peers = _peers(layout, position)
        widest = group_of["across" if "across" in shared else "inside"]
        joined = SymmMem(
            agreement,
            members,
            position,
            [peer for lane in shared for peer in peers[lane]],
            timeout_s,
            widest.handle,
            widest.index,
        )
        lanes.update(dict.fromkeys(shared, joined))
    return lanes


def _connect_nvshmem(
    members: Sequence[int], position: int, peers: Sequence[int], timeout_s: float, agreement: Agreement
) -> Lanes:
    """Both lanes are one. Collective."""
    joined = Nvshmem(agreement, members, position, peers, timeout_s)
    return {"inside": joined, "across": joined}


def _peers(layout: Layout, position: int) -> dict[Lane, list[int]]:
    """Whom a rank exchanges chunks with: those with the same ring coordinates, and those with the same heads."""
    others = sorted({*layout.ulysses_group(position), *layout.ring_group(position)} - {position})
    here = layout.machine(position)
    return {
        "inside": [p for p in others if layout.machine(p) == here],
        "across": [p for p in others if layout.machine(p) != here],
    }


def _plan(
    grid: MachineGrid,
    args: TorusArgs,
    heads: int | None,
    kv_heads: int | None,
    ulysses_degree: int | None,
    ring_degree: int | None,
    max_imbalance: Fraction,
) -> Plan:
    world_size = len(grid.members)
    if ulysses_degree is not None and ulysses_degree * (ring_degree or 1) != world_size:
        raise ValueError(
            f"ulysses_degree={ulysses_degree} x ring_degree={ring_degree or 1} = "
            f"{ulysses_degree * (ring_degree or 1)}, but the sequence-parallel group has {world_size} ranks: give "
            f"degrees with that product, or none and let --sp-plan choose"
        )
    plan = make_plan(
        grid.num_machines,
        grid.ranks_per_machine,
        heads=heads,
        kv_heads=kv_heads,
        rule=args.rule,
        explicit=args.explicit_plan(),
        ulysses_degree=ulysses_degree,
        max_imbalance=max_imbalance,
    )
    layout = plan.layout
    if ulysses_degree is not None and layout.ulysses_degree != ulysses_degree:
        raise ValueError(
            f"--sp-plan {args.plan} means ulysses_degree={layout.ulysses_degree} and ring_degree={layout.ring_degree}, "
            f"but ulysses_degree={ulysses_degree} and ring_degree={ring_degree} were given: leave one of them out"
        )
    return plan


@dataclass(frozen=True)
class _Group:
    handle: dist.ProcessGroup
    index: dict[int, int]  # position -> rank in the process group


def _of(groups: Sequence[_Group], position: int) -> _Group:
    return next(group for group in groups if position in group.index)


class _Groups:
    """Makes process groups of positions. ``new_group`` is collective over the world and sorts by global rank."""

    def __init__(self, backend: str | None, timeout_s: float) -> None:
        self._backend = backend
        self._timeout_s = timeout_s

    def new(self, positions: list[int], members: Sequence[int], bounded: bool = False) -> _Group:
        ranks = sorted(members[p] for p in positions)
        handle = dist.new_group(
            ranks, backend=self._backend, timeout=timedelta(seconds=self._timeout_s) if bounded else None
        )
        return _Group(handle, {p: ranks.index(members[p]) for p in positions})
