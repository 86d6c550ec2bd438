"""The emulated cluster on the real kernel: environment of the ranks, traffic counters, and cleanup."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sf_xfuser.bench import emulate
from sf_xfuser.bench.emulate import ClusterSpec, EmulationError

REASON = emulate.unavailable()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=REASON or "")

COMMAND = """
import sys
from sf_xfuser.cli import main
status = main(["cluster", "run", *sys.argv[1:]])
assert "torch" not in sys.modules, "the emulated cluster works without PyTorch"
sys.exit(status)
"""
# Every rank writes its environment to a file, leaves a process behind, and connects to rank 0.
SEE = """
import json, os, socket, subprocess, sys, time
from pathlib import Path
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", sys.argv[1]], start_new_session=True)
peers = []
if rank == 0:
    with socket.create_server(address) as server:
        for _ in range(world - 1):
            peer, (host, _) = server.accept()
            peers.append([host, int(peer.recv(16))])
else:
    while True:
        try:
            peer = socket.create_connection(address, timeout=10)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    peer.sendall(b"%d" % rank)
seen = {
    "env": dict(os.environ), "hostname": socket.gethostname(), "peers": sorted(peers), "cwd": os.getcwd(),
    "interfaces": [name for _, name in socket.if_nameindex()], "stdin": sys.stdin.read(),
    "named": socket.gethostbyname("machine1"),
    "congestion": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
    "uid_map": Path("/proc/self/uid_map").read_text().split(),
}
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(seen))
print("seen by", rank, flush=True)
"""
# Arguments FOLDER FROM TO BYTES: one transfer between two ranks, timed by the sender until the receiver has it all.
TRANSFER = """
import json, os, socket, sys, time
from pathlib import Path
from sf_xfuser.bench.emulate import read_matrix, shape
folder, source, target, size = sys.argv[1], *map(int, sys.argv[2:])
rank, machines = int(os.environ["RANK"]), int(os.environ["GROUP_WORLD_SIZE"])
address = (f"10.77.0.{target // int(os.environ['LOCAL_WORLD_SIZE']) + 1}", 7000)
if rank == target:
    with socket.create_server(address) as server:
        peer, _ = server.accept()
    while size:
        size -= len(peer.recv(1 << 20))
    peer.sendall(b"x")
elif rank == source:
    while True:
        try:
            peer = socket.create_connection(address, timeout=30)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    if "NEW_RATE" in os.environ:
        shape(int(os.environ["NEW_RATE"]))
    before, start = read_matrix(machines), time.perf_counter()
    peer.sendall(bytes(size))
    peer.recv(1)
    seconds, after = time.perf_counter() - start, read_matrix(machines)
    moved = [[b - a for a, b in zip(*rows)] for rows in zip(before, after)]
    Path(folder, "transfer.json").write_text(json.dumps({"seconds": seconds, "moved": moved}))
"""
# Writes a file per rank, then sleeps.
WAIT = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in sys.argv else signal.SIG_DFL)
Path(sys.argv[1], "up" + os.environ["RANK"]).touch()
time.sleep(1000)
"""
ALL_REDUCE = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from sf_xfuser.layout.topology import probe
dist.init_process_group("gloo")
value = torch.full((250_000,), float(dist.get_rank() + 1))
dist.all_reduce(value)
assert value.eq(3).all()
machines = [None, None]
dist.all_gather_object(machines, probe().machine)
assert len(set(machines)) == 2, machines
dist.destroy_process_group()
Path(sys.argv[1], "done" + os.environ["RANK"]).touch()
"""


def spec(cluster: str = "2x1", rate: str | None = None, delay: str | None = None) -> ClusterSpec:
    return ClusterSpec.parse(cluster, rate, delay)


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", script, *map(str, arguments)]


def descendants(pid: int) -> set[int]:
    """Every process below ``pid``, as the host sees it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def naming(text: str) -> list[str]:
    """Command lines of the host's processes that name ``text``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if text in (line := path.read_text().replace("\0", " ")):
                found.append(line)
    return found


def wait_for(condition, what: str, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.02)
    return value


def host_interfaces() -> set[str]:
    """The host's interfaces with names of a cluster's interfaces."""
    return {name for _, name in socket.if_nameindex() if re.fullmatch(r"(up|br)\d+|x\d+-\d+", name)}


@pytest.fixture
def clean(tmp_path):
    """No interface on the host, no child process and no process with the test's folder as argument is left."""
    network, processes = host_interfaces(), descendants(os.getpid())
    yield
    assert host_interfaces() == network
    wait_for(lambda: descendants(os.getpid()) <= processes, "the cluster's processes end", 20)
    wait_for(lambda: not naming(str(tmp_path)), "the ranks' own processes end", 20)


