"""From a plan to process groups: who exchanges with whom, cross-checked on all ranks."""

from __future__ import annotations

import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from itertools import chain
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sf_xfuser.config import TorusArgs
from sf_xfuser.layout.plan import EVEN, Layout, Plan, make_plan
from sf_xfuser.layout.schedule import Link
from sf_xfuser.layout.topology import MachineGrid, RankFacts, Topology, probe
from sf_xfuser.torus import links as links
from sf_xfuser.torus.compression import Compression
from sf_xfuser.torus.links import PATIENCE, Connect, Group, Links, RankInfo
from sf_xfuser.torus.trace import Trace
from sf_xfuser.transport.base import CallMismatch, OneSided, Parcel, TransportError, TransportUnavailable
from sf_xfuser.transport.control_plane import ControlPlane, GroupError
from sf_xfuser.transport.gpu.memory import is_capturing
from sf_xfuser.transport.rendezvous import StoreGroup, run_with_timeout

_CALLS_KEPT = 64
_TRIES, _LONG_S = 2, 0.5  # a transport is tried so often, the last time counts; once where a call takes longer

_SOON_S = 1.0  # in which a rank whose call has failed comes to the next one, where it does not wait for others first

_T = TypeVar("_T")


class _Behind(TransportError):
    """This rank has failed in an earlier call than others."""


