"""Sockets of the control plane and of the TCP transport: a listener, message framing, fork safety, addresses."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import socket
import struct
import weakref
from collections.abc import Iterator
from typing import Any

from sf_xfuser.config import environment
from sf_xfuser.transport.rendezvous import StoreGroup

TOKEN_BYTES = 16
MAX_PENDING = 256  # connections without a complete handshake; beyond it the oldest is closed
_FRAME_LENGTH = struct.Struct("!I")
_MAX_FRAME_BYTES = 64 << 20


class Acceptor:
    """Listens on a free port of ``address``. Reads a handshake from each connection and blocks on none of them."""

    def __init__(self, address: str, num_connections: int, handshake_bytes: int) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=max(128, num_connections))
        close_on_fork(self._listener)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._handshake_bytes = handshake_bytes
        self._pending: dict[socket.socket, bytearray] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def fileno(self) -> int:
        """A descriptor for another selector, readable when ``poll`` has events to handle."""
        return self._selector.fileno()

    def poll(self, timeout_s: float) -> list[tuple[socket.socket, bytes]]:
        """Return (connection, handshake) for each complete handshake. Waits up to ``timeout_s`` for the first event."""
        accepted = []
        for key, _ in self._selector.select(timeout_s):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if connection is self._listener:
                with contextlib.suppress(OSError):
                    self._accept()
            elif connection in self._pending:  # else _accept has just closed it
                handshake = self._pending[connection]
                try:
                    data = connection.recv(self._handshake_bytes - len(handshake))
                except OSError:
                    data = b""
                handshake += data
                if not data:
                    self._unregister(connection).close()
                elif len(handshake) == self._handshake_bytes:
                    self._unregister(connection).setblocking(True)
                    accepted.append((connection, bytes(handshake)))
        return accepted

    def close(self) -> None:
        """Close the listener and all pending connections."""
        for connection in list(self._pending):
            self._unregister(connection).close()
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        close_on_fork(connection)
        connection.setblocking(False)
        if len(self._pending) == MAX_PENDING:
            self._unregister(next(iter(self._pending))).close()
        self._pending[connection] = bytearray()
        self._selector.register(connection, selectors.EVENT_READ)

    def _unregister(self, connection: socket.socket) -> socket.socket:
        self._selector.unregister(connection)
        del self._pending[connection]
        return connection


class FrameReader:
    """Splits a byte stream into messages. A message is its length, then a JSON list."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[list[Any]]:
        """The messages that ``data`` completes. Raises ValueError for an invalid frame."""
        self._data += data
        while len(self._data) >= _FRAME_LENGTH.size:
            (length,) = _FRAME_LENGTH.unpack_from(self._data)
            if length > _MAX_FRAME_BYTES:
                raise ValueError(f"a message has {length} bytes, at most {_MAX_FRAME_BYTES} are allowed")
            end = _FRAME_LENGTH.size + length
            if len(self._data) < end:
                return
            body = bytes(self._data[_FRAME_LENGTH.size : end])
            del self._data[:end]
            yield json.loads(body)


def send_frame(connection: socket.socket, message: list[Any]) -> None:
    body = json.dumps(message).encode()
    connection.sendall(_FRAME_LENGTH.pack(len(body)) + body)


def shut_down(connection: socket.socket) -> None:
    """End both directions. A thread that is blocked on the connection returns."""
    with contextlib.suppress(OSError):  # the peer has closed it first
        connection.shutdown(socket.SHUT_RDWR)


# -- forked children ---------------------------------------------------------------------------------------------------

_parent_only: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_on_fork(connection: socket.socket) -> None:
    """Close a forked child's copy, which would keep the connection open after this process has ended."""
    _parent_only.add(connection)


def _close_in_child() -> None:
    for connection in list(_parent_only):
        with contextlib.suppress(OSError):
            connection.close()


os.register_at_fork(after_in_child=_close_in_child)


# -- addresses ---------------------------------------------------------------------------------------------------------


def local_address(store: StoreGroup) -> str:
    """The address at which the other ranks reach this one. Collective over ``store``.

    It belongs to the interface named in GLOO_SOCKET_IFNAME, else to the interface that routes to the store's host. The
    store's host reaches itself over loopback, so it uses the interface that routes to a rank on another host."""
    interface = environment(["GLOO_SOCKET_IFNAME"]).get("GLOO_SOCKET_IFNAME")
    own = _interface_address(interface) if interface else _source_address(store.store_host)
    external = [address for address in store.gather("address", own) if not _is_loopback(address)]
    return _source_address(external[0]) if external and _is_loopback(own) else own


def _interface_address(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
        except OSError as error:
            raise RuntimeError(f"GLOO_SOCKET_IFNAME={interface} has no IPv4 address here: {error}") from error
    return socket.inet_ntoa(answer[20:24])


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _source_address(host: str) -> str:
    """The source address of a packet to ``host``. No packet is sent."""
    family, kind, _, _, destination = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(destination)
        return str(probe.getsockname()[0])
