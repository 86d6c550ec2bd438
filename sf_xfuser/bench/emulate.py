"""An emulated cluster: N machines x M ranks on one computer, with shaped links between the machines.

Everything lives in private kernel namespaces. The *driver* (``run``) starts a *holder* through ``unshare``: process 1
of its own PID namespace, whose network namespace is the switch. Each machine is a network and a host name namespace
below it. When the holder ends, for whatever reason, the kernel ends every rank and drops every interface; the holder
ends when the driver does, since each holds an end of one socket (the lifeline). The host's network sees none of it.

Machine ``i`` has ``eth0`` (10.77.0.{i+1}), whose other end ``up{i}`` is on bridge ``br{i}`` of the switch. A pair
``x{i}-{j}`` / ``x{j}-{i}`` joins the bridges of machines ``i`` and ``j``. Addresses are static and nothing floods, so
the bytes sent through ``x{i}-{j}`` are exactly those that machine ``i`` sent to machine ``j``. ``eth0`` sends at
``ClusterSpec.inter_rate_bps``; traffic inside a machine goes over its loopback and is not shaped.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from sf_xfuser.config import environment, parse_grid

_MTU = 9000
_STOP_S = 5.0  # from SIGTERM to SIGKILL
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "bridge": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
# What every program on the emulated fabric sees, whatever the host's defaults are. Nothing is lost here, so congestion
# control has nothing to do: bbr (the default of some hosts) would probe and pace, which makes throughput wander, and
# slow start after idle would charge every pause in the traffic. reno is the one that every kernel lets a namespace
# choose. IPv6 is off since its neighbour discovery would be counted as traffic.
_SYSCTLS = {
    "net/ipv4/tcp_congestion_control": "reno",
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_no_metrics_save": "1",
    "net/ipv4/tcp_rmem": "4096 131072 33554432",
    "net/ipv4/tcp_wmem": "4096 16384 4194304",
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
}
# Runs as the process that keeps a machine's namespaces alive, and in the holder: /proc/sys/net is the reader's own.
_SET_SYSCTLS = """
import json, os, socket, sys
for name, value in json.loads(sys.argv[1]).items():
    if os.path.exists("/proc/sys/" + name):
        open("/proc/sys/" + name, "w").write(value)
"""
# Names for the machines, seen by the ranks alone: mounts are private here, and the folder is covered for a moment.
_SET_HOSTS = """
mount -t tmpfs none /tmp && cat - /etc/hosts > /tmp/hosts && mount --bind /tmp/hosts /etc/hosts && umount /tmp
"""
_MACHINE = _SET_SYSCTLS + "socket.sethostname(sys.argv[2]); print('ready', flush=True); sys.stdin.read()"


class EmulationError(RuntimeError):
    """The emulated cluster cannot be built here. The message says what was tried, the answer, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """N machines x M ranks. ``inter_rate_bps``: bits per second that each machine can send to the others in sum (None:
    not shaped); ``inter_delay_s``: one-way delay between machines. Raises ValueError for what cannot be meant."""

    num_machines: int
    ranks_per_machine: int
    inter_rate_bps: int | None = None
    inter_delay_s: float = 0.0

    def __post_init__(self) -> None:
        if self.num_machines < 1 or self.ranks_per_machine < 1 or self.world_size > 64:
            raise ValueError(
                f"a cluster has 1 to 64 ranks, at least 1 on each machine, got {self.num_machines} machine(s) x "
                f"{self.ranks_per_machine} rank(s): choose smaller or positive numbers"
            )
        if self.inter_rate_bps is not None and not 64_000 <= self.inter_rate_bps <= 100_000_000_000:
            raise ValueError(f"the rate between machines must be 64kbit to 100gbit, got {self.inter_rate_bps} bit/s")
        if not 0 <= self.inter_delay_s <= 10:
            raise ValueError(f"the delay between machines must be 0s to 10s, got {self.inter_delay_s} s")

    @classmethod
    def parse(cls, cluster: str, inter_rate: str | None = None, inter_delay: str | None = None) -> ClusterSpec:
        """From command-line text: ``"4x2"``, ``"2.5gbit"`` (bits per second), ``"0.2ms"``."""
        grid = parse_grid(cluster)
        if grid is None:
            raise ValueError(f"--cluster must be machines x ranks per machine (for instance 4x2), got {cluster!r}")
        rate = _parse("--inter-rate", inter_rate, {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}, "100mbit")
        return cls(
            num_machines=grid[0],
            ranks_per_machine=grid[1],
            inter_rate_bps=None if rate is None else round(rate),
            inter_delay_s=_parse("--inter-delay", inter_delay, {"us": 1e-6, "ms": 1e-3, "s": 1.0}, "0.2ms") or 0.0,
        )

    @property
    def world_size(self) -> int:
        return self.num_machines * self.ranks_per_machine

    def __str__(self) -> str:
        rate = "" if self.inter_rate_bps is None else f" at {self.inter_rate_bps / 1e6:g} Mbit/s"
        delay = f" with {self.inter_delay_s * 1e3:g} ms delay" if self.inter_delay_s else ""
        return f"{self.num_machines}x{self.ranks_per_machine}{rate}{delay}"


