"""Control plane of a sequence-parallel group: small values, failures and deaths, over TCP connections of its own.

The rank at position 0 runs a *hub*, to which every rank (also that one) keeps a connection. The hub

- completes gathers: all values, or one error for all that names who is missing;
- notices a process that ends, by its connection, within a moment;
- turns what ranks report of a failed call into one *verdict*, which all ranks get: the first error of a rank's own,
  else a rank that is gone, else (after asking all ranks what they are doing) a rank that does not answer, that makes
  another call, or that makes none;
- lets ranks meet again after a failure. A rank that waits to meet is a live connection, so nothing stale is ever met.

The c10d store is used once, to publish the hub's address: what happens to the store later stops nobody. Frames are JSON
with a length in front. Whoever knows the token, which is in the store, is trusted, as everywhere in torch.distributed.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import secrets
import selectors
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from math import inf
from typing import Any, NamedTuple

from sf_xfuser.config import environment
from sf_xfuser.layout.topology import boot_id
from sf_xfuser.transport.rendezvous import Agreement

_TOKEN_BYTES = 16
_HELLO = struct.Struct(f"!{_TOKEN_BYTES}sI")  # token, position
_LENGTH = struct.Struct("!I")
_MOST_BYTES = 64 << 20  # of a message
_STRANGERS = 256  # connections that have not said who they are; the oldest makes room
_SEND_S = 2.0  # a peer that takes nothing for so long is treated as gone
_RETRY_S = 2.0  # one attempt to reach the hub; a connection that comes back is then found soon
_PROBE_S = 0.8  # for all ranks to say what they are doing
_OWN_S = 0.3  # and then for one of them to say that it has failed by itself
_VERDICT_S = 2.0  # for a verdict to arrive, the probe included
_ARRIVAL_S = 0.02  # by so much later a message of another host may arrive than that of a third
_GONE_S = 0.5  # a rank that is gone may have sent all that this one waits for: look once more after so long


class GroupError(RuntimeError):
    """The group cannot go on. The text is the same on every rank, and names who failed first where that is known."""


class Greeter:
    """Accepts connections and reads how each begins, without waiting for any of them."""

    def __init__(self, listener: socket.socket, hello_bytes: int) -> None:
        listener.setblocking(False)
        self._listener, self._hello_bytes = listener, hello_bytes
        self._begun: dict[socket.socket, bytearray] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def fileno(self) -> int:
        """Readable where ``poll`` has something to do."""
        return self._selector.fileno()

    def poll(self, timeout_s: float) -> list[tuple[socket.socket, bytes]]:
        """Connections whose first ``hello_bytes`` are here, with these. Waits up to ``timeout_s`` for one."""
        found = []
        for key, _ in self._selector.select(timeout_s):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if connection is self._listener:
                with contextlib.suppress(OSError):
                    self._accept()
                continue
            said = self._begun.get(connection)
            if said is None:  # it has made room for the one before
                continue
            try:
                piece = connection.recv(self._hello_bytes - len(said))
            except OSError:
                piece = b""
            said += piece
            if not piece or len(said) == self._hello_bytes:
                self._forget(connection)
                if piece:
                    connection.setblocking(True)
                    found.append((connection, bytes(said)))
                else:
                    connection.close()
        return found

    def close(self) -> None:
        for connection in list(self._begun):
            self._forget(connection)
            connection.close()
        self._selector.close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        not_inherited(connection)
        connection.setblocking(False)
        if len(self._begun) == _STRANGERS:
            oldest = next(iter(self._begun))
            self._forget(oldest)
            oldest.close()
        self._begun[connection] = bytearray()
        self._selector.register(connection, selectors.EVENT_READ)

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._begun[connection]


class ControlPlane:
    """This rank's end. ``members[w]`` is the global rank at position ``w``; gathers are in the order of positions.

    ``address``: at which the other ranks reach this one. ``doing``: what this rank does just now, for a verdict: a
    function that returns text, and whether that is a call.
    """

    def __init__(self, store: Agreement, members: Sequence[int], position: int, timeout_s: float) -> None:
        """Collective over the ranks of ``store``. Raises RuntimeError where one does not come within ``timeout_s``."""
        self.address = own_address(store)
        self.timeout_s = timeout_s
        self.doing: Callable[[], tuple[str, bool]] = _nothing
        self._members, self._position = members, position
        self._changed = threading.Condition()
        self._link: socket.socket | None = None
        self._failure: str | None = None
        self.failed_call: int | None = None
        """The number of the call that failed, where ``failure`` is about one."""
        self._gone: dict[int, tuple[str, float]] = {}  # by position: with which words, and when that was heard
        self._answers: dict[int, list[Any]] = {}
        self._count = 0
        self._met = False
        self._agreed = True
        self.session = ""
        """The same on all ranks, and never the same twice: of the time since they have met."""
        self._waits_since: float | None = None
        self._sending = threading.Lock()
        self._hub: _Hub | None = None
        at: dict[str, Any] | None = None
        if position == 0:
            self._hub = _Hub(self.address, members)
            at = {"port": self._hub.port, "token": self._hub.token.hex()}
        try:
            said = store.gather("control plane", [self.address, socket.gethostname(), at])
            self._hub_address, self._host_of_hub, hub = said[0]
            self._port, self._token = hub["port"], bytes.fromhex(hub["token"])
            if self._hub is not None:
                self._hub.start([host for _, host, _ in said])
            atexit.register(self.close)  # ranks that are done are not gone
            self._meet(timeout_s, time.monotonic(), time.monotonic())
        except BaseException:
            self.close()
            raise

    # -- between calls -------------------------------------------------------------------------------------------------

    @property
    def failure(self) -> str | None:
        """Why the group has failed, or will: the verdict, or a rank that is gone. None where nothing is known."""
        with self._changed:
            return self._failure or next((text for text, _ in self._gone.values()), None)

    def gather(self, topic: str, value: Any) -> list[Any]:
        """Every rank's ``value`` (JSON), by position. Collective, in the same order on all ranks. Raises GroupError, on
        every rank alike, where a rank is missing, is gone, or is at another topic."""
        with self._changed:
            self._count += 1
            number = self._count
        self._send(["gather", number, topic, value, self.timeout_s])
        with self.waiting(), self._changed:
            self._changed.wait_for(
                lambda: number in self._answers or self._failure or 0 in self._gone, self.timeout_s + _VERDICT_S
            )
            if number in self._answers:
                return self._answers.pop(number)
            if self._failure is not None:
                raise GroupError(self._failure)
        raise GroupError(self._unreachable(f"waited {self.timeout_s:g} s for {topic!r}"))

    def reconnect(self, raised: float | None, entered: float, limit_s: float | None = None) -> bool:
        """Meet all ranks again after a failure, which is forgotten. Collective. Raises GroupError where one does not
        come within ``limit_s`` (None: ``timeout_s``), or is gone.

        ``raised``: when this rank's program was told of the failure (``time.monotonic``; None: it was not),
        ``entered``: when it came to the call for which ranks meet. Returns whether every rank came after all had been
        told, so that their program may have agreed on where to go on."""
        self._leave()
        return self._meet(limit_s or self.timeout_s, raised, entered)

    def close(self) -> None:
        """Idempotent. Local: ranks that still wait for this one are told that it has closed."""
        atexit.unregister(self.close)
        self.doing = _nothing
        with self._changed:
            self._failure = self._failure or f"rank {self._members[self._position]} has closed its mesh"
        self._leave(for_good=True)
        if self._hub is not None:
            self._hub.stop()

    # -- during a call -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this rank waits for others, and is not to be named as the one that holds them up."""
        before, self._waits_since = self._waits_since, time.monotonic()
        try:
            yield
        finally:
            self._waits_since = before

    def hopeless(self, peers: Collection[int] = ()) -> str | None:
        """Why it is of no use to wait any longer: the call has failed on another rank, or one of ``peers`` (positions),
        whose memory or messages are waited for, is gone, and what it may have sent would be here by now. A rank may
        end as soon as its own part of the last call is done, so others that are gone mean nothing. Local; cheap."""
        if self._failure is not None:
            return self._failure
        for peer in self._gone.keys() & set(peers) if self._gone else ():
            text, heard = self._gone[peer]
            if time.monotonic() > heard + _GONE_S:
                return text
        return None

    def fail(self, text: str, *, own: bool, differs: bool = False, number: int = 0) -> str:
        """This rank's call of this ``number`` has failed: tell all ranks. ``own``: by an error of this rank's own, not
        by something that did not come. ``differs``: by something that belongs to another call. Returns the verdict.
        Local; bounded by seconds."""
        self._send(["fail", own, text, differs, number])
        with self.waiting(), self._changed:
            self._changed.wait_for(lambda: self._failure is not None or 0 in self._gone, _VERDICT_S)
            if self._failure is not None:
                return self._failure
        return self._unreachable(text)

    # ------------------------------------------------------------------------------------------------------------------

    def _unreachable(self, text: str) -> str:
        """The verdict of a rank that cannot hear the hub's."""
        hub = f"rank {self._members[0]} on {self._host_of_hub}"
        with self._changed:
            self._failure = self._failure or (
                next((text for text, _ in self._gone.values()), None)
                or f"{hub}, which coordinates the group, does not answer rank {self._members[self._position]} on "
                f"{socket.gethostname()}: it is stopped, or its machine cannot be reached ({text})"
            )
            return self._failure

    def _meet(self, limit_s: float, raised: float | None, entered: float) -> bool:
        with self._changed:
            self._failure, self.failed_call, self._met = None, None, False
            self._gone.clear()
        deadline = time.monotonic() + limit_s
        connection = self._connected(deadline, raised, entered)
        with self._changed:
            self._link = connection
        threading.Thread(target=self._listen, args=(connection,), name="sf-xfuser control", daemon=True).start()
        with self.waiting(), self._changed:
            self._changed.wait_for(
                lambda: self._met or self._failure or 0 in self._gone,
                max(0.0, deadline - time.monotonic()) + _VERDICT_S,
            )
            if self._met:
                return self._agreed
        raise GroupError(self._unreachable(f"waited {limit_s:g} s for all ranks to meet"))

    def _connected(self, deadline: float, raised: float | None, entered: float) -> socket.socket:
        while True:
            left = deadline - time.monotonic()
            try:
                connection = socket.create_connection((self._hub_address, self._port), max(0.1, min(_RETRY_S, left)))
                not_inherited(connection)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(_SEND_S)
                connection.sendall(_HELLO.pack(self._token, self._position))
                now = time.monotonic()
                told_s = None if raised is None else now - raised
                _send_frame(connection, ["meet", max(0.0, deadline - now), told_s, now - entered, [boot_id(), now]])
                return connection
            except OSError as error:
                if isinstance(error, ConnectionRefusedError) or time.monotonic() >= deadline:
                    text = (
                        f"rank {self._members[0]} on {self._host_of_hub} cannot be reached at {self._hub_address} port "
                        f"{self._port} ({error}): its process ended, or the TCP ports between the machines are closed; "
                        f"GLOO_SOCKET_IFNAME names the interface that joins them. Restart the job"
                    )
                    with self._changed:
                        self._failure = text
                    raise GroupError(text) from error

    def _send(self, message: list[Any]) -> None:
        with self._changed:
            connection = self._link
        if connection is None:
            return
        try:
            with self._sending:
                _send_frame(connection, message)
        except OSError:  # the listening thread hears the same
            _hang_up(connection)

    def _leave(self, *, for_good: bool = False) -> None:
        self._send(["bye", for_good])
        with self._changed:
            connection, self._link = self._link, None
        if connection is not None:
            _hang_up(connection)

    def _listen(self, connection: socket.socket) -> None:
        buffer = _Frames()
        while True:
            try:
                data = connection.recv(1 << 16)
            except TimeoutError:  # of sends, which share it
                continue
            except OSError:
                data = b""
            if not data:
                break
            for message in buffer.feed(data):
                self._hear(connection, message)
        with self._changed:
            if self._link is connection:
                hub = (
                    f"rank {self._members[0]} on {self._host_of_hub} is gone: its process ended, or its mesh is closed"
                )
                self._gone.setdefault(0, (hub, time.monotonic()))
                self._changed.notify_all()
        connection.close()

    def _hear(self, connection: socket.socket, message: list[Any]) -> None:
        kind, *rest = message
        if kind == "probe":
            try:
                what, calls = self.doing()
            except Exception as error:  # whatever it is: a verdict is worth more
                what, calls = f"cannot say what it does: {error}", True
            since = self._waits_since
            waits = None if since is None else time.monotonic() - since
            return self._send(["doing", what, calls, waits])
        with self._changed:
            if self._link is not connection:
                return
            if kind == "met":
                self._met = True
                self.session, self._agreed = rest
                self._count = 0
                self._answers.clear()
            elif kind == "gathered":
                self._answers[rest[0]] = rest[1]
            elif kind == "failed":
                if self._failure is None:
                    self._failure, self.failed_call = rest
            elif kind == "gone":
                self._gone.setdefault(rest[0], (rest[1], time.monotonic()))
            self._changed.notify_all()


