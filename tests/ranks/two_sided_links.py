"""Rank side of test_two_sided.py: three ranks, connected again for each case. Each case prints what the rank saw."""

from __future__ import annotations

import sys
import threading
from functools import partial

import torch
import torch.distributed as dist
from cases import run_cases
from tcp_links import PEERS, late_for_another, late_start, never_starts, parcel_of, recorded_calls, stops

from sf_xfuser.transport.base import TransportError
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.gpu.nccl import Nccl
from sf_xfuser.transport.rendezvous import StoreGroup
from sf_xfuser.transport.two_sided import Gloo

SET_UP_S = 20.0


def connect(timeout_s=SET_UP_S):
    control = ControlPlane(StoreGroup.world(SET_UP_S), [0, 1, 2], dist.get_rank(), SET_UP_S)
    return Gloo(dist.new_group(), [0, 1, 2], "across", timeout_s, control)


class NcclLike:
    """A group with the batches of NCCL, over gloo. After ``stop``, batches do not start and waits return, as they do on
    the host of a GPU that waits for a lost rank."""

    def __init__(self):
        self.group = dist.new_group()
        self.rank, self.size = self.group.rank, self.group.size
        self.stopped = False
        self.all_to_alls = 0
        self.aborted = threading.Event()
        self.abort = self.aborted.set
        dist.distributed_c10d._world.pg_group_ranks[self] = {0: 0, 1: 1, 2: 2}

    def _start_coalescing(self, device):
        self.batch = []

    def send(self, *args):
        self.batch.append(partial(self.group.send, *args))

    def recv(self, *args):
        self.batch.append(partial(self.group.recv, *args))

    def alltoall(self, outputs, inputs):
        self.all_to_alls += 1
        for peer in PEERS[self.rank()]:
            self.send([inputs[peer]], peer, 0)
            self.recv([outputs[peer]], peer, 0)

    def _end_coalescing(self, device):
        return Batch([] if self.stopped else [start() for start in self.batch])


class Batch:
    def __init__(self, works):
        self.works = works

    def wait(self):
        for work in self.works:
            work.wait()


def connect_nccl(timeout_s=SET_UP_S):
    control = ControlPlane(StoreGroup.world(SET_UP_S), [0, 1, 2], dist.get_rank(), SET_UP_S)
    return Nccl(NcclLike(), [0, 1, 2], "across", timeout_s, control), control


def case_recorded(rank):
    return recorded_calls(rank, connect())


def case_late_start(rank):
    return late_start(rank, connect(timeout_s=0.5))


def case_late_for_another(rank):
    return late_for_another(rank, connect(timeout_s=0.5))


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
    return "no transfer"


def exchange_with_all(rank, link):
    """The result of a call in which every rank sends its number to every other one."""
    sends = [parcel_of(torch.full((8,), float(rank)), peer, 0) for peer in PEERS[rank]]
    receives = [parcel_of(torch.empty(8), peer, 0) for peer in PEERS[rank]]
    link.exchange(0, sends, receives).wait()
    result = torch.stack([parcel.data for parcel in receives])
    link.record_end()(result)
    return f"got {result[:, 0].tolist()}"


def case_nccl_recorded(rank):
    """Of the two rounds of a call, the first one is between all ranks: two chunks and a label."""
    link, _ = connect_nccl()
    text = recorded_calls(rank, link)
    return f"{text}, {link._group.all_to_alls} all-to-alls"


def case_nccl_another_call(rank):
    link, _ = connect_nccl()
    link.begin_call(1)
    texts = [exchange_with_all(rank, link)]
    link.begin_call(2 if rank == 1 else 3)
    texts.append(exchange_with_all(rank, link))
    try:
        link.begin_call(4)
    except TransportError as error:
        texts.append(f"{type(error).__name__}: {error}")
    return "; ".join(texts)


def case_nccl_failed_rank(rank):
    """Rank 1 fails while the GPUs of the others wait for it."""
    link, control = connect_nccl()
    if rank == 1:
        control.report_failure("ValueError: no", is_cause=True)
        return "reported"
    return stop_in_call(rank, link)


def case_nccl_stopped_rank(rank):
    """Rank 1 makes no call. The GPUs of the others wait for it."""
    link, _ = connect_nccl(timeout_s=0.4)
    if rank == 1:
        return "no call"
    return stop_in_call(rank, link)


def stop_in_call(rank, link):
    link._group.stopped = True
    link.begin_call(1)
    transfer = link.exchange(0, [], [parcel_of(torch.zeros(8), 1, 0)])
    assert link._group.aborted.wait(10.0)
    transfer.wait()
    link._received.fill_(1)  # the label had arrived
    result = torch.zeros(2)
    link.record_end()(result)
    try:
        link.begin_call(2)
    except TransportError as error:
        return f"{result.tolist()}; {error}"
    return "no error"


def main() -> None:
    dist.init_process_group("gloo")
    run_cases(globals(), sys.argv[1:], TransportError)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
