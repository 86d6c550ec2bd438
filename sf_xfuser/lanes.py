"""What moves chunks between the ranks of a group: which transports there are, and how lanes are made of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from sf_xfuser.agreement import Agreement
from sf_xfuser.args import XDIT_BACKENDS, TorusArgs
from sf_xfuser.plan import Layout
from sf_xfuser.schedule import Lane
from sf_xfuser.transport import Nvshmem, Shm, SymmMem, Transport, TwoSided, device, nvshmem, shm, symm_mem, tcp

Lanes = dict[Lane, Transport]
Connect = Callable[[Agreement], Lanes]
"""Makes the lanes of one rank. Collective over its group."""

XDITS = "xDiT's own collectives"


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


@dataclass(frozen=True)
class Home:
    """``name`` is equal for ranks that can write to each other's memory; ``refusal``: why this one cannot."""

    name: str
    refusal: str | None = None

    def __str__(self) -> str:
        return self.refusal or self.name


def wanted(args: TorusArgs, backend: str) -> str | None:
    """A name of ``args.TRANSPORTS``; None: nothing of ours moves anything. ``backend`` is torch.distributed's. Raises
    ValueError where the two do not go together."""
    if args.backend in XDIT_BACKENDS and args.transport == "auto":
        return None
    if args.transport in ("shm", "tcp") and backend != "gloo":
        raise ValueError(
            f"--sp-transport {args.transport} moves tensors of CPU ranks, but torch.distributed's backend is {backend}"
        )
    return args.transport


def need_groups(wanted: str | None, backend: str) -> bool:
    """Whether lanes may be made of torch.distributed's process groups: between GPUs ``"auto"`` tries those, too."""
    return wanted in ("two_sided", "symm_mem") or (wanted == "auto" and backend != "gloo")


def gather_homes(world: Agreement, wanted: str | None, backend: str) -> list[Home]:
    """The home of each rank of the job: that of its memory, or of its GPU where peers may map that. Collective."""
    memory = symm_mem if wanted != "two_sided" and need_groups(wanted, backend) else shm
    return [Home(*said) for said in world.gather("home", [memory.identity(), memory.unavailable()])]


def lane_peers(layout: Layout, position: int) -> dict[Lane, list[int]]:
    """Whom a rank exchanges chunks with: those with the same ring coordinates, and those with the same heads."""
    others = sorted({*layout.ulysses_group(position), *layout.ring_group(position)} - {position})
    here = layout.machine(position)
    return {
        "inside": [p for p in others if layout.machine(p) == here],
        "across": [p for p in others if layout.machine(p) != here],
    }


def shared_lanes(wanted: str | None, homes: Sequence[Home], layout: Layout) -> list[Lane]:
    """The lanes all of whose ranks can write to each other's memory, by the home of each position. Pure.

    Raises ValueError where such memory is demanded and missing.
    """
    of_machine: dict[int, set[Home]] = {}
    for position, home in enumerate(homes):
        of_machine.setdefault(layout.machine(position), set()).add(home)
    joined = [len(seen) == 1 and next(iter(seen)).refusal is None for seen in of_machine.values()]
    shared: list[Lane] = []
    if all(joined) and len(set(homes)) == 1:
        shared = ["inside", "across"]
    elif all(joined) and layout.ranks_per_machine > 1:
        shared = ["inside"]
    if wanted == "shm" and len(shared) < 2:
        raise ValueError(
            f"--sp-transport shm needs ranks that share the memory of one host; they say {list(map(str, homes))}. auto "
            f"uses it inside each host, and tcp between hosts"
        )
    if wanted == "symm_mem" and not shared:
        raise ValueError(
            f"--sp-transport symm_mem needs several ranks of each machine on GPUs of one NVLink domain; they say "
            f"{list(map(str, homes))}. two_sided and nvshmem work between machines"
        )
    return shared


def ways(wanted: str, seat: Seat, shared: Sequence[Lane], group_of: Mapping[Lane, Group]) -> dict[str, Connect]:
    """How the lanes can be made, by name; several for ``"auto"`` only, and the first of them can always be.
    ``group_of``: process groups, where ``need_groups``."""
    found: dict[str, Connect] = {}
    if group_of:
        if wanted != "symm_mem":
            found["two_sided"] = functools.partial(_connect_groups, seat, group_of, ())
        if shared and wanted != "two_sided":
            name = "symm_mem" if len(shared) == 2 else "symm_mem inside, two_sided across"
            found[name] = functools.partial(_connect_groups, seat, group_of, shared)
    if wanted == "nvshmem" or (wanted == "auto" and group_of):
        found["nvshmem"] = functools.partial(_connect_nvshmem, seat)
    if found:
        return found
    if shared and wanted != "tcp":
        name = "shm" if len(shared) == 2 else "shm inside, tcp across"
        found[name] = functools.partial(_connect_cpus, seat, shared)
    if wanted != "shm":
        found["tcp"] = functools.partial(_connect_cpus, seat, ())
    return found


def let_go(agreement: Agreement, members: Sequence[int], position: int, used: str) -> None:
    """Free what transports that were tried, and are not ``used``, hold on GPUs. Collective between calls."""
    if device.let_go(agreement, members, position) and used != "nvshmem":
        nvshmem.finalize()


def _connect_cpus(seat: Seat, shared: Collection[Lane], agreement: Agreement) -> Lanes:
    """One in shared memory for all that ``shared`` names, TCP for the others."""
    layout, position, members = seat.layout, seat.position, seat.members
    peers = lane_peers(layout, position)
    others = {lane: found for lane, found in peers.items() if lane not in shared}
    made: Lanes = {}
    with contextlib.ExitStack() as failed:
        if shared:
            halves = 1 if "across" not in shared and layout.torus > 1 and layout.ring_degree == 1 else 2
            in_memory = [peer for lane in shared for peer in peers[lane]]
            window = Shm(agreement, members, position, in_memory, seat.timeout_s, halves)
            failed.callback(window.close)
            made.update(dict.fromkeys(shared, window))
        if others:
            made.update(tcp.connect(agreement, members, position, others, seat.timeout_s))
        failed.pop_all()
    return made


def _connect_groups(
    seat: Seat, group_of: Mapping[Lane, Group], shared: Collection[Lane], agreement: Agreement
) -> Lanes:
    """One of symmetric memory for all that ``shared`` names, matched sends and receives for the others."""
    made: Lanes = {name: TwoSided(group.handle, seat.members, name, seat.timeout_s) for name, group in group_of.items()}
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