class _Waiting(NamedTuple):
    """A rank that waits to meet the others: until when, when its program was told of the failure, and when that came
    to the call for which ranks meet; times of this host."""

    connection: socket.socket
    until: float
    told: float
    entered: float


def _nothing() -> tuple[str, bool]:
    return "is in no call", False


class _Hub:
    """Serves one group from a thread of the rank at position 0."""

    def __init__(self, address: str, members: Sequence[int]) -> None:
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=max(128, len(members)))
        not_inherited(self._listener)
        self.port: int = self._listener.getsockname()[1]
        self._names = [f"rank {rank}" for rank in members]
        self._ranks = list(members)
        self._greeter = Greeter(self._listener, _HELLO.size)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._greeter.fileno(), selectors.EVENT_READ)
        self._woken, self._wake = socket.socketpair()
        not_inherited(self._woken)
        not_inherited(self._wake)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._meeting: dict[int, _Waiting] = {}  # who waits to meet
        self._ranks_of: dict[socket.socket, int] = {}  # positions, of every connection
        self._frames: dict[socket.socket, _Frames] = {}
        self._running: dict[int, socket.socket] = {}  # who has met
        self._absent: dict[int, str] = {}  # by position: gone, or closed, and with which words
        self._dead: set[int] = set()  # those whose process ended, or that have closed their mesh
        self._gathers: dict[int, tuple[dict[int, list[Any]], float]] = {}
        self._verdict: str | None = None
        self._failed_call: int | None = None  # which was reported to have failed
        self._symptoms: dict[int, str] = {}  # by position: what did not come
        self._differ = False  # a rank was sent what belongs to another call
        self._doing: dict[int, list[Any]] = {}
        self._probe_until: float | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="sf-xfuser hub", daemon=True)

    def start(self, hosts: Sequence[str]) -> None:
        self._names = [f"{name} on {host}" for name, host in zip(self._names, hosts, strict=True)]
        self._thread.start()

    def stop(self) -> None:
        self._stopped = True
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        if self._thread.ident is None:  # it never ran
            self._end()
        elif self._thread.is_alive():
            self._thread.join(_SEND_S)

    # ------------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopped:
                ends = [until for _, until in self._gathers.values() if self._verdict is None]
                ends += [self._probe_until] if self._probe_until is not None else []
                ends += [waiting.until for waiting in self._meeting.values()]
                wait_s = max(0.0, min(ends) - time.monotonic()) if ends else None
                for key, _ in self._selector.select(wait_s):
                    if key.fileobj is self._woken:
                        continue
                    if isinstance(key.fileobj, int):
                        for connection, hello in self._greeter.poll(0):
                            self._greet(connection, hello)
                    elif key.fileobj in self._ranks_of:
                        self._read(key.fileobj)
                self._look_at_the_clock()
        finally:
            self._end()

    def _end(self) -> None:
        for connection in list(self._ranks_of):
            self._drop(connection)
        self._greeter.close()
        for end in (self._listener, self._woken, self._wake):
            end.close()
        self._selector.close()

    def _greet(self, connection: socket.socket, hello: bytes) -> None:
        token, position = _HELLO.unpack(hello)
        if not secrets.compare_digest(token, self.token) or position >= len(self._names):
            connection.close()
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(_SEND_S)
        self._ranks_of[connection], self._frames[connection] = position, _Frames()
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return self._lost(connection, "is gone: its process ended", dead=True)
        try:
            for message in self._frames[connection].feed(data):
                if connection in self._ranks_of:
                    self._hear(connection, self._ranks_of[connection], message)
        except ValueError:  # a rank that was interrupted while it sent
            self._lost(connection, "was interrupted in a message")

    def _hear(self, connection: socket.socket, position: int, message: list[Any]) -> None:
        kind, *rest = message
        if kind == "meet":
            return self._meet(connection, position, *rest)
        if kind == "bye":
            (for_good,) = rest
            words = "has closed its mesh" if for_good else "has failed in an earlier call"
            return self._lost(connection, words, dead=for_good)
        if self._running.get(position) is not connection:
            return
        if self._verdict is not None:
            self._tell(position, ["failed", self._verdict, self._failed_call])
        elif kind == "gather":
            self._gather(position, *rest)
        elif kind == "doing":
            self._doing[position] = rest
        elif kind == "fail":
            own, text, differs, self._failed_call = rest
            if own:
                return self._judge(f"{self._names[position]} failed: {text}")
            self._symptoms[position] = text
            self._differ |= differs
            if self._probe_until is None:
                self._probe_until = time.monotonic() + _PROBE_S
                for peer in list(self._running):
                    self._tell(peer, ["probe"])
        if self._probe_until is not None:
            everyone = len(self._doing) == len(self._names)
            if self._absent or (everyone and self._differ):
                self._judge(self._culprit())
            elif everyone:  # a rank that fails by itself may still say so
                self._probe_until = min(self._probe_until, time.monotonic() + _OWN_S)

    def _meet(
        self,
        connection: socket.socket,
        position: int,
        limit_s: float,
        told_s: float | None,
        entered_s: float,
        clock: list[Any],
    ) -> None:
        before = self._meeting.pop(position, None)
        if before is not None:
            self._drop(before.connection)
        now = time.monotonic()
        boot, sent = clock
        one_clock = boot == boot_id()  # processes of one kernel share time.monotonic
        said = sent if one_clock else now  # else as old as it arrives
        told = inf if told_s is None else said - told_s - (0 if one_clock else _ARRIVAL_S)
        self._meeting[position] = _Waiting(connection, now + limit_s, told, said - entered_s)
        self._dead.discard(position)  # it lives
        if len(self._meeting) == len(self._names):
            for old in list(self._running.values()):
                self._drop(old)
            waiting, self._meeting = self._meeting, {}
            self._running = {at: each.connection for at, each in waiting.items()}
            self._absent.clear()
            self._verdict = self._probe_until = self._failed_call = None
            self._gathers.clear()
            self._symptoms.clear()
            self._differ = False
            self._doing.clear()
            last_told = max(each.told for each in waiting.values())
            agreed = all(each.entered >= last_told for each in waiting.values())
            session = secrets.token_hex(8)
            for peer in list(self._running):
                self._tell(peer, ["met", session, agreed])
        elif self._dead:
            self._refuse_meeting(f"{self._absent[min(self._dead)]}. Restart the job", list(self._meeting))

    def _refuse_meeting(self, text: str, positions: Sequence[int]) -> None:
        for position in positions:
            connection = self._meeting.pop(position).connection
            with contextlib.suppress(OSError):
                _send_frame(connection, ["failed", text, None])
            self._drop(connection)

    def _gather(self, position: int, number: int, topic: str, value: Any, timeout_s: float) -> None:
        said, _ = self._gathers.setdefault(number, ({}, time.monotonic() + timeout_s))
        said[position] = [topic, value]
        if len(said) == len(self._names):
            del self._gathers[number]
            if len({topic for topic, _ in said.values()}) > 1:
                topics = self._by_words({w: f"is at {topic!r}" for w, (topic, _) in said.items()})
                return self._judge(f"ranks make different calls ({topics}). {_SAME_CALLS}")
            values = [said[w][1] for w in range(len(self._names))]
            for peer in list(self._running):
                self._tell(peer, ["gathered", number, values])
        else:
            self._look_for_the_absent()

    def _look_for_the_absent(self) -> None:
        """A gather that waits for a rank which is gone ends now."""
        for said, _ in self._gathers.values():
            for position, words in self._absent.items():
                if position not in said:
                    return self._judge(words)

    def _lost(self, connection: socket.socket, words: str, *, dead: bool = False) -> None:
        position = self._ranks_of[connection]
        self._drop(connection)
        if position in self._meeting and self._meeting[position].connection is connection:
            del self._meeting[position]
            if dead:
                self._absent[position] = f"{self._names[position]} {words}"
                self._never_meets(position)
        if self._running.get(position) is not connection:
            return
        del self._running[position]
        self._absent[position] = f"{self._names[position]} {words}"
        for peer in list(self._running):
            self._tell(peer, ["gone", position, self._absent[position]])
        if self._verdict is None:
            self._look_for_the_absent()
        if self._verdict is None and self._probe_until is not None:
            self._judge(self._culprit())
        if dead:
            self._never_meets(position)

    def _never_meets(self, position: int) -> None:
        self._dead.add(position)
        if self._meeting:
            self._refuse_meeting(f"{self._absent[position]}. Restart the job", list(self._meeting))

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if late := [at for at, waiting in self._meeting.items() if now >= waiting.until]:
            absent = [name for at, name in enumerate(self._names) if at not in self._meeting]
            self._refuse_meeting(f"{', '.join(absent)} did not come to meet again after a failed call", late)
        if self._verdict is not None:
            return
        if self._probe_until is not None and now >= self._probe_until:
            return self._judge(self._culprit())
        for said, until in self._gathers.values():
            if now >= until:
                absent = [name for at, name in enumerate(self._names) if at not in said]
                topic = next(iter(said.values()))[0]
                return self._judge(
                    f"{', '.join(absent)} did not come to {topic!r}, for which the other ranks wait: it failed, was "
                    f"started without the same --sp-* flags, or needs a longer --sp-timeout"
                )

    def _culprit(self) -> str:
        """Who holds the others up, from what ranks report and answer."""
        symptom = next(iter(self._symptoms.values()))
        for at, words in self._absent.items():
            if at not in self._symptoms:  # else it left because it had waited in vain
                return words
        silent = [name for at, name in enumerate(self._names) if at not in self._doing and at not in self._symptoms]
        if silent:
            return (
                f"{', '.join(silent)} did not answer within {_PROBE_S:g} s: the process is stopped, or its machine "
                f"cannot be reached ({symptom})"
            )
        calls = {at: what for at, (what, is_call, _) in self._doing.items() if is_call}
        idle = {at: what for at, (what, is_call, _) in self._doing.items() if not is_call}
        if idle and calls and not self._differ:
            return f"{self._by_words(idle)}, while the other ranks wait for it ({symptom})"
        if len(set(calls.values())) > 1:
            return f"ranks make different calls ({self._by_words(calls)}). {_SAME_CALLS}"
        busy = [self._names[at] for at, (_, _, waits) in self._doing.items() if waits is None]
        if busy and len(busy) < len(self._names):
            return f"{', '.join(busy)} computes, while the other ranks wait for it ({symptom})"
        return symptom

    def _by_words(self, said: dict[int, str]) -> str:
        """What ranks said, those that said the same together."""
        by_words: dict[str, list[str]] = {}
        for at in sorted(said):
            by_words.setdefault(said[at], []).append(self._names[at])
        return "; ".join(f"{', '.join(names)} {words}" for words, names in by_words.items())

    def _judge(self, verdict: str) -> None:
        self._verdict = verdict
        self._probe_until = None
        for peer in list(self._running):
            self._tell(peer, ["failed", verdict, self._failed_call])

    def _tell(self, position: int, message: list[Any]) -> None:
        connection = self._running.get(position)
        if connection is None:
            return
        try:
            _send_frame(connection, message)
        except TimeoutError:
            self._lost(connection, "takes no messages: it is stopped, or its machine cannot be reached")
        except OSError:
            pass  # it has hung up, and what it said before that is still to be read

    def _drop(self, connection: socket.socket) -> None:
        if self._ranks_of.pop(connection, None) is not None:
            del self._frames[connection]
            self._selector.unregister(connection)
        _hang_up(connection)
        connection.close()


