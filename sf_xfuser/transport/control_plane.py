"""Control plane of a sequence-parallel group: gathers of small values, and failure detection, over TCP.

The rank at position 0 runs a hub (``control_hub``). Every rank, rank 0 included, keeps one connection to it. The c10d
store is used once, to publish the hub's address: a later failure of the store does not affect the group.

**Life of a group.** All ranks connect and join. Between calls they gather values. When a call fails on a rank, the rank
reports the failure. The hub then decides on one *outcome* and sends it to all ranks, so all raise the same error:

1. the first error that a rank raised itself (the *cause*; a timeout while it waits for a peer is not one),
2. else a rank that is lost: its process ended, or it disconnected,
3. else, after a query for the status of all ranks, a rank that does not answer, is in another
   call, is in no call, or still computes.

Before the next call all ranks reconnect: they open new connections and send ``join``. A ``join`` that waits for others
ends with its connection, so a stale one cannot complete.

============  =============  ===========================================================================================
message       from -> to     fields and meaning
============  =============  ===========================================================================================
(handshake)   rank -> hub    token, position: the first bytes of a connection, of fixed length
join          rank -> hub    timeout; seconds since the rank's program was notified of the failure, or None; seconds
                             since it entered the next call; the sender's clock (boot id, time)
joined        hub -> ranks   all ranks have joined: session id, whether every rank entered after all were notified
gather        rank -> hub    number, topic, value, timeout
gathered      hub -> ranks   number, values by position
failure       rank -> hub    whether this rank is the cause, error, whether it got data of another call, call number
query         hub -> ranks   requests the status, after a rank has reported a failure that is not the cause, or asks
                             which ranks are late
status        rank -> hub    text, whether the rank is in a call, whether it waits for others, number of its last call
late          rank -> hub    number of its call: asks which ranks have not started it
late          hub -> rank    their names, or nothing if there are none or if a rank does not answer
lost          hub -> ranks   a rank has disconnected: position, reason
outcome       hub -> ranks   the group has failed, or a join is refused: reason, number of the failed call or None
leave         rank -> hub    the rank disconnects next: whether it closes (True) or reconnects (False)
============  =============  ===========================================================================================

A message is its length in 4 bytes, then a JSON list. A connection that presents the token is trusted. The token is in
the store, so this connection is as secure as torch.distributed.
"""

from __future__ import annotations

import atexit
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from sf_xfuser.layout.topology import boot_id
from sf_xfuser.transport.control_hub import HANDSHAKE, SEND_TIMEOUT_S, Hub
from sf_xfuser.transport.rendezvous import StoreGroup
from sf_xfuser.transport.sockets import FrameReader, close_on_fork, local_address, send_frame, shut_down

_CONNECT_S = 2.0  # one attempt to connect to the hub; short, so that a restored network is used soon
_OUTCOME_S = 1.5  # time limit for an outcome to arrive, including the query
_LATE_S = 1.0  # time limit for the names of late ranks, including the query
_LOST_GRACE_S = 0.5  # data of a lost rank may still arrive for this long


class GroupError(RuntimeError):
    """The group has failed. The text is the same on every rank. It names the first failure if that is known."""


