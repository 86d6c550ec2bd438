"""Virtual ranks: threads of one process that run the real protocol of ``transport/gpu/device.py``, each with its own
window. On a GPU they use CUDA streams. Without one, ``use_cpu_streams`` replaces streams by threads."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import json
import queue
import random
import struct
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from sf_xfuser.transport.gpu import device, driver, memory
from sf_xfuser.transport.gpu.symm_mem import SymmMem


class ThreadGroup:
    """State shared by the ``ThreadControl`` of each rank."""

    def __init__(self, ranks: int, timeout_s: float = 30.0) -> None:
        self.barrier = threading.Barrier(ranks, timeout=timeout_s)
        self.messages: list[Any] = [None] * ranks


class ThreadControl:
    """As ``sf_xfuser.transport.control_plane.ControlPlane``, between threads."""

    failure = None

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group, self._rank = group, rank

    def gather(self, topic: str, value: Any) -> list[Any]:
        self._group.messages[self._rank] = json.dumps([topic, value])
        self._group.barrier.wait()
        messages = [json.loads(each) for each in self._group.messages]
        self._group.barrier.wait()
        assert {each[0] for each in messages} == {topic}
        return [each[1] for each in messages]

    def abort_reason(self, peers=()):
        return None

    def late_ranks(self):
        return ""

    def report_failure(self, text, *, is_cause, mismatch=False, call=0):
        return text

    def close(self):
        pass


class Virtual(SymmMem):
    """Symmetric memory with all peers in this process."""

    name = "virtual"

    def __init__(self, control, members, position, peers, timeout_s, device_type="cpu"):
        self._device_type = device_type
        device.DeviceWindow.__init__(self, control, members, position, peers, timeout_s)

    def _allocate(self, nbytes):
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device_type)
        self._address = dict(enumerate(self._control.gather("address", memory.data_ptr())))
        return memory

    def _free(self):
        pass


def meshes(machines: int, ranks_per_machine: int, heads: int, timeout_s: float = 30.0, device_type: str = "cpu"):
    """For each rank a function that creates its mesh. Call it in the rank's thread."""
    from sf_xfuser.layout.plan import make_plan
    from sf_xfuser.layout.topology import Topology
    from sf_xfuser.torus.links import link_peers
    from sf_xfuser.torus.mesh import Mesh

    plan = make_plan(machines, ranks_per_machine, heads=heads)
    world = machines * ranks_per_machine
    topology = Topology.uniform(machines, ranks_per_machine)
    group = ThreadGroup(world)

    def mesh(rank: int):
        control: Any = ThreadControl(group, rank)
        peers = [peer for link in link_peers(plan.layout, rank).values() for peer in link]
        link = Virtual(control, range(world), rank, peers, timeout_s, device_type)
        return Mesh(
            plan=plan,
            grid=topology.fold(range(world)),
            topology=topology,
            position=rank,
            links={"inside": link, "across": link},
            ulysses_group=None,  # type: ignore[arg-type]
            ring_group=None,  # type: ignore[arg-type]
            control=control,
            transport="virtual",
            transport_reason="the only available one",
        )

    return [lambda rank=rank: mesh(rank) for rank in range(world)]


def run_ranks(ranks: int, work: Callable[[int], Any], timeout_s: float = 120.0) -> list[Any]:
    """Run ``work(rank)`` in a thread for each rank. Returns their results or exceptions."""
    results: list[Any] = [None] * ranks

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:  # also pytest's
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), "a rank hangs"
    return results


