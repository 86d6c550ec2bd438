"""The program of a call: its schedule as a flat tuple of operations, with the place of every chunk. Pure data.

``recorder.py`` turns the schedule of one rank into a ``Program``, once per call shape. ``str(program)`` is a table with
the launches and bytes of each operation. ``torus/run.py`` binds a program to the memory and the links of a mesh, and
runs it.

Chunks of Q, K, V and O are [S, B, H, D]. They are in the caller's tensors, in the window (where peers write), or in
*scratch* memory, which a mesh keeps between calls. So every address is known beforehand, except those of the caller's
tensors and of the result. In shared memory, chunks are copied straight into the windows of peers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from sf_xfuser.kernels.packing import Format
from sf_xfuser.layout.schedule import Link

INPUTS = ("query", "key", "value", "joint key", "joint value")
Strides = tuple[int, int, int]


class View(NamedTuple):
    """A strided view [S, B, H, D] of a memory, from element ``offset``; D is contiguous. ``memory``: one of ``INPUTS``,
    ``"result"``, ``"output"`` (of the only attention call), ``"window"``, ``"scratch"``, ``"sums"`` (scratch in fp32 or
    fp64), ``"bytes"`` (scratch as bytes), or the position of a peer, for its window."""

    memory: str | int
    offset: int
    shape: tuple[int, ...]
    strides: Strides = (0, 0, 0)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def rows(self, start: int, stop: int) -> View:
        shape = (stop - start, *self.shape[1:])
        return self._replace(offset=self.offset + start * self.strides[0], shape=shape)


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy each source to its target. One launch."""

    name: str
    copies: tuple[tuple[View, View], ...]
    launches = 1

    @property
    def nbytes(self) -> int:
        return sum(target.numel for _, target in self.copies)


@dataclass(frozen=True, slots=True)
class Compress:
    """Compress tensors into the bytes ``chunk``, or with ``restore``, the reverse. Each part has its own format."""

    chunk: View
    parts: tuple[View, ...]
    formats: tuple[Format, ...]
    restore: bool = False
    launches = 1
    name = "compress"


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure the error of a compressed chunk after it has left, in some calls."""

    chunk: View
    parts: tuple[View, ...]
    formats: tuple[Format, ...]
    launches = 0
    name = "error of a chunk"


@dataclass(frozen=True, slots=True)
class Poison:
    """Turn chunks into NaN if data of this call was lost, before they leave over another transport."""

    views: tuple[View, ...]
    name = "poison"

    @property
    def launches(self) -> int:
        return len(self.views)


@dataclass(frozen=True, slots=True)
class Post:
    """Start the transfer of this index, after the chunks of the transfers ``after``, which it forwards, have arrived.
    The chunks of a round are one copy operation, their flags another one, the wait for ``after`` a third one."""

    transfer: int
    name: str
    launches: int
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for all chunks of these transfers."""

    transfers: tuple[int, ...]
    name: str
    launches = 1


class Output(NamedTuple):
    """Rows ``start`` to ``stop`` of the queries of an ``Attend``: their sums of outputs [S, B, H, D] and log-sum-exps
    [B, H, S] so far, and for the last keys, where the final output is written."""

    start: int
    stop: int
    sums: View
    lse: View
    result: View | None


@dataclass(frozen=True, slots=True)
class AttendOp:
    """Attend ``queries`` to ``keys`` and ``values``, and merge the output into ``outputs``. ``first``: there are no
    earlier sums. ``fused``: one kernel attends and merges. Without ``outputs``, the output of attention stays in memory
    ``"output"``. Without ``keys``, only write the sums to the results."""

    queries: View
    keys: View | None
    values: View | None
    outputs: tuple[Output, ...]
    first: bool
    name: str
    fused: bool = False

    @property
    def launches(self) -> int:
        return 1 if self.fused else (self.keys is not None) + len(self.outputs)


Op = Copy | Compress | Measure | Poison | Post | Wait | AttendOp


class Chunk(NamedTuple):
    """A chunk to send or receive. ``view`` None: a copy has written it into the peer's window."""

    peer: int
    slot: int
    view: View | None
    offset: int = 0


@dataclass(frozen=True, slots=True)
class TransferSpec:
    link: Link
    round: int
    sends: tuple[Chunk, ...]
    receives: tuple[Chunk, ...]
    nbytes: int
    received: str
    """``nbytes`` and what is received, for traces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """``ops`` in order; ``transfers`` by index, in the order of their posts. ``scratch_bytes``: scratch memory that the
    program uses. ``result_shape``: [B, S, H, D]. ``itemsize``: bytes of an element of the inputs."""

    ops: tuple[Op, ...]
    transfers: tuple[TransferSpec, ...]
    scratch_bytes: int
    result_shape: tuple[int, int, int, int]
    itemsize: int

    END_LAUNCHES = 4
    """Of a call with one-sided transfers on a GPU: its identity, the check of all flags, that of the result, and a copy
    of the outcome to the host."""

    @property
    def launches(self) -> int:
        """Kernel launches and driver calls of one call over one-sided transfers between GPUs. A batch that the driver
        takes in one call counts once."""
        return sum(op.launches for op in self.ops) + (self.END_LAUNCHES if self.transfers else 0)

    def __str__(self) -> str:
        lines = [f"{'operation':<10} {'launches':>8} {'bytes':>12}  what"]
        for op in self.ops:
            kind = {"AttendOp": "attend"}.get(type(op).__name__, type(op).__name__.lower())
            lines.append(f"{kind:<10} {op.launches:>8} {self._nbytes(op):>12}  {op.name}")
        end = self.END_LAUNCHES if self.transfers else 0
        lines.append(f"{'end':<10} {end:>8} {0:>12}  the identity, flags and result of the call")
        lines.append(f"{'total':<10} {self.launches:>8} {sum(map(self._nbytes, self.ops)):>12}")
        return "\n".join(lines)

    def _nbytes(self, op: Op) -> int:
        if isinstance(op, Copy):
            return op.nbytes * self.itemsize
        if isinstance(op, Post):
            return self.transfers[op.transfer].nbytes
        return op.chunk.numel if isinstance(op, Compress) else 0
