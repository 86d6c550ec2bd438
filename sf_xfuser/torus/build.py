"""Builds the mesh of a rank: topology, plan, process groups and links, cross-checked on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sf_xfuser import config
from sf_xfuser.config import TorusArgs
from sf_xfuser.layout.plan import EVEN, Plan, make_plan
from sf_xfuser.layout.schedule import Link
from sf_xfuser.layout.topology import MachineGrid, RankFacts, Topology, probe
from sf_xfuser.torus import links
from sf_xfuser.torus.compression import Compression
from sf_xfuser.torus.graphs import Graphs
from sf_xfuser.torus.links import Group, RankInfo
from sf_xfuser.torus.mesh import Mesh
from sf_xfuser.transport.base import CALL_TIMEOUT_FACTOR, TransportError, TransportUnavailable
from sf_xfuser.transport.control_plane import ControlPlane, GroupError
from sf_xfuser.transport.rendezvous import StoreGroup, run_with_timeout


def build_mesh(
    sp_rank_lists: Sequence[Sequence[int]] | DeviceMesh,
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

    ``sp_rank_lists``: the ascending global ranks of every sequence-parallel group; every rank is in one group. A
    DeviceMesh stands for the ranks of this rank's group. It has one dimension, or ``("ring", "ulysses")`` as in
    diffusers' ContextParallelConfig; its degrees are ignored.
    Degrees that are given are kept (``ring_degree`` is only checked); others are planned, with heads at most as uneven
    as ``max_imbalance`` (see ``make_plan``). ``backend``: of torch.distributed.
    Raises ValueError (bad degrees, heads, flags) or RuntimeError (a rank is missing) on every rank.
    """
    rank = dist.get_rank()
    world = StoreGroup.world(CALL_TIMEOUT_FACTOR * args.timeout)
    topology = gather_topology(args, world, dist.get_world_size())
    if isinstance(sp_rank_lists, DeviceMesh):
        sp_rank_lists = _gather_rank_lists(sp_rank_lists, world)
    for ranks in sp_rank_lists:
        if list(ranks) != sorted(set(ranks)):
            raise ValueError(f"a sequence-parallel group must list ascending distinct ranks, got {list(ranks)}")

    # Every rank makes the plans of all groups before any process group, so an error is raised on all ranks.
    grids = [topology.fold(ranks) for ranks in sp_rank_lists]
    given = {"heads": heads, "kv_heads": kv_heads, "max_imbalance": max_imbalance}
    plans = [_plan(grid, args, ulysses_degree, ring_degree, **given) for grid in grids]
    groups = list(zip(grids, plans, strict=True))
    backend = backend or dist.get_backend()
    requested = links.requested_transport(args, backend)
    shared = _shared_links(world, args, requested, backend, groups)
    # Creating process groups is collective over the world, so it precedes everything that can fail on one rank.
    process_groups = _process_groups(args, backend, groups)
    index = next((n for n, grid in enumerate(grids) if rank in grid.members), None)
    if index is None:
        raise ValueError(f"rank {rank} is in none of the sequence-parallel groups {[list(r) for r in sp_rank_lists]}")
    (grid, plan), (ulysses, ring) = groups[index], process_groups[2 * index : 2 * index + 2]
    position = grid.members.index(rank)
    rank_info = RankInfo(plan.layout, grid.members, position, args.timeout)
    agreement = world.subgroup(index, grid.members)
    # A rank that waits for a chunk gives up first, since it knows which call it is in.
    control = ControlPlane(agreement, grid.members, position, agreement.timeout_s + args.timeout)
    link_groups = _link_groups(rank_info, backend) if links.needs_process_groups(requested, backend) else {}
    transports = {} if requested is None else links.candidates(requested, rank_info, shared[index], link_groups)
    if args.compress != "none":
        for name in config.UNCOMPRESSED:
            transports.pop(name, None)
    mesh = Mesh(
        graphs=Graphs(enabled=args.graphs == "auto"),
        plan=plan,
        grid=grid,
        topology=topology,
        position=position,
        links={},
        ulysses_group=ulysses[position],
        ring_group=ring[position],
        control=control,
        groups=list(link_groups.values()),
        transport=links.XDIT_COLLECTIVES,  # until a transport is connected
        transports=transports,
        one_host=len(shared[index]) == 2,
        compression=Compression(args.compress) if args.compress != "none" else None,
    )
    try:
        _connect(mesh, args, world if requested is not None else None)
    except BaseException:
        mesh.close()
        raise
    return mesh


def gather_topology(args: TorusArgs, agreement: StoreGroup, world_size: int) -> Topology:
    """The topology of the job, equal on every rank. Collective over the world, even when --sp-topology overrides it.

    Raises ValueError on every rank if ranks were started with different ``--sp-*`` flags.
    """
    agreement.require_same("flags", {f"--sp-{name}": value for name, value in asdict(args).items()})
    if args.topology != "auto":
        return Topology.parse(args.topology, world_size)
    return Topology.from_facts([RankFacts(**facts) for facts in agreement.gather("host", asdict(probe()))])


def _gather_rank_lists(device_mesh: DeviceMesh, world: StoreGroup) -> list[list[int]]:
    """The ranks of every group, from the DeviceMesh of each rank's own group. Collective over the world."""
    names, ranks, error = device_mesh.mesh_dim_names, device_mesh.mesh.flatten().tolist(), ""
    if device_mesh.ndim != 1 and names != ("ring", "ulysses"):
        got = names or f"{device_mesh.ndim} without names"
        error = f"a DeviceMesh must have one dimension or ('ring', 'ulysses'), got {got}: pass a slice, as mesh['sp']"
    reports = world.gather("device mesh", [error, ranks])
    if errors := [f"rank {rank}: {text}" for rank, (text, _) in enumerate(reports) if text]:
        raise ValueError(errors[0])
    groups = sorted({tuple(ranks) for _, ranks in reports})
    if sorted(chain(*groups)) != list(range(len(reports))):
        raise ValueError(f"each of the {len(reports)} ranks must be in one group, got DeviceMeshes of {groups}")
    return [list(group) for group in groups]