_SAME_CALLS = "All ranks of a group must make the same calls in the same order, from one thread"


class _Frames:
    """Puts received bytes together to messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[list[Any]]:
        self._data += data
        while len(self._data) >= _LENGTH.size:
            (count,) = _LENGTH.unpack_from(self._data)
            if count > _MOST_BYTES:
                raise ValueError(f"a message of {count} bytes")
            if len(self._data) < _LENGTH.size + count:
                return
            body = bytes(self._data[_LENGTH.size : _LENGTH.size + count])
            del self._data[: _LENGTH.size + count]
            yield json.loads(body)


def _send_frame(connection: socket.socket, message: list[Any]) -> None:
    body = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(body)) + body)


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


# -- forked children ---------------------------------------------------------------------------------------------------

_own_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def not_inherited(connection: socket.socket) -> None:
    """A forked child closes its copy: one that outlives this process must not hide that it has ended."""
    _own_sockets.add(connection)


def _close_in_child() -> None:
    for connection in list(_own_sockets):
        with contextlib.suppress(OSError):
            connection.close()


os.register_at_fork(after_in_child=_close_in_child)


# -- addresses ---------------------------------------------------------------------------------------------------------


def own_address(store: Agreement) -> str:
    """The address at which the other ranks reach this one: that of the interface named in GLOO_SOCKET_IFNAME, else of
    the one that leads to the job's store; a rank for which that is itself asks for the way to another. Collective."""
    interface = environment(["GLOO_SOCKET_IFNAME"]).get("GLOO_SOCKET_IFNAME")
    if interface:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", interface.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError as error:
                raise RuntimeError(f"GLOO_SOCKET_IFNAME={interface} has no IPv4 address here: {error}") from error
        own = socket.inet_ntoa(answer[20:24])
    else:
        own = _address_towards(store.store_host)
    known = store.gather("address", own)
    elsewhere = [address for address in known if not _is_loopback(address)]
    return _address_towards(elsewhere[0]) if elsewhere and _is_loopback(own) else own


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _address_towards(host: str) -> str:
    """The local address of a packet to ``host``; none is sent."""
    family, kind, _, _, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])
