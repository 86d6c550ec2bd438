"""Rank side of test_tcp.py: three ranks, connected again for each case. Each case prints what the rank saw."""

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


SET_UP_S = 20.0


def connect(timeout_s=SET_UP_S):
    """A link with this limit. On a busy machine, setting it up may take longer."""
    rank = dist.get_rank()
    control = ControlPlane(StoreGroup.world(SET_UP_S), [0, 1, 2], rank, SET_UP_S)
    link = tcp.connect(control, [0, 1, 2], rank, {"across": PEERS[rank]}, SET_UP_S)["across"]
    link._timeout_s = link._patience._timeout_s = timeout_s
    return link


def parcel_of(tensor, peer, slot):
    return Parcel(tensor, peer, slot)


def content(sender, receiver, round, slot):
    """Data that both ends can generate: from 1 byte to 3 MB, several dtypes."""
    make = torch.Generator().manual_seed(((sender * 3 + receiver) * 1000 + round) * 10 + slot)
    count = int(10 ** (torch.rand((), generator=make) * 6.5))
    dtype = (torch.uint8, torch.float32, torch.bfloat16)[slot]
    return (torch.rand(max(1, count // dtype.itemsize), generator=make) * 255).to(dtype)


def case_all_data_arrives(rank):
    """60 rounds, up to three in flight; ranks pause at random."""
    link, rng = connect(), random.Random(rank)
    open_rounds = []
    for round in range(60):
        time.sleep(rng.random() * 0.01)
        sends = [parcel_of(content(rank, peer, round, slot), peer, slot) for peer in PEERS[rank] for slot in range(3)]
        wanted = [(peer, content(peer, rank, round, slot), slot) for peer in PEERS[rank] for slot in range(3)]
        receives = [parcel_of(torch.zeros_like(x), peer, slot) for peer, x, slot in wanted]
        open_rounds.append((link.exchange(round, sends, receives), wanted, receives))
        if len(open_rounds) == 3 or round == 59:
            for transfer, wanted, receives in open_rounds:
                transfer.wait()
                for (_, x, _), parcel in zip(wanted, receives, strict=True):
                    assert torch.equal(x, parcel.data)
            link.drain()
            open_rounds = []
    link.close()
    link.close()
    return "all equal"


def case_recorded(rank):
    return recorded_calls(rank, connect())


def recorded_calls(rank, link):
    """Two rounds, recorded in the first call and posted in each: two chunks to each peer, then one of them is passed on
    to the next rank."""
    before, after = (rank - 1) % 3, (rank + 1) % 3
    own = [torch.empty(70_000), torch.empty(3, dtype=torch.bfloat16)]
    theirs = {peer: [torch.empty_like(x) for x in own] for peer in PEERS[rank]}
    passed = torch.empty_like(own[0])
    for call in range(5):
        link.begin_call(1000 + call)
        if call == 0:
            sends = [parcel_of(x, peer, slot) for peer in PEERS[rank] for slot, x in enumerate(own)]
            receives = [parcel_of(x, peer, slot) for peer in PEERS[rank] for slot, x in enumerate(theirs[peer])]
            first = link.record(0, sends, receives)
            second = link.record(1, [parcel_of(theirs[before][0], after, 0)], [parcel_of(passed, before, 0)])
            wait, end = link.record_wait([first, second]), link.record_end()
        for slot, x in enumerate(own):
            x.fill_(100 * call + 10 * rank + slot)
        first.post()
        first.wait()
        second.post()
        wait()
        for peer in PEERS[rank]:
            for slot, x in enumerate(theirs[peer]):
                assert (x == 100 * call + 10 * peer + slot).all()
        assert (passed == 100 * call + 10 * after).all()
        end(None)
    return "all equal"


def case_sends_keep_their_order(rank):
    """Rank 0 sends more than the kernel buffers to rank 1, which receives after 1 s, then a byte to rank 2."""
    link = connect()
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
        # The k-th exchange of a rank matches the k-th of its peer, so rank 2 needs two as well.
        link.exchange(0, [], [])
        link.exchange(1, [], [parcel_of(torch.zeros_like(small), 0, 0)]).wait()
    elapsed = time.monotonic() - started
    dist.barrier()
    return f"after {elapsed:.2f} s"


def case_call_mismatch(rank):
    """Rank 0 sends round 1 while rank 1 expects round 2: both fail."""
    link = connect(timeout_s=5.0)
    if rank == 0:
        link.exchange(1, [parcel_of(torch.ones(8), 1, 0)], [parcel_of(torch.ones(8), 1, 0)]).wait()
    elif rank == 1:
        link.exchange(2, [], [parcel_of(torch.ones(8), 0, 0)]).wait()
    return "no error" if rank != 2 else "no transfer"


def begin_late(link, is_late):
    """Begin call 1; if this rank is late, two timeouts after the others."""
    if is_late:
        time.sleep(1.0)
    link._control.call = 1
    link.begin_call(1)


def case_late_start(rank):
    return late_start(rank, connect(timeout_s=0.5))


def late_start(rank, link):
    """Rank 1 starts its call two timeouts after the others."""
    begin_late(link, rank == 1)
    sends = [parcel_of(torch.full((8,), float(rank)), peer, 0) for peer in PEERS[rank]]
    receives = [parcel_of(torch.empty(8), peer, 0) for peer in PEERS[rank]]
    link.exchange(0, sends, receives).wait()
    link.drain()
    return "from " + " ".join(str(int(parcel.data.sum()) // 8) for parcel in receives)


def case_late_for_another(rank):
    return late_for_another(rank, connect(timeout_s=0.5))


def late_for_another(rank, link):
    """Rank 2 starts its call two timeouts after the others. Rank 1 waits for it before it sends its second chunk."""
    begin_late(link, rank == 2)
    if rank == 0:
        link.exchange(0, [], [parcel_of(torch.empty(8), 1, 0)]).wait()
        link.exchange(1, [], [parcel_of(torch.empty(8), 1, 0)]).wait()
    elif rank == 1:
        link.exchange(0, [parcel_of(torch.ones(8), 0, 0)], [parcel_of(torch.empty(8), 2, 0)]).wait()
        link.exchange(1, [parcel_of(torch.ones(8), 0, 0)], [])
    else:
        link.exchange(0, [parcel_of(torch.ones(8), 1, 0)], [])
    link.drain()
    return "done"


def case_stops(rank):
    return stops(rank, connect(timeout_s=0.5))


def stops(rank, link):
    """Rank 1 sends the first of two chunks."""
    link.begin_call(1)
    if rank == 0:
        link.exchange(0, [], [parcel_of(torch.empty(8), 1, 0)]).wait()
        link.exchange(1, [], [parcel_of(torch.empty(8), 1, 0)]).wait()
    elif rank == 1:
        link.exchange(0, [parcel_of(torch.ones(8), 0, 0)], [])
    return "not waiting"


def case_never_starts(rank):
    return never_starts(rank, connect(timeout_s=0.4))


def never_starts(rank, link):
    link._control.call = int(rank != 1)
    link.begin_call(1)
    if rank == 0:
        link.exchange(7, [], [parcel_of(torch.empty(8), 1, 0), parcel_of(torch.empty(8), 2, 1)]).wait()
    elif rank == 2:
        link.exchange(7, [parcel_of(torch.ones(8), 0, 1)], [])
    return "not waiting"


def case_send_timeout(rank):
    link = connect(timeout_s=0.4)
    if rank == 0:
        link._control.call = 1
        link.exchange(0, [parcel_of(torch.ones(256 << 20, dtype=torch.uint8), 1, 0)], [])
        link.drain()
        return "no error"
    return "no receive"


def case_peer_closes(rank):
    link = connect(timeout_s=30.0)
    if rank == 1:
        link.close()
        return "closed"
    link.exchange(0, [], [parcel_of(torch.ones(8), 1, 0)]).wait()
    return "no error"


def case_use_after_close(rank):
    link = connect(timeout_s=5.0)
    dist.barrier()
    link.close()
    link.exchange(0, [], [parcel_of(torch.ones(8), PEERS[rank][0], 0)]).wait()
    return "no error"


def case_strangers(rank):
    """Before a rank's peers connect, strangers do: two send wrong data, one disconnects, ten are silent, and one sends
    a byte at a time. None delays the ranks."""
    create_server, strangers = socket.create_server, []

    def create_server_with_strangers(address, **options):
        listener = create_server(address, **options)
        impostor = tcp._HANDSHAKE.pack(
            os.urandom(16), 0, rank + 1
        )  # the handshake of an expected peer, except for the token
        silent = [None] * 10
        for data in (impostor, os.urandom(24), b"GET / HTTP/1.0\r\n\r\n....................", b"", *silent):
            stranger = socket.create_connection(listener.getsockname())
            strangers.append(stranger)
            if data is not None:
                stranger.sendall(data)
                stranger.shutdown(socket.SHUT_WR)

        def trickle():
            with contextlib.suppress(OSError):
                for byte in impostor:
                    strangers[-1].send(bytes([byte]))
                    time.sleep(0.2)

        threading.Thread(target=trickle, daemon=True).start()
        return listener

    control = ControlPlane(StoreGroup.world(5.0), [0, 1, 2], rank, 5.0)
    socket.create_server = create_server_with_strangers
    started = time.monotonic()
    try:
        link = tcp.connect(control, [0, 1, 2], rank, {"across": PEERS[rank]}, 5.0)["across"]
    finally:
        socket.create_server = create_server
    assert time.monotonic() - started < 3
    wanted = [parcel_of(torch.zeros(4), peer, 0) for peer in PEERS[rank]]
    link.exchange(0, [parcel_of(torch.full((4,), float(rank)), peer, 0) for peer in PEERS[rank]], wanted).wait()
    return "from " + " ".join(str(int(parcel.data.sum()) // 4) for parcel in wanted)


def main() -> None:
    dist.init_process_group("gloo")
    run_cases(globals(), sys.argv[1:], TransportError)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
