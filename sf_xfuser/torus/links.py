"""The links of a rank: which transports are available, and how each of them connects the links."""

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
from sf_xfuser.transport.cpu import segment, shm, tcp
from sf_xfuser.transport.cpu.shm import Shm
from sf_xfuser.transport.gpu import nccl_put, nvshmem, symm_mem
from sf_xfuser.transport.gpu.memory import free_closed_windows
from sf_xfuser.transport.gpu.nccl import Nccl
from sf_xfuser.transport.gpu.nccl_put import NcclPut
from sf_xfuser.transport.gpu.nvshmem import Nvshmem
from sf_xfuser.transport.gpu.symm_mem import SymmMem
from sf_xfuser.transport.rendezvous import StoreGroup, run_with_timeout
from sf_xfuser.transport.two_sided import Gloo

Links = dict[Link, Transport]
Connect = Callable[[ControlPlane], Links]
"""Connects the links of one rank. Collective over its group."""

XDIT_COLLECTIVES = "xDiT's own collectives"

UNAVAILABLE: Mapping[str, Callable[[], str | None]] = {
    "shm": segment.unavailable,
    "symm_mem": symm_mem.unavailable,
    "nccl_put": nccl_put.unavailable,
    "nvshmem": nvshmem.unavailable,
}
"""Transport -> why this process cannot use it, regardless of its peers, or None. Local. Others run everywhere."""


@dataclass
class Group:
    """A process group of the global ``ranks`` for transfers. ``index``: the rank of each position in it. Only these
    ranks create it, when a link needs it, and again after a failed call has closed it."""

    name: str
    ranks: Sequence[int]
    index: dict[int, int]
    backend: str
    timeout_s: float
    handle: dist.ProcessGroup | None = None

    def open(self, control: ControlPlane) -> dist.ProcessGroup:
        """Create the group if needed. Collective over ``ranks``, which are all members of ``control``."""
        if self.handle is None:
            c10d = dist.distributed_c10d
            # ``new_group`` could reuse the name of an earlier group, which has left keys in the store.
            name: Any = f"sf_xfuser/{control.session}/{self.name}/{self.ranks[0]}"
            timeout = timedelta(seconds=self.timeout_s)

            def make() -> dist.ProcessGroup:
                group, _ = c10d._new_process_group_helper(
                    len(self.ranks),
                    self.ranks.index(dist.get_rank()),
                    list(self.ranks),
                    c10d.Backend(self.backend),
                    c10d._get_default_store(),
                    name,
                    _options(self.backend, timeout),
                    timeout=timeout,
                )
                c10d._world.pg_group_ranks[group] = {rank: index for index, rank in enumerate(self.ranks)}
                return group  # type: ignore[no-any-return]

            try:
                if self.backend == "gloo":
                    self.handle = run_with_timeout(make, 2 * self.timeout_s, "making a process group")
                else:  # NCCL may create its communicator here, for the device of this thread
                    self.handle = make()
            except RuntimeError as error:
                if (why := control.failure) is not None:
                    raise TransportError(why) from error
                raise
        return self.handle

    def close(self) -> None:
        """Release the group without waiting for pending transfers. Idempotent. Local."""
        handle, self.handle = self.handle, None
        if handle is not None:
            destroy_group(handle)


def _options(backend: str, timeout: timedelta) -> Any:
    """For NCCL, streams of high priority: the kernel of a round that becomes ready during attention runs before the
    remaining blocks of the attention kernel."""
    if "nccl" not in backend or not dist.is_nccl_available():
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # otherwise PyTorch warns that it differs
    return options


def destroy_group(handle: dist.ProcessGroup) -> None:
    """Release the connections and threads of a process group. Idempotent. Local."""
    if dist.is_initialized() and handle in dist.distributed_c10d._world.pg_map:
        if dist.get_backend(handle) == "gloo":
            dist.destroy_process_group(handle)
        else:  # destroying an NCCL group would wait for pending transfers
            dist.distributed_c10d._abort_process_group(handle)


@dataclass(frozen=True)
class RankInfo:
    """A rank at ``position`` of ``layout``. ``members[w]``: the global rank at position ``w``."""

    layout: Layout
    members: Sequence[int]
    position: int
    timeout_s: float


@dataclass(frozen=True)
class MemoryDomain:
    """``name`` is equal for ranks that can write to each other's memory. ``refusal``: why this rank cannot."""

    name: str
    refusal: str | None = None

    def __str__(self) -> str:
        return self.refusal or self.name


def requested_transport(args: TorusArgs, backend: str) -> str | None:
    """One of ``config.TRANSPORTS``, or None if xDiT's own collectives are used. ``backend``: of torch.distributed.
    Raises ValueError if the transport does not support the backend."""
    if args.backend in XDIT_BACKENDS and args.transport == "auto":
        return None
    if args.transport in ("shm", "tcp") and backend != "gloo":
        raise ValueError(
            f"--sp-transport {args.transport} moves tensors of CPU ranks, but torch.distributed's backend is {backend}"
        )
    return args.transport


def refused_here(args: TorusArgs, backend: str) -> str | None:
    """Why this rank cannot use the named transport, regardless of the other ranks, or None. Local."""
    try:
        requested = requested_transport(args, backend)
    except ValueError as error:
        return str(error)
    unavailable = UNAVAILABLE.get(requested or "")
    reason = unavailable() if unavailable is not None else None
    return f"--sp-transport {requested} cannot be used here: {reason}; use --sp-transport auto" if reason else None