def succeeded(results: list[Any]) -> list[Any]:
    """The results of ``run_ranks``; raises the first exception."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# -- CUDA streams as threads ------------------------------------------------------------------------------------------

HOST = 0  # the stream of PyTorch's CPU operators: the host itself runs its work
_local = threading.local()  # of each host thread: ``stream``, its current stream, and ``graph``, which it captures


class Stream:
    """Runs its work in order, some of it after a delay of up to ``pause_s``."""

    pause_s = 0.0
    pause_chance = 0.1
    by_handle: dict[int, Stream] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.handle = len(self.by_handle) + 1
        self.by_handle[self.handle] = self
        self._queue: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._random = random.Random(self.handle)
        threading.Thread(target=self._run, daemon=True).start()

    def enqueue(self, work: Callable[[], object]) -> None:
        self._queue.put(work)

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            if self.pause_s and self._random.random() < self.pause_chance:
                time.sleep(self._random.random() * self.pause_s)
            work()


def current_stream() -> int:
    return getattr(_local, "stream", HOST)


@contextlib.contextmanager
def on_stream(stream: Stream):
    """``with torch.cuda.stream(...)``."""
    _local.stream = stream.handle
    try:
        yield
    finally:
        _local.stream = HOST


def synchronize(stream: Stream) -> None:
    done = threading.Event()
    stream.enqueue(done.set)
    done.wait()


def _capture() -> Graph | None:
    return getattr(_local, "graph", None)


def _enqueue(stream: int, work: Callable[[], object]) -> None:
    """Capture the work, or run it in stream order."""
    graph = _capture()
    if graph is not None and stream in graph.streams:
        graph.add(stream, lambda: work)
    elif stream == HOST:
        work()
    else:
        Stream.by_handle[stream].enqueue(work)


def launch(kernel: Callable[..., object]) -> Callable[..., None]:
    """A kernel of CPU tensors that runs on the current stream."""
    return lambda *arguments: _enqueue(current_stream(), lambda: kernel(*arguments))


class Graph:
    """As ``torch.cuda.CUDAGraph``, for work that goes through ``_enqueue`` and ``CpuDriver``. A replay runs on streams
    of its own, apart from the current one, as the nodes of a graph do."""

    def __init__(self) -> None:
        self._operations: list[tuple[int, Callable[[], Callable[[], object]]]] = []
        self._events: dict[int, threading.Event] = {}
        self._recorded: dict[int, tuple[int, int]] = {}  # event -> stream, operations of it so far
        self._count: dict[int, int] = {}
        self._own: dict[int, Stream] = {}
        self.streams: set[int] = set()  # that capture

    @contextlib.contextmanager
    def capture(self):
        """Raises if a stream has not joined the first one at the end, as CUDA does."""
        self._origin = current_stream()
        self.streams, self._unjoined = {self._origin}, set()
        _local.graph = self
        try:
            yield
        finally:
            _local.graph = None
        if self._unjoined:
            raise RuntimeError(f"capture ends with unjoined work on streams {self._unjoined}")
        self._own = {handle: Stream() for handle in self.streams - {self._origin}}

    def add(self, stream: int, make: Callable[[], Callable[[], object]]) -> None:
        """``make()`` returns the work of one replay."""
        self._operations.append((stream, make))
        self._count[stream] = self._count.get(stream, 0) + 1
        if stream != self._origin:
            self._unjoined.add(stream)

    def record(self, event: int, stream: int) -> None:
        def make() -> Callable[[], object]:
            self._events[event] = threading.Event()
            return self._events[event].set

        self._recorded[event] = stream, self._count.get(stream, 0)
        self._operations.append((stream, make))

    def wait_event(self, stream: int, event: int) -> None:
        if event not in self._recorded:
            raise RuntimeError("a capturing stream waits for work outside the graph")
        self.streams.add(stream)
        self.add(stream, lambda: self._events[event].wait)
        if stream == self._origin and self._recorded[event][1] == self._count.get(self._recorded[event][0], 0):
            self._unjoined.discard(self._recorded[event][0])

    def replay(self) -> None:
        for stream, make in self._operations:
            work = make()
            if stream != self._origin:
                self._own[stream].enqueue(work)
            else:
                _enqueue(current_stream(), work)


class CpuDriver:
    """As ``transport.gpu.driver.Driver``, on ``Stream`` and host memory. ``calls``: names of the driver calls."""

    events: dict[int, threading.Event] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._batches = False

    def current_stream(self, device):
        return current_stream()

    def new_stream(self):
        return Stream().handle

    def new_event(self):
        handle = next(_handles)
        self.events[handle] = threading.Event()
        self.events[handle].set()  # as an event that was never recorded
        return handle

    def allow_queries_during_capture(self):
        pass

    def record(self, event, stream):
        graph = _capture()
        if graph is not None and stream in graph.streams:
            return graph.record(event, stream)
        self.events[event] = done = threading.Event()
        _enqueue(stream, done.set)

    def wait_event(self, stream, event):
        graph = _capture()
        if graph is not None and (stream in graph.streams or event in graph._recorded):
            return graph.wait_event(stream, event)
        _enqueue(stream, self.events[event].wait)

    def query(self, event):
        assert _capture() is None, "not permitted while the thread captures"
        return self.events[event].is_set()

    def synchronize(self, event):
        assert _capture() is None, "not permitted while the thread captures"
        self.events[event].wait()

    def try_batches(self, batch, stream):
        self._batches = True
        self.copy_all(batch, stream)

    def copy_launches(self, batch):
        return len(batch.copies) if not self._batches else min(1, len(batch.copies))

    def copy_all(self, batch, stream):
        """In any order."""
        graph = _capture()
        assert graph is None or stream not in graph.streams, "CUDA cannot capture batches"
        copies = batch.table.T.tolist()
        if copies:
            self.calls.append("copies")
            random.shuffle(copies)
            _enqueue(stream, lambda: [ctypes.memmove(target, source, size) for target, source, size in copies])

    def copy(self, target, source, nbytes, stream):
        self.calls.append("copy")
        _enqueue(stream, lambda: ctypes.memmove(target, source, nbytes))

    def write_32(self, target, value, stream):
        self.calls.append("write")
        word = ctypes.c_uint32.from_address(target)
        _enqueue(stream, lambda: setattr(word, "value", value))

    def write_64(self, target, value, stream):
        self.calls.append("write")
        word = ctypes.c_uint64.from_address(target)
        _enqueue(stream, lambda: setattr(word, "value", value))

    def run(self, batch, stream):
        """Reads the operations as the driver does, from the addresses of the parts."""
        for address, count in batch.parts:
            self.calls.append("batch")
            assert count <= 255
            table = ctypes.string_at(address, 48 * count)
            for start in range(0, len(table), 48):
                operation, target, value, flags = struct.unpack_from("<IxxxxQQI", table, start)
                word = ctypes.c_uint64.from_address(target)
                if operation == 5:
                    _enqueue(stream, functools.partial(setattr, word, "value", value))
                else:
                    assert operation == 4
                    _enqueue(stream, functools.partial(_wait_until, word, _CONDITIONS[flags], value))


_CONDITIONS = {1: int.__eq__, 2: int.__and__}


def _wait_until(word, condition, value):
    while not condition(word.value, value):
        time.sleep(1e-4)


_handles = itertools.count(1)


def use_cpu_streams(monkeypatch) -> None:
    """Run ``transport/gpu/device.py`` without a GPU for one test."""
    cuda = SimpleNamespace(
        current_device=lambda: 0,
        empty_cache=lambda: None,
        is_available=lambda: True,
        is_current_stream_capturing=lambda: _capture() is not None,
        mem_get_info=lambda: (1 << 40, 1 << 40),
        set_device=lambda index: None,
        synchronize=lambda: None,
    )
    closed: list[Any] = []
    kept: list[Any] = []
    for module in (device, memory):
        monkeypatch.setattr(module, "torch", _Override(torch, cuda=cuda))
        monkeypatch.setattr(module, "closed_windows", closed)
        monkeypatch.setattr(module, "kept_windows", kept)
    monkeypatch.setattr(device, "Driver", CpuDriver)
    for kernel in ("check_flags", "poison_result", "add_one"):
        monkeypatch.setattr(device, kernel, launch(getattr(device, kernel)))
    monkeypatch.setattr(driver, "_idle_sets", {})
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")


class _Override:
    """A module with some names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
