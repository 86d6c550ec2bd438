"""Rank side of test_control_plane.py: four ranks and the control plane alone; each case prints what a rank saw."""

from __future__ import annotations

import os
import socket
import struct
import sys
import time

import torch.distributed as dist
from cases import report, run_cases

from sf_xfuser.transport.control_plane import ControlPlane, GroupError
from sf_xfuser.transport.rendezvous import Agreement

RANKS = [0, 1, 2, 3]


def plane(rank, timeout_s=5.0):
    return ControlPlane(Agreement.of_world(timeout_s), RANKS, rank, timeout_s)


def case_values(rank):
    control = plane(rank)
    said = [control.gather("topic", {"rank": rank, "n": n}) for n in range(200)]
    control.close()
    return "right" if said == [[{"rank": r, "n": n} for r in RANKS] for n in range(200)] else str(said[:2])


def case_large_values(rank):
    control = plane(rank)
    said = control.gather("topic", f"{rank}" * (1 << 20))
    control.close()
    return f"{[(x[0], len(x)) for x in said] == [(str(r), 1 << 20) for r in RANKS]}"


def case_another_topic(rank):
    control = plane(rank)
    try:
        control.gather("lunch" if rank == 2 else "dinner", None)
    finally:
        control.close()
    return "went unnoticed"


def case_nobody_comes(rank):
    control = plane(rank, timeout_s=1.0)
    if rank == 2:
        time.sleep(2.0)
    started = time.monotonic()
    try:
        control.gather("dinner", None)
    finally:
        assert time.monotonic() - started < 2.5
        control.close()
    return "went unnoticed"


def case_first_reason_stays(rank):
    """What one rank says of itself counts more than what the others noticed of it, in whatever order it is heard."""
    control = plane(rank)
    if rank == 3:
        time.sleep(0.1)
        said = control.fail("KeyError: 'it'", own=True)
    else:
        said = control.fail(f"rank {rank}: nothing came from rank 3", own=False)
    dist.barrier()
    control.reconnect(time.monotonic(), time.monotonic())
    assert control.failure is None and control.gather("again", rank) == RANKS
    control.close()
    return said


def case_who_makes_no_call(rank):
    control = plane(rank)
    control.doing = lambda: ("is in no call" if rank == 1 else "is in call 7", rank != 1)
    control.gather("all here", None)
    said = control.failure
    if rank != 1:
        said = control.fail(f"rank {rank}: nothing came from rank {(rank + 1) % 4}", own=False)
    dist.barrier()
    control.close()
    return said or "nothing"


def case_a_forked_child_hides_nothing(rank):
    """Rank 1 ends, and leaves a child behind."""
    control = plane(rank)
    control.gather("all here", None)
    if rank == 1 and os.fork() == 0:
        time.sleep(6.0)
        os._exit(0)
    if rank == 1:
        report("a_forked_child_hides_nothing", "gone")
        os._exit(0)
    started = time.monotonic()
    try:
        control.gather("dinner", None)
    except GroupError as error:
        return f"{error} ({'at once' if time.monotonic() - started < 2 else 'late'})"
    return "went unnoticed"


def case_strangers(rank):
    """On the hub's port: silent ones, garbage, one with a wrong token, one that says it sends a gigabyte."""
    control = plane(rank)
    strangers = [socket.create_connection((control._hub_address, control._port)) for _ in range(20)]
    for stranger, said in zip(strangers, (os.urandom(100), b"\0" * 24, struct.pack("!I", 1 << 30)), strict=False):
        stranger.sendall(said)
    said = [control.gather("topic", rank) for _ in range(20)]
    for stranger in strangers:
        stranger.close()
    control.close()
    return "right" if said == [RANKS] * 20 else str(said)


def case_one_closes(rank):
    control = plane(rank)
    control.gather("all here", None)
    if rank == 2:
        control.close()
        return "closed"
    control.gather("dinner", None)
    return "went unnoticed"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run_cases(globals(), sys.argv[1:], GroupError)
    dist.destroy_process_group()
