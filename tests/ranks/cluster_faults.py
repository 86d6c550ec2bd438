"""Injects faults into an emulated cluster while four ranks compare every attention call with float64: cuts links, and
stops, kills and interrupts ranks. Runs one scenario after another and prints a table of the results.

    python tests/ranks/cluster_faults.py                         all scenarios of the table below
    python tests/ranks/cluster_faults.py NAME ... [--seed 1]     these, or others of the same grammar
    python tests/ranks/cluster_faults.py --list | --json

A name is SHAPE/TRANSPORT/FAULT[/OPTION ...]. SHAPE: 4x1 or 2x2. FAULT is KIND[@MOMENT]:TARGETS[:SECONDS]:

    calm:0                  no fault
    cut:0+1:20              no packets between these machines and the others; "ever" never ends
    slow:1:15               the machine sends at 1 kbit/s
    stop:1:10               SIGSTOP, then SIGCONT
    kill:1  orphan:1        SIGKILL; orphan: a forked child of the rank survives and holds its sockets
    raise:1                 attention raises MemoryError
    grad:1  none:1          an input of the call requires a gradient, or the query is None
    sigint:1                Ctrl-C while the rank waits for its peers

TARGETS are machines for cut and slow, else ranks. MOMENT: any (from outside, at a random time), attend (inside the
call), before (before the call) or setup. OPTION: no-counts (no tokens), new-shapes (each call has a new
shape), store:N (a launcher on machine N hosts the c10d store instead of rank 0), goes-on (ranks make the next call
immediately after an error, without synchronizing through files).

Expected, with T = --sp-timeout:

- A fault shorter than T has no effect.
- After any other fault every living rank raises within 1.5 T, or within 1.5 x 5 T if ranks gather values first (new
  shapes, no counts, setup). It is also correct that no rank raises if a link is slow, or if ranks gather values first
  and the fault is shorter than 5 T.
- If all ranks live, the next call after the fault succeeds.
- No result is wrong, no call takes longer than 1.5 x 5 T, and no process or shared memory is left.

The exit status is 1 if any of this fails. The table also shows how many errors name a rank at fault.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from sf_xfuser import TorusArgs, build_mesh, kernels, torus_attention
from sf_xfuser.bench import emulate
from sf_xfuser.bench.emulate import ClusterSpec

WORLD = 4
TIMEOUT_S = 6.0
PATIENCE_S = 5 * TIMEOUT_S
SLACK = 1.5
RATE_BPS, SLOW_BPS = 1_000_000_000, 1_000
WARM, AFTER = 5, 3  # calls before and after a fault
TOLERANCE = 1e-5
LIMIT_S = 110.0  # after the end of the fault: more than twice the longest call allowed
MOMENT = {"raise": "attend", "grad": "before", "none": "before", "sigint": "wait"}
KINDS = ("calm", "cut", "slow", "stop", "kill", "orphan", *MOMENT)

NAMES = [
    f"{where}/{fault}"
    for where, faults in {
        "4x1/tcp": (
            "calm:0", "cut:1:2", "cut:0:2/no-counts", "cut:1:20", "cut:0:20", "cut:1+2:20", "cut:0:20/no-counts",
            "cut:1:20/new-shapes", "cut:3:20/store:3", "cut:1:ever", "cut:0:ever", "cut:0:ever/no-counts",
            "cut:2:ever/no-counts/store:2", "cut@setup:1:ever", "slow:1:4", "slow:1:15", "stop:1:3", "stop:1:10",
            "stop:0:10", "stop:1:40/no-counts", "kill:1", "kill:0", "kill:1+2", "kill:1/no-counts",
            "kill:0/no-counts", "kill@setup:1", "orphan:1", "orphan:1/no-counts", "raise:1", "raise:0/no-counts",
            "raise:1/goes-on", "grad:1", "grad:1/goes-on", "none:1/no-counts", "none:1/goes-on", "sigint:1",
            "sigint:1/no-counts",
        ),
        "2x2/auto": (
            "calm:0", "cut:1:2", "cut:1:20", "cut:1:ever", "slow:0:15/no-counts", "stop@attend:0:3",
            "stop:0:10/no-counts", "stop@attend:1:10", "kill@attend:1", "kill:0/store:0", "orphan:1", "raise:1",
            "raise:3/goes-on", "grad:1", "grad:1/goes-on", "none:0", "sigint:0", "sigint:1/goes-on",
        ),
        "4x1/two_sided": (
            "calm:0", "cut:1:ever", "stop:1:3", "stop:1:10", "kill:1", "raise:1", "grad:1/goes-on",
        ),
    }.items()
    for fault in faults
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    name: str
    machines: int
    transport: str
    kind: str
    moment: str
    targets: tuple[int, ...]
    seconds: float | None  # None: unlimited or instantaneous
    options: tuple[str, ...]

    @classmethod
    def parse(cls, name: str) -> Scenario:
        """Raises ValueError for an invalid name."""
        fault = r"(\w+)(?:@(\w+))?:([0-3](?:\+[0-3])*)(?::(ever|[\d.]+))?"
        match = re.fullmatch(rf"(4x1|2x2)/(\w+)/{fault}((?:/\S+)*)", name)
        options = tuple(match[7].split("/")[1:]) if match else ()
        known = all(re.fullmatch(r"no-counts|new-shapes|goes-on|store:[0-3]", option) for option in options)
        if match is None or match[3] not in KINDS or not known:
            raise ValueError(f"a scenario is SHAPE/TRANSPORT/FAULT[/OPTION ...], got {name!r}: see --help")
        shape, transport, kind, moment, targets, seconds, _ = match.groups()
        return cls(
            name=name, machines=int(shape[0]), transport=transport, kind=kind, options=options,
            moment=moment or MOMENT.get(kind, "any"), targets=tuple(map(int, targets.split("+"))),
            seconds=float(seconds) if seconds not in (None, "ever") else None,
        )  # fmt: skip

    @property
    def has_no_effect(self) -> bool:
        return self.kind == "calm" or (self.seconds or TIMEOUT_S) < TIMEOUT_S

    @property
    def kills(self) -> bool:
        return self.kind in ("kill", "orphan")

    @property
    def recovers(self) -> bool:
        """Whether all ranks live after the fault and the job continues."""
        lasting = self.kills or (self.kind in ("cut", "slow", "stop") and self.seconds is None)
        return not (lasting or self.moment == "setup" or "goes-on" in self.options)

    @property
    def attempts(self) -> int:
        """Errors after which a rank ends if the job does not recover."""
        return 1 if self.kills or self.moment == "setup" else 2

    @property
    def survivors(self) -> list[int]:
        return [rank for rank in range(WORLD) if not (self.kills and rank in self.targets)]

    @property
    def due_s(self) -> float:
        """How long a rank waits for another, as documented: for a chunk, or for a gather before the call."""
        gathers_first = self.moment == "setup" or {"no-counts", "new-shapes"} & {*self.options}
        return PATIENCE_S if gathers_first else TIMEOUT_S

    @property
    def bound_s(self) -> float:
        return SLACK * self.due_s

    @property
    def may_pass(self) -> bool:
        """Whether it depends on chance that ranks raise: small chunks pass a slow link, and the fault may hit a gather,
        which has a longer timeout."""
        return self.kind == "slow" or (self.seconds or self.due_s) < self.due_s

    def rng(self, seed: int) -> random.Random:
        return random.Random(f"{seed} {self.name}")


# --- a rank ---------------------------------------------------------------------------------------------------------


def inputs(index: int, rank: int, tokens: int) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(WORLD * index + rank)
    return [torch.randn(1, 4, tokens, 8, generator=make) for _ in range(3)]


def reference(index: int, rank: int, tokens: int) -> torch.Tensor:
    q = inputs(index, rank, tokens)[0]
    k, v = (torch.cat([inputs(index, peer, tokens)[n] for peer in range(WORLD)], 2) for n in (1, 2))
    return torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())


class Rank:
    """Makes calls until the ``stop`` file exists. Logs events to ``{rank}.jsonl`` in the scenario's folder."""

    def __init__(self, scenario: Scenario, seed: int, rank: int, folder: Path) -> None:
        self.scenario, self.rank, self.folder = scenario, rank, folder
        self.log_file = -1
        rng = scenario.rng(seed)
        self.fault_call, self.fault_piece = WARM + rng.randrange(1, 5), rng.randrange(1, 4)
        self.pieces_left = 0  # of attention, until this rank injects its fault
        self.num_syncs = 0

    def log(self, **what: Any) -> None:
        os.write(self.log_file, json.dumps({"t": time.monotonic(), **what}).encode() + b"\n")

    def main(self) -> None:
        self.log_file = os.open(self.folder / f"{self.rank}.jsonl", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=self.store(), rank=self.rank, world_size=WORLD)
        self.log(up=True)
        if self.injects("setup"):
            self.inject()
        began = time.monotonic()
        args = TorusArgs(backend="torus", transport=self.scenario.transport, timeout=TIMEOUT_S)
        try:
            mesh = build_mesh([range(WORLD)], args, heads=4)
        except Exception as error:
            return self.log(call=-1, began=began, error=type(error).__name__, text=str(error))
        if self.scenario.kind == "orphan" and self.rank in self.scenario.targets:
            child = os.fork()
            if not child:
                signal.pause()
            self.log(child=child)
        self.calls(mesh)
        (self.folder / f"done-{self.rank}").touch()
        mesh.close()
        self.log(closed=True)

    def store(self) -> dist.TCPStore:
        """The store of rank 0 or of a launcher. The ``store`` file holds its address."""
        path = self.folder / "store"
        if self.rank == 0 and not any(option.startswith("store:") for option in self.scenario.options):
            store = dist.TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False)
            publish(path, f"{store.host} {store.port}")
            return store
        while not path.exists():
            time.sleep(0.01)
        host, port = path.read_text().split()
        return dist.TCPStore(host, int(port))

    def calls(self, mesh: Any) -> None:
        index, errors, goes_on = 0, 0, "goes-on" in self.scenario.options
        last = self.fault_call + AFTER if goes_on else None
        while last is None or index <= last:
            if self.rank == 0 and last is None and (self.folder / "stop").exists():
                # The others cannot finish this call before this rank begins it, so they read the file in time.
                publish(self.folder / "last", str(last := index))
            if not self.call(mesh, index):
                errors += 1
                if not (self.scenario.recovers or goes_on) and errors == self.scenario.attempts:
                    return
                index = index if goes_on else self.synchronize(index)
            index += 1
            with suppress(FileNotFoundError):
                last = int((self.folder / "last").read_text())
            time.sleep(0.02)

    def call(self, mesh: Any, index: int) -> bool:
        scenario, is_target = self.scenario, self.rank in self.scenario.targets
        tokens = 16 + (index if "new-shapes" in scenario.options else 0)
        q, k, v = inputs(index, self.rank, tokens)
        counts = None if "no-counts" in scenario.options else ([tokens] * WORLD, [tokens] * WORLD)
        now = index == self.fault_call
        if now and scenario.moment == "attend" and is_target:
            self.pieces_left = self.fault_piece
        if now and scenario.kind == "sigint":
            if is_target:
                threading.Timer(0.3, self.inject).start()
            else:
                time.sleep(1.0)
        if now and self.injects("before"):
            self.inject()
            q.requires_grad_(scenario.kind == "grad")
            q = None if scenario.kind == "none" else q
        began = time.monotonic()
        try:
            found = torus_attention(q, k, v, mesh=mesh, attention=self.attend, tokens=counts)
        except BaseException as error:
            self.log(call=index, began=began, error=type(error).__name__, text=str(error))
            return False
        t = time.monotonic()
        self.log(call=index, began=began, t=t, off=float((found - reference(index, self.rank, tokens)).abs().max()))
        return True

    def attend(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.pieces_left -= 1
        if self.pieces_left == 0:
            self.inject()
        return kernels.sdpa_attend(*tensors)

    def injects(self, moment: str) -> bool:
        return self.scenario.moment == moment and self.scenario.kind != "cut" and self.rank in self.scenario.targets

    def inject(self) -> None:
        self.log(fault=True)
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "sigint": signal.SIGINT}.get(self.scenario.kind)
        if number is not None:
            os.kill(os.getpid(), number)
        elif self.scenario.kind == "raise":
            raise MemoryError("planted")

    def synchronize(self, index: int) -> int:
        """Wait for all living ranks. Returns the highest index at which a rank has failed."""
        self.num_syncs += 1
        publish(self.folder / f"sync-{self.num_syncs}-{self.rank}", str(index))
        synced = [self.folder / f"sync-{self.num_syncs}-{rank}" for rank in range(WORLD)]
        done = [self.folder / f"done-{rank}" for rank in range(WORLD)]
        while not all(a.exists() or b.exists() for a, b in zip(synced, done, strict=True)):
            time.sleep(0.01)
        return max(int(path.read_text()) for path in synced if path.exists())