class ControlPlane:
    """One rank's end of the control plane. ``members[w]`` is the global rank at position ``w``.

    ``address``: the IP address at which other ranks reach this one. ``call_status`` answers the hub's queries: it
    returns a description of this rank's activity, and whether the rank is in a call.
    """

    def __init__(self, store: StoreGroup, members: Sequence[int], position: int, timeout_s: float) -> None:
        """Collective over the ranks of ``store``. Raises RuntimeError if a rank does not join within ``timeout_s``."""
        self.address = local_address(store)
        self.timeout_s = timeout_s
        self.call_status: Callable[[], tuple[str, bool]] = _no_call
        self.call = 0
        """The number of this rank's last call."""
        self.failed_call: int | None = None
        """The number of the failed call, if ``failure`` is about a call."""
        self.session = ""
        """A new unique id each time the ranks join, the same on all ranks."""
        self._members, self._position = members, position
        self._condition = threading.Condition()  # guards the fields below
        self._connection: socket.socket | None = None
        self._failure: str | None = None
        self._lost: dict[int, tuple[str, float]] = {}  # by position: reason, time of the message
        self._gathered: dict[int, list[Any]] = {}
        self._num_gathers = 0
        self._late: str | None = None  # the answer to a question
        self._all_notified: bool | None = None  # None until all ranks have joined
        self._waiting = False
        self._send_lock = threading.Lock()
        self._hub = Hub(self.address, members) if position == 0 else None
        endpoint = [self._hub.port, self._hub.token.hex()] if self._hub is not None else None
        try:
            gathered = store.gather("control plane", [self.address, socket.gethostname(), endpoint])
            self._hub_address, self._hub_host, (self._port, token) = gathered[0]
            self._token = bytes.fromhex(token)
            if self._hub is not None:
                self._hub.start([host for _, host, _ in gathered])
            atexit.register(self.close)  # a rank that ends normally closes, so it is not reported as lost
            self._join(timeout_s, time.monotonic(), time.monotonic())
        except BaseException:
            self.close()
            raise

    # -- between calls -------------------------------------------------------------------------------------------------

    @property
    def failure(self) -> str | None:
        """The outcome of a failure, or why a rank is lost; None if there is neither."""
        with self._condition:
            return self._failure or self._lost_reason()

    def gather(self, topic: str, value: Any) -> list[Any]:
        """Every rank's ``value`` (JSON), by position. Collective, in the same order on all ranks. Raises GroupError, on
        every rank, if a rank is missing, is lost, or gathers another topic."""
        with self._condition:
            self._num_gathers += 1
            number = self._num_gathers
        self._send(["gather", number, topic, value, self.timeout_s])
        self._wait_for_outcome(self.timeout_s + _OUTCOME_S, lambda: number in self._gathered)
        with self._condition:
            if number in self._gathered:
                return self._gathered.pop(number)
            failure = self._failure
        raise GroupError(failure or self._hub_failure(f"waited {self.timeout_s:g} s for {topic!r}"))

    def reconnect(self, notified_at: float | None, entered_at: float, timeout_s: float | None = None) -> bool:
        """Clear a failure and reconnect all ranks. Collective. Raises GroupError if a rank is lost, or does not join
        within ``timeout_s`` (default: that of the control plane).

        ``notified_at``: when this rank's program was notified of the failure (``time.monotonic``; None: it was not).
        ``entered_at``: when it entered the call that reconnects. Returns whether every rank entered after all had been
        notified: only then can the ranks' programs have agreed on the next call."""
        self._leave(closing=False)
        return self._join(timeout_s or self.timeout_s, notified_at, entered_at)

    def close(self) -> None:
        """Disconnect. Idempotent. Local. Ranks that still wait for this one raise that it has closed."""
        atexit.unregister(self.close)
        self.call_status = _no_call
        with self._condition:
            self._failure = self._failure or f"rank {self._members[self._position]} has closed its mesh"
        self._leave(closing=True)
        if self._hub is not None:
            self._hub.stop()

    # -- during a call -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark this rank as waiting for others, so that the hub does not report it as the late rank."""
        outer, self._waiting = self._waiting, True
        try:
            yield
        finally:
            self._waiting = outer

    def abort_reason(self, peers: Collection[int] = ()) -> str | None:
        """Why a wait for ``peers`` (positions) cannot complete, or None: the call has failed on another rank, or a peer
        is lost and its last data has had time to arrive. Other lost ranks do not matter, since a rank may end once its
        part of the last call is done. Local; cheap."""
        if self._failure is not None:
            return self._failure
        for peer in self._lost.keys() & set(peers) if self._lost else ():
            reason, received_at = self._lost[peer]
            if time.monotonic() > received_at + _LOST_GRACE_S:
                return reason
        return None

    def late_ranks(self) -> str:
        """The names of the ranks that have not started this rank's call. Empty if there are none, or if a rank does not
        answer. Local; takes a second at most."""
        with self._condition:
            self._late = None
        self._send(["late", self.call])
        self._wait_for_outcome(_LATE_S, lambda: self._late is not None)
        return self._late or ""

    def report_failure(self, text: str, *, is_cause: bool, mismatch: bool = False, call: int = 0) -> str:
        """Report to all ranks that this rank's call number ``call`` has failed. Returns the outcome. Local; takes a
        few seconds at most.

        ``is_cause``: this rank raised an error itself; False: data of a peer did not arrive. ``mismatch``: it
        received data of another call."""
        self._send(["failure", is_cause, text, mismatch, call])
        self._wait_for_outcome(_OUTCOME_S)
        return self._failure or self._hub_failure(text)

    # ------------------------------------------------------------------------------------------------------------------

    def _wait_for_outcome(self, timeout_s: float, condition: Callable[[], bool] = lambda: False) -> None:
        """Wait for an outcome, for the loss of the hub, or for the condition."""
        with self.waiting(), self._condition:
            self._condition.wait_for(lambda: condition() or self._failure is not None or 0 in self._lost, timeout_s)

    def _lost_reason(self) -> str | None:
        return next((reason for reason, _ in self._lost.values()), None)

    def _hub_failure(self, text: str) -> str:
        """Set and return the failure of a rank that gets no outcome from the hub."""
        with self._condition:
            self._failure = (
                self._failure
                or self._lost_reason()
                or f"rank {self._members[0]} on {self._hub_host}, which coordinates the group, does not answer rank "
                f"{self._members[self._position]} on {socket.gethostname()}: it is stopped, or its machine cannot be "
                f"reached ({text})"
            )
            return self._failure

    def _join(self, timeout_s: float, notified_at: float | None, entered_at: float) -> bool:
        with self._condition:
            self._failure, self.failed_call, self._all_notified = None, None, None
            self._lost.clear()
        deadline = time.monotonic() + timeout_s
        connection = self._connect(deadline, notified_at, entered_at)
        with self._condition:
            self._connection = connection
        threading.Thread(target=self._receive, args=(connection,), name="sf-xfuser control", daemon=True).start()
        remaining_s = max(0.0, deadline - time.monotonic())
        self._wait_for_outcome(remaining_s + _OUTCOME_S, lambda: self._all_notified is not None)
        with self._condition:
            if self._all_notified is not None:
                return self._all_notified
        raise GroupError(self._hub_failure(f"waited {timeout_s:g} s for all ranks to connect"))

    def _connect(self, deadline: float, notified_at: float | None, entered_at: float) -> socket.socket:
        """Connect to the hub and send ``join``."""
        while True:
            remaining_s = deadline - time.monotonic()
            try:
                address = self._hub_address, self._port
                connection = socket.create_connection(address, max(0.1, min(_CONNECT_S, remaining_s)))
                close_on_fork(connection)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(SEND_TIMEOUT_S)
                connection.sendall(HANDSHAKE.pack(self._token, self._position))
                now = time.monotonic()
                since_notified_s = None if notified_at is None else now - notified_at
                clock = [boot_id(), now]
                send_frame(connection, ["join", max(0.0, deadline - now), since_notified_s, now - entered_at, clock])
                return connection
            except OSError as error:
                if isinstance(error, ConnectionRefusedError) or time.monotonic() >= deadline:
                    text = (
                        f"rank {self._members[0]} on {self._hub_host} cannot be reached at {self._hub_address} port "
                        f"{self._port} ({error}): its process ended, or the TCP ports between the machines are closed; "
                        f"set GLOO_SOCKET_IFNAME to the interface between them. Restart the job"
                    )
                    with self._condition:
                        self._failure = text
                    raise GroupError(text) from error

    def _send(self, message: list[Any]) -> None:
        with self._condition:
            connection = self._connection
        if connection is None:
            return
        try:
            with self._send_lock:
                send_frame(connection, message)
        except OSError:  # the receiving thread then marks the hub as lost
            shut_down(connection)

    def _leave(self, *, closing: bool) -> None:
        self._send(["leave", closing])
        with self._condition:
            connection, self._connection = self._connection, None
        if connection is not None:
            shut_down(connection)

    def _receive(self, connection: socket.socket) -> None:
        frames = FrameReader()
        while True:
            try:
                data = connection.recv(1 << 16)
            except TimeoutError:  # the timeout limits sends only
                continue
            except OSError:
                data = b""
            if not data:
                break
            for message in frames.feed(data):
                self._on_message(connection, message)
        with self._condition:
            if self._connection is connection:
                reason = (
                    f"rank {self._members[0]} on {self._hub_host} is gone: its process ended, or its mesh is closed"
                )
                self._lost.setdefault(0, (reason, time.monotonic()))
                self._condition.notify_all()
        connection.close()

    def _on_message(self, connection: socket.socket, message: list[Any]) -> None:
        kind, *fields = message
        if kind == "query":
            return self._send_status()
        with self._condition:
            if self._connection is not connection:
                return
            if kind == "joined":
                self.session, self._all_notified = fields
                self._num_gathers = 0
                self._gathered.clear()
            elif kind == "gathered":
                number, values = fields
                self._gathered[number] = values
            elif kind == "late":
                (self._late,) = fields
            elif kind == "outcome":
                if self._failure is None:
                    self._failure, self.failed_call = fields
            elif kind == "lost":
                position, reason = fields
                self._lost.setdefault(position, (reason, time.monotonic()))
            self._condition.notify_all()

    def _send_status(self) -> None:
        try:
            text, in_call = self.call_status()
        except Exception as error:  # the hub needs an answer in any case
            text, in_call = f"cannot report its status: {error}", True
        self._send(["status", text, in_call, self._waiting, self.call])


def _no_call() -> tuple[str, bool]:
    return "is in no call", False