def _parse(flag: str, text: str | None, units: Mapping[str, float], example: str) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{flag} must be a number with {', '.join(units)} (for instance {example}), got {text!r}")
    return float(match[1]) * units[match[2].lower()]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """A rank that did not end with status 0. ``what``: its exit status or signal, in words."""

    rank: int
    machine: int
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended. ``status``: 0, or that of the rank that failed first (128 + signal), or 124 after the time-out.
    ``failures``: in the order in which they happened. ``bytes_between[i][j]``: what machine i sent to machine j over
    the whole run, in bytes on the link; 0 for i = j, since traffic inside a machine passes no link."""

    status: int
    failures: tuple[RankFailure, ...] = ()
    bytes_between: tuple[tuple[int, ...], ...] = ()


def unavailable() -> str | None:
    """Why this computer cannot emulate a cluster, with the remedy; None where it can. Leaves nothing behind."""
    try:
        _namespaces()
    except EmulationError as error:
        return str(error)
    return None


def run(
    spec: ClusterSpec,
    argv: Sequence[str],
    *,
    timeout_s: float | None = None,
    grace_s: float = 15.0,
    prefix: bool = False,
    env: Mapping[str, str] | None = None,
    output: BinaryIO | int | None = None,
) -> Outcome:
    """Run ``argv`` on every rank of an emulated cluster and wait for its end. Nothing outlives the call.

    Ranks inherit this process's environment and working directory, plus ``env``, plus torchrun's variables (RANK,
    LOCAL_RANK, WORLD_SIZE, GROUP_RANK, MASTER_ADDR, ...). Machine ``i`` is host ``machine{i}``. Standard input is
    empty. ``output`` takes both output streams of all ranks (None: inherited); ``prefix`` marks lines with their rank.

    The first rank that fails is reported on stderr; the others get ``grace_s`` seconds to fail by themselves, then
    SIGTERM, then SIGKILL. After ``timeout_s`` all ranks are ended so. Raises EmulationError where the cluster cannot be
    built, before any rank has started.
    """
    if not argv:
        raise ValueError("a cluster needs a command for its ranks, got none; for instance: -- python train.py")
    omp = {} if environment(["OMP_NUM_THREADS"]) else {"OMP_NUM_THREADS": "1"}  # as torchrun does
    order: dict[str, Any] = {"spec": asdict(spec), "argv": list(argv), "env": omp | dict(env or {})}
    order |= {"timeout_s": timeout_s, "grace_s": grace_s, "prefix": prefix}
    namespaces = _namespaces()
    lifeline, holders_end = socket.socketpair()
    with lifeline:
        with holders_end:
            holder = subprocess.Popen(
                [
                    *namespaces,
                    sys.executable,
                    "-m",
                    "sf_xfuser.bench.emulate",
                    str(holders_end.fileno()),
                    json.dumps(order),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                pass_fds=(holders_end.fileno(),),
                start_new_session=True,  # Ctrl-C reaches the driver alone, which then ends the ranks in order
            )
        try:
            answer = json.loads(_receive_all(lifeline) or "null")
        except BaseException:
            with suppress(OSError):
                lifeline.sendall(b"stop")
                lifeline.settimeout(_STOP_S + 5)
                _receive_all(lifeline)
            raise
        finally:
            with suppress(subprocess.TimeoutExpired):
                holder.wait(timeout=1)
            holder.kill()  # where it still lives; unshare takes the holder, and so every rank, with it
            holder.wait()
    if answer is None:
        raise EmulationError(f"the emulated cluster ended without an answer (status {holder.returncode}): killed?")
    if "error" in answer:
        raise EmulationError(answer["error"])
    return Outcome(
        status=answer["status"],
        failures=tuple(RankFailure(**failure) for failure in answer["failures"]),
        bytes_between=tuple(map(tuple, answer["bytes_between"])),
    )


def _receive_all(end: socket.socket) -> bytes:
    return b"".join(iter(lambda: end.recv(65536), b""))


def _tool(name: str) -> str:
    """The path of an executable, also where PATH lacks the sbin folders (as for users of Debian)."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if found is None:
        raise EmulationError(
            f"an emulated cluster needs the program {name!r}, which is not installed. Debian and Ubuntu: "
            f"apt-get install {_TOOLS.get(name, 'coreutils')}"
        )
    return found


