"""What moves chunks between the ranks of a group: which transports there are, and how links are made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from sf_xfuser.config import XDIT_BACKENDS, TorusArgs
from sf_xfuser.layout.plan import Layout
from sf_xfuser.layout.schedule import Link
from sf_xfuser.transport.base import Transport, TransportError
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.cpu import shm, tcp
from sf_xfuser.transport.cpu.shm import Shm
from sf_xfuser.transport.gpu import nvshmem, symm_mem
from sf_xfuser.transport.gpu.memory import free_closed_windows
from sf_xfuser.transport.gpu.nvshmem import Nvshmem
from sf_xfuser.transport.gpu.symm_mem import SymmMem
from sf_xfuser.transport.rendezvous import StoreGroup, run_with_timeout
from sf_xfuser.transport.two_sided import TwoSided

PATIENCE = 5
"""Ranks may come to a call, or to setting up, this many times ``--sp-timeout`` apart: they load a model first. Once a
call is under way, no chunk may take longer than ``--sp-timeout``."""

Links = dict[Link, Transport]
Connect = Callable[[ControlPlane], Links]
"""Makes the links of one rank. Collective over its group."""

XDITS = "xDiT's own collectives"


@dataclass
class Group:
    """A process group of the global ``ranks``, which move chunks over it, and each position's rank in it. Made by these
    ranks alone when a link wants it, and again where a failed call has ended it."""

    name: str
    ranks: Sequence[int]
    index: dict[int, int]
    backend: str | None
    timeout_s: float
    handle: dist.ProcessGroup | None = None

    def open(self, control: ControlPlane) -> dist.ProcessGroup:
        """Collective over ``ranks``, all of which are among those of ``control`` and come here equally often."""
        if self.handle is None:
            c10d = dist.distributed_c10d
            # ``new_group`` would give it the name of an earlier one, and leave what that had put into the store there.
            name: Any = f"sf_xfuser/{control.session}/{self.name}/{self.ranks[0]}"

            def make() -> dist.ProcessGroup:
                group, _ = c10d._new_process_group_helper(
                    len(self.ranks),
                    self.ranks.index(dist.get_rank()),
                    list(self.ranks),
                    c10d.Backend(self.backend or dist.get_backend()),
                    c10d._get_default_store(),
                    name,
                    timeout=timedelta(seconds=self.timeout_s),
                )
                c10d._world.pg_group_ranks[group] = {rank: index for index, rank in enumerate(self.ranks)}
                return group  # type: ignore[no-any-return]

            # NCCL's may make its communicator at once, for the device of this thread.
            on_cpus = (self.backend or dist.get_backend()) == "gloo"
            try:
                self.handle = (
                    run_with_timeout(make, 2 * self.timeout_s, "making a process group") if on_cpus else make()
                )
            except RuntimeError as error:
                if (why := control.failure) is not None:
                    raise TransportError(why) from error
                raise
        return self.handle

    def end(self) -> None:
        """Release it, whatever is on its way. Idempotent. Local."""
        handle, self.handle = self.handle, None
        if handle is not None:
            end_group(handle)


def end_group(handle: dist.ProcessGroup) -> None:
    """Release the connections and threads of a process group. Idempotent. Local."""
    if dist.is_initialized() and handle in dist.distributed_c10d._world.pg_map:
        if dist.get_backend(handle) == "gloo":
            dist.destroy_process_group(handle)
        else:  # destroying NCCL's would wait for what is on its way
            dist.distributed_c10d._abort_process_group(handle)


@dataclass(frozen=True)
class RankInfo:
    """One rank: at ``position`` of ``layout``, where ``members[w]`` is the global rank at position ``w``."""

    layout: Layout
    members: Sequence[int]
    position: int
    timeout_s: float


@dataclass(frozen=True)
class MemoryDomain:
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
    """Whether links may be made of torch.distributed's process groups: between GPUs ``"auto"`` tries those, too."""
    return wanted in ("two_sided", "symm_mem") or (wanted == "auto" and backend != "gloo")


def gather_domains(world: StoreGroup, wanted: str | None, backend: str) -> list[MemoryDomain]:
    """The domain of each rank of the job: that of its memory, or of its GPU where peers may map that. Collective."""
    memory = symm_mem if wanted != "two_sided" and need_groups(wanted, backend) else shm
    return [MemoryDomain(*said) for said in world.gather("domain", [memory.identity(), memory.unavailable()])]


def link_peers(layout: Layout, position: int) -> dict[Link, list[int]]:
    """Whom a rank exchanges chunks with: those with the same ring coordinates, and those with the same heads."""
    others = sorted({*layout.ulysses_group(position), *layout.ring_group(position)} - {position})
    here = layout.machine(position)
    return {
        "inside": [p for p in others if layout.machine(p) == here],
        "across": [p for p in others if layout.machine(p) != here],
    }


