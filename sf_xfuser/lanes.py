"""What moves chunks between the ranks of a group: which transports there are, and how lanes are made of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from sf_xfuser.agreement import Agreement
from sf_xfuser.args import XDIT_BACKENDS, TorusArgs
from sf_xfuser.plan import Layout
from sf_xfuser.schedule import Lane
from sf_xfuser.transport import Nvshmem, Shm, SymmMem, Transport, TwoSided, shm, symm_mem, tcp

Lanes = dict[Lane, Transport]
Connect = Callable[[Agreement], Lanes]
"""Makes the lanes of one rank. Collective over its group."""

XDITS = "xDiT's own collectives"
OVER_GROUPS = ("two_sided", "symm_mem")
"""Transports that need torch.distributed's process groups."""


@dataclass(frozen=True)
class Group:
    """A process group, and each position's rank in it."""

    handle: dist.ProcessGroup
    index: dict[int, int]


@dataclass(frozen=True)
class Seat:
    """One rank: at ``position`` of ``layout``, where ``members[w]`` is the global rank at position ``w``."""

    layout: Layout
    members: Sequence[int]
    position: int
    timeout_s: float


def wanted(args: TorusArgs, backend: str) -> str | None:
    """A name of ``args.TRANSPORTS``, ``"auto"`` between CPU ranks only; None: nothing of ours moves anything.
    ``backend`` is torch.distributed's. Raises ValueError where the two do not go together."""
    if args.backend in XDIT_BACKENDS and args.transport == "auto":
        return None
    if args.transport in ("shm", "tcp") and backend != "gloo":
        raise ValueError(
            f"--sp-transport {args.transport} moves tensors of CPU ranks, but torch.distributed's backend is {backend}"
        )
    return "two_sided" if args.transport == "auto" and backend != "gloo" else args.transport


def homes(agreement: Agreement) -> list[str | None]:
    """Equal for ranks that share the memory of a host; None for one that cannot. Collective over the group."""
    return agreement.gather("shared memory", None if shm.unavailable() else shm.identity())


def lane_peers(layout: Layout, position: int) -> dict[Lane, list[int]]:
    """Whom a rank exchanges chunks with: those with the same ring coordinates, and those with the same heads."""
    others = sorted({*layout.ulysses_group(position), *layout.ring_group(position)} - {position})
    here = layout.machine(position)
    return {
        "inside": [p for p in others if layout.machine(p) == here],
        "across": [p for p in others if layout.machine(p) != here],
    }


def ways(
    wanted: str,
    seat: Seat,
    homes: Sequence[str | None],
    agreement: Agreement,
    group_of: Mapping[Lane, Group],
) -> dict[str, Connect]:
    """How the lanes can be made, by name; several for ``"auto"`` only. ``group_of``: for ``OVER_GROUPS``. Collective.

    Raises ValueError, on every rank, where the ranks sit so that what is wanted cannot be.
    """
    if wanted == "nvshmem":
        return {wanted: functools.partial(_connect_nvshmem, seat)}
    if wanted == "two_sided":
        return {wanted: functools.partial(_connect_groups, seat, group_of, ())}
    if wanted == "symm_mem":
        reports = agreement.gather("NVLink domain", [symm_mem.identity(), symm_mem.unavailable()])
        shared = joined([None if reason else str(home) for home, reason in reports], seat.layout)
        if not shared:
            raise ValueError(
                f"--sp-transport symm_mem needs several ranks of each machine on GPUs of one NVLink domain; they say "
                f"{[reason or home for home, reason in reports]}. two_sided and nvshmem work between machines"
            )
        name = "symm_mem" if len(shared) == 2 else "symm_mem inside, two_sided across"
        return {name: functools.partial(_connect_groups, seat, group_of, shared)}
    return {
        name: functools.partial(_connect_cpus, seat, shared)
        for name, shared in cpu_ways(wanted, homes, seat.layout).items()
    }


def cpu_ways(wanted: str, homes: Sequence[str | None], layout: Layout) -> dict[str, list[Lane]]:
    """What can move chunks between CPU ranks: name -> the lanes in shared memory, the others being TCP. Pure.

    Raises ValueError where shared memory is demanded and missing.
    """
    shared = joined(homes, layout)
    found: dict[str, list[Lane]] = {}
    if shared:
        found["shm" if len(shared) == 2 else "shm inside, tcp across"] = shared
    found["tcp"] = []
    if wanted == "shm" and "shm" not in found:
        raise ValueError(
            f"--sp-transport shm needs ranks that share the memory of one host, which they call {list(homes)}. auto "
            f"uses it inside each host, and tcp between hosts"
        )
    return found if wanted == "auto" else {wanted: found[wanted]}


def joined(homes: Sequence[str | None], layout: Layout) -> list[Lane]:
    """The lanes all of whose ranks have one home, by that of each position; None: no home. Pure."""
    of_machine: dict[int, set[str | None]] = {}
    for position, home in enumerate(homes):
        of_machine.setdefault(layout.machine(position), set()).add(home)
    if len(set(homes)) == 1 and homes[0] is not None:
        return ["inside", "across"]
    if layout.ranks_per_machine > 1 and all(len(seen) == 1 and None not in seen for seen in of_machine.values()):
        return ["inside"]
    return []


def _connect_cpus(seat: Seat, shared: Collection[Lane], agreement: Agreement) -> Lanes:
    """One in shared memory for all that ``shared`` names, TCP for the others."""
    layout, position, members = seat.layout, seat.position, seat.members
    peers = lane_peers(layout, position)
    others = {lane: found for lane, found in peers.items() if lane not in shared}
    made: Lanes = {**tcp.connect(agreement, members, position, others, seat.timeout_s)} if others else {}
    if shared:
        halves = 1 if "across" not in shared and layout.torus > 1 and layout.ring_degree == 1 else 2
        in_memory = [peer for lane in shared for peer in peers[lane]]
        made.update(dict.fromkeys(shared, Shm(agreement, members, position, in_memory, seat.timeout_s, halves)))
    return made


def _connect_groups(
    seat: Seat, group_of: Mapping[Lane, Group], shared: Collection[Lane], agreement: Agreement
) -> Lanes:
    """One of symmetric memory for all that ``shared`` names, matched sends and receives for the others."""
    made: Lanes = {name: TwoSided(group.handle, name, seat.timeout_s) for name, group in group_of.items()}
    if shared:
        peers = lane_peers(seat.layout, seat.position)
        widest = group_of["across" if "across" in shared else "inside"]
        window = SymmMem(
            agreement,
            seat.members,
            seat.position,
            [peer for lane in shared for peer in peers[lane]],
            seat.timeout_s,
            widest.handle,
            widest.index,
        )
        made.update(dict.fromkeys(shared, window))
    return made


def _connect_nvshmem(seat: Seat, agreement: Agreement) -> Lanes:
    """Both lanes are one."""
    peers = [peer for found in lane_peers(seat.layout, seat.position).values() for peer in found]
    return dict.fromkeys(("inside", "across"), Nvshmem(agreement, seat.members, seat.position, peers, seat.timeout_s))