def _namespaces() -> list[str]:
    """The ``unshare`` command that this kernel grants. Raises EmulationError with its answers."""
    tools = {name: _tool(name) for name in _TOOLS}
    plain = [tools["unshare"], "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with_user = [*plain, "--user", "--map-root-user"]
    answers = ""
    for command in [plain, with_user] if os.geteuid() == 0 else [with_user]:
        probe = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=60)
        if probe.returncode == 0:
            return command
        answers += f"\n  {' '.join(command)}: {probe.stderr.strip() or f'status {probe.returncode}'}"
    raise EmulationError(
        f"an emulated cluster needs private namespaces, which this kernel or container refuses:{answers}\n"
        "Do one of: run as root; allow user namespaces (sysctl -w kernel.unprivileged_userns_clone=1, on Ubuntu sysctl "
        "-w kernel.apparmor_restrict_unprivileged_userns=0); start the container with --privileged"
    )


# --- the holder: process 1 of the private namespaces ----------------------------------------------------------------


def _hold(lifeline: socket.socket, order: Mapping[str, Any]) -> None:
    """Build the cluster, run the ranks, answer on the lifeline. Returning ends everything below this process."""
    wake, signals = socket.socketpair()
    signals.setblocking(False)
    signal.set_wakeup_fd(signals.fileno())
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):  # for process 1, the kernel has no default actions
        signal.signal(number, lambda *_: None)
    spec = ClusterSpec(**order["spec"])
    try:
        machines = _build(spec)
    except (EmulationError, OSError, subprocess.SubprocessError) as error:
        lifeline.sendall(json.dumps({"error": str(error)}).encode())
        return
    ranks = _Ranks(order, spec, machines)
    ranks.wait(lifeline, wake)
    sent = _counters("/proc/self/net/dev", spec.num_machines)
    outcome = Outcome(status=ranks.status, failures=tuple(ranks.failures), bytes_between=tuple(map(tuple, sent)))
    lifeline.sendall(json.dumps(asdict(outcome)).encode())