def publish(path: Path, text: str) -> None:
    """Write atomically."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.rename(path)


# --- a machine ------------------------------------------------------------------------------------------------------


class Machine:
    """Runs on each machine of the cluster. Forks ranks, which inherit the imported libraries, and injects faults."""

    def __init__(self, folder: Path) -> None:
        self.number = int(os.environ["RANK"])
        self.pids: dict[int, int] = {}  # rank -> process
        self.statuses: dict[int, int] = {}
        self.before: set[str] = set()
        with Client(str(folder / "control"), "AF_UNIX") as control:
            control.send(self.number)
            with suppress(EOFError):  # the controller has ended
                while True:
                    name, arguments = control.recv()
                    control.send(getattr(self, name)(*arguments))

    def start(self, scenario: Scenario, seed: int, folder: Path) -> None:
        self.before, self.statuses, self.pids = processes(), {}, {}
        if f"store:{self.number}" in scenario.options:
            self.pids[-1] = self._fork(folder / "store.log", hold_store, folder, self.number)
        each = WORLD // scenario.machines
        os.environ.update(WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(each))
        for local in range(each):
            rank = each * self.number + local
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(local))
            self.pids[rank] = self._fork(folder / f"{rank}.log", Rank(scenario, seed, rank, folder).main)

    def _fork(self, log: Path, main: Callable[..., None], *arguments: Any) -> int:
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 1)
            os.dup2(1, 2)
            faulthandler.register(signal.SIGUSR1, all_threads=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = 1
            try:
                main(*arguments)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        return pid

    def ended(self) -> dict[int, int]:
        """The exit status of each rank that has ended."""
        for rank, pid in self.pids.items():
            if rank not in self.statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return {rank: status for rank, status in self.statuses.items() if rank >= 0}

    def signal(self, rank: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def cut(self) -> None:
        emulate.cut(self.number)

    def restore(self) -> None:
        emulate.restore(self.number)

    def shape(self, rate_bps: int) -> None:
        emulate.shape(rate_bps)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # The kernel applies the new rate to a waiting queue only when another packet arrives.
            probe.sendto(b"", (f"10.77.0.{2 - self.number % 2}", 9))

    def finish(self) -> list[str]:
        """Kill running ranks. Remove and return what is left in shared memory."""
        for rank in self.pids.keys() - self.statuses.keys():
            self.signal(rank, signal.SIGKILL)
            os.waitpid(self.pids[rank], 0)
        left = os.listdir("/dev/shm")
        for name in left:
            os.unlink(f"/dev/shm/{name}")
        return left

    def strays(self) -> list[str]:
        """Kill and return new processes of the cluster, on all machines."""
        until = time.monotonic() + 2  # process 1 reaps orphans
        while (left := processes() - self.before) and time.monotonic() < until:
            time.sleep(0.02)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        return sorted(left)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)


def processes() -> set[str]:
    return {name for name in os.listdir("/proc") if name.isdigit()}


def hold_store(folder: Path, machine: int) -> NoReturn:
    """Host the store, as torchrun's agent does."""
    store = dist.TCPStore(f"10.77.0.{machine + 1}", 0, is_master=True, wait_for_workers=False)
    publish(folder / "store", f"{store.host} {store.port}")
    while True:
        signal.pause()


