"""Rank side of test_control_plane.py: four ranks with only a control plane. Each case prints what the rank saw."""

from __future__ import annotations

import os
import socket
import struct
import sys
import time

import torch.distributed as dist
from cases import report, run_cases

from sf_xfuser.transport.control_plane import ControlPlane, GroupError
from sf_xfuser.transport.rendezvous import StoreGroup

RANKS = [0, 1, 2, 3]


def connect(rank, timeout_s=5.0):
    return ControlPlane(StoreGroup.world(timeout_s), RANKS, rank, timeout_s)


def case_gathers(rank):
    control = connect(rank)
    gathered = [control.gather("topic", {"rank": rank, "n": n}) for n in range(200)]
    control.close()
    return "correct" if gathered == [[{"rank": r, "n": n} for r in RANKS] for n in range(200)] else str(gathered[:2])


def case_large_values(rank):
    control = connect(rank)
    gathered = control.gather("topic", f"{rank}" * (1 << 20))
    control.close()
    return "correct" if [(x[0], len(x)) for x in gathered] == [(str(r), 1 << 20) for r in RANKS] else "wrong"


def case_different_topics(rank):
    control = connect(rank)
    try:
        control.gather("topic a" if rank == 2 else "topic b", None)
    finally:
        control.close()
    return "no error"


def case_missing_rank(rank):
    control = connect(rank, timeout_s=1.0)
    if rank == 2:
        time.sleep(2.0)
    started = time.monotonic()
    try:
        control.gather("topic b", None)
    finally:
        assert time.monotonic() - started < 2.5
        control.close()
    return "no error"


def case_cause_before_timeouts(rank):
    """The error that a rank raised itself is the outcome, even if timeouts of other ranks are reported first."""
    control = connect(rank)
    if rank == 3:
        time.sleep(0.1)
        outcome = control.report_failure("KeyError: 'x'", is_cause=True)
    else:
        outcome = control.report_failure(f"rank {rank}: no data from rank 3", is_cause=False)
    dist.barrier()
    control.reconnect(time.monotonic(), time.monotonic())
    assert control.failure is None and control.gather("again", rank) == RANKS
    control.close()
    return outcome


def case_rank_in_no_call(rank):
    control = connect(rank)
    control.call_status = lambda: ("is in no call" if rank == 1 else "is in call 7", rank != 1)
    control.gather("start", None)
    outcome = control.failure
    if rank != 1:
        outcome = control.report_failure(f"rank {rank}: no data from rank {(rank + 1) % 4}", is_cause=False)
    dist.barrier()
    control.close()
    return outcome or "no failure"


def case_forked_child(rank):
    """Rank 1 ends while its forked child still runs."""
    control = connect(rank)
    control.gather("start", None)
    if rank == 1 and os.fork() == 0:
        time.sleep(6.0)
        os._exit(0)
    if rank == 1:
        report("forked_child", "ended")
        os._exit(0)
    started = time.monotonic()
    try:
        control.gather("topic b", None)
    except GroupError as error:
        return f"{error} ({'at once' if time.monotonic() - started < 2 else 'late'})"
    return "no error"


def case_strangers(rank):
    """Connections to the hub's port: silent, random bytes, a wrong token, a frame length of 1 GiB."""
    control = connect(rank)
    strangers = [socket.create_connection((control._hub_address, control._port)) for _ in range(20)]
    for stranger, data in zip(strangers, (os.urandom(100), b"\0" * 24, struct.pack("!I", 1 << 30)), strict=False):
        stranger.sendall(data)
    gathered = [control.gather("topic", rank) for _ in range(20)]
    for stranger in strangers:
        stranger.close()
    control.close()
    return "correct" if gathered == [RANKS] * 20 else str(gathered)


def case_closed_rank(rank):
    control = connect(rank)
    control.gather("start", None)
    if rank == 2:
        control.close()
        return "closed"
    control.gather("topic b", None)
    return "no error"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run_cases(globals(), sys.argv[1:], GroupError)
    dist.destroy_process_group()