def _plan(
    grid: MachineGrid, args: TorusArgs, ulysses_degree: int | None, ring_degree: int | None, **given: Any
) -> Plan:
    """``given``: further arguments of ``make_plan``."""
    if ulysses_degree is not None and (product := ulysses_degree * (ring_degree or 1)) != len(grid.members):
        raise ValueError(
            f"ulysses_degree={ulysses_degree} x ring_degree={ring_degree or 1} = {product}, but the sequence-parallel "
            f"group has {len(grid.members)} ranks: give degrees with that product, or omit them for --sp-plan"
        )
    shape, explicit = (grid.num_machines, grid.ranks_per_machine), args.explicit_plan()
    plan = make_plan(*shape, rule=args.rule, explicit=explicit, ulysses_degree=ulysses_degree, **given)
    even = plan.even
    if ulysses_degree is not None and even.ulysses_degree != ulysses_degree:
        raise ValueError(
            f"--sp-plan {args.plan} means ulysses_degree={even.ulysses_degree} and ring_degree={even.ring_degree}, "
            f"but ulysses_degree={ulysses_degree} and ring_degree={ring_degree} were given: omit one of them"
        )
    return plan


def _shared_links(
    world: StoreGroup, args: TorusArgs, requested: str | None, backend: str, groups: list[tuple[MachineGrid, Plan]]
) -> list[list[Link]]:
    """The links of each group that can use shared memory. Collective over the world."""
    domains = links.gather_domains(world, requested, backend)
    shared = [links.shared_links(requested, [domains[r] for r in grid.members], plan.layout) for grid, plan in groups]
    if args.compress != "none":  # windows hold uncompressed chunks
        shared = [[link for link in of_group if link != "across"] for of_group in shared]
        if requested == "symm_mem" and not all(shared):
            raise ValueError(
                f"--sp-compress {args.compress} supports symm_mem inside machines only, and a machine has "
                f"one rank: use two_sided"
            )
    return shared


def _connect(mesh: Mesh, args: TorusArgs, world: StoreGroup | None) -> None:
    """Connect the first available transport. Collective over ``world``, which is None if xDiT's own collectives are
    used. Raises on all ranks if one of them fails."""
    failure: Exception | None = None
    refusals: list[str] = []
    try:
        for name, connect in list(mesh.transports.items()):
            try:
                mesh.links, mesh.transport = connect(mesh.control), name
                break
            except TransportUnavailable as refusal:
                del mesh.transports[name]
                if not mesh.transports:
                    raise
                refusals.append(str(refusal))
        mesh.transport_reason = "; ".join(text for text in [_reason(args, len(mesh.transports)), *refusals] if text)
    except (TransportUnavailable, GroupError) as error:  # raised on all ranks of the group
        failure = error
    except Exception as error:
        mesh.control.report_failure(f"{type(error).__name__}: {error}", is_cause=not isinstance(error, TransportError))
        failure = error
    if world is not None:
        errors = sorted({text for text in world.gather("links", failure and str(failure)) if text})
        if errors:
            raise failure or TransportError("; ".join(errors))


def _reason(args: TorusArgs, num_transports: int) -> str:
    """``Mesh.transport_reason`` of a new mesh."""
    if num_transports == 0:
        return "no --sp-transport was given"
    if args.transport != "auto":
        return "as requested"
    return "" if num_transports > 1 else "the only available one"


def _process_groups(
    args: TorusArgs, backend: str, groups: list[tuple[MachineGrid, Plan]]
) -> list[dict[int, dist.ProcessGroup]]:
    """For each group, the Ulysses and then the ring process group of each position. Collective over the world."""
    made: list[dict[int, dist.ProcessGroup]] = []
    for grid, plan in groups:
        for group_of in (plan.even.ulysses_group, plan.even.ring_group):
            made.append({})
            for positions in sorted({group_of(p) for p in range(len(grid.members))}):
                new = partial(dist.new_group, sorted(grid.members[p] for p in positions), backend=backend)
                # NCCL may create its communicator here, for the device of this thread.
                limit_s = CALL_TIMEOUT_FACTOR * args.timeout
                handle = run_with_timeout(new, limit_s, "making process groups") if backend == "gloo" else new()
                made[-1].update(dict.fromkeys(positions, handle))
    return made


def _link_groups(rank_info: RankInfo, backend: str) -> dict[Link, Group]:
    """The process groups that the links of a rank may use. Local: they are created later."""
    layout, members = rank_info.layout, rank_info.members
    everyone = range(layout.world_size)
    machine = [p for p in everyone if layout.machine(p) == layout.machine(rank_info.position)]
    parts: dict[Link, Sequence[int]] = {"inside": machine, "across": everyone}
    groups = {}
    for link, positions in parts.items():
        ranks = sorted(members[p] for p in positions)
        index = {p: ranks.index(members[p]) for p in positions}
        # NCCL's own watchdog ends the process, so it has to be the last to act.
        patience = 1 if backend == "gloo" else 2 * CALL_TIMEOUT_FACTOR
        groups[link] = Group(link, ranks, index, backend, patience * rank_info.timeout_s)
    return groups
