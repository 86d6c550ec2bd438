"""The holder of an emulated cluster: process 1 of its namespaces, started by ``emulate.run``.

It builds machines and links, runs the ranks, and sends the outcome over the lifeline. When it ends, the kernel kills
every process and removes every interface below it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import IO, Any, BinaryIO

from sf_xfuser.bench.emulate import (
    STOP_S,
    ClusterSpec,
    EmulationError,
    Outcome,
    RankFailure,
    call,
    counters,
    gso,
    shaper,
    tool,
)

_MTU = 9000
# Independent of the host's defaults. No packet is lost, so congestion control is not needed: bbr (the default of some
# hosts) varies the throughput, and slow start after idle delays traffic after every pause. Every kernel allows reno in
# a namespace. IPv6 is off because its neighbour discovery would count as traffic.
_SYSCTLS = {
    "net/ipv4/tcp_congestion_control": "reno",
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_no_metrics_save": "1",
    "net/ipv4/tcp_rmem": "4096 131072 33554432",
    "net/ipv4/tcp_wmem": "4096 16384 4194304",
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
}
# The holder and the first process of each machine run this, because /proc/sys/net shows the caller's namespace.
_SET_SYSCTLS = """
import json, os, socket, sys
for name, value in json.loads(sys.argv[1]).items():
    if os.path.exists("/proc/sys/" + name):
        open("/proc/sys/" + name, "w").write(value)
"""
# Host names of the machines, visible to the ranks only: mounts are private. /tmp is hidden during this command.
_SET_HOSTS = """
mount -t tmpfs none /tmp && cat - /etc/hosts > /tmp/hosts && mount --bind /tmp/hosts /etc/hosts && umount /tmp
"""
_MACHINE = _SET_SYSCTLS + "socket.sethostname(sys.argv[2]); print('ready', flush=True); sys.stdin.read()"


def _hold(lifeline: socket.socket, job: Mapping[str, Any]) -> None:
    """Build the cluster, run the ranks and send the outcome over the lifeline."""
    wake, signals = socket.socketpair()
    signals.setblocking(False)
    signal.set_wakeup_fd(signals.fileno())
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):  # process 1 has no default actions for signals
        signal.signal(number, lambda *_: None)
    spec = ClusterSpec(**job["spec"])
    try:
        machines = _build(spec)
    except (EmulationError, OSError, subprocess.SubprocessError) as error:
        lifeline.sendall(json.dumps({"error": str(error)}).encode())
        return
    ranks = _Ranks(job, spec, machines)
    ranks.wait(lifeline, wake)
    sent = counters("/proc/self/net/dev", spec.num_machines)
    outcome = Outcome(status=ranks.status, failures=tuple(ranks.failures), bytes_between=tuple(map(tuple, sent)))
    lifeline.sendall(json.dumps(asdict(outcome)).encode())


def _build(spec: ClusterSpec) -> list[subprocess.Popen[str]]:
    """Create machines, links, addresses and shaping. Returns the process that keeps each machine's namespaces alive."""
    python = [sys.executable, "-I", "-S", "-c"]
    call([*python, _SET_SYSCTLS, json.dumps(_SYSCTLS)])
    call([tool("sh"), "-c", _SET_HOSTS], [f"{_address(i)} machine{i}" for i in range(spec.num_machines)] + [""])
    pipe = subprocess.PIPE
    machines = []
    for i in range(spec.num_machines):
        command = [tool("unshare"), "--net", "--uts", *python, _MACHINE, json.dumps(_SYSCTLS), f"machine{i}"]
        machines.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True))
    for i, machine in enumerate(machines):
        if machine.stdout is not None and (line := machine.stdout.readline()) != "ready\n":
            raise EmulationError(f"machine {i} did not start: {line}{machine.stdout.read()}")
    links, forwarding = _switch([machine.pid for machine in machines])
    call([tool("ip"), "-batch", "-"], links)
    call([tool("bridge"), "-batch", "-"], forwarding)
    for i, machine in enumerate(machines):
        enter = [tool("nsenter"), f"--net=/proc/{machine.pid}/ns/net"]
        setup = ["link set lo up", f"link set eth0 up gso_max_size {gso(spec.inter_rate_bps or 0)}"]
        setup += [f"addr add {_address(i)}/24 dev eth0"]
        setup += [f"neigh add {_address(j)} lladdr {_mac(j)} dev eth0" for j in range(spec.num_machines) if j != i]
        call([*enter, tool("ip"), "-batch", "-"], setup)
        qdisc = [tool("tc"), "qdisc", "add", "root", "dev"]
        if spec.inter_rate_bps is not None:
            call([*enter, *shaper("add", spec.inter_rate_bps)])
        if spec.inter_delay_s:
            try:  # at the switch's end; at the sender's, TCP would count delayed packets as not yet sent
                netem = ["netem", "delay", f"{spec.inter_delay_s * 1e6:.0f}us", "limit", "10000000"]
                call([*qdisc, f"up{i}", *netem])
            except EmulationError as error:
                raise EmulationError(
                    f"--inter-delay needs the kernel module sch_netem, which is missing here ({error}). As "
                    "root: modprobe sch_netem; it is in linux-image-* on Debian and in "
                    "linux-modules-extra-* on Ubuntu. Without --inter-delay the cluster works here"
                ) from None
    return machines


def _address(machine: int) -> str:
    return f"10.77.0.{machine + 1}"


def _mac(machine: int) -> str:
    return f"02:4d:00:00:00:{machine + 1:02x}"


