"""The hub of the control plane: completes gathers, detects lost ranks, and decides the outcome of a failed call.

``control_plane`` describes the protocol. The hub runs in a thread of the rank at position 0.
"""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

from sf_xfuser.layout.topology import boot_id
from sf_xfuser.transport.sockets import TOKEN_BYTES, Acceptor, FrameReader, close_on_fork, send_frame, shut_down

HANDSHAKE = struct.Struct(f"!{TOKEN_BYTES}sI")  # token, position
SEND_TIMEOUT_S = 2.0  # a peer that accepts no data for this long is lost
_QUERY_S = 0.8  # time limit for all ranks to report their status
_CAUSE_S = 0.3  # time after all statuses in which a rank can still report that it is the cause
_DELAY_S = 0.02  # largest difference between the message delays of two hosts
_SAME_CALLS = "All ranks of a group must make the same calls in the same order, from one thread"


class _Join(NamedTuple):
    """A rank that waits for all others to join. All times use this host's clock.

    ``notified_at``: when its program was notified of the failure. ``entered_at``: when it entered the next call."""

    connection: socket.socket
    deadline: float
    notified_at: float
    entered_at: float


class _Status(NamedTuple):
    """A rank's answer to a query. ``waiting``: it waits for other ranks; otherwise it computes. ``call``: the number of
    its last call."""

    text: str
    in_call: bool
    waiting: bool
    call: int


@dataclass
class _Gather:
    deadline: float
    values: dict[int, tuple[str, Any]] = field(default_factory=dict)  # by position: topic, value


@dataclass
class _Epoch:
    """State of the group from one join of all ranks to the next. Keys are positions; ``gathers`` has numbers."""

    connections: dict[int, socket.socket] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)  # reasons
    gathers: dict[int, _Gather] = field(default_factory=dict)
    reports: dict[int, str] = field(default_factory=dict)  # failures that are not the cause
    statuses: dict[int, _Status] = field(default_factory=dict)
    query_deadline: float | None = None  # None: no query is active
    questions: dict[int, int] = field(default_factory=dict)  # call of each rank that asks which ranks are late for it
    mismatch: bool = False  # a rank has received data of another call
    failed_call: int | None = None
    outcome: str | None = None  # why the group has failed


