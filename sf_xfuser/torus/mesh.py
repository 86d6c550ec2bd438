"""The mesh: one sequence-parallel group as seen by one rank, with its plan, links, and state between calls."""

from __future__ import annotations

import logging
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NoReturn, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist

from sf_xfuser.layout.plan import Layout, Plan
from sf_xfuser.layout.schedule import Link
from sf_xfuser.layout.topology import MachineGrid, Topology
from sf_xfuser.torus import links
from sf_xfuser.torus.call_guard import CallGuard
from sf_xfuser.torus.compression import Compression
from sf_xfuser.torus.graphs import Graphs
from sf_xfuser.torus.links import Connect, Group, Links
from sf_xfuser.torus.trace import Trace
from sf_xfuser.transport.base import OneSided, Parcel, TransportError, TransportUnavailable
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.gpu.memory import is_capturing

_MAX_CACHED_CALLS = 64
_PROBE_CALLS, _MAX_PROBE_S = 5, 0.5  # timed calls per transport: no further one after this time

_T = TypeVar("_T")


def _log_on_rank_0(message: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        logging.getLogger("sf_xfuser").info(message)


@dataclass(eq=False)
class Mesh:
    """One sequence-parallel group as seen by this rank. Made by :func:`build_mesh`; holds no tensors.

    ``position``: this rank's machine-major index in ``plan.layout``. ``members[w]``: the global rank at position ``w``.
    ``links``: the transports inside machines and across machines; empty if only xDiT's own collectives are used.
    ``ulysses_group``, ``ring_group``: process groups for collectives (xDiT's own USP), in ascending global ranks. With
    uneven heads they are those of ``plan.even``. ``transports``: functions that connect the links, by name;
    ``transport``: the selected one; ``transport_reason``: why, empty until the first call has timed all of them.
    ``groups``: process groups for links. ``one_host``: all ranks share memory. ``compression``: of chunks between
    machines. ``calls``: cache of negotiated calls. ``layer``: the layer of the next call, if the caller knows it; part
    of the identity of the call. ``trace``, if set, records the spans of each call. ``log``: for decisions of all
    ranks after construction; it logs on rank 0. ``received_bytes`` (by link), ``traced_calls`` and ``exposed_ms``: for
    ``sf_xfuser.stats``.
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
    transport_reason: str = ""
    one_host: bool = False
    compression: Compression | None = None
    calls: dict[Any, Any] = field(default_factory=dict)
    trace: Trace | None = None
    log: Callable[[str], object] = _log_on_rank_0
    layer: str = ""
    guard: CallGuard = field(init=False)
    graphs: Graphs = field(default_factory=Graphs)
    received_bytes: Counter[str] = field(default_factory=Counter)
    traced_calls: int = 0
    exposed_ms: float = 0.0
    _scratch: torch.Tensor | None = None
    _scratch_used: torch.cuda.Event | None = None  # by the last call

    def __post_init__(self) -> None:
        self.guard = CallGuard(self)
        meshes.add(self)

    @property
    def layout(self) -> Layout:
        return self.plan.layout

    @property
    def members(self) -> tuple[int, ...]:
        return self.grid.members

    @property
    def failed(self) -> bool:
        return self.guard.failed

    @property
    def window(self) -> OneSided | None:
        """The one-sided transport, if there is one."""
        return next((link.one_sided for link in self.links.values() if link.one_sided is not None), None)

    @property
    def window_links(self) -> Collection[Link]:
        return [name for name, link in self.links.items() if link.one_sided is not None]

    def unavailable_reason(self) -> str | None:
        """Why no call is possible now, equal on all ranks; None if one is. Local."""
        if not self.transport_reason and is_capturing():
            return "a CUDA graph is being captured, and no transport has been selected yet"
        return None if self.window is None else self.window.unavailable_reason()

    @property
    def scratch(self) -> torch.Tensor:
        """Memory of this rank for a call, as bytes: what it sends, and its partial results. Kept between calls."""
        window = self.window
        memory = None if window is None else window.scratch
        memory = self._scratch if memory is None else memory
        assert memory is not None
        return memory

    def reserve(self, window_bytes: int, scratch_bytes: int, device: torch.device) -> None:
        """Make the window, if there is one, and the scratch memory at least this large for each call; the same on every
        rank. Collective between calls. New memory clears the cache of calls, which refers to the old one."""
        window = self.window
        in_window = window is not None and window.scratch is not None
        if window is not None:
            if in_window:  # a single exchange may send as much as it receives
                scratch_bytes = max(scratch_bytes, window_bytes)
            scratch_is_short = in_window and _size(window.scratch) < scratch_bytes
            if window.window_bytes < window.halves * window_bytes or scratch_is_short:
                self.calls.clear()
                self.guard.dirty = True  # until all ranks have the new window
            try:
                window.reserve(window_bytes, scratch_bytes)
            except TransportUnavailable:  # no rank has a new window
                self.guard.dirty = False
                raise
            self.guard.dirty = False
        if not in_window and (
            self._scratch is None or self._scratch.nbytes < scratch_bytes or self._scratch.device != device
        ):
            self.calls.clear()
            with torch.inference_mode(False):  # calls in any mode write to it
                self._scratch = torch.empty(-(-scratch_bytes // 64) * 64, dtype=torch.uint8, device=device)

    def cache_call(self, key: Any, call: Any) -> None:
        """Cache a negotiated call; evicts the oldest one, in the same order on every rank."""
        while len(self.calls) >= _MAX_CACHED_CALLS:
            del self.calls[next(iter(self.calls))]
        self.calls[key] = call

    # -- calls ---------------------------------------------------------------------------------------------------------

    def begin_request(self, description: str) -> None:
        """Start a request (an image, a forward pass), described by values that are equal on all ranks. Ranks in
        different requests fail at their next call. Local with links. Without links collective: ValueError then."""
        self.guard.requests += 1
        self.guard.request, self.guard.first_call = description, self.guard.number + 1
        if not self.links:  # xDiT's own collectives carry no identity
            with self.call():
                self.require_same_request(self.control.gather("request", description))

    def require_same_request(self, requests: Sequence[str]) -> None:
        """Refuse the call if the ``requests`` of the ranks, by position, differ."""
        if len(set(requests)) > 1:
            seen = "; ".join(f"rank {rank}: {text}" for rank, text in zip(self.members, requests, strict=True))
            self.refuse(f"ranks are in different requests: {seen}. Give all ranks the same requests in the same order")

    @contextmanager
    def request(self, description: str) -> Iterator[None]:
        """``begin_request`` for a block, which may contain further requests of this thread. An exception in it on one
        rank, also outside of its calls, fails the request on all ranks; the next request works. RuntimeError if another
        thread is in a request."""
        with self.guard.in_request():
            self.begin_request(description)
            yield

    def call(self, check: Callable[[], _T] = lambda: None) -> AbstractContextManager[_T]:  # type: ignore[assignment, return-value]
        """The context of one call. Collective: after a failed call, the ranks reconnect first. ``check`` returns the
        arguments of the call. It raises if those of this rank are wrong, even if another rank has failed.

        An exception on this rank, other than by ``refuse`` or ``TransportUnavailable``, fails the call on all ranks:
        they would otherwise wait, and mistake this rank's next call for this one. The other ranks raise TransportError
        or RuntimeError with the rank that failed first."""
        return self.guard.call(check)

    def refuse(self, text: str) -> NoReturn:
        """Raise ValueError inside ``call``. Every rank must do so with the same text, before any chunk is sent."""
        self.guard.refuse(text)

    def attempt(self, run: Callable[[], _T], probe: Callable[[], object], device: torch.device) -> _T:
        """The result of ``run``, inside ``call``. First selects a transport by timing ``probe`` with each, if none is
        selected. Switches to another transport if the selected one cannot make this call. Collective."""
        while True:
            if not self.transport_reason:
                self.select_transport(probe, device)
            try:
                return run()
            except TransportUnavailable as refusal:
                if self.guard.started or len(self.transports) < 2:
                    raise
                del self.transports[self.transport]
                self.log(f"--sp-transport auto: dropping {self.transport}, which cannot make this call: {refusal}")
                self.transport_reason = "" if len(self.transports) > 1 else f"the only one left, since {refusal}"
                self.use_transport(next(iter(self.transports)))

    def begin(self, maps: object, digest: str) -> torch.Tensor | None:
        """Start a call. Returns the bytes of its window, if there is one. ``digest``: shapes, dtypes, tokens and layout
        as text, equal on all ranks.

        A window with one half allows a peer to write as soon as it has this rank's last chunk of the previous call.
        This is safe between two calls with the same memory maps, which pass the same ``maps``. Before any other call,
        the ranks that write to each other meet first."""
        guard = self.guard
        if self._scratch_used is not None and not is_capturing():  # if the caller changed streams
            torch.cuda.current_stream().wait_event(self._scratch_used)
        guard.status = f"is in {guard.describe_call()}: {digest}", True
        identity = zlib.crc32(f"{guard.number} {guard.requests} {guard.request} {self.layer} {digest}".encode())
        guard.started = guard.dirty = True
        for link in dict.fromkeys(self.links.values()):
            link.begin_call(identity)
        window = self.window
        if window is None:
            return None
        window_bytes = window.begin()
        if window.halves == 1 and maps is not window.last_maps:
            for name in self.window_links:
                peers = links.link_peers(self.layout, self.position)[name]
                empty = [Parcel(None, peer, slot=0) for peer in peers]
                self.links[name].exchange(0, empty, empty).wait()
        window.last_maps = maps
        return window_bytes

    def end(self) -> None:
        """End a call, after what ``Transport.record_end`` of each transport has returned. Nothing stays posted."""
        if self.compression is not None:
            self.compression.end_call()
        if self._scratch is not None and self._scratch.is_cuda and not is_capturing():
            self._scratch_used = torch.cuda.current_stream().record_event()
        self.guard.started = self.guard.dirty = False

    def end_exchanges(self, result: torch.Tensor) -> None:
        """End a call of one-off exchanges. Nothing stays posted. If the host did not wait for a chunk that was lost,
        ``result`` becomes NaN."""
        for transport in dict.fromkeys(self.links.values()):
            transport.record_end()(result)
        self.end()

    # -- transports ----------------------------------------------------------------------------------------------------

    def use_transport(self, name: str) -> None:
        """Connect the links of ``transports[name]``. Collective between calls. Raises TransportUnavailable if that is
        impossible; then another transport must be used."""
        if name != self.transport:
            self.guard.dirty = True
            self.close_links(failed=False)
            self.transport = ""
            self.links = self.transports[name](self.control)
            self.transport = name
            self.guard.dirty = False

    def select_transport(self, probe: Callable[[], object], device: torch.device) -> None:
        """Time ``probe`` with each transport, use the fastest, and release the others. The time of a transport is the
        median of a few calls. Its first call does not count: it sets up windows and connections, and the first of all
        compiles kernels. Collective between calls."""
        seconds: dict[str, float] = {}
        refusals: list[str] = []
        for name in self.transports:
            try:
                self.use_transport(name)
                self._time_probe(probe, device)
                timed: list[float] = []
                while len(timed) < _PROBE_CALLS and sum(timed) < _MAX_PROBE_S:
                    timed.append(self._time_probe(probe, device))
                seconds[name] = median(timed)
            except TransportUnavailable as refusal:
                refusals.append(str(refusal))
        if not seconds:
            raise TransportError(f"--sp-transport auto: no transport is available: {'; '.join(refusals)}")
        self.use_transport(min(seconds, key=lambda name: seconds[name]))
        links.release_unused(self.control, self.members, self.position, self.transport)
        times = ", ".join(f"{name} {1e3 * taken:.3g} ms" for name, taken in seconds.items())
        self.transport_reason = "; ".join([f"the fastest of {times}, for the chunks of the first call", *refusals])
        self.log(f"--sp-transport auto: {self.transport}, {self.transport_reason}")

    def _time_probe(self, probe: Callable[[], object], device: torch.device) -> float:
        """The seconds that one call takes on the slowest rank. Collective."""
        started_s = time.perf_counter()
        probe()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return float(max(self.control.gather("transport probe", time.perf_counter() - started_s)))

    def reconnect_links(self, states: Sequence[Sequence[Any]], dirty: bool) -> None:
        """Bring the links of all ranks to one state after a failed call. ``states``: (transport, transport_reason,
        names of transports) of every rank. ``dirty``: rebuild the links in any case. Collective."""
        same = all(state == states[0] for state in states)
        if not same:  # the call failed while a transport was being selected
            self.transport_reason = ""
            common = [name for name in self.transports if all(name in names for _, _, names in states)]
            self.transports = {name: self.transports[name] for name in common}
        if not same or dirty:
            self.guard.dirty = True
            self.close_links(failed=True)
            name = self.transport if same and self.transport else next(iter(self.transports), "")
            self.links = self.transports[name](self.control) if name else {}
            self.transport = name

    def close_links(self, *, failed: bool) -> None:
        self.calls.clear()
        for link in self.links.values():
            link.close()
        for group in self.groups if failed else ():
            group.close()

    def close(self) -> None:
        """Release connections, threads, memory and process groups. Idempotent. Local. No call may follow. No effect in
        a forked child, since the resources belong to its parent."""
        if self.guard.is_forked:
            return
        self.guard.closed = True
        self.control.close()
        self.close_links(failed=False)
        for group in self.groups:
            group.close()
        for handle in (self.ulysses_group, self.ring_group):
            links.destroy_group(handle)

    # -- text ----------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        note = f"; {self.grid.note}" if self.grid.note else ""
        return f"{self.plan}; ranks {list(self.members)}, topology from {self.topology.source}{note}"

    def lines(self) -> list[str]:
        """The mesh as text: topology, plan with its alternatives, transport, and the coordinates of this rank."""
        t, u, r_x, r_i = self.layout.coordinates(self.position)
        text = [f"topology from {self.topology.source}: sequence-parallel group {list(self.members)}"]
        if self.grid.note:
            text.append(self.grid.note)
        text += self.plan.lines()
        if self.compression is not None:
            text.append(f"--sp-compress: {self.compression}")
        text.append(
            f"transport {self.transport}: {self.transport_reason or 'until the first call has timed all of them'}"
        )
        if torch.cuda.is_available():
            text.append(self.graphs.line(self))
        rank = self.members[self.position]
        text.append(f"this rank: {rank} at torus {t}, ulysses {u}, ring {r_x} across and {r_i} inside")
        return text


meshes: WeakSet[Mesh] = WeakSet()
"""All of this process, for ``sf_xfuser.stats``."""


def _size(memory: torch.Tensor | None) -> int:
    return 0 if memory is None else memory.nbytes