def _switch(pids: Sequence[int]) -> tuple[list[str], list[str]]:
    """Commands for ``ip -batch`` and for ``bridge -batch`` that link the machines with processes ``pids``."""
    links, forwarding = [], []
    no_flood = "type bridge_slave learning off flood off mcast_flood off bcast_flood off"
    for i, pid in enumerate(pids):
        links += [f"link add br{i} mtu {_MTU} type bridge stp_state 0 mcast_snooping 0", f"link set br{i} up"]
        links += [f"link add up{i} mtu {_MTU} type veth peer name eth0 mtu {_MTU} address {_mac(i)} netns {pid}"]
        links += [f"link add x{i}-{j} mtu {_MTU} type veth peer name x{j}-{i} mtu {_MTU}" for j in range(i)]
    for i in range(len(pids)):
        for j in range(len(pids)):
            port = f"up{i}" if i == j else f"x{i}-{j}"
            links += [f"link set {port} up master br{i}", f"link set {port} {no_flood}"]
            forwarding += [f"fdb add {_mac(j)} dev {port} master static"]
    return links, forwarding


class _Ranks:
    """The ranks of one run; the constructor starts them."""

    def __init__(self, job: Mapping[str, Any], spec: ClusterSpec, machines: list[subprocess.Popen[str]]) -> None:
        self.status = 0
        self.failures: list[RankFailure] = []
        self._timeout_s: float | None = job["timeout_s"]
        self._grace_s: float = job["grace_s"]
        self._ranks_per_machine = spec.ranks_per_machine
        self._printing = threading.Lock()
        self._readers: list[threading.Thread] = []
        self._running: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}  # by process id: rank and process
        pipe = subprocess.PIPE if job["prefix"] else None
        for rank in range(spec.world_size):
            machine, local = divmod(rank, spec.ranks_per_machine)
            variables: dict[str, str] = {
                "RANK": f"{rank}", "ROLE_RANK": f"{rank}", "LOCAL_RANK": f"{local}", "GROUP_RANK": f"{machine}",
                "WORLD_SIZE": f"{spec.world_size}", "ROLE_WORLD_SIZE": f"{spec.world_size}", "ROLE_NAME": "default",
                "LOCAL_WORLD_SIZE": f"{spec.ranks_per_machine}", "GROUP_WORLD_SIZE": f"{spec.num_machines}",
                "MASTER_ADDR": _address(0), "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "emulated",
                "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
                "GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0",
            } | job["env"]  # fmt: skip
            enter = [f"--{kind}=/proc/{machines[machine].pid}/ns/{kind}" for kind in ("net", "uts")]
            command = [tool("nsenter"), *enter, tool("env"), *map("=".join, variables.items()), *job["argv"]]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
            self._running[process.pid] = rank, process
            for source, sink in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
                if source is not None:
                    prefix = f"[machine{machine} rank{rank}] ".encode()
                    self._readers.append(threading.Thread(target=self._copy, args=(source, sink, prefix), daemon=True))
                    self._readers[-1].start()

    def _copy(self, source: IO[bytes], sink: BinaryIO, prefix: bytes) -> None:
        for line in iter(source.readline, b""):
            with self._printing:
                sink.write(prefix + line.removesuffix(b"\n") + b"\n")
                sink.flush()

    def wait(self, lifeline: socket.socket, wake: socket.socket) -> None:
        """Wait for every rank. Stop all ranks after the time-out, a failure and its grace period, or a signal."""
        limit = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        reason, status, stopping = f"the time-out of {self._timeout_s} s has passed", 124, False
        while True:
            failed_before = bool(self.failures)
            self._reap(f": stopped by the launcher because {reason}" if stopping else "")
            if not self._running:
                break
            if self.failures and not failed_before and not stopping:
                limit, reason = time.monotonic() + self._grace_s, f"another rank failed {self._grace_s:g} s ago"
                self._print(f"the other ranks have {self._grace_s:g} s to exit")
            remaining_s = None if limit is None else max(0.0, limit - time.monotonic())
            ready = select.select([lifeline, wake], [], [], remaining_s)[0]
            if lifeline in ready and not lifeline.recv(16):
                raise SystemExit(1)  # emulate.run has exited; the kernel kills the ranks
            received = wake.recv(4096) if wake in ready else b""
            if not stopping and (lifeline in ready or {signal.SIGINT, signal.SIGTERM} & {*received}):
                limit, reason, status = time.monotonic(), "the launcher was stopped", 130
            if limit is not None and time.monotonic() >= limit:
                if not stopping:
                    self.status = self.status or status
                    self._print(f"stopping rank(s) {sorted(rank for rank, _ in self._running.values())}: {reason}")
                for _, process in self._running.values():
                    process.send_signal(signal.SIGKILL if stopping else signal.SIGTERM)
                limit, stopping = time.monotonic() + STOP_S, True
        limit = time.monotonic() + 1.0  # a process that a rank left behind may keep the pipe open
        for reader in self._readers:
            reader.join(max(0.0, limit - time.monotonic()))

    def _reap(self, suffix: str) -> None:
        """Collect ended children, including orphans of ranks, which process 1 inherits."""
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid not in self._running:
                os.waitpid(ended.si_pid, 0)
                continue
            rank, process = self._running.pop(ended.si_pid)
            if code := process.wait():
                name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
                what = f"exited with status {code}" if code > 0 else f"was killed by {name}"
                failure = RankFailure(rank=rank, machine=rank // self._ranks_per_machine, what=what + suffix)
                self.failures.append(failure)
                self.status = self.status or (code if code > 0 else 128 - code)
                if not suffix:
                    self._print(f"rank {rank} (machine {failure.machine}) {what}")

    def _print(self, text: str) -> None:
        with self._printing:
            print(f"sf-xfuser cluster: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as end:
        _hold(end, json.loads(sys.argv[2]))