def _call(command: list[str], batch: Sequence[str] = ()) -> None:
    done = subprocess.run(command, input="\n".join(batch), capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise EmulationError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")


def _build(spec: ClusterSpec) -> list[subprocess.Popen[str]]:
    """Machines, links, addresses and shaping. The processes that keep the machines alive. Raises EmulationError."""
    python = [sys.executable, "-I", "-S", "-c"]
    _call([*python, _SET_SYSCTLS, json.dumps(_SYSCTLS)])
    _call([_tool("sh"), "-c", _SET_HOSTS], [f"{_address(i)} machine{i}" for i in range(spec.num_machines)] + [""])
    pipe = subprocess.PIPE
    machines = []
    for i in range(spec.num_machines):
        command = [_tool("unshare"), "--net", "--uts", *python, _MACHINE, json.dumps(_SYSCTLS), f"machine{i}"]
        machines.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True))
    for i, machine in enumerate(machines):
        if machine.stdout is not None and (said := machine.stdout.readline()) != "ready\n":
            raise EmulationError(f"machine {i} did not start: {said}{machine.stdout.read()}")
    links, forwarding = _switch([machine.pid for machine in machines])
    _call([_tool("ip"), "-batch", "-"], links)
    _call([_tool("bridge"), "-batch", "-"], forwarding)
    for i, machine in enumerate(machines):
        enter = [_tool("nsenter"), f"--net=/proc/{machine.pid}/ns/net"]
        inside = ["link set lo up", f"link set eth0 up gso_max_size {_gso(spec.inter_rate_bps or 0)}"]
        inside += [f"addr add {_address(i)}/24 dev eth0"]
        inside += [f"neigh add {_address(j)} lladdr {_mac(j)} dev eth0" for j in range(spec.num_machines) if j != i]
        _call([*enter, _tool("ip"), "-batch", "-"], inside)
        qdisc = [_tool("tc"), "qdisc", "add", "root", "dev"]
        if spec.inter_rate_bps is not None:
            _call([*enter, *_shaper("add", spec.inter_rate_bps)])
        if spec.inter_delay_s:
            try:  # at the switch's end of the link: in the sender, TCP would count what waits there as not yet sent
                netem = ["netem", "delay", f"{spec.inter_delay_s * 1e6:.0f}us", "limit", "10000000"]
                _call([*qdisc, f"up{i}", *netem])
            except EmulationError as error:
                raise EmulationError(
                    f"--inter-delay needs the network emulator (sch_netem), which this kernel lacks ({error}). As "
                    "root: modprobe sch_netem; Debian has it in its linux-image-* packages, Ubuntu in "
                    "linux-modules-extra-*. Without --inter-delay the cluster runs here"
                ) from None
    return machines


