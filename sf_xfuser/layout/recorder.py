"""Records the program of a call: walks the schedule of one rank, and gives every chunk its place. No tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from sf_xfuser.kernels.packing import CompressedLayout, Format
from sf_xfuser.layout.memory_map import ALIGNMENT, Buffer, MemoryMap, Sizes
from sf_xfuser.layout.program import (
    INPUTS,
    AttendOp,
    Chunk,
    Compress,
    Copy,
    Measure,
    Op,
    Output,
    Poison,
    Post,
    Program,
    TransferSpec,
    View,
    Wait,
)
from sf_xfuser.layout.schedule import JOINT, Attend, Exchange, Link, Message, Piece, Schedule

_SLOT = {"q": 0, "k": 1, "v": 2, "o": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What a program depends on besides the schedule, for one rank.

    ``memory_maps[w]``: of this rank, and of each peer with a one-sided link. ``strides``: of each input [B, H, S, D].
    ``window_links``: links on which peers write into windows. ``host_links``: those on which this process writes into
    the windows of peers itself. ``compressed``: the format of chunks between machines. ``max_rows``: queries of one
    attention call (None: all). ``sum_itemsize``: bytes of an element of the sums. ``fused``: the kernel that attends
    also merges, so every output goes through the sums."""

    memory_maps: Mapping[int, MemoryMap]
    strides: Sequence[tuple[int, ...]]
    window_links: Sequence[Link] = ()
    host_links: Sequence[Link] = ()
    compressed: Format = "none"
    max_rows: int | None = None
    sum_itemsize: int = 4
    fused: bool = False


def record(schedule: Schedule, sizes: Sizes, placement: Placement) -> Program:
    """The program of the rank at ``schedule.position``. Pure."""
    return _Recorder(schedule, sizes, placement).record()


