"""Rank side of test_two_sided.py: three ranks, connected again for each case. Each case prints what the rank saw."""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
from cases import run_cases
from tcp_links import late_start, never_starts, parcel_of, recorded_calls, stops

from sf_xfuser.transport import two_sided
from sf_xfuser.transport.base import TransportError
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.rendezvous import StoreGroup


def connect(timeout_s=20.0):
    control = ControlPlane(StoreGroup.world(timeout_s), [0, 1, 2], dist.get_rank(), timeout_s)
    return two_sided.connect(dist.new_group(), [0, 1, 2], "across", timeout_s, control)


def case_recorded(rank):
    return recorded_calls(rank, connect())


def case_late_start(rank):
    return late_start(rank, connect(timeout_s=0.5))


def case_stops(rank):
    return stops(rank, connect(timeout_s=0.5))


def case_never_starts(rank):
    return never_starts(rank, connect(timeout_s=0.4))


def case_another_call(rank):
    """Ranks 0 and 1 make different calls: neither receives the other's chunk."""
    link = connect(timeout_s=0.4)
    link.begin_call(rank)
    if rank != 2:
        peer = 1 - rank
        link.exchange(0, [parcel_of(torch.ones(8), peer, 0)], [parcel_of(torch.ones(8), peer, 0)]).wait()
        return "no error"
    time.sleep(2.5)
    return "no transfer"


def main() -> None:
    dist.init_process_group("gloo")
    run_cases(globals(), sys.argv[1:], TransportError)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