# --- what a cluster is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "machines", "ranks", "rate", "delay", "text"),
    [
        (("4x2",), 4, 2, None, 0.0, "4x2"),
        (("4X2", "100mbit"), 4, 2, 100_000_000, 0.0, "4x2 at 100 Mbit/s"),
        (("1x1", "2.5gbit", "0.2ms"), 1, 1, 2_500_000_000, 2e-4, "1x1 at 2500 Mbit/s with 0.2 ms delay"),
        (("64x1", "500kbit", "50us"), 64, 1, 500_000, 5e-5, "64x1 at 0.5 Mbit/s with 0.05 ms delay"),
        (("2x3", "1Gbit", "1s"), 2, 3, 1_000_000_000, 1.0, "2x3 at 1000 Mbit/s with 1000 ms delay"),
    ],
)
def test_parsing(arguments, machines, ranks, rate, delay, text):
    parsed = ClusterSpec.parse(*arguments)
    assert (parsed.num_machines, parsed.ranks_per_machine, parsed.inter_rate_bps) == (machines, ranks, rate)
    assert parsed.inter_delay_s == pytest.approx(delay)
    assert parsed.world_size == machines * ranks
    assert str(parsed) == text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("4",), ["--cluster", "4x2", "'4'"]),
        (("0x2",), ["at least 1", "0 machine(s)"]),
        (("33x2",), ["1 to 64 ranks", "33 machine(s)"]),
        (("-1x2",), ["--cluster", "'-1x2'"]),
        (("2x2", "100"), ["--inter-rate", "mbit", "'100'"]),
        (("2x2", "100MB"), ["--inter-rate", "mbit", "'100MB'"]),
        (("2x2", "1kbit"), ["64kbit to 100gbit", "1000"]),
        (("2x2", "200gbit"), ["64kbit to 100gbit"]),
        (("2x2", None, "1"), ["--inter-delay", "ms", "'1'"]),
        (("2x2", None, "11s"), ["0s to 10s", "11"]),
    ],
)
def test_invalid_values_are_refused(arguments, words):
    with pytest.raises(ValueError) as caught:
        ClusterSpec.parse(*arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_missing_program_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(emulate.shutil, "which", lambda name, path=None: None if name == "tc" else f"/bin/{name}")
    assert "'tc'" in emulate.unavailable() and "iproute2" in emulate.unavailable()


def test_the_error_contains_the_tried_commands_and_the_remedy(monkeypatch, tmp_path):
    fake = tmp_path / "unshare"
    fake.write_text("#!/bin/sh\necho unshare failed: Operation not permitted >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(emulate.shutil, "which", lambda name, path=None: str(fake) if name == "unshare" else name)
    for uid, tried in ((0, 2), (1000, 1)):  # root tries without a user namespace first
        monkeypatch.setattr(emulate.os, "geteuid", lambda uid=uid: uid)
        reason = emulate.unavailable()
        assert reason.count("Operation not permitted") == tried
        assert all(word in reason for word in ("--user", "run as root", "apparmor_restrict", "--privileged"))


def test_counters_outside_a_cluster():
    with pytest.raises(EmulationError, match="not a rank of an emulated cluster of 2"):
        emulate.read_matrix(2)


def test_a_command_is_needed():
    with pytest.raises(ValueError, match="no command to run"):
        emulate.run(spec(), [])


# --- what ranks see -------------------------------------------------------------------------------------------------


@needs_namespaces
def test_ranks_see_machines(clean, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    outcome = emulate.run(spec("2x2", "100mbit"), python(SEE, tmp_path), env={"FOO": "a b=c"}, prefix=True)
    assert (outcome.status, outcome.failures) == (0, ())
    lines = sorted(capfd.readouterr().out.splitlines())
    assert lines == [f"[machine{rank // 2} rank{rank}] seen by {rank}" for rank in range(4)]
    for rank in range(4):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        machine, local = divmod(rank, 2)
        expected = {
            "RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": machine,
            "GROUP_WORLD_SIZE": 2, "ROLE_RANK": rank, "ROLE_WORLD_SIZE": 4, "ROLE_NAME": "default",
            "MASTER_ADDR": "10.77.0.1", "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0,
            "OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "eth0", "FOO": "a b=c", "PATH": os.environ["PATH"],
        }  # fmt: skip
        assert {name: seen["env"].get(name) for name in expected} == {k: str(v) for k, v in expected.items()}
        assert {"MASTER_PORT", "TORCHELASTIC_RUN_ID"} <= set(seen["env"])
        assert seen["hostname"] == f"machine{machine}" and seen["interfaces"] == ["lo", "eth0"]
        assert seen["named"] == "10.77.0.2"
        assert seen["cwd"] == os.getcwd() and seen["stdin"] == "" and seen["congestion"] == "reno"
        if rank == 0:  # ranks connect from the address of their machine
            assert seen["peers"] == [["10.77.0.1", 1], ["10.77.0.2", 2], ["10.77.0.2", 3]]


@needs_namespaces
def test_omp_num_threads_of_the_user_is_kept(clean, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert emulate.run(spec("1x1"), ["sh", "-c", "echo $OMP_NUM_THREADS"]).status == 0
    assert capfd.readouterr().out == "7\n"


@needs_namespaces
def test_bytes_and_rate_between_machines(clean, tmp_path):
    size, rate = 2_000_000, 40_000_000
    outcome = emulate.run(spec("3x2", "40mbit"), python(TRANSFER, tmp_path, 1, 4, size))  # machine 0 -> machine 2
    assert outcome.status == 0
    seen = json.loads((tmp_path / "transfer.json").read_text())
    for matrix in (seen["moved"], outcome.bytes_between):
        assert size <= matrix[0][2] < 1.02 * size
        assert matrix[2][0] < 0.02 * size  # acknowledgements
        assert all(matrix[i][j] == 0 for i in range(3) for j in range(3) if {i, j} != {0, 2})
    assert seen["seconds"] > 0.8 * size * 8 / rate


@needs_namespaces
def test_a_rank_changes_the_rate_of_its_machine(clean, tmp_path):
    size, rate = 1_000_000, 20_000_000
    outcome = emulate.run(spec("2x1", "10gbit"), python(TRANSFER, tmp_path, 0, 1, size), env={"NEW_RATE": str(rate)})
    assert outcome.status == 0
    assert json.loads((tmp_path / "transfer.json").read_text())["seconds"] > 0.8 * size * 8 / rate


@needs_namespaces
def test_traffic_inside_a_machine_passes_no_link(clean, tmp_path):
    outcome = emulate.run(spec("2x2", "64kbit"), python(TRANSFER, tmp_path, 2, 3, 20_000_000), timeout_s=60)
    assert outcome.status == 0  # shaped, it would take 40 minutes
    assert outcome.bytes_between == ((0, 0), (0, 0))


@needs_namespaces
def test_an_unprivileged_user_gets_a_user_namespace(clean, tmp_path, monkeypatch):
    monkeypatch.setattr(emulate.os, "geteuid", lambda: 1000)
    if reason := emulate.unavailable():
        pytest.skip(reason)
    assert emulate.run(spec("2x1", "10mbit"), python(SEE, tmp_path)).status == 0
    seen = json.loads((tmp_path / "0.json").read_text())
    assert seen["uid_map"] == ["0", str(os.getuid()), "1"] and seen["hostname"] == "machine0"


@needs_namespaces
def test_gloo_crosses_machines(clean, tmp_path):
    outcome = emulate.run(spec("2x1", "1gbit"), python(ALL_REDUCE, tmp_path), timeout_s=60)
    assert outcome.status == 0
    assert {path.name for path in tmp_path.iterdir()} == {"done0", "done1"}
    assert min(outcome.bytes_between[0][1], outcome.bytes_between[1][0]) >= 1_000_000


# --- how it ends ----------------------------------------------------------------------------------------------------


@needs_namespaces
def test_a_killed_rank_is_reported_and_the_others_are_ended(clean, tmp_path, capfd):
    argv = ["sh", "-c", '[ "$RANK" = 2 ] && kill -9 $$; exec sleep 1000']
    outcome = emulate.run(spec("2x2"), argv, grace_s=0.5)
    assert outcome.status == 128 + signal.SIGKILL
    first, *others = outcome.failures
    assert (first.rank, first.machine, first.what) == (2, 1, "was killed by SIGKILL")
    assert sorted(failure.rank for failure in others) == [0, 1, 3]
    assert all("SIGTERM" in failure.what and "stopped by the launcher" in failure.what for failure in others)
    error = capfd.readouterr().err
    assert "rank 2 (machine 1) was killed by SIGKILL" in error and "stopping rank(s) [0, 1, 3]" in error


@needs_namespaces
def test_the_first_status_wins_and_grace_is_used(clean, tmp_path):
    argv = ["sh", "-c", '[ "$RANK" = 1 ] && exit 7; sleep 0.5; exit 3']
    outcome = emulate.run(spec("2x1"), argv, grace_s=30)
    assert outcome.status == 7
    assert [(failure.rank, failure.what) for failure in outcome.failures] == [
        (1, "exited with status 7"),
        (0, "exited with status 3"),
    ]


@needs_namespaces
def test_the_time_out_ends_ranks_that_ignore_sigterm(clean, tmp_path, capfd):
    outcome = emulate.run(spec("1x2"), python(WAIT, tmp_path, "stubborn"), timeout_s=1.5)
    assert outcome.status == 124
    assert ["SIGKILL" in failure.what for failure in outcome.failures] == [True, True]
    assert "the time-out of 1.5 s has passed" in capfd.readouterr().err


@needs_namespaces
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["ctrl-c", "sigterm", "kill-9"],
)
def test_nothing_outlives_the_driver(clean, tmp_path, number, status):
    driver = subprocess.Popen(
        python(COMMAND, "--cluster", "2x2", "--inter-rate", "100mbit", "--", *python(WAIT, tmp_path)),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(list(tmp_path.glob("up*"))) == 4, "ranks start")
        below = descendants(driver.pid)
        assert len(below) == 2 + 2 + 4  # unshare and the holder, machines, ranks
        if number == signal.SIGINT:
            os.killpg(driver.pid, number)  # as a terminal does: to all of the foreground group
        else:
            driver.send_signal(number)
        error = driver.communicate(timeout=60)[1]
        assert driver.returncode == status
        assert "Traceback" not in error
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), "the cluster's processes end", 20)
    finally:
        driver.kill()


@needs_namespaces
@pytest.mark.parametrize("who", ["holder", "unshare"])
def test_an_end_of_the_holder_is_an_error(clean, tmp_path, who):
    driver = subprocess.Popen(
        python(COMMAND, "--cluster", "1x1", "--", *python(WAIT, tmp_path)), stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: (tmp_path / "up0").exists(), "the rank starts")
        below = descendants(driver.pid)
        first = min(below)  # unshare; its child is the holder
        assert len(descendants(first)) == 3
        os.kill(first if who == "unshare" else min(descendants(first)), signal.SIGKILL)
        assert "the emulated cluster was killed" in driver.communicate(timeout=60)[1]
        assert driver.returncode == 2
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), "the cluster's processes end", 20)
    finally:
        driver.kill()