class _Recorder:
    def __init__(self, schedule: Schedule, sizes: Sizes, placement: Placement) -> None:
        self.schedule, self.sizes, self.placement = schedule, sizes, placement
        self.position = schedule.position
        self.map = placement.memory_maps[self.position]
        self.head_group = schedule.layout.head_group
        self.group = self.head_group(self.position)
        self.own = Piece(self.position)
        self.B, self.D = sizes.batch, sizes.head_size
        self.S = sizes.q_tokens[self.position]
        self.q_heads, self.kv_heads = sizes.q_heads[self.group], sizes.kv_heads[self.group]
        self.H = self.q_heads[1] - self.q_heads[0]
        self.all_heads = sizes.q_heads[-1][1]
        self.ops: list[Op] = []
        self.transfers: list[TransferSpec] = []
        self.scratch_bytes = 0
        self.scratch: dict[Buffer, View] = {}
        self.query_in_place = len(schedule.queries) == len(schedule.remote) + 1
        self.kv_in_place = schedule.slabs[0] == (self.own,) and schedule.layout.ring_degree == 1
        # What to do before the first use of a piece: wait for a transfer, or copy own tokens. The copies come as late
        # as possible, because transfers start first.
        self.pending: dict[tuple[str, Piece], int | tuple[tuple[View, View], ...]] = {}
        if not self.query_in_place:
            self.pending["q", self.own] = self._copies_of_own("q")
        if not self.kv_in_place:
            self.pending["kv", self.own] = self._copies_of_own("kv")
        if sizes.joint_tokens:
            self.pending["kv", Piece(JOINT)] = self._copies_of_joint()
        self.measured: set[str] = set()  # tensors of which a chunk is measured
        self.restores: dict[int, list[Compress]] = {}  # by transfer
        self.started: set[Piece] = set()  # queries with sums
        self.outputs: list[int] = []  # transfers of outputs
        self.stores: list[tuple[View, View]] = []
        self.final: dict[Piece, View] = {}  # where the final output of other ranks' queries is written

    def record(self) -> Program:
        self._place_outputs()
        for step in self.schedule.steps:
            if isinstance(step, Exchange):
                self._exchange(step)
            else:
                self._attend(step)
        self._wait(self.outputs, "outputs")
        self._copy("result", self.stores)
        return Program(
            ops=tuple(self.ops),
            transfers=tuple(self.transfers),
            scratch_bytes=self.scratch_bytes,
            result_shape=(self.B, self.S, self.all_heads, self.D),
            itemsize=self.sizes.itemsize,
        )

    # -- exchanges ----------------------------------------------------------------------------------------------------

    def _exchange(self, step: Exchange) -> None:
        """Start one round of transfers."""
        index = len(self.transfers)
        compressed = self.placement.compressed if step.link == "across" else "none"
        forwarded = [(m.tensor, piece) for m in step.sends if self._is_forward(m) for piece in m.pieces]
        leaves_window = bool(self.placement.window_links) and step.link not in self.placement.window_links
        if compressed != "none" or leaves_window or self.placement.host_links:  # this rank reads the chunks first
            self._need(forwarded, "to forward")
        after = self._awaited(forwarded)
        copies: list[tuple[View, View]] = []
        compressions: list[Compress] = []
        leaving: list[View] = []  # from the window of one transport over another one
        sends: list[Chunk] = []
        for message in step.sends:
            sources = self._sources(message)
            if message.tensor == "o" or self._is_forward(message):
                leaving += sources
            if step.link in self.placement.window_links:
                received = Message(message.tensor, message.pieces, self.position)
                arrivals = self.placement.memory_maps[message.peer].destinations(received)
            else:
                arrivals = ((0, None),) * len(sources)
            if compressed != "none":
                chunk, compression = self._compression(message, sources, compressed)
                compressions += compression
                sends.append(Chunk(message.peer, _SLOT[message.tensor[0]], chunk))
                continue
            for buffer, source, (offset, strides) in zip(self._names(message), sources, arrivals, strict=True):
                slot = _SLOT[buffer]
                if step.link in self.placement.host_links:
                    target = _contiguous(message.peer, offset // self.sizes.itemsize, source.shape)
                    target = target if strides is None else target._replace(strides=strides)
                    if target != source:
                        copies.append((source, target))
                    sends.append(Chunk(message.peer, slot, None, offset))
                elif source.memory in INPUTS:
                    target = self._new("scratch", source.shape)
                    copies.append((source, target))
                    sends.append(Chunk(message.peer, slot, target, offset))
                else:
                    sends.append(Chunk(message.peer, slot, source, offset))
        self._copy(f"pack {_describe(step.sends)}", copies)
        if leaves_window and leaving:
            self.ops.append(Poison(tuple(leaving)))
        self.ops += compressions
        measurements: list[Op] = []
        for op in compressions:
            kind = step.sends[0].tensor
            if kind not in self.measured:
                self.measured.add(kind)
                measurements.append(Measure(op.chunk, op.parts, op.formats))
        receives, nbytes = self._receives(step, index, compressed)
        launches = 2 if any(chunk.view is not None and chunk.view.numel for chunk in sends) else 1
        launches += bool(after)
        self.ops.append(Post(index, f"{step.link} {step.round}: {_describe(step.sends)}", launches, after))
        arriving = "" if not step.receives else step.receives[0].tensor
        name = f"{arriving} from {'+'.join(str(m.peer) for m in step.receives)}"
        self.transfers.append(TransferSpec(step.link, step.round, tuple(sends), tuple(receives), nbytes, name))
        self.ops += measurements

    def _receives(self, step: Exchange, index: int, compressed: Format) -> tuple[list[Chunk], int]:
        receives: list[Chunk] = []
        total = 0
        for message in step.receives:
            targets = self._targets(message)
            if compressed != "none":
                chunk, restores = self._compression(message, targets, compressed, restore=True)
                self.restores.setdefault(index, []).extend(restores)
                receives.append(Chunk(message.peer, _SLOT[message.tensor[0]], chunk))
                total += chunk.numel
            else:
                total += sum(target.numel for target in targets) * self.sizes.itemsize
                names = self._names(message)
                receives += [
                    Chunk(message.peer, _SLOT[name], target) for name, target in zip(names, targets, strict=True)
                ]
            if message.tensor == "o":
                if index not in self.outputs:
                    self.outputs.append(index)
                low, high = self.sizes.q_heads[self.head_group(message.peer)]
                first, end = message.pieces[0].span(self.S)
                self.stores.append((targets[0], self._result(first, end, low, high)))
            else:
                self.pending.update({(message.tensor, piece): index for piece in message.pieces})
        return receives, total

    def _compression(
        self, message: Message, parts: Sequence[View], format: Format, *, restore: bool = False
    ) -> tuple[View, list[Compress]]:
        """The bytes of a compressed chunk, and the operation that writes or reads them. K keeps its dtype."""
        formats: tuple[Format, ...] = ("none", format) if message.tensor == "kv" else (format,)
        if not parts[0].numel:
            return View("bytes", 0, (0,)), []
        S, B, H, D = parts[0].shape
        dtype = torch.float32 if self.sizes.itemsize == 4 else torch.float16  # only the item size matters
        nbytes = CompressedLayout(shape=(S, B, H, D), dtype=dtype, formats=formats).nbytes
        chunk = View("bytes", self._allocate(nbytes), (nbytes,))
        return chunk, [Compress(chunk, tuple(parts), formats, restore)]

    def _is_forward(self, message: Message) -> bool:
        """Whether the message sends a buffer on to a ring neighbour."""
        return message.tensor != "o" and self.head_group(message.peer) == self.group

    @staticmethod
    def _names(message: Message) -> tuple[str, ...]:
        return ("k", "v") if message.tensor == "kv" else (message.tensor,)

    def _sources(self, message: Message) -> tuple[View, ...]:
        """The chunk to send: views of the inputs, of buffers, or of a final output."""
        if self._is_forward(message):
            return self._views(message.tensor, message.pieces)
        (piece,) = message.pieces
        if message.tensor == "o":
            return (self.final[piece],)
        return self._own_chunk(message.tensor, piece, self.head_group(message.peer))

    def _targets(self, message: Message) -> tuple[View, ...]:
        if message.tensor != "o":
            return self._views(message.tensor, message.pieces)
        (buffer,) = self.map.buffers(message)
        low, high = self.sizes.q_heads[self.head_group(message.peer)]
        first, end = message.pieces[0].span(self.S)
        shape = end - first, self.B, high - low, self.D
        if buffer in self.map.offset:
            return (_contiguous("window", self.map.offset[buffer] // self.sizes.itemsize, shape),)
        return (self._new("scratch", shape),)

    # -- attention ----------------------------------------------------------------------------------------------------

    def _attend(self, step: Attend) -> None:
        """Attend queries to keys once both have arrived. The last keys write the final output."""
        name = _name(step)
        self._need([*(("q", p) for p in step.queries), *(("kv", p) for p in step.keys)], name)
        key_rows = self.map.rows("kv", step.keys)
        keys, values = self._views("kv", step.keys)
        rows = self.map.queries[step.queries]
        if rows.start == rows.stop:
            return
        queries = self._views("q", step.queries)[0]
        first, last = self.started.isdisjoint(step.queries), step.queries_last
        if key_rows.start == key_rows.stop:
            if last:
                self.ops.append(AttendOp(queries, None, None, self._outputs(rows, last=True), False, name))
            return
        self.started.update(step.queries)
        if first and last and rows == slice(0, self.map.queries.total) and not self.placement.fused:
            self.ops.append(AttendOp(queries, keys, values, (), True, name))
            # The offset of a view of "output" is its first row; only the call knows the strides.
            places = self._destinations(rows)
            self._copy("outputs", [(View("output", start, view.shape), view) for start, _, view in places])
            return
        size = self.placement.max_rows or rows.stop - rows.start
        for start in range(rows.start, rows.stop, size):
            stop = min(start + size, rows.stop)
            block = queries.rows(start - rows.start, stop - rows.start)
            outputs = self._outputs(slice(start, stop), last=last)
            self.ops.append(AttendOp(block, keys, values, outputs, first, name, self.placement.fused))

    def _outputs(self, rows: slice, *, last: bool) -> tuple[Output, ...]:
        """The sums of these queries, split by the destination of their final outputs for the last keys."""
        runs: Sequence[tuple[int, int, View | None]] = [(rows.start, rows.stop, None)]
        total, (sums, lse) = self.map.queries.total, self._sums
        return tuple(
            Output(
                start - rows.start,
                stop - rows.start,
                sums.rows(start, stop),
                View("sums", lse + start, (self.B, self.H, stop - start), (self.H * total, total, 1)),
                result,
            )
            for start, stop, result in (self._destinations(rows) if last else runs)
        )

    def _destinations(self, rows: slice) -> list[tuple[int, int, View]]:
        """Where the final output of these queries is written, as (first row, end, view): the result for this rank's own
        queries, which come first, and what ``final`` has for the others."""
        runs = [(start, stop, self._result(start, stop, *self.q_heads)) for start, stop in _overlap(rows, 0, self.S)]
        for piece, view in self.final.items():
            at = self.map.queries[piece,]
            for start, stop in _overlap(rows, at.start, at.stop):
                final = view.rows(start - at.start, stop - at.start)
                if runs and (merged := _adjacent(runs[-1][2], final)) is not None:
                    runs[-1] = runs[-1][0], stop, merged
                else:
                    runs.append((start, stop, final))
        return runs

    @cached_property
    def _sums(self) -> tuple[View, int]:
        """The sums of all queries, and the offset of their log-sum-exps."""
        total, item = self.map.queries.total, self.placement.sum_itemsize
        shape = total, self.B, self.H, self.D
        sums = _contiguous("sums", self._allocate(prod(shape) * item) // item, shape)
        return sums, self._allocate(total * self.B * self.H * item) // item

    @cached_property
    def _others(self) -> View:
        """The final output of other ranks' queries, which are sent from here."""
        return self._new("scratch", (self.map.queries.total - self.S, self.B, self.H, self.D))

    def _place_outputs(self) -> None:
        """Where the final output of each query of other ranks is written: the chunk to send, or with host links, the
        peer's window."""
        for step in self.schedule.steps:
            if not isinstance(step, Exchange):
                continue
            for message in step.sends:
                if message.tensor != "o":
                    continue
                (piece,) = message.pieces
                at = self.map.queries[message.pieces]
                if step.link in self.placement.host_links:
                    peer_map = self.placement.memory_maps[message.peer]
                    ((offset, _),) = peer_map.destinations(Message("o", message.pieces, self.position))
                    shape = at.stop - at.start, self.B, self.H, self.D
                    self.final[piece] = _contiguous(message.peer, offset // self.sizes.itemsize, shape)
                else:
                    self.final[piece] = self._others.rows(at.start - self.S, at.stop - self.S)
        self.final = dict(sorted(self.final.items(), key=lambda item: self.map.queries[item[0],].start))

    # -- memory -------------------------------------------------------------------------------------------------------

    def _need(self, pieces: Sequence[tuple[str, Piece]], name: str) -> None:
        """Copy and wait for what has to be there before a step."""
        copies: list[tuple[View, View]] = []
        transfers: list[int] = []
        for piece in pieces:
            found = self.pending.pop(piece, None)
            if isinstance(found, int):
                if found not in transfers:
                    transfers.append(found)
            elif found is not None:
                copies += found
        self._copy("own tokens", copies)
        self._wait(transfers, name)

    def _awaited(self, pieces: Sequence[tuple[str, Piece]]) -> tuple[int, ...]:
        """The transfers that receive these pieces, which are sent on as they are. Other pieces are made ready."""
        numbers: list[int] = []
        for piece in pieces:
            found = self.pending.get(piece)
            if isinstance(found, int) and found not in self.restores:
                numbers.append(found)
            else:
                self._need([piece], "to forward")
        return tuple(dict.fromkeys(numbers))

    def _copy(self, name: str, copies: Sequence[tuple[View, View]]) -> None:
        if copies := [copy for copy in copies if copy[0].numel]:
            self.ops.append(Copy(name, tuple(copies)))

    def _wait(self, transfers: Sequence[int], name: str) -> None:
        transfers = [index for index in transfers if self.transfers[index].receives]
        if not transfers:
            return
        self.ops.append(Wait(tuple(transfers), name))
        for index in transfers:  # the first wait for a transfer restores all of it
            self.ops += self.restores.pop(index, [])
            arrived = [piece for piece, pending in self.pending.items() if pending == index]
            for piece in arrived:
                del self.pending[piece]

    def _views(self, tensor: str, pieces: Sequence[Piece]) -> tuple[View, ...]:
        """Q, or K and V, of pieces that are adjacent in their buffers."""
        if tensor == "q":
            remote = pieces[0] in self.schedule.remote
            if self.query_in_place and not remote:
                return self._own_chunk("q", self.own, self.group)
            buffers: tuple[Buffer, ...] = (Buffer("q", int(remote)),)
        else:
            slab = self.map.slab_of[pieces[0]]
            if self.kv_in_place and slab == 0:
                return self._own_chunk("kv", self.own, self.group)
            buffers = Buffer("k", slab), Buffer("v", slab)
        rows = self.map.rows(tensor, pieces)
        return tuple(self._buffer(buffer).rows(rows.start, rows.stop) for buffer in buffers)

    def _buffer(self, buffer: Buffer) -> View:
        low, high = self.q_heads if buffer.tensor == "q" else self.kv_heads
        shape = self.map.tokens(buffer), self.B, high - low, self.D
        if buffer in self.map.offset:
            offset = self.map.offset[buffer] // self.sizes.itemsize
            return View("window", offset, shape, self.map.strides(buffer))
        if buffer not in self.scratch:
            self.scratch[buffer] = self._new("scratch", shape)
        return self.scratch[buffer]

    def _own_chunk(self, tensor: str, piece: Piece, group: int) -> tuple[View, ...]:
        """Views of this rank's tokens in ``piece`` and the heads of ``group``: Q, or K and V."""
        indices = (0,) if tensor == "q" else (1, 2)
        tokens = self.sizes.q_tokens if tensor == "q" else self.sizes.kv_tokens
        heads = (self.sizes.q_heads if tensor == "q" else self.sizes.kv_heads)[group]
        return tuple(self._input(index, *piece.span(tokens[self.position]), *heads) for index in indices)

    def _input(self, index: int, first: int, end: int, low: int, high: int) -> View:
        b, h, s, _ = self.placement.strides[index]
        return View(INPUTS[index], low * h + first * s, (end - first, self.B, high - low, self.D), (s, b, h))

    def _result(self, first: int, end: int, low: int, high: int) -> View:
        row = self.all_heads * self.D
        offset, shape = first * row + low * self.D, (end - first, self.B, high - low, self.D)
        return View("result", offset, shape, (row, self.S * row, self.D))

    def _copies_of_own(self, tensor: str) -> tuple[tuple[View, View], ...]:
        sources = self._own_chunk(tensor, self.own, self.group)
        return tuple(zip(sources, self._views(tensor, (self.own,)), strict=True))

    def _copies_of_joint(self) -> tuple[tuple[View, View], ...]:
        sources = [self._input(index, 0, self.sizes.joint_tokens, *self.kv_heads) for index in (3, 4)]
        return tuple(zip(sources, self._views("kv", (Piece(JOINT),)), strict=True))

    def _new(self, memory: str, shape: tuple[int, ...]) -> View:
        return _contiguous(memory, self._allocate(prod(shape) * self.sizes.itemsize) // self.sizes.itemsize, shape)

    def _allocate(self, nbytes: int) -> int:
        """The byte offset of new scratch memory."""
        offset = self.scratch_bytes
        self.scratch_bytes += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return offset


def _contiguous(memory: str | int, offset: int, shape: tuple[int, ...]) -> View:
    _, B, H, D = shape
    return View(memory, offset, shape, (B * H * D, H * D, D))


def _adjacent(view: View | None, following: View) -> View | None:
    """Both views as one, if the second one follows the first one in memory."""
    if view is None or view.memory != following.memory or view.strides != following.strides:
        return None
    if view.shape[1:] != following.shape[1:] or view.offset + view.shape[0] * view.strides[0] != following.offset:
        return None
    return view._replace(shape=(view.shape[0] + following.shape[0], *view.shape[1:]))


def _overlap(rows: slice, start: int, stop: int) -> list[tuple[int, int]]:
    start, stop = max(rows.start, start), min(rows.stop, stop)
    return [(start, stop)] if start < stop else []


def _name(step: Attend) -> str:
    queries, keys = ("+".join(str(s) for s in sorted({p.source for p in x})) for x in (step.queries, step.keys))
    return f"Q {queries} x KV {keys}".replace(str(JOINT), "joint")


def _describe(messages: Sequence[Message]) -> str:
    tensors = dict.fromkeys(m.tensor for m in messages)
    return f"{', '.join(tensors)} to {'+'.join(str(p) for p in dict.fromkeys(m.peer for m in messages))}"
