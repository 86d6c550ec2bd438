"""The control plane's parts that need no other process."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from sf_xfuser.control_plane import _STRANGERS, Greeter


def test_the_oldest_stranger_speaks_while_it_makes_room():
    with ExitStack() as open_links, socket.create_server(("127.0.0.1", 0), backlog=_STRANGERS) as listener:
        greeter = Greeter(listener, 4)
        links = []
        for _ in range(_STRANGERS):
            links.append(open_links.enter_context(socket.create_connection(listener.getsockname())))
            assert greeter.poll(1.0) == []
        links.append(open_links.enter_context(socket.create_connection(listener.getsockname())))
        links[0].sendall(b"no")
        links[-1].sendall(b"here")
        found = []
        while not found:
            found = greeter.poll(1.0)
        assert [said for _, said in found] == [b"here"]
        found[0][0].close()
        greeter.close()