@needs_namespaces
def test_a_failure_while_building_starts_no_rank(clean, tmp_path, monkeypatch):
    fake = tmp_path / "bridge"
    fake.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(EmulationError, match="bridge -batch - failed: no such luck"):
        emulate.run(spec(), python(WAIT, tmp_path), timeout_s=10)
    assert not list(tmp_path.glob("up*"))


@needs_namespaces
def test_a_delay_is_applied_or_refused_before_ranks_start(clean, tmp_path):
    try:
        outcome = emulate.run(spec("2x1", "1gbit", "50ms"), python(TRANSFER, tmp_path, 0, 1, 1000))
    except EmulationError as error:
        assert "sch_netem" in str(error) and "modprobe" in str(error)
        assert not list(tmp_path.iterdir())
    else:
        assert outcome.status == 0
        assert json.loads((tmp_path / "transfer.json").read_text())["seconds"] > 0.1  # there and back


@needs_namespaces
def test_the_command(clean, tmp_path):
    file = tmp_path / "outcome.json"
    arguments = ["--cluster", "2x1", "--inter-rate", "1gbit", "--json", file, "--"]
    done = subprocess.run(
        python(COMMAND, *arguments, *python(TRANSFER, tmp_path, 0, 1, 1_500_000)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    written = json.loads(file.read_text())
    assert "2x1 at 1000 Mbit/s" in done.stderr
    assert f"{written['bytes_between'][0][1] / 1e6:.2f}" in done.stderr  # MB from machine 0
    assert written["spec"]["inter_rate_bps"] == 1_000_000_000 and written["status"] == 0
    assert 1_500_000 <= written["bytes_between"][0][1] < 1.02 * 1_500_000


def test_the_command_explains_a_wrong_cluster():
    done = subprocess.run(python(COMMAND, "--cluster", "2", "true"), capture_output=True, text=True)
    assert done.returncode == 2 and "for instance 4x2" in done.stderr and "Traceback" not in done.stderr