def _burst(rate_bps: int) -> int:
    """What a link sends at once after a pause, in bytes: 1 ms."""
    return max(32 * 1024, rate_bps // 8 // 1000)


def _gso(rate_bps: int) -> int:
    """Size of the segments handed to the device: they fit the burst, so that the shaper need not cut them."""
    return min(65536, _burst(rate_bps) * 7 // 8)


def _shaper(verb: str, rate_bps: int) -> list[str]:
    """The ``tc`` command for a machine's link. The limit is beyond what all its send buffers hold: nothing is lost."""
    tbf = ["tbf", "rate", f"{rate_bps}bit", "burst", str(_burst(rate_bps)), "limit", str(2**30)]
    return [_tool("tc"), "qdisc", verb, "dev", "eth0", "root", *tbf]


def _address(machine: int) -> str:
    return f"10.77.0.{machine + 1}"


def _mac(machine: int) -> str:
    return f"02:4d:00:00:00:{machine + 1:02x}"


def _switch(pids: Sequence[int]) -> tuple[list[str], list[str]]:
    """(commands for ``ip -batch``, commands for ``bridge -batch``) that wire the machines that live in ``pids``."""
    links, forwarding = [], []
    still = "type bridge_slave learning off flood off mcast_flood off bcast_flood off"
    for i, pid in enumerate(pids):
        links += [f"link add br{i} mtu {_MTU} type bridge stp_state 0 mcast_snooping 0", f"link set br{i} up"]
        links += [f"link add up{i} mtu {_MTU} type veth peer name eth0 mtu {_MTU} address {_mac(i)} netns {pid}"]
        links += [f"link add x{i}-{j} mtu {_MTU} type veth peer name x{j}-{i} mtu {_MTU}" for j in range(i)]
    for i in range(len(pids)):
        for j in range(len(pids)):
            port = f"up{i}" if i == j else f"x{i}-{j}"
            links += [f"link set {port} up master br{i}", f"link set {port} {still}"]
            forwarding += [f"fdb add {_mac(j)} dev {port} master static"]
    return links, forwarding


class _Ranks:
    """The ranks of one run, started by the constructor."""

    def __init__(self, order: Mapping[str, Any], spec: ClusterSpec, machines: list[subprocess.Popen[str]]) -> None:
        self.status = 0
        self.failures: list[RankFailure] = []
        self._timeout_s: float | None = order["timeout_s"]
        self._grace_s: float = order["grace_s"]
        self._ranks_per_machine = spec.ranks_per_machine
        self._printing = threading.Lock()
        self._readers: list[threading.Thread] = []
        self._running: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}  # by process number: (rank, its process)
        pipe = subprocess.PIPE if order["prefix"] else None
        for rank in range(spec.world_size):
            machine, local = divmod(rank, spec.ranks_per_machine)
            variables: dict[str, str] = {
                "RANK": f"{rank}", "ROLE_RANK": f"{rank}", "LOCAL_RANK": f"{local}", "GROUP_RANK": f"{machine}",
                "WORLD_SIZE": f"{spec.world_size}", "ROLE_WORLD_SIZE": f"{spec.world_size}", "ROLE_NAME": "default",
                "LOCAL_WORLD_SIZE": f"{spec.ranks_per_machine}", "GROUP_WORLD_SIZE": f"{spec.num_machines}",
                "MASTER_ADDR": _address(0), "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "emulated",
                "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
                "GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0",
            } | order["env"]  # fmt: skip
            enter = [f"--{kind}=/proc/{machines[machine].pid}/ns/{kind}" for kind in ("net", "uts")]
            command = [_tool("nsenter"), *enter, _tool("env"), *map("=".join, variables.items()), *order["argv"]]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
            self._running[process.pid] = rank, process
            for source, sink in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
                if source is not None:
                    mark = f"[machine{machine} rank{rank}] ".encode()
                    self._readers.append(threading.Thread(target=self._copy, args=(source, sink, mark), daemon=True))
                    self._readers[-1].start()

    def _copy(self, source: IO[bytes], sink: BinaryIO, mark: bytes) -> None:
        for line in iter(source.readline, b""):
            with self._printing:
                sink.write(mark + line.removesuffix(b"\n") + b"\n")
                sink.flush()

    def wait(self, lifeline: socket.socket, wake: socket.socket) -> None:
        """Return when every rank has ended, by itself or, after ``limit``, for the reason ``why``."""
        limit = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        why, status, ending = f"the time-out of {self._timeout_s} s is over", 124, False
        while True:
            failed_before = bool(self.failures)
            self._reap(f": ended by the launcher, since {why}" if ending else "")
            if not self._running:
                break
            if self.failures and not failed_before and not ending:
                limit, why = time.monotonic() + self._grace_s, f"another rank failed {self._grace_s:g} s ago"
                self._say(f"the other ranks have {self._grace_s:g} s to end by themselves")
            left = None if limit is None else max(0.0, limit - time.monotonic())
            ready = select.select([lifeline, wake], [], [], left)[0]
            if lifeline in ready and not lifeline.recv(16):
                raise SystemExit(1)  # the driver is gone; the kernel ends the ranks
            received = wake.recv(4096) if wake in ready else b""
            if not ending and (lifeline in ready or {signal.SIGINT, signal.SIGTERM} & {*received}):
                limit, why, status = time.monotonic(), "the launcher was stopped", 130
            if limit is not None and time.monotonic() >= limit:
                if not ending:
                    self.status = self.status or status
                    self._say(f"ending rank(s) {sorted(rank for rank, _ in self._running.values())}: {why}")
                for _, process in self._running.values():
                    process.send_signal(signal.SIGKILL if ending else signal.SIGTERM)
                limit, ending = time.monotonic() + _STOP_S, True
        limit = time.monotonic() + 1.0  # a process that a rank left behind may hold its pipe for longer
        for reader in self._readers:
            reader.join(max(0.0, limit - time.monotonic()))

    def _reap(self, remark: str) -> None:
        """Collect every child that has ended, also those that ranks left behind, which process 1 inherits."""
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid not in self._running:
                os.waitpid(ended.si_pid, 0)
                continue
            rank, process = self._running.pop(ended.si_pid)
            if code := process.wait():
                name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
                what = f"exited with status {code}" if code > 0 else f"was killed by {name}"
                failure = RankFailure(rank=rank, machine=rank // self._ranks_per_machine, what=what + remark)
                self.failures.append(failure)
                self.status = self.status or (code if code > 0 else 128 - code)
                if not remark:
                    self._say(f"rank {rank} (machine {failure.machine}) {what}")

    def _say(self, text: str) -> None:
        with self._printing:
            print(f"sf-xfuser cluster: {text}", file=sys.stderr, flush=True)


# --- for ranks --------------------------------------------------------------------------------------------------------


def read_matrix(num_machines: int) -> list[list[int]]:
    """Called by a rank of an emulated cluster: bytes that machine i has sent to machine j so far, as ``[i][j]``. The
    difference of two calls is the traffic between them. Raises EmulationError elsewhere."""
    return _counters("/proc/1/net/dev", num_machines)  # process 1 is the holder, whose network is the switch


def shape(rate_bps: int) -> None:
    """Called by one rank of a machine: from now on this machine sends at ``rate_bps`` bits per second. The cluster must
    have been started with a rate. Raises EmulationError where it was not, or elsewhere."""
    if "up0:" not in Path("/proc/1/net/dev").read_text():
        raise EmulationError("this process is not a rank of an emulated cluster: its links are not ours to shape")
    inside = [_tool("ip"), "link", "set", "eth0", "gso_max_size", str(_gso(rate_bps))]
    _call(_shaper("change", rate_bps))
    _call(inside)


def cut(machine: int) -> None:
    """Called by a rank: from now on nothing passes between ``machine`` and the others. Its interface stays up, so no
    program is told. Raises EmulationError outside a cluster."""
    _set_bridge(machine, "down")


def restore(machine: int) -> None:
    """Called by a rank: end :func:`cut`."""
    _set_bridge(machine, "up")


def _set_bridge(machine: int, state: str) -> None:
    if f"br{machine}:" not in Path("/proc/1/net/dev").read_text():
        raise EmulationError(f"this process is not a rank of an emulated cluster with a machine {machine}")
    _call([_tool("nsenter"), "--net=/proc/1/ns/net", _tool("ip"), "link", "set", f"br{machine}", state])


def _counters(path: str, num_machines: int) -> list[list[int]]:
    lines = (line.split(":") for line in Path(path).read_text().splitlines()[2:])
    sent = {name.strip(): int(numbers.split()[8]) for name, numbers in lines}
    machines = range(num_machines)
    if any(f"up{i}" not in sent for i in machines) or f"up{num_machines}" in sent:
        raise EmulationError(f"this process is not a rank of an emulated cluster of {num_machines} machine(s)")
    return [[0 if i == j else sent[f"x{i}-{j}"] for j in machines] for i in machines]


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as end:
        _hold(end, json.loads(sys.argv[2]))