def needs_process_groups(requested: str | None, backend: str) -> bool:
    """Whether links may use torch.distributed's process groups. ``"auto"`` also tries them between GPUs."""
    return requested in ("two_sided", "symm_mem") or (requested == "auto" and backend != "gloo")


def gather_domains(world: StoreGroup, requested: str | None, backend: str) -> list[MemoryDomain]:
    """The memory domain of each rank of the job: of its host memory, or of its GPU memory if peers can map it.
    Collective over the world."""
    memory = symm_mem if requested != "two_sided" and needs_process_groups(requested, backend) else shm
    return [MemoryDomain(*report) for report in world.gather("domain", [memory.identity(), memory.unavailable()])]


def link_peers(layout: Layout, position: int) -> dict[Link, list[int]]:
    """The peers of a rank on each link: the ranks with the same ring coordinates, and those with the same heads."""
    others = sorted({*layout.ulysses_group(position), *layout.ring_group(position)} - {position})
    here = layout.machine(position)
    return {
        "inside": [p for p in others if layout.machine(p) == here],
        "across": [p for p in others if layout.machine(p) != here],
    }


def shared_links(requested: str | None, domains: Sequence[MemoryDomain], layout: Layout) -> list[Link]:
    """The links on which all ranks can write to each other's memory. ``domains``: by position. Pure. Raises ValueError
    if the requested transport needs such memory and it is missing."""
    of_machine: dict[int, set[MemoryDomain]] = {}
    for position, domain in enumerate(domains):
        of_machine.setdefault(layout.machine(position), set()).add(domain)
    joined = [len(seen) == 1 and next(iter(seen)).refusal is None for seen in of_machine.values()]
    shared: list[Link] = []
    if all(joined) and len(set(domains)) == 1:
        shared = ["inside", "across"]
    elif all(joined) and layout.ranks_per_machine > 1:
        shared = ["inside"]
    if requested == "shm" and len(shared) < 2:
        raise ValueError(
            f"--sp-transport shm needs all ranks on one host, got {list(map(str, domains))}: use auto, which uses shm "
            f"inside hosts and tcp between hosts"
        )
    if requested == "symm_mem" and not shared:
        raise ValueError(
            f"--sp-transport symm_mem needs several ranks per machine on GPUs of one NVLink domain, got "
            f"{list(map(str, domains))}: use two_sided, nccl_put or nvshmem, which work between machines"
        )
    return shared


def candidates(
    requested: str, rank_info: RankInfo, shared: Sequence[Link], group_of: Mapping[Link, Group]
) -> dict[str, Connect]:
    """The transports to try, by name. More than one only for ``"auto"``; the first one of those is always available.
    ``group_of``: the process groups if ``needs_process_groups``, else empty."""
    found: dict[str, Connect] = {}
    if group_of:
        if requested != "symm_mem":
            found["two_sided"] = partial(_connect_groups, rank_info, group_of, ())
        if shared and requested != "two_sided":
            name = "symm_mem" if len(shared) == 2 else "symm_mem inside, two_sided across"
            found[name] = partial(_connect_groups, rank_info, group_of, shared)
    for kind in (NcclPut, Nvshmem):
        if requested == kind.name or (requested == "auto" and group_of):
            found[kind.name] = partial(_connect_one_sided, rank_info, kind)
    if found:
        return found
    if shared and requested != "tcp":
        name = "shm" if len(shared) == 2 else "shm inside, tcp across"
        found[name] = partial(_connect_cpus, rank_info, shared)
    if requested != "shm":
        found["tcp"] = partial(_connect_cpus, rank_info, ())
    return found


def release_unused(control: ControlPlane, members: Sequence[int], position: int, used: str) -> None:
    """Free the GPU memory of all transports that were tried, except ``used``. Collective between calls."""
    if free_closed_windows(control, members, position) and used != "nvshmem":
        nvshmem.finalize()


def _connect_cpus(rank_info: RankInfo, shared: Collection[Link], control: ControlPlane) -> Links:
    """Shared memory for the links in ``shared``, TCP for the others."""
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
    """Symmetric memory for the links in ``shared``, matched sends and receives for the others."""
    members, position, timeout_s = rank_info.members, rank_info.position, rank_info.timeout_s
    groups = {name: group.open(control) for name, group in group_of.items()}
    made: Links = {
        name: (Gloo if group.backend == "gloo" else Nccl)(groups[name], members, name, timeout_s, control)
        for name, group in group_of.items()
        if name not in shared
    }
    if shared:
        peers = link_peers(rank_info.layout, position)
        in_memory = [peer for link in shared for peer in peers[link]]
        widest: Link = "across" if "across" in shared else "inside"
        group, index = groups[widest], group_of[widest].index
        made.update(dict.fromkeys(shared, SymmMem(control, members, position, in_memory, timeout_s, group, index)))
    return made


def _connect_one_sided(rank_info: RankInfo, kind: type[NcclPut] | type[Nvshmem], control: ControlPlane) -> Links:
    """One transport for both links."""
    peers = [peer for found in link_peers(rank_info.layout, rank_info.position).values() for peer in found]
    window = kind(control, rank_info.members, rank_info.position, peers, rank_info.timeout_s)
    return dict.fromkeys(("inside", "across"), window)