class Hub:
    """Server of one group. ``members[w]`` is the global rank at position ``w``."""

    def __init__(self, address: str, members: Sequence[int]) -> None:
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._names = [f"rank {rank}" for rank in members]
        self._acceptor = Acceptor(address, len(members), HANDSHAKE.size)
        self.port = self._acceptor.port
        self._stop_receiver, self._stop_sender = socket.socketpair()
        close_on_fork(self._stop_receiver)
        close_on_fork(self._stop_sender)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._acceptor, selectors.EVENT_READ)
        self._selector.register(self._stop_receiver, selectors.EVENT_READ)
        self._connections: dict[socket.socket, tuple[int, FrameReader]] = {}  # with positions
        self._joins: dict[int, _Join] = {}  # by position
        self._ended: dict[int, str] = {}  # why a rank cannot reconnect: it has ended or closed its mesh
        self._epoch = _Epoch()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="sf-xfuser hub", daemon=True)

    def start(self, hosts: Sequence[str]) -> None:
        self._names = [f"{name} on {host}" for name, host in zip(self._names, hosts, strict=True)]
        self._thread.start()

    def stop(self) -> None:
        self._stopped = True
        with contextlib.suppress(OSError):
            self._stop_sender.send(b"x")
        if self._thread.ident is None:  # start was not called
            self._close()
        elif self._thread.is_alive():
            self._thread.join(SEND_TIMEOUT_S)

    # -- connections -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopped:
                for key, _ in self._selector.select(self._timeout_s()):
                    if key.fileobj is self._acceptor:
                        for connection, handshake in self._acceptor.poll(0):
                            self._accept(connection, handshake)
                    elif key.fileobj in self._connections:
                        self._receive(key.fileobj)
                self._check_deadlines()
        finally:
            self._close()

    def _close(self) -> None:
        for connection in list(self._connections):
            self._disconnect(connection)
        for closable in (self._acceptor, self._stop_receiver, self._stop_sender, self._selector):
            closable.close()

    def _accept(self, connection: socket.socket, handshake: bytes) -> None:
        token, position = HANDSHAKE.unpack(handshake)
        if not secrets.compare_digest(token, self.token) or position >= len(self._names):
            connection.close()
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(SEND_TIMEOUT_S)
        self._connections[connection] = position, FrameReader()
        self._selector.register(connection, selectors.EVENT_READ)

    def _disconnect(self, connection: socket.socket) -> None:
        if self._connections.pop(connection, None) is not None:
            self._selector.unregister(connection)
        shut_down(connection)
        connection.close()

    def _receive(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return self._on_lost(connection, "is gone: its process ended", ended=True)
        try:
            position, frames = self._connections[connection]
            for message in frames.feed(data):
                if connection in self._connections:
                    self._on_message(connection, position, message)
        except ValueError:
            self._on_lost(connection, "was interrupted while it sent a message")

    def _send(self, position: int, message: list[Any]) -> None:
        connection = self._epoch.connections.get(position)
        if connection is None:
            return
        try:
            send_frame(connection, message)
        except TimeoutError:
            self._on_lost(connection, "accepts no messages: it is stopped, or its machine cannot be reached")
        except OSError:
            pass  # the rank has disconnected; its earlier messages are read first

    def _broadcast(self, message: list[Any]) -> None:
        for position in list(self._epoch.connections):
            self._send(position, message)

    def _on_lost(self, connection: socket.socket, reason: str, *, ended: bool = False) -> None:
        """A rank has disconnected. ``ended``: it cannot reconnect."""
        (position, _), epoch = self._connections[connection], self._epoch
        reason = f"{self._names[position]} {reason}"
        self._disconnect(connection)
        joining = position in self._joins and self._joins[position].connection is connection
        if joining:
            del self._joins[position]
            if ended:
                epoch.lost[position] = reason
        if connected := epoch.connections.get(position) is connection:
            del epoch.connections[position]
            epoch.lost[position] = reason
            self._broadcast(["lost", position, reason])
            if epoch.outcome is None:
                self._check_gathers()
            if epoch.outcome is None and epoch.reports:
                self._set_outcome(self._first_failure())
        if ended and (joining or connected):
            self._ended[position] = reason
            self._refuse_joins(f"{reason}. Restart the job", list(self._joins))

    # -- messages ----------------------------------------------------------------------------------------------------

    def _on_message(self, connection: socket.socket, position: int, message: list[Any]) -> None:
        kind, *fields = message
        epoch = self._epoch
        if kind == "join":
            return self._on_join(connection, position, *fields)
        if kind == "leave":
            (ended,) = fields
            return self._on_lost(
                connection, "has closed its mesh" if ended else "has failed in an earlier call", ended=ended
            )
        if epoch.connections.get(position) is not connection:
            return
        if epoch.outcome is not None:
            self._send(position, ["outcome", epoch.outcome, epoch.failed_call])
        elif kind == "gather":
            self._on_gather(position, *fields)
        elif kind == "status":
            epoch.statuses[position] = _Status(*fields)
        elif kind == "failure":
            is_cause, text, mismatch, epoch.failed_call = fields
            if is_cause:
                return self._set_outcome(f"{self._names[position]} failed: {text}")
            epoch.reports[position] = text
            epoch.mismatch |= mismatch
            self._query()
        elif kind == "late":
            (epoch.questions[position],) = fields
            self._query()
        if epoch.query_deadline is not None:
            complete = len(epoch.statuses) == len(self._names)
            if epoch.reports and (epoch.lost or (complete and epoch.mismatch)):
                self._set_outcome(self._first_failure())
            elif complete and epoch.reports:
                epoch.query_deadline = min(epoch.query_deadline, time.monotonic() + _CAUSE_S)
            elif complete:
                self._answer_questions()

    def _query(self) -> None:
        """Request the status of all ranks, if that is not under way."""
        if self._epoch.query_deadline is None:
            self._epoch.statuses.clear()
            self._epoch.query_deadline = time.monotonic() + _QUERY_S
            self._broadcast(["query"])

    def _answer_questions(self) -> None:
        """Tell the ranks that have asked which ranks are late. A rank that does not answer is not just late."""
        epoch = self._epoch
        questions, epoch.questions, epoch.query_deadline = epoch.questions, {}, None
        answered = len(epoch.statuses) == len(self._names)
        for position, call in questions.items():
            late = [self._names[w] for w, status in sorted(epoch.statuses.items()) if status.call < call]
            self._send(position, ["late", ", ".join(late) if answered else ""])

    def _on_join(
        self,
        connection: socket.socket,
        position: int,
        timeout_s: float,
        since_notified_s: float | None,
        since_entered_s: float,
        clock: list[Any],
    ) -> None:
        earlier = self._joins.pop(position, None)
        if earlier is not None:
            self._disconnect(earlier.connection)
        now = time.monotonic()
        boot, sent_at = clock
        same_clock = boot == boot_id()  # processes of one kernel share time.monotonic
        sent_at = sent_at if same_clock else now
        notified_at = inf if since_notified_s is None else sent_at - since_notified_s - (0 if same_clock else _DELAY_S)
        self._joins[position] = _Join(connection, now + timeout_s, notified_at, sent_at - since_entered_s)
        self._ended.pop(position, None)
        if len(self._joins) == len(self._names):
            self._start_epoch()
        elif self._ended:
            self._refuse_joins(f"{self._ended[min(self._ended)]}. Restart the job", list(self._joins))

    def _start_epoch(self) -> None:
        """All ranks have joined."""
        for connection in self._epoch.connections.values():
            self._disconnect(connection)
        joins, self._joins = self._joins, {}
        self._epoch = _Epoch(connections={position: join.connection for position, join in joins.items()})
        last_notified = max(join.notified_at for join in joins.values())
        all_notified = all(join.entered_at >= last_notified for join in joins.values())
        self._broadcast(["joined", secrets.token_hex(8), all_notified])

    def _refuse_joins(self, reason: str, positions: Sequence[int]) -> None:
        for position in positions:
            connection = self._joins.pop(position).connection
            with contextlib.suppress(OSError):
                send_frame(connection, ["outcome", reason, None])
            self._disconnect(connection)

    def _on_gather(self, position: int, number: int, topic: str, value: Any, timeout_s: float) -> None:
        gather = self._epoch.gathers.setdefault(number, _Gather(time.monotonic() + timeout_s))
        gather.values[position] = topic, value
        if len(gather.values) < len(self._names):
            return self._check_gathers()
        del self._epoch.gathers[number]
        if len({topic for topic, _ in gather.values.values()}) > 1:
            topics = self._by_text({w: f"is at {topic!r}" for w, (topic, _) in gather.values.items()})
            return self._set_outcome(f"ranks make different calls ({topics}). {_SAME_CALLS}")
        self._broadcast(["gathered", number, [gather.values[w][1] for w in range(len(self._names))]])

    def _check_gathers(self) -> None:
        """Fail if a gather waits for a lost rank."""
        for gather in self._epoch.gathers.values():
            for position, reason in self._epoch.lost.items():
                if position not in gather.values:
                    return self._set_outcome(reason)

    # -- deadlines and the outcome -----------------------------------------------------------------------------------

    def _timeout_s(self) -> float | None:
        """Seconds until the next deadline, or None."""
        epoch = self._epoch
        deadlines = [join.deadline for join in self._joins.values()]
        if epoch.outcome is None:
            deadlines += [gather.deadline for gather in epoch.gathers.values()]
        if epoch.query_deadline is not None:
            deadlines.append(epoch.query_deadline)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _check_deadlines(self) -> None:
        now, epoch = time.monotonic(), self._epoch
        if late := [position for position, join in self._joins.items() if now >= join.deadline]:
            self._refuse_joins(f"{self._names_without(self._joins)} did not reconnect after a failed call", late)
        if epoch.outcome is not None:
            return
        if epoch.query_deadline is not None and now >= epoch.query_deadline:
            return self._set_outcome(self._first_failure()) if epoch.reports else self._answer_questions()
        for gather in epoch.gathers.values():
            if now >= gather.deadline:
                topic = next(iter(gather.values.values()))[0]
                return self._set_outcome(
                    f"{self._names_without(gather.values)} did not reach {topic!r} while the other ranks wait for it: "
                    f"it failed, was started without the same --sp-* flags, or needs a longer --sp-timeout"
                )

    def _set_outcome(self, outcome: str) -> None:
        """Fail the group, with the same text on all ranks, until they reconnect."""
        self._epoch.outcome = outcome
        self._epoch.query_deadline = None
        self._broadcast(["outcome", outcome, self._epoch.failed_call])

    def _first_failure(self) -> str:
        """The outcome if no rank has reported that it is the cause."""
        epoch = self._epoch
        report = next(iter(epoch.reports.values()))
        for position, reason in epoch.lost.items():
            if position not in epoch.reports:  # else it left because it had timed out itself
                return reason
        if silent := self._names_without({**epoch.statuses, **epoch.reports}):
            return (
                f"{silent} did not answer within {_QUERY_S:g} s: the process is stopped, or its machine cannot be "
                f"reached ({report})"
            )
        calls = {position: status.text for position, status in epoch.statuses.items() if status.in_call}
        idle = {position: status.text for position, status in epoch.statuses.items() if not status.in_call}
        if idle and calls and not epoch.mismatch:
            return f"{self._by_text(idle)}, while the other ranks wait for it ({report})"
        if len(set(calls.values())) > 1:
            return f"ranks make different calls ({self._by_text(calls)}). {_SAME_CALLS}"
        computing = [self._names[position] for position, status in epoch.statuses.items() if not status.waiting]
        if computing and len(computing) < len(self._names):
            return f"{', '.join(computing)} computes, while the other ranks wait for it ({report})"
        return report

    def _names_without(self, positions: dict[int, Any]) -> str:
        """The names of all ranks that are not at ``positions``."""
        return ", ".join(name for position, name in enumerate(self._names) if position not in positions)

    def _by_text(self, texts: dict[int, str]) -> str:
        """One clause for each distinct text, with the names of its ranks first."""
        names: dict[str, list[str]] = {}
        for position in sorted(texts):
            names.setdefault(texts[position], []).append(self._names[position])
        return "; ".join(f"{', '.join(ranks)} {text}" for text, ranks in names.items())
