"""Plain TCP between CPU ranks: each rank sends what it has in one strict order, on one thread.

Why not gloo: it moves a chunk only after the receiver has asked for it, and whatever is posted shares the wire, so
that what is needed first comes last. Here a chunk goes out as soon as those before it have: the order on the wire is
the sender's program order, which the schedule chose; one connection for each pair of ranks keeps that order, and the
kernel holds what comes before its receive is posted.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import TypeVar

import torch

from sf_xfuser.transport.base import OtherCall, Parcel, Ticket, Transport, TransportError
from sf_xfuser.transport.control_plane import ControlPlane, Greeter, not_inherited

UNSENT_BYTES = 128 << 10
"""How much of a chunk may wait in the kernel for the wire when the next one starts."""

_Link = TypeVar("_Link", bound=str)
_HELLO = struct.Struct("!16sII")  # the listener's token, link, position
_HEADER = struct.Struct("!IQIIQ")  # the call's identity, exchanges before this one on the link, round, slot, bytes
_LOOK_S = 0.1  # how often a waiting rank looks whether others still can send


def connect(
    control: ControlPlane,
    members: Sequence[int],
    position: int,
    peers: Mapping[_Link, Sequence[int]],
    timeout_s: float,
) -> dict[_Link, Tcp]:
    """One transport per link, each joined to the positions ``peers[link]``. Collective over ``members``.

    ``members[w]`` is the global rank at position ``w``; if ``w`` is among my peers on a link, I am among ``w``'s.
    Raises RuntimeError if a rank is missing, TransportError if one cannot be reached within ``timeout_s``.
    """
    address = control.address
    token = secrets.token_bytes(16)
    found: dict[_Link, dict[int, socket.socket]] = {link: {} for link in peers}
    missing = {(link, peer) for link, others in peers.items() for peer in others if peer > position}
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as failed:
        listener = socket.create_server((address, 0), family=family, backlog=max(128, len(missing)))
        failed.callback(listener.close)
        greeter = Greeter(listener, _HELLO.size)
        failed.callback(greeter.close)
        mine = {"address": address, "port": listener.getsockname()[1], "token": token.hex()}
        published = control.gather("tcp listener", mine)
        deadline = time.monotonic() + timeout_s
        # The kernel takes a connection before it is accepted here: every rank can first connect, then accept.
        for number, link in enumerate(peers):
            for peer in (p for p in peers[link] if p < position):
                at = published[peer]
                try:
                    connection = socket.create_connection(
                        (at["address"], at["port"]), max(0.1, deadline - time.monotonic())
                    )
                    failed.callback(connection.close)
                    connection.sendall(_HELLO.pack(bytes.fromhex(at["token"]), number, position))
                except OSError as error:
                    raise TransportError(
                        f"rank {members[position]}: no connection to rank {members[peer]} at {at['address']} port "
                        f"{at['port']}: {error}. Open the TCP ports between the machines, or name the interface that "
                        f"joins them in GLOO_SOCKET_IFNAME"
                    ) from error
                found[link][peer] = connection
        links = tuple(peers)
        with control.waiting():
            while missing:
                for connection, hello in greeter.poll(_LOOK_S):
                    said, number, peer = _HELLO.unpack(hello)
                    if secrets.compare_digest(said, token) and number < len(links) and (links[number], peer) in missing:
                        found[links[number]][peer] = connection
                        failed.callback(connection.close)
                        missing.remove((links[number], peer))
                    else:
                        connection.close()
                absent = sorted({members[peer] for _, peer in missing})
                if absent and (why := control.hopeless({peer for _, peer in missing})):
                    raise TransportError(why)
                if absent and time.monotonic() >= deadline:
                    raise TransportError(
                        f"rank {members[position]}: rank(s) {absent} did not connect within {timeout_s:g} s; see their "
                        f"logs, or raise --sp-timeout"
                    )
        failed.pop_all()
        greeter.close()
        listener.close()
    for connection in (x for connections in found.values() for x in connections.values()):
        not_inherited(connection)
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A send returns once all but this much is on its way: a chunk does not share the wire with the one behind it.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    return {link: Tcp(link, connections, members, position, timeout_s, control) for link, connections in found.items()}


class Tcp(Transport):
    """``connections[w]`` is the connection to position ``w``; parcels name peers by position. Made by :func:`connect`."""

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
        self._links = connections
        self._members = members
        self._position = position
        self._timeout_s = timeout_s
        self._control = control
        self._exchanges = 0
        self._seen = dict.fromkeys(connections, "nothing yet")  # what came last from each
        self._error: TransportError | None = None
        self._lock = threading.Lock()  # over what is due, and the error
        self._due: set[_Arrival] = set()
        self._sends: SimpleQueue[tuple[bytes, torch.Tensor, int, int] | _Arrival | None] = SimpleQueue()
        self._receives: dict[int, SimpleQueue[tuple[bytes, Parcel, _Arrival] | None]] = {}
        self._sent: deque[torch.Tensor] = deque()
        self._threads = [threading.Thread(target=self._run_sends, name="sf-xfuser tcp", daemon=True)]
        for peer in connections:
            self._receives[peer] = SimpleQueue()
            run = threading.Thread(target=self._run_receives, args=(peer,), name="sf-xfuser tcp", daemon=True)
            self._threads.append(run)
        for thread in self._threads:
            thread.start()

    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        self._let_go()
        due = [parcel for parcel in receives if parcel.nbytes]
        arrival = self._new_arrival(due, round)
        if not due:
            self._here(arrival, None)
        for parcel in due:
            self._receives[parcel.peer].put((self._header(parcel, round), parcel, arrival))
        for parcel in sends:
            if parcel.nbytes:
                self._sends.put((self._header(parcel, round), parcel.packed(), parcel.peer, round))
        self._exchanges += 1
        return arrival

    def drain(self) -> None:
        done = self._new_arrival([])
        self._sends.put(done)
        done.wait()
        self._let_go()

    def close(self) -> None:
        with self._lock:
            self._error = self._error or self._failure("the link was closed")
        self._sends.put(None)
        for queue in self._receives.values():
            queue.put(None)
        self._hang_up()
        for thread in self._threads:
            thread.join(self._timeout_s)
        for connection in self._links.values():
            connection.close()

    def _new_arrival(self, receives: Sequence[Parcel], round: int = 0) -> _Arrival:
        arrival = _Arrival(self, receives, f"round {round} of exchange {self._exchanges}")
        with self._lock:
            if self._error is not None:
                raise self._error
            self._due.add(arrival)
        return arrival

    def _failure(self, text: str) -> TransportError:
        return TransportError(
            f"rank {self._members[self._position]} on {socket.gethostname()}: {text} (link {self._link}, tcp)"
        )

    def wait(self, arrival: _Arrival) -> None:
        self._let_go()
        if not arrival.event.is_set():
            started = time.monotonic()
            with self._control.waiting():
                while not arrival.event.wait(min(_LOOK_S, self._timeout_s)):
                    waited = time.monotonic() - started
                    if (why := self._control.hopeless()) is not None:
                        self._fail(f"{self._late(arrival)} after {waited:.1f} s: {why}")
                    elif waited >= self._timeout_s:
                        self._fail(f"{self._late(arrival)} within {self._timeout_s:g} s")
        if not arrival.complete and self._error is not None:
            raise self._error

    def _late(self, arrival: _Arrival) -> str:
        late = sorted({parcel.peer for parcel in arrival.missing})
        if not late:
            return "what was to be sent was not taken"
        seen = ", ".join(f"rank {self._members[peer]}'s last: {self._seen[peer]}" for peer in late)
        return f"nothing came from rank(s) {[self._members[peer] for peer in late]} for {arrival.what} ({seen})"

    # -- threads ------------------------------------------------------------------------------------------------------

    def _run_sends(self) -> None:
        while (item := self._sends.get()) is not None:
            if isinstance(item, _Arrival):
                self._here(item, None)
                continue
            header, chunk, peer, round = item
            try:
                _send_all(self._links[peer], header, _bytes_of(chunk))
            except Exception as error:  # whatever it is, nobody else would hear of it
                return self._fail(f"sending round {round} to rank {self._members[peer]} failed: {error}")
            self._sent.append(chunk)  # let go by the thread that made it
            del item, chunk

    def _run_receives(self, peer: int) -> None:
        _leave_computing_undisturbed()
        connection, queue = self._links[peer], self._receives[peer]
        while (item := queue.get()) is not None:
            header, parcel, arrival = item
            try:
                seen = _receive_exactly(connection, _HEADER.size)
                if seen != header:
                    text = "(call's identity, exchange, round, slot, bytes)"
                    expected, got = _HEADER.unpack(header), _HEADER.unpack(seen)
                    words = f"expected {text} {expected} from rank {self._members[peer]}, got {got}"
                    return self._fail(words, OtherCall)
                _receive_into(connection, _bytes_of(parcel.packed()))
            except Exception as error:  # whatever it is, nobody else would hear of it
                return self._fail(f"receiving {arrival.what} from rank {self._members[peer]} failed: {error}")
            self._seen[peer] = arrival.what
            self._here(arrival, parcel)
            del item, parcel, arrival

    def _here(self, arrival: _Arrival, parcel: Parcel | None) -> None:
        """A parcel of a round is here; or, with None, all that was to be sent before a drain is on its way."""
        with self._lock:
            arrival.missing = [other for other in arrival.missing if other is not parcel]
            arrival.complete = not arrival.missing
            if arrival.complete:
                self._due.discard(arrival)
        if arrival.complete:
            arrival.arrived_s = time.perf_counter()
            arrival.event.set()

    def _fail(self, text: str, kind: type[TransportError] = TransportError) -> None:
        """The link is of no more use, and its peers see that."""
        with self._lock:
            self._error = self._error or kind(str(self._failure(text)))
            due, self._due = self._due, set()
        for arrival in due:
            arrival.event.set()
        self._hang_up()

    def _hang_up(self) -> None:
        for connection in self._links.values():
            with contextlib.suppress(OSError):  # the peer was first
                connection.shutdown(socket.SHUT_RDWR)

    def _header(self, parcel: Parcel, round: int) -> bytes:
        return _HEADER.pack(self._identity, self._exchanges, round, parcel.slot, parcel.nbytes)

    def _let_go(self) -> None:
        while self._sent:
            self._sent.popleft()


class _Arrival(Ticket):
    """A round's receives, until all of them are here; or a drain. ``what``: of which round."""

    def __init__(self, transport: Tcp, missing: Sequence[Parcel], what: str) -> None:
        self._transport = transport
        self.missing = list(missing)
        self.what = what
        self.complete = False
        self.event = threading.Event()

    def wait(self) -> None:
        self._transport.wait(self)


def _leave_computing_undisturbed() -> None:
    """Data that arrives wakes this thread, which on Linux then waits for its turn instead of interrupting a thread that
    computes: with more ranks than cores each such switch costs what the caches held."""
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


# -- sockets ----------------------------------------------------------------------------------------------------------


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _send_all(connection: socket.socket, header: bytes, body: memoryview) -> None:
    sent = connection.sendmsg([header, body]) - len(header)
    if sent < 0:
        connection.sendall(header[sent:])
        sent = 0
    if sent < len(body):
        connection.sendall(body[sent:])


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
