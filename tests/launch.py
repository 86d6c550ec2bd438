"""Starts real ranks for a test and reports what they printed when they fail."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RANKS = Path(__file__).parent / "ranks"
KILLED = 137  # exit status of a launch that `Launch.kill` ended


@dataclass(frozen=True)
class Finished:
    returncode: int
    output: str


def torchrun(
    script: str | Path, *arguments: object, nproc: int, timeout: float = 180, env: dict[str, str] | None = None,
    expect_failure: bool = False, torchrun_args: tuple[str, ...] = (), warm: bool = True,
) -> Finished:  # fmt: skip
    """Run ``tests/ranks/<script>`` on ``nproc`` ranks. Asserts success (or failure) and that it ends by itself.

    ``warm``: ranks are forked from a process that has the libraries (warm.py). By torchrun itself, in fresh
    interpreters, where that is False, arguments for torchrun are given, or there are GPUs, which CUDA opens in one
    process and not in its forks.
    """
    path, given = str(RANKS / script), [str(argument) for argument in arguments]
    if not warm or torchrun_args or torch.cuda.is_available():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
        return run([*command, *torchrun_args, path, *given], timeout=timeout, env=env, expect_failure=expect_failure)
    with tempfile.TemporaryFile("w+") as output:
        launch = Launch(path, given, nproc, environment(env), output.fileno())
        alarm = threading.Timer(timeout, launch.kill)
        alarm.start()
        status = launch.wait()
        alarm.cancel()
        output.seek(0)
        finished = Finished(status, output.read())
    command = [f"{nproc} ranks of", path, *given]
    assert status != KILLED, (
        f"killed, or still running after {timeout} s: {' '.join(command)}\n{finished.output[-8000:]}"
    )
    return checked(finished, command, expect_failure)


def on_cluster(
    script: str | Path, *arguments: object, cluster: str = "2x2", timeout: float = 240,
    env: dict[str, str] | None = None, expect_failure: bool = False,
) -> Finished:  # fmt: skip
    """Run ``tests/ranks/<script>`` on an emulated cluster, where calls are staged. Asserts as ``torchrun`` does."""
    command = [sys.executable, "-m", "sf_xfuser.cli", "cluster", "run", "--cluster", cluster, "--timeout", f"{timeout}"]
    command += ["--", sys.executable, str(RANKS / script), *map(str, arguments)]
    return run(command, timeout=timeout + 30, env=env, expect_failure=expect_failure)


class Launch:
    """``nproc`` ranks of a script, forked from the process of warm.py that this pytest shares."""

    def __init__(self, script: str, arguments: list[str], nproc: int, env: dict[str, str], output: int) -> None:
        status, theirs = os.pipe()
        request = {"argv": [script, *arguments], "nproc": nproc, "env": env, "cwd": os.getcwd()}
        socket.send_fds(_warm(), [json.dumps(request).encode()], [output, theirs])
        os.close(theirs)
        self._status = os.fdopen(status)
        agent = self._status.readline()
        if not agent:
            raise RuntimeError("the process that forks ranks has ended; what it wrote to stderr says why")
        self._agent = int(agent)

    def wait(self) -> int:
        """The exit status: 0, 1 after a rank failed, KILLED after ``kill``."""
        with self._status:
            return int(self._status.readline() or KILLED)

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # ranks are in their agent's session
            os.killpg(self._agent, signal.SIGKILL)


@functools.cache
def _warm() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(theirs.fileno())], pass_fds=[theirs.fileno()],
            env=environment({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}), cwd=RANKS.parents[1],
        )  # fmt: skip
    return ours  # closed with this process: then the other ends


def records(output: str) -> list[tuple[str, str, Any]]:
    """(case, rank, result) of every ``report`` of ``ranks/cases.py``."""
    return [tuple(json.JSONDecoder().raw_decode(part)[0]) for part in output.split("@report ")[1:]]


def reports(output: str, cases: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """case -> rank -> result. ``cases`` are present even if no rank reported them."""
    found: dict[str, dict[str, Any]] = {case: {} for case in cases}
    for case, rank, result in records(output):
        found.setdefault(case, {})[rank] = result
    return found


def check(case: str, found: Mapping[str, Mapping[str, str]], expected: Iterable[str]) -> None:
    """Assert that the text of rank i starts with a match of the i-th pattern."""
    for rank, pattern in enumerate(expected):
        got = found[case].get(str(rank), "no report")
        assert re.match(pattern, got, re.DOTALL), f"case {case}, rank {rank}\ngot:      {got}\nexpected: {pattern}"


def run(
    command: list[str], *, timeout: float = 180, env: dict[str, str] | None = None, expect_failure: bool = False
) -> Finished:
    """Run a command. Asserts success (or failure) and that it ends by itself."""
    return checked(finish(command, timeout=timeout, env=env), command, expect_failure)


def checked(finished: Finished, command: list[str], expect_failure: bool) -> Finished:
    failed = finished.returncode != 0
    assert failed == expect_failure, (
        f"exit status {finished.returncode} of {' '.join(command)}\n{finished.output[-8000:]}"
    )
    return finished


def environment(more: dict[str, str] | None) -> dict[str, str]:
    """That of programs that tests start."""
    merged = {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}
    merged.pop("TRITON_INTERPRET", None)  # conftest.py
    return merged


def finish(
    command: list[str], *, timeout: float, env: dict[str, str] | None = None, cwd: str | Path | None = None
) -> Finished:
    """Run a command, in its own session, so that a time-out can end all of its processes; AssertionError then."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(env), cwd=cwd,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # torchrun's ranks have sessions of their own: only the agent can end them, and it does on SIGTERM.
        process.terminate()
        try:
            output, _ = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s: {' '.join(command)}\n{output[-8000:]}") from None
    return Finished(process.returncode, output)
