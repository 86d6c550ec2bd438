"""Rank side of test_tcp.py: three ranks, joined anew for each case; each prints what it saw."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import threading
import time

import torch
import torch.distributed as dist
from cases import run_cases

from sf_xfuser.transport.base import Parcel, TransportError
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.cpu import tcp
from sf_xfuser.transport.rendezvous import StoreGroup

PEERS = {0: [1, 2], 1: [0, 2], 2: [0, 1]}


def join(timeout_s=20.0):
    rank = dist.get_rank()
    control = ControlPlane(StoreGroup.world(timeout_s), [0, 1, 2], rank, timeout_s)
    return tcp.connect(control, [0, 1, 2], rank, {"across": PEERS[rank]}, timeout_s)["across"]


def parcel_of(tensor, peer, slot):
    return Parcel((tensor,), tensor.dtype, peer, slot)


def content(sender, receiver, round, slot):
    """What ``sender`` sends, which both ends can make: from 1 byte to 3 MB, of several dtypes."""
    make = torch.Generator().manual_seed(((sender * 3 + receiver) * 1000 + round) * 10 + slot)
    count = int(10 ** (torch.rand((), generator=make) * 6.5))
    dtype = (torch.uint8, torch.float32, torch.bfloat16)[slot]
    return (torch.rand(max(1, count // dtype.itemsize), generator=make) * 255).to(dtype)


def case_everything_arrives(rank):
    """60 rounds, three of them open at a time; ranks pause at random."""
    link, wait = join(), random.Random(rank)
    open_rounds = []
    for round in range(60):
        time.sleep(wait.random() * 0.01)
        sends = [parcel_of(content(rank, peer, round, slot), peer, slot) for peer in PEERS[rank] for slot in range(3)]
        wanted = [(peer, content(peer, rank, round, slot), slot) for peer in PEERS[rank] for slot in range(3)]
        receives = [parcel_of(torch.zeros_like(x), peer, slot) for peer, x, slot in wanted]
        open_rounds.append((link.exchange(round, sends, receives), wanted, receives))
        if len(open_rounds) == 3 or round == 59:
            for ticket, wanted, receives in open_rounds:
                ticket.wait()
                for (_, x, _), parcel in zip(wanted, receives, strict=True):
                    assert torch.equal(x, parcel.parts[0])
            link.drain()
            open_rounds = []
    link.close()
    link.close()
    return "all equal"


def case_a_later_send_waits_for_an_earlier_one(rank):
    """Rank 1 asks for what rank 0 sends it, more than the kernel holds, after 1 s; rank 2 gets a byte after that."""
    link = join()
    big, small = torch.ones(256 << 20, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)
    dist.barrier()
    started = time.monotonic()
    if rank == 0:
        link.exchange(0, [parcel_of(big, 1, 0)], [])
        link.exchange(1, [parcel_of(small, 2, 0)], [])
        link.drain()
    elif rank == 1:
        time.sleep(1.0)
        link.exchange(0, [], [parcel_of(torch.zeros_like(big), 0, 0)]).wait()
    else:
        # Two exchanges on every rank: the k-th of one matches the k-th of another.
        link.exchange(0, [], [])
        link.exchange(1, [], [parcel_of(torch.zeros_like(small), 0, 0)]).wait()
    elapsed = time.monotonic() - started
    dist.barrier()
    return f"after {elapsed:.2f} s"


def case_another_call(rank):
    """Rank 0 sends round 1 while rank 1 expects round 2: both are told, or see the connection end."""
    link = join(timeout_s=5.0)
    if rank == 0:
        link.exchange(1, [parcel_of(torch.ones(8), 1, 0)], [parcel_of(torch.ones(8), 1, 0)]).wait()
    elif rank == 1:
        link.exchange(2, [], [parcel_of(torch.ones(8), 0, 0)]).wait()
    return "went unnoticed" if rank != 2 else "not concerned"


def case_nothing_comes(rank):
    link = join(timeout_s=2.0)
    if rank == 0:
        link.exchange(7, [], [parcel_of(torch.ones(8), 1, 0), parcel_of(torch.ones(8), 2, 1)]).wait()
        return "went unnoticed"
    link.exchange(7, [parcel_of(torch.ones(8), 0, 1)] if rank == 2 else [], [])
    time.sleep(3.0)
    return "sent or not"


def case_nobody_takes_it(rank):
    link = join(timeout_s=2.0)
    if rank == 0:
        link.exchange(0, [parcel_of(torch.ones(256 << 20, dtype=torch.uint8), 1, 0)], [])
        link.drain()
        return "went unnoticed"
    time.sleep(3.0)
    return "did not ask"


def case_a_peer_leaves(rank):
    link = join(timeout_s=30.0)
    if rank == 1:
        link.close()
        return "left"
    link.exchange(0, [], [parcel_of(torch.ones(8), 1, 0)]).wait()
    return "went unnoticed"


def case_use_after_close(rank):
    link = join(timeout_s=5.0)
    dist.barrier()
    link.close()
    link.exchange(0, [], [parcel_of(torch.ones(8), PEERS[rank][0], 0)]).wait()
    return "went unnoticed"


def case_strangers(rank):
    """Before each rank's peers come, two who say the wrong thing, one who hangs up, ten who say nothing, and one who
    says a byte at a time: none keeps anybody waiting."""
    create_server, strangers = socket.create_server, []

    def beset(address, **options):
        listener = create_server(address, **options)
        impostor = tcp._HANDSHAKE.pack(os.urandom(16), 0, rank + 1)  # a peer that is due, but for the token
        quiet = [None] * 10
        for said in (impostor, os.urandom(24), b"GET / HTTP/1.0\r\n\r\n....................", b"", *quiet):
            stranger = socket.create_connection(listener.getsockname())
            strangers.append(stranger)
            if said is not None:
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)

        def trickle():
            with contextlib.suppress(OSError):
                for byte in impostor:
                    strangers[-1].send(bytes([byte]))
                    time.sleep(0.2)

        threading.Thread(target=trickle, daemon=True).start()
        return listener

    control = ControlPlane(StoreGroup.world(5.0), [0, 1, 2], rank, 5.0)
    socket.create_server = beset
    started = time.monotonic()
    try:
        link = tcp.connect(control, [0, 1, 2], rank, {"across": PEERS[rank]}, 5.0)["across"]
    finally:
        socket.create_server = create_server
    assert time.monotonic() - started < 3
    wanted = [parcel_of(torch.zeros(4), peer, 0) for peer in PEERS[rank]]
    link.exchange(0, [parcel_of(torch.full((4,), float(rank)), peer, 0) for peer in PEERS[rank]], wanted).wait()
    return "from " + " ".join(str(int(parcel.parts[0].sum()) // 4) for parcel in wanted)


def main() -> None:
    dist.init_process_group("gloo")
    run_cases(globals(), sys.argv[1:], TransportError)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
