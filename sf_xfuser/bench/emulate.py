"""An emulated cluster: N machines with M ranks each on one computer, with shaped links between the machines.

Everything lives in private kernel namespaces. ``run`` starts a *holder* (``namespaces``) through ``unshare``: process 1
of a new PID namespace. Its network namespace is the switch. Each machine is a network and a host name namespace. Each
of ``run`` and the holder has one end of a socket (the lifeline), so the holder ends when ``run``'s process ends. The
kernel then kills every rank and removes every interface. The host's network is never changed.

Machine ``i`` has ``eth0`` (10.77.0.{i+1}), and its other end ``up{i}`` is on bridge ``br{i}`` of the switch. A
pair ``x{i}-{j}`` / ``x{j}-{i}`` joins the bridges of machines ``i`` and ``j``. Addresses are static and nothing floods,
so the bytes sent through ``x{i}-{j}`` are exactly those from machine ``i`` to machine ``j``. ``eth0`` sends at
``ClusterSpec.inter_rate_bps``. Traffic inside a machine uses the loopback interface and is not shaped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sf_xfuser.config import environment, parse_grid

STOP_S = 5.0  # from SIGTERM to SIGKILL
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "bridge": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}


class EmulationError(RuntimeError):
    """The emulated cluster cannot be built here. The message contains the failed command and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """N machines with M ranks each. Raises ValueError for invalid values.

    ``inter_rate_bps``: total bits per second that a machine can send (None: not shaped).
    ``inter_delay_s``: one-way delay between machines.
    """

    num_machines: int
    ranks_per_machine: int
    inter_rate_bps: int | None = None
    inter_delay_s: float = 0.0

    def __post_init__(self) -> None:
        if self.num_machines < 1 or self.ranks_per_machine < 1 or self.world_size > 64:
            raise ValueError(
                f"a cluster has 1 to 64 ranks and at least 1 per machine, got {self.num_machines} machine(s) x "
                f"{self.ranks_per_machine} rank(s)"
            )
        if self.inter_rate_bps is not None and not 64_000 <= self.inter_rate_bps <= 100_000_000_000:
            raise ValueError(f"the rate between machines must be 64kbit to 100gbit, got {self.inter_rate_bps} bit/s")
        if not 0 <= self.inter_delay_s <= 10:
            raise ValueError(f"the delay between machines must be 0s to 10s, got {self.inter_delay_s} s")

    @classmethod
    def parse(cls, cluster: str, inter_rate: str | None = None, inter_delay: str | None = None) -> ClusterSpec:
        """Parse texts such as ``"4x2"``, ``"2.5gbit"`` (per second) and ``"0.2ms"``."""
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

    @property
    def unshaped(self) -> str:
        """What an unlimited rate between machines means for the times; empty if there is a limit."""
        if self.inter_rate_bps is not None or self.num_machines == 1:
            return ""
        return (
            "no --inter-rate: the links between machines are not shaped, so a transfer takes as long as a copy in "
            "memory, and times do not show what a network costs"
        )

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
    """A rank that did not exit with status 0. ``what``: its exit status or signal, as text."""

    rank: int
    machine: int
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of a run.

    ``status``: 0, the status of the first rank that failed (128 + signal), or 124 after the time-out. ``failures``: in
    the order in which they happened. ``bytes_between[i][j]``: bytes that machine i sent to machine j on the link.
    """

    status: int
    failures: tuple[RankFailure, ...] = ()
    bytes_between: tuple[tuple[int, ...], ...] = ()


def unavailable() -> str | None:
    """The reason why this computer cannot emulate a cluster, with a remedy; None if it can."""
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
    """Run ``argv`` on every rank of an emulated cluster and wait. No process outlives the call.

    Ranks inherit this process's environment and working directory, and get ``env`` and torchrun's variables (RANK,
    LOCAL_RANK, WORLD_SIZE, GROUP_RANK, MASTER_ADDR, ...). The host name of machine ``i`` is ``machine{i}``. Standard
    input is empty. ``output`` receives standard output and error of all ranks (None: this process's). ``prefix`` starts
    each line with machine and rank.

    The first rank that fails is reported on stderr. The other ranks have ``grace_s`` seconds to exit, then get SIGTERM
    and SIGKILL; after ``timeout_s`` all ranks get both. Raises EmulationError before any rank starts if the cluster
    cannot be built.
    """
    if not argv:
        raise ValueError("no command to run on the ranks; append one, for instance: -- python train.py")
    omp = {} if environment(["OMP_NUM_THREADS"]) else {"OMP_NUM_THREADS": "1"}  # as torchrun does
    job: dict[str, Any] = {"spec": asdict(spec), "argv": list(argv), "env": omp | dict(env or {})}
    job |= {"timeout_s": timeout_s, "grace_s": grace_s, "prefix": prefix}
    namespaces = _namespaces()
    lifeline, holders_end = socket.socketpair()
    with lifeline:
        with holders_end:
            program = [sys.executable, "-m", "sf_xfuser.bench.namespaces", str(holders_end.fileno()), json.dumps(job)]
            holder = subprocess.Popen(
                [*namespaces, *program],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                pass_fds=(holders_end.fileno(),),
                start_new_session=True,  # Ctrl-C reaches only this process, which then stops the ranks in order
            )
        try:
            reply = json.loads(_receive_all(lifeline) or "null")
        except BaseException:
            with suppress(OSError):
                lifeline.sendall(b"stop")
                lifeline.settimeout(STOP_S + 5)
                _receive_all(lifeline)
            raise
        finally:
            with suppress(subprocess.TimeoutExpired):
                holder.wait(timeout=1)
            holder.kill()  # kills unshare, and with it the holder and every rank
            holder.wait()
    if reply is None:
        raise EmulationError(f"the emulated cluster was killed (status {holder.returncode})")
    if "error" in reply:
        raise EmulationError(reply["error"])
    return Outcome(
        status=reply["status"],
        failures=tuple(RankFailure(**failure) for failure in reply["failures"]),
        bytes_between=tuple(map(tuple, reply["bytes_between"])),
    )


def _receive_all(end: socket.socket) -> bytes:
    return b"".join(iter(lambda: end.recv(65536), b""))


def tool(name: str) -> str:
    """The path of an executable. Also searches the sbin folders, which Debian users do not have in PATH."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if path is None:
        raise EmulationError(
            f"an emulated cluster needs the program {name!r}, which is not installed. On Debian and Ubuntu: "
            f"apt-get install {_TOOLS.get(name, 'coreutils')}"
        )
    return path


def _namespaces() -> list[str]:
    """The ``unshare`` command that works here. Raises EmulationError with the output of the commands that fail."""
    tools = {name: tool(name) for name in _TOOLS}
    plain = [tools["unshare"], "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with_user = [*plain, "--user", "--map-root-user"]
    errors = ""
    for command in [plain, with_user] if os.geteuid() == 0 else [with_user]:
        probe = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=60)
        if probe.returncode == 0:
            return command
        errors += f"\n  {' '.join(command)}: {probe.stderr.strip() or f'status {probe.returncode}'}"
    raise EmulationError(
        f"an emulated cluster needs private namespaces, which this kernel or container does not allow:{errors}\n"
        "Do one of: run as root; allow user namespaces (sysctl -w kernel.unprivileged_userns_clone=1, on Ubuntu sysctl "
        "-w kernel.apparmor_restrict_unprivileged_userns=0); start the container with --privileged"
    )


# --- links ------------------------------------------------------------------------------------------------------------


def call(command: list[str], batch: Sequence[str] = ()) -> None:
    result = subprocess.run(command, input="\n".join(batch), capture_output=True, text=True, timeout=120)
    if result.returncode != 0:
        raise EmulationError(f"{' '.join(command)} failed: {(result.stderr or result.stdout).strip()}")


def _burst(rate_bps: int) -> int:
    """Bytes that a link may send in one burst after a pause: 1 ms at full rate."""
    return max(32 * 1024, rate_bps // 8 // 1000)


def gso(rate_bps: int) -> int:
    """Largest segment of a link. It fits into a burst, so the shaper does not split it."""
    return min(65536, _burst(rate_bps) * 7 // 8)


def shaper(verb: str, rate_bps: int) -> list[str]:
    """The ``tc`` command for a machine's link. The limit exceeds all its send buffers, so no packet is dropped."""
    tbf = ["tbf", "rate", f"{rate_bps}bit", "burst", str(_burst(rate_bps)), "limit", str(2**30)]
    return [tool("tc"), "qdisc", verb, "dev", "eth0", "root", *tbf]


# --- for ranks --------------------------------------------------------------------------------------------------------


def read_matrix(num_machines: int) -> list[list[int]]:
    """Bytes that machine i has sent to machine j so far, as ``[i][j]``. For ranks; raises EmulationError elsewhere."""
    return counters("/proc/1/net/dev", num_machines)  # process 1 is the holder; its network is the switch


def shape(rate_bps: int) -> None:
    """Set the rate of this machine, in bits per second. One rank per machine may call it, in a cluster that started
    with a rate; raises EmulationError elsewhere."""
    if "up0:" not in Path("/proc/1/net/dev").read_text():
        raise EmulationError("this process is not a rank of an emulated cluster, so it cannot set the rate of a link")
    set_gso = [tool("ip"), "link", "set", "eth0", "gso_max_size", str(gso(rate_bps))]
    call(shaper("change", rate_bps))
    call(set_gso)


def cut(machine: int) -> None:
    """Drop all traffic between ``machine`` and the others. Its interface stays up, so no program is notified. For
    ranks; raises EmulationError elsewhere."""
    _set_bridge(machine, "down")


def restore(machine: int) -> None:
    """End :func:`cut`."""
    _set_bridge(machine, "up")


def _set_bridge(machine: int, state: str) -> None:
    if f"br{machine}:" not in Path("/proc/1/net/dev").read_text():
        raise EmulationError(f"this process is not a rank of an emulated cluster with a machine {machine}")
    call([tool("nsenter"), "--net=/proc/1/ns/net", tool("ip"), "link", "set", f"br{machine}", state])


def counters(path: str, num_machines: int) -> list[list[int]]:
    lines = (line.split(":") for line in Path(path).read_text().splitlines()[2:])
    sent = {name.strip(): int(numbers.split()[8]) for name, numbers in lines}
    machines = range(num_machines)
    if any(f"up{i}" not in sent for i in machines) or f"up{num_machines}" in sent:
        raise EmulationError(f"this process is not a rank of an emulated cluster of {num_machines} machine(s)")
    return [[0 if i == j else sent[f"x{i}-{j}"] for j in machines] for i in machines]
