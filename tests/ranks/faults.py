"""Kills or stops one of four ranks at a chosen moment. Prints the result of each scenario as a line of JSON.

    python tests/ranks/faults.py KIND:kill:RANK:WHERE:NTH ...    kill or stop
    python tests/ranks/faults.py fuzz:COUNT:SEED                 COUNT random kills

KIND: shm, tcp; over shm: ring (keys stay split), alltoall (yunchang's, instead of attention); mixed (shm inside
machines, TCP between them). WHERE: before attention (attend), before an access to shared memory (put, flag, wait,
read), or when a new, larger segment has a name (grow). The exit status is 1 if a rank hangs, a survivor does not fail
with the expected error, or something is left in /dev/shm.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from sf_xfuser import kernels
from sf_xfuser.config import TorusArgs
from sf_xfuser.integrations.yunchang.all_to_all import all_to_all_4d
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.transport.base import TransportError
from sf_xfuser.transport.cpu import segment, shm

segment.PREFIX = "sf-xfuser_faults-"  # distinct from other jobs on this host
WORLD = 4
TIMEOUT_S = {"kill": 2.0, "stop": 0.8}  # ranks notice at once that a process is gone
WHERE = ("put", "flag", "wait", "read")
POINTS = 9  # a rank of 2x2 puts 9 chunks in a call, and waits for as many
KINDS = ("shm", "ring", "alltoall", "mixed")


def mesh_of(kind: str, rank: int, timeout_s: float):
    transport = {"tcp": "tcp", "mixed": "auto"}.get(kind, "shm")
    args = TorusArgs(backend="torus", topology="2x2", transport=transport, timeout=timeout_s)
    if kind == "mixed":  # as between machines
        shm.identity = lambda: f"machine {rank // 2}"
    mesh = build_mesh([[0, 1, 2, 3]], args, heads=2 if kind == "ring" else 4)
    mesh.transport_reason = mesh.transport_reason or "fixed by the test"
    return mesh


def rank_main(rank: int, folder: Path, kind: str, action: str, victim: int, where: str, nth: int) -> int:
    """Make calls until one fails. If all ranks live, one of the next calls has to succeed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mesh = mesh_of(kind, rank, TIMEOUT_S[action])
    mesh.one_host = nth % 2 == 0  # unstaged or staged
    make = torch.Generator().manual_seed(rank)
    q, k, v = (torch.randn(1, mesh.layout.ulysses_degree, 16, 8, generator=make) for _ in range(3))

    remaining = [-1]  # visits of ``where`` until the fault

    def attend(*tensors):
        inject("attend")
        return kernels.sdpa_attend(*tensors)

    def call(times=1):
        inputs = [x.repeat(1, 1, times, 1) for x in (q, k, v)]
        if kind == "alltoall":
            return all_to_all_4d(inputs[0], 2, 1, mesh)
        counts = [16 * times] * WORLD
        return torus_attention(*inputs, mesh=mesh, attention=attend, tokens=(counts, counts))

    def inject(at: str) -> None:
        remaining[0] -= at == where and remaining[0] > 0
        if remaining[0] == 0:
            remaining[0] = -1
            (folder / "injected").touch()
            os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)

    wanted = call()
    if rank == victim:
        remaining[0] = nth + 1
        if mesh.window is not None:
            mesh.window.pause = inject
        create = segment.Segment.create
        segment.Segment.create = lambda *sizes: (create(*sizes), inject("grow"))[0]
    try:
        if where == "grow":
            call(times=64)
        for _ in range(200):
            assert torch.equal(call(), wanted)
        return 0  # no error
    except TransportError as error:
        injected_at = (folder / "injected").stat().st_mtime
        error_text = str(error)
        report = {"error": error_text, "after_s": time.time() - injected_at}
        (folder / f"{rank}.json").write_text(json.dumps(report))
    if action == "stop" and rank == victim and "is gone" in error_text:
        # It finished the call in which it was stopped and made the next one with the others, which have ended since.
        (folder / f"{rank}.json").write_text(json.dumps({**report, "next_call": "equal"}))
    elif action == "stop":
        for _ in range(3):  # a rank that is a call behind raises once more
            with contextlib.suppress(TransportError):
                assert torch.equal(call(), wanted)
                break
        else:
            return 4
        (folder / f"{rank}.json").write_text(json.dumps({**report, "next_call": "equal"}))
    return 3


def scenario(kind: str, action: str, victim: int, where: str, nth: int) -> dict:
    names = shared_names()
    with tempfile.TemporaryDirectory() as name:
        folder, children = Path(name), {}
        for rank in range(WORLD):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    status = rank_main(rank, folder, kind, action, victim, where, nth)
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            children[child] = rank
        victims = {rank: child for child, rank in children.items()}
        statuses: dict[int, int] = {}
        deadline = time.monotonic() + 60
        while children and time.monotonic() < deadline:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended:
                statuses[children.pop(ended)] = os.waitstatus_to_exitcode(status)
                continue
            others = [rank for rank in range(WORLD) if rank != victim]
            if (
                action == "stop"
                and victims[victim] in children
                and all((folder / f"{rank}.json").exists() for rank in others)
            ):
                os.kill(victims[victim], signal.SIGCONT)
            time.sleep(0.01)
        for child in children:  # they hang
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        errors = {rank: json.loads(p.read_text()) for rank in range(WORLD) if (p := folder / f"{rank}.json").exists()}
    return {
        "scenario": f"{kind}:{action}:{victim}:{where}:{nth}",
        "statuses": [statuses.get(rank, "hangs") for rank in range(WORLD)],
        "errors": [errors.get(rank) for rank in range(WORLD)],
        "left": sorted(shared_names() - names),
    }


def shared_names() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(segment.PREFIX)}


def main() -> None:
    failed = 0
    for text in sys.argv[1:]:
        first, *rest = text.split(":")
        if first == "fuzz":
            rng = random.Random(int(rest[1]))
            scenarios = [
                (rng.choice(KINDS), "kill", rng.randrange(WORLD), rng.choice(WHERE), rng.randrange(30))
                for _ in range(int(rest[0]))
            ]
        else:
            scenarios = [(first, rest[0], int(rest[1]), rest[2], int(rest[3]))]
        for arguments in scenarios:
            result = scenario(*arguments)
            print(json.dumps(result), flush=True)
            survivors = [rank for rank in range(WORLD) if rank != arguments[2] or arguments[1] == "stop"]
            passed = all(result["statuses"][rank] == 3 and result["errors"][rank] for rank in survivors)
            failed += not passed or bool(result["left"])
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
