"""Virtual ranks: threads of one process, each with a window of its own and the real protocol of ``transport/device.py``
between them. On a GPU their streams are CUDA's; without one, ``stand_in`` puts threads in their place."""

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
from sf_xfuser.transport.gpu import device
from sf_xfuser.transport.gpu.symm_mem import SymmMem


class Meeting:
    """What the agreements of a group of threads share."""

    def __init__(self, ranks: int, timeout_s: float = 30.0) -> None:
        self.barrier = threading.Barrier(ranks, timeout=timeout_s)
        self.said: list[Any] = [None] * ranks


class ThreadControl:
    """As ``sf_xfuser.transport.control_plane.ControlPlane``, between threads."""

    failure = None

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    def gather(self, topic: str, value: Any) -> list[Any]:
        self._meeting.said[self._rank] = json.dumps([topic, value])
        self._meeting.barrier.wait()
        said = [json.loads(each) for each in self._meeting.said]
        self._meeting.barrier.wait()
        assert {each[0] for each in said} == {topic}
        return [each[1] for each in said]

    def hopeless(self, peers=()):
        return None

    def fail(self, text, *, own, differs=False, number=0):
        return text

    def close(self):
        pass


class Virtual(SymmMem):
    """Symmetric memory whose peers are in this process."""

    name = "virtual"

    def __init__(self, control, members, position, peers, timeout_s, where="cpu"):
        self._where = where
        self._words = {}
        device.DeviceWindow.__init__(self, control, members, position, peers, timeout_s)

    def _allocate(self, nbytes):
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._where)
        self._address = dict(enumerate(self._control.gather("address", memory.data_ptr())))
        return memory

    def _free(self):
        pass


def meshes(machines: int, ranks_per_machine: int, heads: int, timeout_s: float = 30.0, where: str = "cpu"):
    """For each rank a function that makes its mesh, to be called in the rank's thread."""
    plan = make_plan(machines, ranks_per_machine, heads=heads)
    world = machines * ranks_per_machine
    topology = Topology.uniform(machines, ranks_per_machine)
    meeting = Meeting(world)

    def mesh(rank: int) -> Mesh:
        control: Any = ThreadControl(meeting, rank)
        peers = [peer for link in link_peers(plan.layout, rank).values() for peer in link]
        link = Virtual(control, range(world), rank, peers, timeout_s, where)
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


def together(ranks: int, work: Callable[[int], Any], timeout_s: float = 120.0) -> list[Any]:
    """``work(rank)`` in a thread for each rank; what they returned or raised."""
    found: list[Any] = [None] * ranks

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), "a rank hangs"
    return found


# -- CUDA's streams, by threads ---------------------------------------------------------------------------------------


class Stream:
    """Does what it is given one after the other, some of it after a pause of up to ``pause_s``."""

    pause_s = 0.0
    pause_chance = 0.1
    by_handle: dict[int, Stream] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.cuda_stream = len(self.by_handle) + 1
        self.by_handle[self.cuda_stream] = self
        self._todo: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._random = random.Random(self.cuda_stream)
        threading.Thread(target=self._run, daemon=True).start()

    def give(self, work: Callable[[], object]) -> None:
        self._todo.put(work)

    def record_event(self) -> Event:
        event = Event()
        event.done.clear()
        self.give(event.done.set)
        return event

    def wait_event(self, event: Event) -> None:
        self.give(event.done.wait)

    def _run(self) -> None:
        while True:
            work = self._todo.get()
            if self.pause_s and self._random.random() < self.pause_chance:
                time.sleep(self._random.random() * self.pause_s)
            work()


class Event:
    def __init__(self, blocking: bool = False) -> None:
        self.done = threading.Event()
        self.done.set()  # as one that was never recorded
        self.query, self.synchronize = self.done.is_set, self.done.wait

    def record(self) -> None:
        """On the host's stream, which is never behind."""


class Host:
    """The stream on which a rank computes: PyTorch's CPU operators, so what it waits for the host waits for."""

    def record_event(self) -> Event:
        return Event()

    def wait_event(self, event: Event) -> None:
        event.done.wait()


class On:
    """``with torch.cuda.stream(...)``: what the stream has been given before comes first."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._stream.record_event().done.wait()

    def __exit__(self, *error: object) -> None:
        pass


class StandInDriver:
    """As ``transport.driver.Driver``, on Streams and the memory of the process."""

    def new_stream(self):
        return Stream()

    def allow_queries_during_capture(self):
        pass

    def copy(self, into, source, nbytes, stream):
        Stream.by_handle[stream].give(lambda: ctypes.memmove(into, source, nbytes))

    def write_32(self, into, bits, stream):
        word = ctypes.c_uint32.from_address(into)
        Stream.by_handle[stream].give(lambda: setattr(word, "value", bits))

    def write_64(self, into, value, stream):
        word = ctypes.c_uint64.from_address(into)
        Stream.by_handle[stream].give(lambda: setattr(word, "value", value))

    def wait_64(self, at, value, stream):
        word = ctypes.c_uint64.from_address(at)

        def wait():
            while word.value != value:
                time.sleep(1e-4)

        Stream.by_handle[stream].give(wait)


def stand_in(monkeypatch, capturing: bool = False) -> None:
    """Let ``transport/device.py`` run without a GPU, for one test."""
    cuda = SimpleNamespace(
        Event=Event,
        Stream=Stream,
        current_device=lambda: 0,
        current_stream=Host,
        empty_cache=lambda: None,
        is_available=lambda: True,
        is_current_stream_capturing=lambda: capturing,
        mem_get_info=lambda: (1 << 40, 1 << 40),
        set_device=lambda index: None,
        stream=On,
        synchronize=lambda: None,
    )
    monkeypatch.setattr(device, "torch", _With(torch, cuda=cuda))
    monkeypatch.setattr(device, "Driver", StandInDriver)
    monkeypatch.setattr(device, "_kept", [])
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")


class _With:
    """A module with some other names."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