@dataclass(eq=False)
class Mesh:
    """One sequence-parallel group as seen by this rank. Made by :func:`build_mesh`; holds no tensors.

    ``position`` is this rank's machine-major place in ``plan.layout``; ``members[w]`` the global rank at place ``w``.
    ``links`` moves chunks inside a machine and across machines. A backend of xDiT's own has no links unless a transport
    was named. ``ulysses_group`` and ``ring_group`` are process groups for code that wants collectives (xDiT's own USP):
    ascending global ranks.
    ``transports``: ways to make the links, by name; ``transport`` is the one in use, ``chosen`` why, empty until the
    first call has tried them all. ``one_host``: all ranks can write to each other's memory. ``calls`` caches what was
    agreed per call shape. ``trace``, where set, collects what each call did and when. ``log`` is told what is decided
    later than here. ``compression``: of chunks between machines. Where heads do not divide, the two process groups are
    those of ``plan.even``. ``pieces``: how many pieces of attention were computed by what, and why.

    ``groups``: those that links may be made of. ``number`` counts calls. ``requests`` and ``place`` (which layer the
    next call belongs to, where a caller knows) go into the identity of a call. ``failed``: the last call has, and ranks
    have to meet before the next one; ``dirty``: with something on its way, so that links have to be made again.
    ``begun``: a call has come to its first chunk, and not yet to its end. The three are set before what they speak of,
    and taken back when that is done: whatever interrupts a call in between, an exception's handling included, leaves
    them set. ``closed``: no call may follow.
    """

    plan: Plan
    grid: MachineGrid
    topology: Topology
    position: int
    links: Links
    ulysses_group: dist.ProcessGroup
    ring_group: dist.ProcessGroup
    control: ControlPlane
    transport: str
    groups: Sequence[Group] = ()
    transports: dict[str, Connect] = field(default_factory=dict)
    chosen: str = ""
    one_host: bool = False
    compression: Compression | None = None
    calls: dict[Any, Any] = field(default_factory=dict)
    trace: Trace | None = None
    log: Callable[[str], object] = logging.getLogger("sf_xfuser").info
    number: int = 0
    requests: int = 0
    place: str = ""
    failed: bool = False
    dirty: bool = False
    begun: bool = False
    closed: bool = False
    _request: str = ""
    _said: tuple[str, bool] = ("has made no call yet", False)
    _refusal: ValueError | None = None
    _told: float | None = None  # when the program was, that the last call has failed
    _user: dict[str, int] = field(default_factory=dict)  # the thread that makes a call; one operation looks and takes
    _inside: bool = False  # it is in one
    _process: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        self.control.call_status = lambda: self._said

    @property
    def layout(self) -> Layout:
        return self.plan.layout

    @property
    def members(self) -> tuple[int, ...]:
        return self.grid.members

    @property
    def window(self) -> OneSided | None:
        """The transport that writes into windows."""
        return next((link.one_sided for link in self.links.values() if link.one_sided is not None), None)

    @property
    def window_links(self) -> Collection[Link]:
        return [name for name, link in self.links.items() if link.one_sided is not None]

    def why_not_now(self) -> str | None:
        """Why no call can be made at this moment, alike on all ranks; None where one can. Local."""
        if not self.chosen and is_capturing():
            return "a CUDA graph is being captured, and the transports have not been tried yet"
        return None if self.window is None else self.window.fallback_reason()

    def reserve(self, nbytes: int) -> None:
        """From now on the window, where there is one, has ``nbytes`` for each call; the same on every rank. Collective
        between calls. Where that takes new memory, what was kept of calls is forgotten: it names the old."""
        window = self.window
        if window is not None:
            if window.window_bytes < window.halves * nbytes:
                self.calls.clear()
                self.dirty = True  # some ranks have new memory, and others not
            try:
                window.reserve(nbytes)
            except TransportUnavailable:  # nobody has
                self.dirty = False
                raise
            self.dirty = False

    def remember(self, key: Any, agreed: Any) -> None:
        """Keep what was agreed on a call; where there is too much, the oldest goes, on every rank alike."""
        while len(self.calls) >= _CALLS_KEPT:
            del self.calls[next(iter(self.calls))]
        self.calls[key] = agreed

    # -- calls ---------------------------------------------------------------------------------------------------------

    def begin_request(self, what: str) -> None:
        """What the following calls belong to: one more request (a picture, a model's forward), described by values that
        are the same on all ranks. Ranks that are in different requests fail at their next call. Local; collective where
        no links are there to carry it, and ValueError then."""
        self.requests += 1
        self._request = what
        if not self.links:  # xDiT's own collectives carry no identity
            with self.call():
                said = self.control.gather("request", what)
                if len(set(said)) > 1:
                    seen = "; ".join(f"rank {rank}: {text}" for rank, text in zip(self.members, said, strict=True))
                    self.refuse(f"ranks are in different requests: {seen}. Give all ranks the same, in one order")

    def refuse(self, text: str) -> NoReturn:
        """Raise ValueError inside ``call``, which every rank does with the same text before any of them has begun."""
        self._refusal = ValueError(text)
        raise self._refusal

    def attempt(self, make: Callable[[], _T], trial: Callable[[], object], device: torch.device) -> _T:
        """What ``make`` returns, inside ``call``. Where transports have not been tried yet ``trial`` is made with each
        of them; where the one in use turns out to be unable to make the call, another one is chosen. Collective."""
        while True:
            if not self.chosen:
                self.choose_by(trial, device)
            try:
                return make()
            except TransportUnavailable as refusal:
                if self.begun or len(self.transports) < 2:
                    raise
                del self.transports[self.transport]
                self.log(f"--sp-transport auto: another one than {self.transport} for this call: {refusal}")
                self.chosen = "" if len(self.transports) > 1 else f"the only one left, since {refusal}"
                self.use(next(iter(self.transports)))

    @contextmanager
    def call(self, check: Callable[[], _T] = lambda: None) -> Iterator[_T]:  # type: ignore[assignment, return-value]
        """Around everything that one call does. Collective: where the last one failed, ranks meet first. ``check``
        makes what the call takes, and raises where this rank's own arguments are wrong, whatever has failed elsewhere.

        Whatever is raised on this rank but not on all (``refuse``, ``TransportUnavailable``) fails the call on all:
        they wait for this rank, and would else take its next call for this one. TransportError or RuntimeError on those
        ranks name the rank that failed first."""
        if os.getpid() != self._process:  # what it put into memory that ranks share would be taken for its parent's
            raise RuntimeError(
                f"this process was forked from rank {self.members[self.position]}, whose mesh it cannot use: make all "
                f"calls in the process that made the mesh"
            )
        me = threading.get_ident()
        if self._user.setdefault("", me) != me or self._inside:
            error = RuntimeError(
                "two threads use one mesh at the same time, and ranks cannot tell their calls apart: make all calls of "
                "a mesh from one thread"
            )
            self._report(error)
            raise error
        try:
            self._inside = True
            if self.closed:
                raise RuntimeError("this mesh has been closed, and no call may follow: make another one")
            self.number += 1
            entered = time.monotonic()
            if self.failed:
                self._reconnect(entered)
            why = self.control.failure
            if why is not None and not self.requests and self.control.failed_call == self.number - 1:
                # Of the call that has ended here. A program that goes on call by call makes this one on all ranks.
                with suppress(TransportError):
                    self._reconnect(entered, _SOON_S)
                    why = None
            self.failed = True  # until this call has ended
            self._said = f"is in call {self.number}{self._of_request()}", True
            try:
                given = check()
                if (why := why or self.control.failure) is not None:
                    raise GroupError(why)
                yield given
                self.failed = False
            except BaseException as error:
                alike = error is self._refusal or (isinstance(error, TransportUnavailable) and not self.begun)
                if alike:
                    self.failed = False
                else:
                    self._fail(error)
                raise
            finally:
                self._said = f"is in no call; its last one was number {self.number}{self._of_request()}", False
                self.begun = False
        finally:
            self._inside = False
            self._user.clear()

    def _of_request(self) -> str:
        words = f" of request {self.requests}" if self.requests else ""
        words += f" ({self._request})" if self._request else ""
        return words + (f" at {self.place}" if self.place else "")

    def _fail(self, error: BaseException) -> None:
        """This rank's call has failed with ``error``: so has it on all ranks. Raises TransportError in place of one
        that only says what did not come."""
        own = self._is_own(error)
        verdict = self._report(error)
        self._abort()
        if isinstance(error, GroupError) and not isinstance(error, TransportError):
            raise TransportError(str(error)) from error  # as all ranks have it
        if not own:
            seen = str(error)
            raise TransportError(verdict if verdict in seen else f"{verdict}. Seen here: {seen}") from error

    def _report(self, error: BaseException) -> str:
        own = self._is_own(error)
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        differs = isinstance(error, CallMismatch)
        text = words if own else str(error)
        return self.control.report_failure(text, is_cause=own, mismatch=differs, call=self.number)

    def _is_own(self, error: BaseException) -> bool:
        """Whether it is of this rank's own making, not that something did not come."""
        return not isinstance(error, GroupError) and not (isinstance(error, TransportError) and self.begun)

    def _abort(self) -> None:
        """No call until ranks have met. What has something on its way is closed, so that peers fail instead of
        waiting."""
        self.failed, self._told = True, time.monotonic()
        if self.begun or self.dirty or any(link.enqueues for link in self.links.values()):
            self.dirty = True
            self._close_links(failed=True)

    def _reconnect(self, entered: float, limit_s: float | None = None) -> None:
        """Before the call that follows a failed one, to which this rank came at ``entered``. Collective, as every call
        fails on all ranks or on none; TransportError where one does not come in time."""
        try:
            while True:
                agreed = self.control.reconnect(self._told if self.failed else None, entered, limit_s)
                mine = [self.dirty, self.number, self.requests, self.transport, self.chosen, list(self.transports)]
                said = self.control.gather("reconnect", mine)
                numbers = [number for _, number, *_ in said]
                if len(set(numbers)) == 1 or agreed or any(requests for _, _, requests, *_ in said):
                    break
                # One heard of the failure a call later than another, and their program goes on call by call.
                if self.number < max(numbers):
                    self.failed, self._told = True, time.monotonic()
                    behind = [rank for rank, number in zip(self.members, numbers, strict=True) if number < max(numbers)]
                    raise _Behind(
                        f"rank(s) {behind} are a call behind: call {self.number} has failed on the other ranks, and "
                        f"fails here, too, so that the next one is the same on all ranks"
                    )
            self.number = max(numbers)
            self.requests = 0
            self.calls.clear()
            alike = all(each[3:] == said[0][3:] for each in said)
            if not alike:  # they failed while a transport was chosen
                self.chosen = ""
                common = [name for name in self.transports if all(name in each[5] for each in said)]
                self.transports = {name: self.transports[name] for name in common}
            if not alike or any(dirty for dirty, *_ in said):
                self.dirty = True
                self._close_links(failed=True)
                name = self.transport if alike and self.transport else next(iter(self.transports), "")
                self.links = self.transports[name](self.control) if name else {}
                self.transport = name
        except _Behind:
            raise
        except BaseException as error:
            self.failed, self._told = True, time.monotonic()
            verdict = self._report(error)
            if isinstance(error, GroupError):
                raise TransportError(verdict) from error
            raise
        self.dirty = False

    def begin(self, call: object, digest: str) -> torch.Tensor | None:
        """Start a call: the bytes of the window in it, where there is one. ``digest``: its shapes, dtypes, tokens and
        layout as text, the same on all ranks that make the same call.

        In a window of a single half, a peer may write as soon as it has what this rank sends last, while this rank
        still reads what that peer sent last. Where two calls have the same places that is not the same memory: give the
        same ``call`` for them. Before any other, those who write into the window meet."""
        self._said = f"is in call {self.number}{self._of_request()}: {digest}", True
        identity = zlib.crc32(f"{self.number} {self.requests} {self._request} {self.place} {digest}".encode())
        self.begun = self.dirty = True
        for link in dict.fromkeys(self.links.values()):
            link.begin_call(identity)
        window = self.window
        if window is None:
            return None
        mine = window.begin()
        if window.halves == 1 and call is not window.last_call:
            for name in self.window_links:
                peers = links.link_peers(self.layout, self.position)[name]
                nothing = [Parcel((torch.empty(0),), torch.float32, peer, slot=0) for peer in peers]
                self.links[name].exchange(0, nothing, nothing).wait()
        window.last_call = call
        return mine

    def end(self, used: Links, result: torch.Tensor) -> None:
        """End a call that used these links: nothing stays posted, and where a chunk was lost that nobody waited for on
        the host, ``result`` becomes NaN."""
        for link in used.values():
            link.drain()
        for link in dict.fromkeys(self.links.values()):
            link.poison(result)
        self.begun = self.dirty = False

    def close(self) -> None:
        """Release connections, threads, memory and process groups; idempotent. Local. No call may follow. In a forked
        child it does nothing: what it would end is its parent's."""
        if os.getpid() != self._process:
            return
        self.closed = True
        self.control.close()
        self._close_links(failed=False)
        for group in self.groups:
            group.end()
        for handle in (self.ulysses_group, self.ring_group):
            links.end_group(handle)

    def _close_links(self, *, failed: bool) -> None:
        self.calls.clear()
        for link in self.links.values():
            link.close()
        for group in self.groups if failed else ():
            group.end()

    def use(self, transport: str) -> None:
        """Make the links those of ``transports[transport]``. Collective between calls. Raises
        TransportUnavailable if it is not available: then another one has to be used."""
        if transport != self.transport:
            self.dirty = True
            self._close_links(failed=False)
            self.transport = ""
            self.links = self.transports[transport](self.control)
            self.transport = transport
            self.dirty = False

    def choose_by(self, call: Callable[[], object], device: torch.device) -> None:
        """Make a call with each transport that there is, use the fastest, and let go of what the others held.
        Collective between calls."""
        seconds: dict[str, float] = {}
        refusals: list[str] = []
        for name in self.transports:
            try:
                self.use(name)
                for _ in range(_TRIES):  # the first makes windows and connections warm
                    started_s = time.perf_counter()
                    call()
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    seconds[name] = max(self.control.gather("transport probe", time.perf_counter() - started_s))
                    if seconds[name] > _LONG_S:
                        break
            except TransportUnavailable as refusal:
                refusals.append(str(refusal))
        if not seconds:
            raise TransportError(f"--sp-transport auto found nothing: {'; '.join(refusals)}")
        self.use(min(seconds, key=lambda name: seconds[name]))
        links.let_go(self.control, self.members, self.position, self.transport)
        tried = ", ".join(f"{name} {1e3 * taken:.3g} ms" for name, taken in seconds.items())
        self.chosen = "; ".join([f"the fastest of {tried}, for the chunks of the first call", *refusals])
        self.log(f"--sp-transport auto: {self.transport}, {self.chosen}")

    def __str__(self) -> str:
        note = f"; {self.grid.note}" if self.grid.note else ""
        return f"{self.plan}; ranks {list(self.members)}, topology from {self.topology.source}{note}"

    def lines(self) -> list[str]:
        """The mesh as text: topology, plan with its alternatives, and where this rank stands."""
        t, u, r_x, r_i = self.layout.coordinates(self.position)
        text = [f"topology from {self.topology.source}: sequence-parallel group {list(self.members)}"]
        if self.grid.note:
            text.append(self.grid.note)
        text += self.plan.lines()
        if self.compression is not None:
            text.append(f"--sp-compress: {self.compression}")
        text.append(f"transport {self.transport}: {self.chosen or 'until the first call has tried what there is'}")
        rank = self.members[self.position]
        text.append(f"this rank: {rank} at torus {t}, ulysses {u}, ring {r_x} across and {r_i} inside")
        return text