# --- the controller -------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Result:
    """``after_s``: by rank, time from the fault to its first error. ``named``: how many first errors of other ranks
    name a rank at fault. ``tries``: calls after the fault until one succeeded."""

    name: str
    problems: list[str] = field(default_factory=list)
    after_s: dict[int, float] = field(default_factory=dict)
    bound_s: float = 0.0
    longest_s: float = 0.0
    calls: int = 0
    worst: float = 0.0
    named: str = ""
    tries: int | None = None
    errors: dict[int, list[str]] = field(default_factory=dict)
    hang: dict[int, list[str]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Cluster:
    """An emulated cluster with a ``Machine`` on each of its machines."""

    def __init__(self, machines: int, folder: Path) -> None:
        self.folder = folder
        argv = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh"]  # a machine's own
        argv += [sys.executable, __file__, "--machine", str(folder)]
        self.spec = ClusterSpec(num_machines=machines, ranks_per_machine=1, inter_rate_bps=RATE_BPS)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "control"))
            listener.listen()
            listener.settimeout(120)
            self.thread = threading.Thread(target=self._run, args=(argv,), daemon=True)
            self.thread.start()
            ends = [Connection(listener.accept()[0].detach()) for _ in range(machines)]
        self.controls = {end.recv(): end for end in ends}

    def _run(self, argv: list[str]) -> None:
        with (self.folder / "log").open("wb") as log:
            emulate.run(self.spec, argv, output=log, env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})

    def ask(self, machine: int, what: str, *arguments: Any) -> Any:
        control = self.controls[machine]
        control.send((what, arguments))
        if not control.poll(60):
            raise RuntimeError(f"machine {machine} does not answer {what!r}: see {self.folder}/log")
        return control.recv()

    def close(self) -> None:
        for control in self.controls.values():
            control.close()


