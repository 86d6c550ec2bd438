"""Virtual ranks: threads of one process that run the real protocol of ``transport/gpu/device.py``, each with its own
window. On a GPU they use CUDA streams. Without one, ``use_cpu_streams`` replaces streams by threads."""

from __future__ import annotations

import ctypes
import json
import queue
import random
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from sf_xfuser.layout.plan import make_plan
from sf_xfuser.layout.topology import Topology
from sf_xfuser.torus.links import link_peers
from sf_xfuser.torus.mesh import Mesh
from sf_xfuser.transport.gpu import device, memory
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

    def report_failure(self, text, *, is_cause, mismatch=False, call=0):
        return text

    def close(self):
        pass


class Virtual(SymmMem):
    """Symmetric memory with all peers in this process."""

    name = "virtual"

    def __init__(self, control, members, position, peers, timeout_s, device_type="cpu"):
        self._device_type = device_type
        self._flag_sources = {}
        device.DeviceWindow.__init__(self, control, members, position, peers, timeout_s)

    def _allocate(self, nbytes):
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device_type)
        self._address = dict(enumerate(self._control.gather("address", memory.data_ptr())))
        return memory

    def _free(self):
        pass


def meshes(machines: int, ranks_per_machine: int, heads: int, timeout_s: float = 30.0, device_type: str = "cpu"):
    """For each rank a function that creates its mesh. Call it in the rank's thread."""
    plan = make_plan(machines, ranks_per_machine, heads=heads)
    world = machines * ranks_per_machine
    topology = Topology.uniform(machines, ranks_per_machine)
    group = ThreadGroup(world)

    def mesh(rank: int) -> Mesh:
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
        except Exception as error:
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
        if isinstance(result, Exception):
            raise result
    return results


# -- CUDA streams as threads ------------------------------------------------------------------------------------------


class Stream:
    """Runs its work in order, some of it after a delay of up to ``pause_s``."""

    pause_s = 0.0
    pause_chance = 0.1
    by_handle: dict[int, Stream] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.cuda_stream = len(self.by_handle) + 1
        self.by_handle[self.cuda_stream] = self
        self._queue: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._random = random.Random(self.cuda_stream)
        threading.Thread(target=self._run, daemon=True).start()

    def enqueue(self, work: Callable[[], object]) -> None:
        self._queue.put(work)

    def record_event(self) -> Event:
        event = Event()
        event.done.clear()
        self.enqueue(event.done.set)
        return event

    def wait_event(self, event: Event) -> None:
        self.enqueue(event.done.wait)

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            if self.pause_s and self._random.random() < self.pause_chance:
                time.sleep(self._random.random() * self.pause_s)
            work()


class Event:
    def __init__(self, blocking: bool = False) -> None:
        self.done = threading.Event()
        self.done.set()  # as an event that was never recorded
        self.query, self.synchronize = self.done.is_set, self.done.wait

    def record(self) -> None:
        """On the host's stream, which has no pending work."""


class HostStream:
    """The compute stream of a rank. It runs PyTorch's CPU operators, so the host itself waits."""

    def record_event(self) -> Event:
        return Event()

    def wait_event(self, event: Event) -> None:
        event.done.wait()


class StreamContext:
    """``with torch.cuda.stream(...)``: waits for the stream's earlier work."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._stream.record_event().done.wait()

    def __exit__(self, *error: object) -> None:
        pass


class CpuDriver:
    """As ``transport.gpu.driver.Driver``, on ``Stream`` and host memory."""

    def new_stream(self):
        return Stream()

    def allow_queries_during_capture(self):
        pass

    def copy(self, target, source, nbytes, stream):
        Stream.by_handle[stream].enqueue(lambda: ctypes.memmove(target, source, nbytes))

    def write_32(self, target, value, stream):
        word = ctypes.c_uint32.from_address(target)
        Stream.by_handle[stream].enqueue(lambda: setattr(word, "value", value))

    def write_64(self, target, value, stream):
        word = ctypes.c_uint64.from_address(target)
        Stream.by_handle[stream].enqueue(lambda: setattr(word, "value", value))

    def wait_64(self, address, value, stream):
        word = ctypes.c_uint64.from_address(address)

        def wait():
            while word.value != value:
                time.sleep(1e-4)

        Stream.by_handle[stream].enqueue(wait)


def use_cpu_streams(monkeypatch, capturing: bool = False) -> None:
    """Run ``transport/gpu/device.py`` without a GPU for one test."""
    cuda = SimpleNamespace(
        Event=Event,
        Stream=Stream,
        current_device=lambda: 0,
        current_stream=HostStream,
        empty_cache=lambda: None,
        is_available=lambda: True,
        is_current_stream_capturing=lambda: capturing,
        mem_get_info=lambda: (1 << 40, 1 << 40),
        set_device=lambda index: None,
        stream=StreamContext,
        synchronize=lambda: None,
    )
    kept: list[Any] = []
    for module in (device, memory):
        monkeypatch.setattr(module, "torch", _Override(torch, cuda=cuda))
        monkeypatch.setattr(module, "closed_windows", kept)
    monkeypatch.setattr(device, "Driver", CpuDriver)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")


class _Override:
    """A module with some names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