def gather_topology(args: TorusArgs, agreement: StoreGroup, world_size: int) -> Topology:
    """The job's topology, the same on every rank. Collective over the world, also where it is pretended.

    Raises ValueError on every rank if ranks were started with different ``--sp-*`` flags.
    """
    agreement.require_same("flags", {f"--sp-{name}": value for name, value in asdict(args).items()})
    if args.topology != "auto":
        return Topology.parse(args.topology, world_size)
    return Topology.from_facts([RankFacts(**facts) for facts in agreement.gather("host", asdict(probe()))])


def _rank_lists(device_mesh: DeviceMesh, world: StoreGroup) -> list[list[int]]:
    """The ranks of every group, where each rank has its own group as a DeviceMesh. Collective over the world."""
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

    ``sp_rank_lists``: the global ranks of every sequence-parallel group, each ascending; every rank is in one.
    A DeviceMesh stands for the ranks of this rank's group. It has one dimension, or ``("ring", "ulysses")`` as
    diffusers' ContextParallelConfig makes it; its degrees are not used.
    The degrees are kept where given (``ring_degree`` is checked), else planned, with heads no less even than
    ``max_imbalance`` allows (see ``make_plan``). ``backend`` is torch.distributed's.
    Raises ValueError (bad degrees, heads, flags) or RuntimeError (a rank is missing), on every rank alike.
    """
    world_size = dist.get_world_size()
    rank = dist.get_rank()
    world = StoreGroup.world(PATIENCE * args.timeout)
    topology = gather_topology(args, world, world_size)
    if isinstance(sp_rank_lists, DeviceMesh):
        sp_rank_lists = _rank_lists(sp_rank_lists, world)
    for ranks in sp_rank_lists:
        if list(ranks) != sorted(set(ranks)):
            raise ValueError(f"a sequence-parallel group must list ascending distinct ranks, got {list(ranks)}")

    # Every plan is made on every rank before any group: a refusal of one is seen by all.
    grids = [topology.fold(ranks) for ranks in sp_rank_lists]
    plans = [_plan(grid, args, heads, kv_heads, ulysses_degree, ring_degree, max_imbalance) for grid in grids]
    backend = backend or dist.get_backend()
    wanted = links.wanted(args, backend)
    with_groups = links.need_groups(wanted, backend)
    domains = links.gather_domains(world, wanted, backend)
    shared = [
        links.shared_links(wanted, [domains[rank] for rank in grid.members], plan.layout)
        for grid, plan in zip(grids, plans, strict=True)
    ]
    if args.compress != "none":  # windows have places for chunks as they are
        shared = [[link for link in links_of if link != "across"] for links_of in shared]
        if wanted == "symm_mem" and not all(shared):
            raise ValueError(
                f"--sp-compress {args.compress} is for chunks between machines, and --sp-transport symm_mem can then "
                f"serve the inside of machines only, which has one rank each: use two_sided"
            )
    # Making groups is collective over the world: all of them come before anything that a rank may fail at.
    made = []
    for grid, plan in zip(grids, plans, strict=True):
        even, everyone = plan.even, range(len(grid.members))
        ulysses, ring = (
            _collective_groups(backend, args.timeout, grid.members, sorted(set(map(of, everyone))))
            for of in (even.ulysses_group, even.ring_group)
        )
        made.append((ulysses, ring))
    index = next((n for n, grid in enumerate(grids) if rank in grid.members), None)
    if index is None:
        raise ValueError(f"rank {rank} is in none of the sequence-parallel groups {[list(r) for r in sp_rank_lists]}")
    grid, plan, (ulysses, ring) = grids[index], plans[index], made[index]
    position = grid.members.index(rank)
    control = ControlPlane(world.subgroup(index, grid.members), grid.members, position, PATIENCE * args.timeout)
    rank_info = RankInfo(plan.layout, grid.members, position, args.timeout)
    groups = _link_groups(plan.layout, grid.members, position, backend, args.timeout) if with_groups else {}
    transports = {} if wanted is None else links.ways(wanted, rank_info, shared[index], groups)
    if args.compress != "none":
        transports.pop("nvshmem", None)
    mesh = Mesh(
        plan=plan,
        grid=grid,
        topology=topology,
        position=position,
        links={},
        ulysses_group=ulysses[position],
        ring_group=ring[position],
        control=control,
        groups=list(groups.values()),
        transport="",
        transports=transports,
        one_host=len(shared[index]) == 2,
        compression=Compression(args.compress) if args.compress != "none" else None,
    )
    try:
        failure: Exception | None = None
        try:
            mesh.transport, mesh.links, refusals = _connect(transports, control)
            mesh.chosen = "; ".join([text for text in [_why(args, len(transports)), *refusals] if text])
        except (TransportUnavailable, GroupError) as error:  # on all ranks of the group
            failure = error
        except Exception as error:
            control.report_failure(f"{type(error).__name__}: {error}", is_cause=not isinstance(error, TransportError))
            failure = error
        if wanted is not None:
            said = sorted({text for text in world.gather("links", failure and str(failure)) if text})
            if said:
                raise failure or TransportError("; ".join(said))
    except BaseException:
        mesh.close()
        raise
    return mesh


def _connect(transports: dict[str, Connect], control: ControlPlane) -> tuple[str, Links, list[str]]:
    """The first that can be had; those before it leave ``transports``, with why. Collective over a group.
    TransportUnavailable on every rank where none can be had."""
    refusals: list[str] = []
    for name, connect in list(transports.items()):
        try:
            return name, connect(control), refusals
        except TransportUnavailable as refusal:
            del transports[name]
            if not transports:
                raise
            refusals.append(str(refusal))
    return links.XDITS, {}, refusals


def _why(args: TorusArgs, num_transports: int) -> str:
    """``Mesh.chosen`` of a new mesh."""
    if num_transports == 0:
        return "none of ours was named"
    if args.transport != "auto":
        return "as asked for"
    return "" if num_transports > 1 else "the only one here"


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
    even = plan.even
    if ulysses_degree is not None and even.ulysses_degree != ulysses_degree:
        raise ValueError(
            f"--sp-plan {args.plan} means ulysses_degree={even.ulysses_degree} and ring_degree={even.ring_degree}, "
            f"but ulysses_degree={ulysses_degree} and ring_degree={ring_degree} were given: leave one of them out"
        )
    return plan


def _collective_groups(
    backend: str | None, timeout_s: float, members: Sequence[int], parts: Iterable[Sequence[int]]
) -> dict[int, dist.ProcessGroup]:
    """A process group for each of ``parts`` of the positions, by position. Collective over the world."""
    found = {}
    for positions in parts:
        new = partial(dist.new_group, sorted(members[p] for p in positions), backend=backend)
        # NCCL's may make its communicator at once, for the device of this thread.
        handle = run_with_timeout(new, PATIENCE * timeout_s, "making process groups") if backend == "gloo" else new()
        found.update(dict.fromkeys(positions, handle))
    return found


def _link_groups(
    layout: Layout, members: Sequence[int], position: int, backend: str, timeout_s: float
) -> dict[Link, Group]:
    """Process groups that the links of a position may be made of. Local: nothing is made yet."""
    everyone = range(layout.world_size)
    machine = [p for p in everyone if layout.machine(p) == layout.machine(position)]
    parts: dict[Link, Sequence[int]] = {"inside": machine, "across": everyone}
    found = {}
    for link, positions in parts.items():
        ranks = sorted(members[p] for p in positions)
        found[link] = Group(link, ranks, {p: ranks.index(members[p]) for p in positions}, backend, timeout_s)
    return found
