"""Plain TCP between CPU ranks. One thread of each rank sends all chunks, in program order.

gloo moves a chunk only after the receiver has posted its receive, and all posted chunks share the network, so the chunk
that is needed first may arrive last. Here each chunk is sent right after the previous one, in schedule order.
Each pair of ranks has one connection per link, which keeps that order. The kernel buffers data that arrives before its
receive is posted.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from queue import SimpleQueue
from typing import TypeVar

import torch

from sf_xfuser.transport.base import CallMismatch, Parcel, Transfer, Transport, TransportError
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.patience import Patience
from sf_xfuser.transport.sockets import TOKEN_BYTES, Acceptor, close_on_fork, shut_down

_Link = TypeVar("_Link", bound=str)
_HANDSHAKE = struct.Struct(f"!{TOKEN_BYTES}sII")  # the acceptor's token, link number, position
_HEADER = struct.Struct("!IQIIQ")  # call identity, exchange number on the link, round, slot, bytes
_UNSENT_BYTES = 128 << 10  # a send returns when at most this much of its chunk is unsent in the kernel
_MAX_BUFFERS = os.sysconf("SC_IOV_MAX")  # of one sendmsg
_POLL_S = 0.1  # interval at which a waiting rank checks for failures elsewhere


def connect(
    control: ControlPlane,
    members: Sequence[int],
    position: int,
    peers: Mapping[_Link, Sequence[int]],
    timeout_s: float,
) -> dict[_Link, Tcp]:
    """One transport per link, connected to the positions ``peers[link]``. Collective over ``members``.

    ``members[w]`` is the global rank at position ``w``. Peers are symmetric: each is a peer of the other on the link.
    Raises GroupError if a rank is missing, TransportError if one is not connected within ``timeout_s``.
    """
    token = secrets.token_bytes(TOKEN_BYTES)
    links = tuple(peers)
    connections: dict[_Link, dict[int, socket.socket]] = {link: {} for link in peers}
    missing = {(link, peer) for link in links for peer in peers[link] if peer > position}
    acceptor = Acceptor(control.address, len(missing), _HANDSHAKE.size)
    with contextlib.closing(acceptor), contextlib.ExitStack() as opened:
        endpoints = control.gather("tcp listener", [control.address, acceptor.port, token.hex()])
        deadline = time.monotonic() + timeout_s
        # The kernel completes a connection before it is accepted here: every rank first connects, then accepts.
        for number, link in enumerate(links):
            for peer in (p for p in peers[link] if p < position):
                address, port, peer_token = endpoints[peer]
                try:
                    remaining_s = max(0.1, deadline - time.monotonic())
                    connection = opened.enter_context(socket.create_connection((address, port), remaining_s))
                    connection.sendall(_HANDSHAKE.pack(bytes.fromhex(peer_token), number, position))
                except OSError as error:
                    raise TransportError(
                        f"rank {members[position]}: no connection to rank {members[peer]} at {address} port {port}: "
                        f"{error}. Open the TCP ports between the machines, or set GLOO_SOCKET_IFNAME to the "
                        f"interface between them"
                    ) from error
                connections[link][peer] = connection
        with control.waiting():
            while missing:
                for connection, handshake in acceptor.poll(_POLL_S):
                    key, number, peer = _HANDSHAKE.unpack(handshake)
                    if secrets.compare_digest(key, token) and number < len(links) and (links[number], peer) in missing:
                        connections[links[number]][peer] = opened.enter_context(connection)
                        missing.remove((links[number], peer))
                    else:
                        connection.close()
                late = {peer for _, peer in missing}
                if late and (reason := control.abort_reason(late)):
                    raise TransportError(reason)
                if late and time.monotonic() >= deadline:
                    raise TransportError(
                        f"rank {members[position]}: rank(s) {sorted(members[peer] for peer in late)} did not connect "
                        f"within {timeout_s:g} s; see their logs, or raise --sp-timeout"
                    )
        opened.pop_all()
    for connection in (c for of_link in connections.values() for c in of_link.values()):
        close_on_fork(connection)
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Otherwise consecutive chunks would share the network.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
    return {link: Tcp(link, sockets, members, position, timeout_s, control) for link, sockets in connections.items()}


class Tcp(Transport):
    """``connections[w]`` leads to position ``w``; parcels name peers by position. Created by :func:`connect`."""

    def __init__(
        self,
        link: str,
        connections: dict[int, socket.socket],
        members: Sequence[int],
        position: int,
        timeout_s: float,
        control: ControlPlane,
    ) -> None:
        self._link = link
        self._connections = connections
        self._members = members
        self._position = position
        self._timeout_s = timeout_s
        self._control = control
        self._num_exchanges = 0
        self._patience = Patience(timeout_s, control.late_ranks)
        self._last_received = dict.fromkeys(connections, "nothing yet")  # by peer
        self._sending: tuple[int, float] | None = None  # the peer to which a batch is being sent, since when
        self._lock = threading.Lock()  # guards the next two
        self._error: TransportError | None = None
        self._pending: set[_Exchange] = set()
        self._drained = _Exchange(self, 0, [], [])
        self._sends: SimpleQueue[tuple[int, int, list[_Frame]] | _Exchange | None] = SimpleQueue()
        self._receives: dict[int, SimpleQueue[tuple[_Exchange, list[_Frame]] | None]] = {}
        self._threads = [threading.Thread(target=self._run_sends, name="sf-xfuser tcp", daemon=True)]
        for peer in connections:
            self._receives[peer] = SimpleQueue()
            thread = threading.Thread(target=self._run_receives, args=(peer,), name="sf-xfuser tcp", daemon=True)
            self._threads.append(thread)
        for thread in self._threads:
            thread.start()

    def begin_call(self, identity: int) -> None:
        super().begin_call(identity)
        self._patience.begin_call()

    def record(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Transfer:
        return _Exchange(self, round, sends, receives)

    def post(self, exchange: _Exchange) -> None:
        call = self._identity, self._num_exchanges, exchange.round
        self._start(exchange, f"round {exchange.round} of exchange {self._num_exchanges}")
        self._num_exchanges += 1
        for peer, chunks in exchange.receives:
            self._receives[peer].put((exchange, _framed(call, chunks)))
        for peer, chunks in exchange.sends:
            self._sends.put((peer, exchange.round, _framed(call, chunks)))
        if not exchange.receives:
            self._complete(exchange, None)

    def drain(self) -> None:
        self._start(self._drained, "a drain")
        self._sends.put(self._drained)
        self._drained.wait()

    def close(self) -> None:
        with self._lock:
            self._error = self._error or TransportError(self._text("the link was closed"))
        self._sends.put(None)
        for queue in self._receives.values():
            queue.put(None)
        self._shut_down()
        for thread in self._threads:
            thread.join(self._timeout_s)
        for connection in self._connections.values():
            connection.close()

    def wait(self, exchange: _Exchange) -> None:
        if not exchange.event.is_set():
            started_at = time.monotonic()
            with self._control.waiting():
                while not exchange.event.wait(min(_POLL_S, self._timeout_s)):
                    if (reason := self._control.abort_reason()) is not None:
                        waited_s = time.monotonic() - started_at
                        self._fail(f"{self._missing_text(exchange)} after {waited_s:.1f} s: {reason}")
                    elif (limit := self._exceeded(exchange, started_at)) is not None:
                        self._fail(f"{self._missing_text(exchange)} within {limit}")
        if not exchange.complete and self._error is not None:
            raise self._error

    def _start(self, exchange: _Exchange, name: str) -> None:
        exchange.start(name)
        with self._lock:
            if self._error is not None:
                raise self._error
            self._pending.add(exchange)

    def _exceeded(self, exchange: _Exchange, started_at: float) -> str | None:
        """The limit that a wait has exceeded, or None."""
        if exchange is not self._drained:
            return self._patience.exceeded(tuple(exchange.missing), started_at)
        if (sending := self._sending) is None:
            return None
        peer, since = sending
        return self._patience.exceeded([peer], max(started_at, since))

    def _text(self, text: str) -> str:
        return f"rank {self._members[self._position]} on {socket.gethostname()}: {text} (link {self._link}, tcp)"

    def _missing_text(self, exchange: _Exchange) -> str:
        if exchange is self._drained:
            receiver = f"rank {self._members[self._sending[0]]}" if self._sending else "a peer"
            return f"{receiver} did not receive the chunks sent to it"
        peers = sorted(set(exchange.missing))
        last = ", ".join(f"rank {self._members[peer]}'s last: {self._last_received[peer]}" for peer in peers)
        return f"no data from rank(s) {[self._members[peer] for peer in peers]} for {exchange.name} ({last})"

    # -- threads ------------------------------------------------------------------------------------------------------

    def _run_sends(self) -> None:
        while (item := self._sends.get()) is not None:
            if isinstance(item, _Exchange):
                self._complete(item, None)
                continue
            peer, round, frames = item
            self._sending = peer, time.monotonic()
            try:
                _send_all(self._connections[peer], frames)
            except Exception as error:  # any error: the thread has no caller to raise it to
                return self._fail(f"sending round {round} to rank {self._members[peer]} failed: {error}")
            self._sending = None
            del item, frames  # they keep memory alive

    def _run_receives(self, peer: int) -> None:
        _use_batch_scheduling()
        connection, queue = self._connections[peer], self._receives[peer]
        while (item := queue.get()) is not None:
            exchange, frames = item
            try:
                for header, body in frames:
                    received = _receive_exactly(connection, _HEADER.size)
                    if received != header:
                        return self._fail(
                            f"expected (call identity, exchange, round, slot, bytes) {_HEADER.unpack(header)} from "
                            f"rank {self._members[peer]}, got {_HEADER.unpack(received)}",
                            CallMismatch,
                        )
                    _receive_into(connection, body)
            except Exception as error:  # any error: the thread has no caller to raise it to
                return self._fail(f"receiving {exchange.name} from rank {self._members[peer]} failed: {error}")
            self._last_received[peer] = exchange.name
            self._patience.arrived(peer)
            self._complete(exchange, peer)
            del item, exchange, frames

    def _complete(self, exchange: _Exchange, peer: int | None) -> None:
        """Mark a batch of ``peer`` as received. None: no receive is pending, or all sends before a drain are done."""
        with self._lock:
            if peer is not None:
                exchange.missing.remove(peer)
            exchange.complete = not exchange.missing
            if exchange.complete:
                self._pending.discard(exchange)
        if exchange.complete:
            exchange.arrived_s = time.perf_counter()
            exchange.event.set()

    def _fail(self, text: str, kind: type[TransportError] = TransportError) -> None:
        """Fail all waits of this link, and close its connections, so that the peers fail too."""
        with self._lock:
            self._error = self._error or kind(self._text(text))
            failed, self._pending = self._pending, set()
        for exchange in failed:
            exchange.event.set()
        self._shut_down()

    def _shut_down(self) -> None:
        for connection in self._connections.values():
            shut_down(connection)


class _Exchange(Transfer):
    """A recorded exchange, or a drain. ``missing``: the peers of batches that have not arrived since the last post;
    ``name``: of that post, for errors."""

    def __init__(self, transport: Tcp, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        self._transport = transport
        self.round = round
        self.sends, self.receives = _batches(sends), _batches(receives)
        self.event = threading.Event()

    def start(self, name: str) -> None:
        self.name = name
        self.missing = [peer for peer, _ in self.receives]
        self.complete = False
        self.event.clear()

    def post(self) -> None:
        self._transport.post(self)

    def wait(self) -> None:
        self._transport.wait(self)


def _use_batch_scheduling() -> None:
    """Keep this thread from preempting compute threads when data arrives. With more ranks than cores, each preemption
    would evict their caches."""
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


# -- sockets ----------------------------------------------------------------------------------------------------------


_Frame = tuple[bytes, memoryview]  # header, chunk
_Chunks = list[tuple[int, memoryview]]  # slot, bytes


def _batches(parcels: Iterable[Parcel]) -> list[tuple[int, _Chunks]]:
    """(peer, chunks) of consecutive parcels of one peer, without empty parcels."""
    groups = groupby((parcel for parcel in parcels if parcel.nbytes), attrgetter("peer"))
    return [(peer, [(parcel.slot, _bytes_of(parcel.data)) for parcel in group]) for peer, group in groups]


def _bytes_of(tensor: torch.Tensor | None) -> memoryview:
    assert tensor is not None
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _framed(call: tuple[int, int, int], chunks: _Chunks) -> list[_Frame]:
    """``call``: identity, exchange number, round."""
    return [(_HEADER.pack(*call, slot, len(body)), body) for slot, body in chunks]


def _send_all(connection: socket.socket, frames: list[_Frame]) -> None:
    """Send headers and chunks with one system call, if the kernel accepts all of them at once."""
    buffers = [part for header, body in frames for part in (memoryview(header), body)]
    while buffers:
        sent = connection.sendmsg(buffers[:_MAX_BUFFERS])
        while buffers and sent >= len(buffers[0]):
            sent -= len(buffers.pop(0))
        if sent:
            buffers[0] = buffers[0][sent:]


def _receive_exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    _receive_into(connection, memoryview(data))
    return bytes(data)


def _receive_into(connection: socket.socket, body: memoryview) -> None:
    while body:
        count = connection.recv_into(body, len(body), socket.MSG_WAITALL)
        if not count:
            raise ConnectionError("the connection was closed")
        body = body[count:]
