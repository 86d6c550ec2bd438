"""One rank of a group without the others: what they would send lies in the window before a call begins, so a call takes
what this rank computes and what its host enqueues, and nothing else. On one GPU, or on a CPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from sf_xfuser.layout.plan import Layout, Plan
from sf_xfuser.layout.schedule import Exchange, Message, Piece
from sf_xfuser.layout.topology import Topology
from sf_xfuser.torus.call import Call, Tokens, negotiate_call
from sf_xfuser.torus.mesh import Mesh
from sf_xfuser.transport.base import OneSided, Parcel, Ticket, window_view
from sf_xfuser.transport.gpu.device import DeviceWindow
from sf_xfuser.transport.gpu.symm_mem import SymmMem


class Alone:
    """As ``ControlPlane``, where every rank says what this one says."""

    failure = None

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def gather(self, topic: str, value: Any) -> list[Any]:
        return [value] * self._ranks

    def hopeless(self, peers: Collection[int] = ()) -> None:
        return None

    def fail(self, text: str, *, own: bool, differs: bool = False, number: int = 0) -> str:
        return text

    def close(self) -> None:
        pass


class _Here(Ticket):
    def wait(self) -> None:
        pass


class Loopback(OneSided):
    """Nothing is sent and nothing awaited. ``sent``: the parcels of the last call, in the schedule's order."""

    halves = 2  # one would do as well as two, as no peer writes while a call reads: there is nobody to meet

    def __init__(self, device: torch.device) -> None:
        self._window = torch.empty(0, dtype=torch.uint8, device=device)
        self.sent: list[Parcel] = []

    @property
    def window_bytes(self) -> int:
        return self._window.nbytes

    def reserve(self, nbytes: int) -> None:
        if nbytes > self._window.nbytes:
            self._window = self._window.new_empty(nbytes)

    def begin(self) -> torch.Tensor:
        self.sent = []
        return self._window

    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        self.sent += sends
        return _Here()

    def drain(self) -> None:
        pass

    def windows(self) -> list[torch.Tensor]:
        """Each part of the window that a call may use."""
        return [self._window]


class StreamLoopback(SymmMem):
    """The transport between GPUs with all that its host does for a call (packs, copies, flags, waits, streams), where
    copies end in memory that nobody reads and every flag has been raised long ago."""

    name = "loopback"

    def __init__(self, ranks: int, position: int, peers: Sequence[int], device: torch.device) -> None:
        self._where = device
        control: Any = Alone(ranks)
        DeviceWindow.__init__(self, control, range(ranks), position, peers, 60.0)

    def reserve(self, nbytes: int) -> None:
        super().reserve(nbytes)
        assert self._block is not None and self._memory is not None
        self._raised = self._memory[self._block.flags : self._block.flags + 8].view(torch.int64).fill_(1)

    def windows(self) -> list[torch.Tensor]:
        """As ``Loopback.windows``."""
        assert self._block is not None and self._memory is not None
        starts = (self._block.half(0), self._block.half(1))
        return [self._memory[start : start + self._block.half_bytes] for start in starts]

    def _allocate(self, nbytes: int) -> torch.Tensor:
        memory, self._nowhere = (torch.empty(nbytes, dtype=torch.uint8, device=self._where) for _ in range(2))
        self._address = dict.fromkeys(self._peers, self._nowhere.data_ptr())
        return memory

    def _free(self) -> None:
        pass

    def _wait(self, peer: int, address: int, value: int, stream: int) -> None:
        self._driver.wait_64(self._raised.data_ptr(), 1, stream)


class OneRank:
    """Position 0 of ``layout``, with tokens spread evenly: the ranks' tokens follow each other by position."""

    def __init__(
        self, layout: Layout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, link: Loopback | StreamLoopback
    ) -> None:
        """``q``, ``k``, ``v`` [B, H, L, D]: those of all ranks."""
        ranks = layout.world_size
        if q.shape[2] % ranks:
            raise ValueError(f"{q.shape[2]} tokens cannot be spread evenly over {ranks} ranks")
        topology = Topology.uniform(layout.num_machines, layout.ranks_per_machine)
        nobody: Any = None  # no process groups: a mesh of one rank exchanges nothing through them
        control: Any = Alone(ranks)
        self.link = link
        self.mesh = Mesh(
            plan=Plan(layout=layout, even=layout, rule="explicit", reason="one rank alone", heads=q.shape[1]),
            grid=topology.fold(range(ranks)),
            topology=topology,
            position=0,
            links={"inside": link, "across": link},
            ulysses_group=nobody,
            ring_group=nobody,
            control=control,
            transport="loopback",
            transport_reason="the only available one",
        )
        self.tokens = q.shape[2] // ranks
        self.own = tuple(x[:, :, : self.tokens] for x in (q, k, v))
        self.counts = (self.tokens,) * ranks
        self._all = {"q": (q,), "kv": (k, v)}

    @property
    def heads(self) -> slice:
        """Of the head group that this rank attends."""
        return slice(*self._call.sizes.q_heads[self.mesh.layout.head_group(0)])

    @property
    def _call(self) -> Call:
        return negotiate_call(self.mesh, self.own, None, Tokens(self.counts, self.counts), overlap=True)

    def fill(self, out: torch.Tensor) -> None:
        """Put into the window what the peers would send; ``out`` [B, H, s, D]: the result of this rank's own tokens."""
        places = self._call.memory_maps[0]
        for window in (places.window_bytes and self.link.windows()) or []:
            for message in self._messages("receives"):
                offset, pitch = places.destination(message)
                chunk = self._chunk(message, out)
                window_view(window, offset, chunk.shape, chunk.dtype, pitch).copy_(chunk)

    def _chunk(self, message: Message, out: torch.Tensor) -> torch.Tensor:
        """What the peer sends: [S, B, H, D], or K and V as [S, 2, B, H, D]."""
        layout, sizes = self.mesh.layout, self._call.sizes
        if message.tensor == "o":
            low, high = sizes.q_heads[layout.head_group(message.peer)]
            first, end = message.pieces[0].span(self.tokens)
            return out[:, low:high, first:end].permute(2, 0, 1, 3).contiguous()
        low, high = (sizes.q_heads if message.tensor == "q" else sizes.kv_heads)[layout.head_group(0)]
        parts = [
            torch.cat([x[:, low:high, self._rows(piece)] for piece in message.pieces], 2).permute(2, 0, 1, 3)
            for x in self._all[message.tensor]
        ]
        return parts[0].contiguous() if len(parts) == 1 else torch.stack(parts, 1)

    def outputs(self, result: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Every output that this rank attended in the last call, as rows among all tokens and [B, H, S, D]: its own out
        of ``result``, the others as they were sent over a ``Loopback``."""
        assert isinstance(self.link, Loopback)
        yield slice(0, self.tokens), result[:, self.heads]
        for message, parcel in zip(self._messages("sends"), self.link.sent, strict=True):
            if message.tensor == "o":
                yield self._rows(message.pieces[0]), parcel.parts[0].permute(1, 2, 0, 3)

    def _messages(self, side: str) -> Iterator[Message]:
        for step in self._call.schedule.steps:
            if isinstance(step, Exchange):
                yield from getattr(step, side)

    def _rows(self, piece: Piece) -> slice:
        first, end = piece.span(self.tokens)
        return slice(piece.source * self.tokens + first, piece.source * self.tokens + end)