def shared_links(wanted: str | None, domains: Sequence[MemoryDomain], layout: Layout) -> list[Link]:
    """The links all of whose ranks can write to each other's memory, by the domain of each position. Pure.

    Raises ValueError where such memory is demanded and missing.
    """
    of_machine: dict[int, set[MemoryDomain]] = {}
    for position, domain in enumerate(domains):
        of_machine.setdefault(layout.machine(position), set()).add(domain)
    joined = [len(seen) == 1 and next(iter(seen)).refusal is None for seen in of_machine.values()]
    shared: list[Link] = []
    if all(joined) and len(set(domains)) == 1:
        shared = ["inside", "across"]
    elif all(joined) and layout.ranks_per_machine > 1:
        shared = ["inside"]
    if wanted == "shm" and len(shared) < 2:
        raise ValueError(
            f"--sp-transport shm needs ranks that share the memory of one host; they say {list(map(str, domains))}. auto "
            f"uses it inside each host, and tcp between hosts"
        )
    if wanted == "symm_mem" and not shared:
        raise ValueError(
            f"--sp-transport symm_mem needs several ranks of each machine on GPUs of one NVLink domain; they say "
            f"{list(map(str, domains))}. two_sided and nvshmem work between machines"
        )
    return shared


def ways(
    wanted: str, rank_info: RankInfo, shared: Sequence[Link], group_of: Mapping[Link, Group]
) -> dict[str, Connect]:
    """How the links can be made, by name; several for ``"auto"`` only, and the first of them can always be.
    ``group_of``: process groups, where ``need_groups``."""
    found: dict[str, Connect] = {}
    if group_of:
        if wanted != "symm_mem":
            found["two_sided"] = partial(_connect_groups, rank_info, group_of, ())
        if shared and wanted != "two_sided":
            name = "symm_mem" if len(shared) == 2 else "symm_mem inside, two_sided across"
            found[name] = partial(_connect_groups, rank_info, group_of, shared)
    if wanted == "nvshmem" or (wanted == "auto" and group_of):
        found["nvshmem"] = partial(_connect_nvshmem, rank_info)
    if found:
        return found
    if shared and wanted != "tcp":
        name = "shm" if len(shared) == 2 else "shm inside, tcp across"
        found[name] = partial(_connect_cpus, rank_info, shared)
    if wanted != "shm":
        found["tcp"] = partial(_connect_cpus, rank_info, ())
    return found


def let_go(control: ControlPlane, members: Sequence[int], position: int, used: str) -> None:
    """Free what transports that were tried, and are not ``used``, hold on GPUs. Collective between calls."""
    if free_closed_windows(control, members, position) and used != "nvshmem":
        nvshmem.finalize()


def _connect_cpus(rank_info: RankInfo, shared: Collection[Link], control: ControlPlane) -> Links:
    """One in shared memory for all that ``shared`` names, TCP for the others."""
    layout, position, members = rank_info.layout, rank_info.position, rank_info.members
    peers = link_peers(layout, position)
    others = {link: found for link, found in peers.items() if link not in shared}
    made: Links = {}
    with contextlib.ExitStack() as failed:
        if shared:
            halves = 1 if "across" not in shared and layout.torus > 1 and layout.ring_degree == 1 else 2
            in_memory = [peer for link in shared for peer in peers[link]]
            window = Shm(control, members, position, in_memory, rank_info.timeout_s, halves)
            failed.callback(window.close)
            made.update(dict.fromkeys(shared, window))
        if others:
            made.update(tcp.connect(control, members, position, others, rank_info.timeout_s))
        failed.pop_all()
    return made


def _connect_groups(
    rank_info: RankInfo, group_of: Mapping[Link, Group], shared: Collection[Link], control: ControlPlane
) -> Links:
    """One of symmetric memory for all that ``shared`` names, matched sends and receives for the others."""
    groups = {name: group.open(control) for name, group in group_of.items()}
    made: Links = {
        name: TwoSided(groups[name], rank_info.members, name, rank_info.timeout_s, control)
        for name in group_of
        if name not in shared
    }
    if shared:
        peers = link_peers(rank_info.layout, rank_info.position)
        widest: Link = "across" if "across" in shared else "inside"
        window = SymmMem(
            control,
            rank_info.members,
            rank_info.position,
            [peer for link in shared for peer in peers[link]],
            rank_info.timeout_s,
            groups[widest],
            group_of[widest].index,
        )
        made.update(dict.fromkeys(shared, window))
    return made


def _connect_nvshmem(rank_info: RankInfo, control: ControlPlane) -> Links:
    """Both links are one."""
    peers = [peer for found in link_peers(rank_info.layout, rank_info.position).values() for peer in found]
    return dict.fromkeys(
        ("inside", "across"), Nvshmem(control, rank_info.members, rank_info.position, peers, rank_info.timeout_s)
    )