class ScenarioRun:
    """Runs one scenario: starts ranks, injects the fault, ends it, reads events, and cleans up."""

    def __init__(self, cluster: Cluster, scenario: Scenario, seed: int, folder: Path) -> None:
        self.cluster, self.scenario, self.folder = cluster, scenario, folder
        self.rng = scenario.rng(seed)
        self.events: dict[int, list[dict[str, Any]]] = {rank: [] for rank in range(WORLD)}
        self.statuses: dict[int, int] = {}
        self.offsets = dict.fromkeys(range(WORLD), 0)  # in each rank's event file
        self.machines = range(scenario.machines)
        for machine in self.machines:
            cluster.ask(machine, "start", scenario, seed, folder)

    def rank(self, rank: int, what: str, *arguments: Any) -> None:
        self.cluster.ask(rank * self.scenario.machines // WORLD, what, rank, *arguments)

    def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Read events until ``condition`` holds, all ranks have ended, or time is up. Returns whether it holds."""
        end = time.monotonic() + seconds
        while not (holds := condition()) and time.monotonic() < end and len(self.statuses) < WORLD:
            time.sleep(0.02)
            self.read_events()
        return holds

    def read_events(self) -> None:
        for machine in self.machines:
            self.statuses |= self.cluster.ask(machine, "ended")
        for rank in range(WORLD):
            if rank in self.statuses:  # a killed rank does not create the file
                (self.folder / f"done-{rank}").touch()
            with suppress(FileNotFoundError), (self.folder / f"{rank}.jsonl").open("rb") as events:
                events.seek(self.offsets[rank])
                whole = b"".join(line for line in events if line.endswith(b"\n"))  # the last line may be incomplete
                self.offsets[rank] += len(whole)
                self.events[rank] += map(json.loads, whole.splitlines())

    def events_with(self, rank: int, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events[rank] if name in event]

    def wait_for(self, name: str, count: int, ranks: Iterable[int]) -> None:
        if not self.until(lambda: all(len(self.events_with(rank, name)) >= count for rank in ranks), 60):
            raise RuntimeError(f"the ranks did not reach the fault: {name!r} was not logged {count} time(s)")

    def inject(self) -> float:
        """Inject the fault; return when it began. Raises RuntimeError if the ranks do not reach it."""
        scenario = self.scenario
        injected_by_rank = scenario.moment != "any" and scenario.kind != "cut"
        if injected_by_rank:
            self.wait_for("fault", 1, scenario.targets)
            return min(self.events_with(rank, "fault")[0]["t"] for rank in scenario.targets)
        if scenario.moment == "setup":
            self.wait_for("up", 1, range(WORLD))
        else:
            self.wait_for("off", WARM, range(WORLD))
        time.sleep(self.rng.uniform(0, 0.2))
        began = time.monotonic()
        for target in scenario.targets:
            if scenario.kind == "cut":
                self.cluster.ask(target, "cut")
            elif scenario.kind == "slow":
                self.cluster.ask(target, "shape", SLOW_BPS)
            elif scenario.kind != "calm":
                self.rank(target, "signal", signal.SIGSTOP)
        if scenario.kills:  # after all are stopped, so that none sees another die
            for target in scenario.targets:
                self.rank(target, "signal", signal.SIGKILL)
        return began

    def end_fault(self) -> None:
        for target in self.scenario.targets:
            if self.scenario.kind == "cut":
                self.cluster.ask(target, "restore")
            elif self.scenario.kind == "slow":
                self.cluster.ask(target, "shape", RATE_BPS)
            elif self.scenario.kind == "stop":
                self.rank(target, "signal", signal.SIGCONT)

    def run(self) -> Result:
        scenario, result = self.scenario, Result(name=self.scenario.name, bound_s=self.scenario.bound_s)
        started = time.monotonic()
        began = ended = None
        try:
            began = self.inject()
            if scenario.seconds is not None:
                self.until(lambda: False, began + scenario.seconds - time.monotonic())
                self.end_fault()
            ended = time.monotonic() if scenario.seconds is not None else began
            if scenario.recovers:
                self.until(lambda: self.enough(ended), LIMIT_S)
                (self.folder / "stop").touch()  # ranks end after the current call and one more
            self.until(lambda: False, SLACK * PATIENCE_S if scenario.recovers else LIMIT_S)
        except RuntimeError as error:
            result.problems.append(str(error))
        self.clean_up(result)
        if began is not None:
            check(scenario, self.events, began, ended, result)
        result.seconds = time.monotonic() - started
        return result

    def enough(self, ended: float) -> bool:
        """Whether every rank has made enough calls since the fault, or failed as many."""
        since = [
            [event for event in self.events_with(rank, "call") if event["began"] >= ended] for rank in range(WORLD)
        ]
        return all(sum("off" in event for event in events) >= AFTER for events in since) or all(
            sum("error" in event for event in events) >= AFTER for events in since
        )

    def clean_up(self, result: Result) -> None:
        """End all processes and restore the links."""
        running = set(range(WORLD)) - self.statuses.keys()
        if running:
            for rank in running:
                self.rank(rank, "signal", signal.SIGCONT)
                self.rank(rank, "signal", signal.SIGUSR1)
            time.sleep(0.5)
            stacks = {rank: frames((self.folder / f"{rank}.log").read_text()) for rank in sorted(running)}
            syncing = {rank for rank, stack in stacks.items() if any(frame.endswith(" synchronize") for frame in stack)}
            result.hang = {rank: stacks[rank] for rank in running - syncing or running}  # the others wait for these
            result.problems.append(f"rank(s) {list(result.hang)} hang")
        self.read_events()
        for child in (event["child"] for rank in range(WORLD) for event in self.events_with(rank, "child")):
            self.cluster.ask(0, "kill", child)
        for machine in self.machines:
            result.left += self.cluster.ask(machine, "finish")
        result.left += [f"process {pid}" for pid in self.cluster.ask(0, "strays")]
        if self.scenario.seconds is None:
            self.end_fault()
        if result.left:
            result.problems.append(f"left: {result.left}")
        for rank, status in self.statuses.items():
            if status != (-signal.SIGKILL if rank not in self.scenario.survivors else 0):
                tail = (self.folder / f"{rank}.log").read_text().strip().splitlines()[-1:]
                result.problems.append(f"rank {rank} ended with status {status}: {' '.join(tail)}")


def check(
    scenario: Scenario, events_of: dict[int, list[dict[str, Any]]], began: float, ended: float | None, result: Result
) -> None:
    """Fill in ``result`` from the events, for a fault that began and ended at these times."""
    calls = {rank: [event for event in events if "call" in event] for rank, events in events_of.items()}
    everything = [event for events in calls.values() for event in events]
    offs = [event["off"] for event in everything if "off" in event]
    result.calls, result.worst = len(offs), max(offs, default=0.0)
    if wrong := sum(not off <= TOLERANCE for off in offs):
        result.problems.append(f"{wrong} wrong results")
    result.longest_s = max((event["t"] - event["began"] for event in everything), default=0.0)
    slept = scenario.seconds if scenario.kind == "stop" and scenario.seconds else 0.0
    if result.longest_s > SLACK * PATIENCE_S + slept:
        result.problems.append(f"a call took {result.longest_s:.0f} s")
    failed = {rank: [event for event in calls[rank] if "error" in event] for rank in scenario.survivors}
    result.errors = {rank: [f"{x['error']}: {x['text']}" for x in errors] for rank, errors in failed.items() if errors}
    texts = [event["text"] or event["error"] == "KeyboardInterrupt" for errors in failed.values() for event in errors]
    if not all(texts):
        result.problems.append("an error without a text")
    if any(event["t"] < began for errors in failed.values() for event in errors):
        result.problems.append("an error before the fault")
    if scenario.has_no_effect:
        if result.errors:
            result.problems.append(f"rank(s) {list(result.errors)} raised")
        return
    first = {rank: errors[0] for rank, errors in failed.items() if errors}
    since = min((event["t"] for event in first.values()), default=began) if scenario.may_pass else began
    for rank in scenario.survivors:
        if rank in first:
            since_rank = ended if scenario.kind == "stop" and rank in scenario.targets and ended is not None else since
            result.after_s[rank] = max(0.0, first[rank]["t"] - since_rank)
    late = [rank for rank, after in result.after_s.items() if after > scenario.bound_s]
    silent = [rank for rank in scenario.survivors if rank not in first]
    if late:
        result.problems.append(f"rank(s) {late} raised late")
    if silent and (first or not scenario.may_pass):
        result.problems.append(f"rank(s) {silent} did not raise")
    if scenario.kind not in ("cut", "slow"):
        others = [rank for rank in first if rank not in scenario.targets]
        result.named = f"{sum(names(first[rank]['text'], rank, scenario.targets) for rank in others)}/{len(others)}"
    if scenario.recovers:
        result.tries = tries(calls, ended if ended is not None else began, {event["call"] for event in first.values()})
        if result.tries != 1:
            result.problems.append(
                f"it took {result.tries} calls until one succeeded" if result.tries else "no call succeeds"
            )


def tries(calls: dict[int, list[dict[str, Any]]], ended: float, first: set[int]) -> int | None:
    """The number, from 1, of the first successful call that all ranks began after the fault and their first errors."""
    by_index: dict[int, list[dict[str, Any]]] = {}
    for event in (event for events in calls.values() for event in events):
        if event["began"] >= ended and event["call"] > max(first, default=-1):
            by_index.setdefault(event["call"], []).append(event)
    whole = [events for _, events in sorted(by_index.items()) if len(events) == WORLD]
    return next((n for n, events in enumerate(whole, 1) if all("off" in event for event in events)), None)


def names(text: str, rank: int, targets: tuple[int, ...]) -> bool:
    """Whether an error of ``rank`` names one of ``targets``."""
    matches = re.findall(r"rank(?:\(s\))? \[?([\d, ]+)", re.sub(rf"^rank {rank}\b", "", text))
    return bool({*map(str, targets)} & {number for numbers in matches for number in re.findall(r"\d+", numbers)})


def frames(text: str) -> list[str]:
    """The innermost calls of a stack written by ``faulthandler``."""
    stack = re.findall(r'File ".*/(\w+\.py)", line (\d+) in (\w+)', text.rpartition("most recent call first")[2])
    return [f"{file}:{line} {function}" for file, line, function in stack[:4]]


def leftover_processes(folder: Path) -> list[str]:
    """Other processes with the folder in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.parent.name != str(os.getpid()) and str(folder) in path.read_text():
                found.append(f"process {path.parent.name}")
    return found


@contextmanager
def clusters() -> Iterator[Callable[[int], Cluster]]:
    """Creates the cluster of a number of machines on first use."""
    made: dict[int, Cluster] = {}
    with tempfile.TemporaryDirectory(prefix="sf-xfuser-faults-") as name:

        def cluster(machines: int) -> Cluster:
            if machines not in made:
                folder = Path(name, str(machines))
                folder.mkdir()
                made[machines] = Cluster(machines, folder)
            return made[machines]

        try:
            yield cluster
        finally:
            for one in made.values():
                one.close()
            for one in made.values():
                one.thread.join(30)
        if left := leftover_processes(Path(name)):
            raise SystemExit(f"left behind: {left}")


def table(rows: list[Result]) -> Table:
    shown = Table("scenario", "", "calls", "raised after, s", "bound", "longest", "named", "tries", "problems")
    for row in rows:
        after = " ".join(f"{row.after_s[rank]:.1f}" if rank in row.after_s else "-" for rank in range(WORLD))
        where = [f"rank {rank} in {' < '.join(stack)}" for rank, stack in row.hang.items()]
        shown.add_row(
            row.name, "[red]bad[/]" if row.problems else "good", str(row.calls), after if row.after_s else "",
            f"{row.bound_s:g}", f"{row.longest_s:.1f}", row.named, "" if row.tries is None else str(row.tries),
            "; ".join([*row.problems, *where]).replace("[", "\\["),
        )  # fmt: skip
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--list", action="store_true", help="print the names of all scenarios")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of faults")
    parser.add_argument("--json", action="store_true", help="print one line of JSON per scenario instead of the table")
    options = parser.parse_args()
    if options.list:
        print("\n".join(NAMES))
        return 0
    if reason := emulate.unavailable():
        sys.exit(reason)
    rows: list[Result] = []
    with clusters() as cluster:
        for scenario in map(Scenario.parse, options.names):
            current = cluster(scenario.machines)
            with tempfile.TemporaryDirectory(dir=current.folder) as folder:
                rows.append(result := ScenarioRun(current, scenario, options.seed, Path(folder)).run())
            if options.json:
                print(json.dumps(asdict(result)), flush=True)
            else:
                print(
                    f"{result.name}: {'; '.join(result.problems) or 'good'} ({result.seconds:.0f} s)", file=sys.stderr
                )
    if not options.json:
        Console(width=None if sys.stdout.isatty() else 200).print(table(rows))
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--machine"]:
        Machine(Path(sys.argv[2]))
        os._exit(0)  # at once: there is nothing to clean up
    else:
        sys.exit(main())
