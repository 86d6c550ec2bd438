"""Runs one rank of a group without the other ranks, on one GPU or a CPU.

The window contains the peers' chunks before a call begins. The time of a call is then this rank's compute and its
host's enqueueing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from sf_xfuser.layout.plan import Layout, Plan
from sf_xfuser.layout.schedule import Exchange, Granularity, Message, Piece
from sf_xfuser.layout.topology import Topology
from sf_xfuser.torus.call import Call, Tokens, negotiate_call
from sf_xfuser.torus.graphs import Graphs
from sf_xfuser.torus.mesh import Mesh
from sf_xfuser.transport.base import OneSided, Parcel, Transfer, window_view
from sf_xfuser.transport.gpu.device import DeviceWindow
from sf_xfuser.transport.gpu.symm_mem import SymmMem


class SoleRank:
    """A ``ControlPlane`` for one process. All ranks appear to send the same value."""

    failure = None

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def gather(self, topic: str, value: Any) -> list[Any]:
        return [value] * self._ranks

    def abort_reason(self, peers: Collection[int] = ()) -> None:
        return None

    def late_ranks(self) -> str:
        return ""

    def report_failure(self, text: str, *, is_cause: bool, mismatch: bool = False, call: int = 0) -> str:
        return text

    def close(self) -> None:
        pass


class Loopback(OneSided):
    """Sends nothing and waits for nothing. ``sent``: the parcels of the last call, in the order of the schedule."""

    halves = 2  # one would be enough, because no peer writes

    def __init__(self, device: torch.device) -> None:
        self._window = torch.empty(0, dtype=torch.uint8, device=device)
        self.sent: list[Parcel] = []

    @property
    def window_bytes(self) -> int:
        return self.halves * self._window.nbytes

    def reserve(self, nbytes: int, scratch_bytes: int) -> None:
        if nbytes > self._window.nbytes:
            self._window = self._window.new_empty(nbytes)

    def begin(self) -> torch.Tensor:
        self.sent = []
        return self._window

    def record(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Transfer:
        return _LoopbackTransfer(self, sends)

    def drain(self) -> None:
        pass

    def windows(self) -> list[torch.Tensor]:
        """The parts of the window that a call may use."""
        return [self._window]


class _LoopbackTransfer(Transfer):
    def __init__(self, transport: Loopback, sends: Sequence[Parcel]) -> None:
        self._transport, self._sends = transport, sends

    def post(self) -> None:
        self._transport.sent += self._sends

    def wait(self) -> None:
        pass


class StreamLoopback(SymmMem):
    """The GPU transport with all of its host's work (packing, copies, flags, waits, streams).

    Copies go to unused memory, and each call raises all of its flags itself.
    """

    name = "loopback"

    def __init__(self, ranks: int, position: int, peers: Sequence[int], device: torch.device) -> None:
        self._memory_device = device
        control: Any = SoleRank(ranks)
        DeviceWindow.__init__(self, control, range(ranks), position, peers, 60.0)

    def begin(self) -> torch.Tensor:
        half = super().begin()
        self._flags.fill_(self.value)
        return half

    def windows(self) -> list[torch.Tensor]:
        """The parts of the window that a call may use."""
        assert self._block is not None and self._memory is not None
        return list(self._halves)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        memory, self._unused = (torch.empty(nbytes, dtype=torch.uint8, device=self._memory_device) for _ in range(2))
        self._address = dict.fromkeys(self._peers, self._unused.data_ptr())
        return memory

    def _free(self) -> None:
        pass


class OneRank:
    """Rank 0 of ``layout``. All ranks hold equally many tokens, in the order of their positions."""

    def __init__(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        link: Loopback | StreamLoopback,
        granularity: Granularity = "block",
        graphs: bool = False,
    ) -> None:
        """``q``, ``k``, ``v`` [B, H, L, D]: of all ranks."""
        ranks = layout.world_size
        if q.shape[2] % ranks:
            raise ValueError(f"{q.shape[2]} tokens cannot be split evenly over {ranks} ranks")
        topology = Topology.uniform(layout.num_machines, layout.ranks_per_machine)
        no_group: Any = None  # one rank needs no process groups
        control: Any = SoleRank(ranks)
        self.link, self._granularity = link, granularity
        self.mesh = Mesh(
            plan=Plan(layout=layout, even=layout, rule="explicit", reason="one rank", heads=q.shape[1]),
            grid=topology.fold(range(ranks)),
            topology=topology,
            position=0,
            links={"inside": link, "across": link},
            ulysses_group=no_group,
            ring_group=no_group,
            control=control,
            transport="loopback",
            transport_reason="loopback",
            graphs=Graphs(enabled=graphs),
        )
        self.tokens = q.shape[2] // ranks
        self.own = tuple(x[:, :, : self.tokens] for x in (q, k, v))
        self.counts = (self.tokens,) * ranks
        self._all = {"q": (q,), "kv": (k, v)}

    @property
    def heads(self) -> slice:
        """The head group of this rank."""
        return slice(*self.call_shape.sizes.q_heads[self.mesh.layout.head_group(0)])

    @property
    def call_shape(self) -> Call:
        return negotiate_call(self.mesh, self.own, None, Tokens(self.counts, self.counts), self._granularity)

    def fill(self, out: torch.Tensor) -> None:
        """Write the peers' chunks into the window; ``out`` [B, H, s, D]: the result of this rank's own tokens."""
        memory_map = self.call_shape.placement.memory_maps[0]
        for window in (memory_map.window_bytes and self.link.windows()) or []:
            for message in self._messages("receives"):
                for (offset, _), chunk in zip(
                    memory_map.destinations(message), self._chunks(message, out), strict=True
                ):
                    window_view(window, offset, chunk.shape, chunk.dtype).copy_(chunk)

    def _chunks(self, message: Message, out: torch.Tensor) -> list[torch.Tensor]:
        """The peer's chunks [S, B, H, D]: Q, K and V, or O."""
        layout, sizes = self.mesh.layout, self.call_shape.sizes
        if message.tensor == "o":
            low, high = sizes.q_heads[layout.head_group(message.peer)]
            first, end = message.pieces[0].span(self.tokens)
            return [out[:, low:high, first:end].permute(2, 0, 1, 3)]
        low, high = (sizes.q_heads if message.tensor == "q" else sizes.kv_heads)[layout.head_group(0)]
        return [
            torch.cat([x[:, low:high, self._rows(piece)] for piece in message.pieces], 2).permute(2, 0, 1, 3)
            for x in self._all[message.tensor]
        ]

    def outputs(self, result: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """The outputs of the last call as (rows among all tokens, [B, H, S, D]): its own from ``result``, the others as
        sent over a ``Loopback``."""
        assert isinstance(self.link, Loopback)
        yield slice(0, self.tokens), result[:, self.heads]
        sent = iter(self.link.sent)
        for message in self._messages("sends"):
            for _ in range(2 if message.tensor == "kv" else 1):
                parcel = next(sent)
            if message.tensor == "o":
                assert parcel.data is not None
                yield self._rows(message.pieces[0]), parcel.data.permute(1, 2, 0, 3)

    def _messages(self, side: str) -> Iterator[Message]:
        for step in self.call_shape.schedule.steps:
            if isinstance(step, Exchange):
                yield from getattr(step, side)

    def _rows(self, piece: Piece) -> slice:
        first, end = piece.span(self.tokens)
        return slice(piece.source * self.tokens + first, piece.source * self.tokens + end)
