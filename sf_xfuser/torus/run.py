"""Runs the program of a call on the memory and the links of a mesh.

``BoundProgram`` turns each operation of a ``Program`` into a function, once. A call fills in its tensors, then calls
the functions in order. Shapes are in names: B batch, H heads, S tokens, D head size.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sf_xfuser.kernels import (
    Attention,
    Chunks,
    FusedAttention,
    fix_fully_masked_lse,
    merge_partial,
    pack_compressed,
    unpack_compressed,
)
from sf_xfuser.kernels.copies import Copies, Side
from sf_xfuser.kernels.copies import Copy as KernelCopy
from sf_xfuser.layout.program import INPUTS, AttendOp, Compress, Copy, Measure, Poison, Post, Program, View, Wait
from sf_xfuser.torus.graphs import EAGER_CALLS, Graph
from sf_xfuser.transport.base import Parcel, Transfer, Transport
from sf_xfuser.transport.gpu.memory import is_capturing

if TYPE_CHECKING:
    from sf_xfuser.torus.mesh import Mesh

Slots = list[Any]  # the tensors of a call: its inputs, its result, and views of them and of fixed memory
_RESULT, _ATTENTION, _OUTPUT = len(INPUTS), len(INPUTS) + 1, len(INPUTS) + 2
_BASES = {name: index for index, name in enumerate((*INPUTS, "result", "", "output"))}


class BoundProgram:
    """A program for the current half of the window of ``mesh``. ``memories``: the fixed memory of each ``View``.
    ``kv_of_q``: the KV head of each query head, if they differ. ``fused``: attend with the fused kernel."""

    def __init__(
        self,
        program: Program,
        mesh: Mesh,
        memories: Mapping[str | int, torch.Tensor],
        example: torch.Tensor,
        kv_of_q: torch.Tensor | None,
        fused: bool,
    ) -> None:
        self.program = program
        self._mesh, self._memories, self._kv_of_q, self._fused = mesh, memories, kv_of_q, fused
        self._device, self._dtype = example.device, example.dtype
        self._slots: Slots = [None] * (_OUTPUT + 1)
        self._index: dict[Any, int] = {}  # slot of each fixed memory and view
        self._late: list[tuple[int, int, tuple[int, ...], tuple[int, ...], int]] = []  # views of inputs and the result
        transports: list[Transport] = list(dict.fromkeys(mesh.links.values()))
        with torch.inference_mode(False):
            self._transfers = [self._record(number) for number in range(len(program.transfers))]
            self._calls = [self._bind(op) for op in program.ops]
            self.ends = [transport.record_end() for transport in transports]
        received = Counter[str]()
        for spec in program.transfers:
            received[spec.link] += spec.nbytes
        self._received = tuple(received.items())
        self._can_capture = mesh.graphs.unavailable_reason(mesh, example.device) is None
        self._graph: Graph | None = None
        self._calls_alike = 0
        self._last_attention: Attention | None = None

    def call(self, inputs: Sequence[torch.Tensor], attention: Attention) -> torch.Tensor:
        """The result of the call, [B, S, H, D]. After ``Mesh.begin``, in the half for which the program was bound."""
        for link, nbytes in self._received:
            self._mesh.received_bytes[link] += nbytes
        if self._can_capture and self._mesh.trace is None and not is_capturing():
            if self._graph is None or self._graph.attention is not attention:
                self._count_call(inputs, attention)
            if self._graph is not None and self._graph.attention is attention:
                return self._graph.replay(inputs)
        result = inputs[0].new_empty(self.program.result_shape)
        self.run(inputs, attention, result)
        for end in self.ends:
            end(result)
        return result

    def _count_call(self, inputs: Sequence[torch.Tensor], attention: Attention) -> None:
        """Capture the program after a few calls with the same attention function."""
        self._calls_alike = self._calls_alike + 1 if attention is self._last_attention else 0
        self._last_attention = attention
        if self._calls_alike >= EAGER_CALLS:
            self._graph = self._mesh.graphs.capture(self._mesh, self, inputs, attention)
            self._can_capture = self._graph is not None

    def run(self, inputs: Sequence[torch.Tensor], attention: Attention, result: torch.Tensor) -> None:
        """Fill ``result`` [B, S, H, D], up to what ``ends`` do."""
        slots = self._slots.copy()
        slots[: len(inputs)] = inputs
        slots[_RESULT], slots[_ATTENTION] = result, attention
        for index, base, shape, strides, offset in self._late:
            memory = slots[base]
            slots[index] = memory.as_strided(shape, strides, memory.storage_offset() + offset)
        if self._mesh.trace is not None:
            return self._run_traced(slots)
        for call in self._calls:
            call(slots)

    def _run_traced(self, slots: Slots) -> None:
        trace, posted = self._mesh.trace, {}
        assert trace is not None
        trace.calls += 1
        for op, call in zip(self.program.ops, self._calls, strict=True):
            if isinstance(op, Post):
                posted[op.transfer] = time.perf_counter()
            if isinstance(op, Wait | AttendOp):
                with trace.span("wait" if isinstance(op, Wait) else "compute", op.name, self._device):
                    call(slots)
            else:
                call(slots)
        for number, started_s in posted.items():
            spec, arrived_s = self.program.transfers[number], self._transfers[number].arrived_s
            if arrived_s is not None and spec.nbytes:
                trace.add(spec.link, spec.received, started_s, arrived_s, spec.nbytes)

    # -- binding ------------------------------------------------------------------------------------------------------

    def _record(self, number: int) -> Transfer:
        spec = self.program.transfers[number]
        sends, receives = (
            [
                Parcel(None if view is None else self._tensor(view), peer, slot, offset)
                for peer, slot, view, offset in chunks
            ]
            for chunks in (spec.sends, spec.receives)
        )
        return self._mesh.links[spec.link].record(spec.round, sends, receives)

    def _bind(self, op: Any) -> Callable[[Slots], object]:
        if isinstance(op, AttendOp):
            return self._bind_attend(op)
        if isinstance(op, Copy):
            return self._bind_copy(op)
        if isinstance(op, Post):
            return self._bind_post(op)
        if isinstance(op, Wait):
            return self._bind_wait(op)
        if isinstance(op, Compress | Measure):
            return self._bind_compress(op)
        assert isinstance(op, Poison)
        assert self._mesh.window is not None
        return _in_order([partial(self._mesh.window.poison, self._tensor(view)) for view in op.views])

    def _bind_post(self, op: Post) -> Callable[[Slots], object]:
        transport = self._mesh.links[self.program.transfers[op.transfer].link]
        by_transport = self._by_transport(op.after)
        post = transport.record_post(self._transfers[op.transfer], by_transport.pop(transport, []))
        return _in_order([*(other.record_wait(transfers) for other, transfers in by_transport.items()), post])

    def _by_transport(self, numbers: Sequence[int]) -> dict[Transport, list[Transfer]]:
        found: dict[Transport, list[Transfer]] = {}
        for number in numbers:
            transport = self._mesh.links[self.program.transfers[number].link]
            found.setdefault(transport, []).append(self._transfers[number])
        return found

    def _bind_wait(self, op: Wait) -> Callable[[Slots], object]:
        by_transport = self._by_transport(op.transfers)
        return _in_order([transport.record_wait(transfers) for transport, transfers in by_transport.items()])

    def _bind_copy(self, op: Copy) -> Callable[[Slots], object]:
        sides = [tuple((self._base(view.memory), view) for view in copy) for copy in op.copies]
        dtype, device = self._dtype, self._device
        if op.copies[0][0].memory != "output":
            return _copy_function(sides, dtype, device)
        known: dict[tuple[int, ...], Callable[[Slots], object]] = {}  # by the strides of the output

        def copy_output(slots: Slots) -> None:
            b, h, s, _ = strides = slots[_OUTPUT].stride()
            if strides not in known:
                known[strides] = _copy_function(
                    [
                        ((slot, view._replace(offset=view.offset * s, strides=(s, b, h))), target)
                        for (slot, view), target in sides
                    ],
                    dtype,
                    device,
                )
            known[strides](slots)

        return copy_output

    def _bind_compress(self, op: Compress | Measure) -> Callable[[Slots], object]:
        chunk = self._tensor(op.chunk)
        parts = [self._slot(view) for view in op.parts]
        if isinstance(op, Measure):
            compression = self._mesh.compression
            assert compression is not None
            return lambda slots: compression.measure(chunk, [slots[part] for part in parts], op.formats)
        if op.restore:
            return lambda slots: unpack_compressed(chunk, [slots[part] for part in parts], op.formats)
        return lambda slots: pack_compressed([slots[part] for part in parts], chunk, op.formats)

    def _bind_attend(self, op: AttendOp) -> Callable[[Slots], object]:
        outputs = [
            (
                output.start,
                output.stop,
                self._slot(output.sums, heads_first=True),
                self._tensor(output.lse),
                None if output.result is None else self._slot(output.result, heads_first=True),
            )
            for output in op.outputs
        ]
        if op.keys is None or op.values is None:
            finals = [(sums, result) for _, _, sums, _, result in outputs if result is not None]
            return lambda slots: [slots[result].copy_(slots[sums]) for sums, result in finals]
        q, k, v = (self._slot(view, heads_first=True) for view in (op.queries, op.keys, op.values))
        first, repeat = op.first, self._kv_of_q
        if self._fused and outputs:
            return self._bind_fused(q, k, v, outputs, first)
        whole = len(outputs) == 1

        def attend(slots: Slots) -> None:
            queries, keys, values = slots[q], slots[k], slots[v]
            if repeat is not None:
                keys, values = keys.index_select(1, repeat), values.index_select(1, repeat)
            out, lse = slots[_ATTENTION](queries, keys, values)
            if not outputs:
                slots[_OUTPUT] = out if out.stride(3) == 1 else out.contiguous()
                return
            lse = fix_fully_masked_lse(queries, keys, out, lse)
            for start, stop, sums, sums_lse, result in outputs:
                part, part_lse = (out, lse) if whole else (out[:, :, start:stop], lse[:, :, start:stop])
                final = None if result is None else slots[result]
                merge_partial(slots[sums], sums_lse, part, part_lse, final, first)

        return attend

    def _bind_fused(
        self, q: int, k: int, v: int, outputs: Sequence[tuple[int, int, int, torch.Tensor, int | None]], first: bool
    ) -> Callable[[Slots], object]:
        slots = self._slots.copy()
        for index, _, shape, strides, _ in self._late:
            slots[index] = torch.empty_strided(shape, strides, dtype=self._dtype, device="meta")
        results = [result for *_, result in outputs if result is not None]
        chunks = Chunks(
            [slots[q][:, :, start:stop] for start, stop, *_ in outputs],
            [slots[k]],
            [slots[v]],
            [slots[sums] for _, _, sums, _, _ in outputs],
            [lse for *_, lse, _ in outputs],
            [slots[result] for result in results],
        )
        kv_of_q = None if self._kv_of_q is None else self._kv_of_q.tolist()
        run = FusedAttention(chunks, kv_of_q=kv_of_q, first=first).run
        (own,) = [result for result in results if slots[result].is_meta] or (_RESULT,)  # one output at most
        return lambda slots: run(slots[q], slots[k], slots[v], slots[own])

    # -- views --------------------------------------------------------------------------------------------------------

    def _base(self, memory: str | int) -> int:
        """The slot of a memory."""
        if memory in _BASES:
            return _BASES[memory]
        if memory not in self._index:
            self._index[memory] = len(self._slots)
            self._slots.append(self._memories[memory])
        return self._index[memory]

    def _slot(self, view: View, *, heads_first: bool = False) -> int:
        """The slot of a view, [S, B, H, D], or with ``heads_first`` [B, H, S, D]."""
        if (view, heads_first) not in self._index:
            self._index[view, heads_first] = len(self._slots)
            if view.memory in _BASES:
                shape, strides = _geometry(view, heads_first)
                self._late.append((len(self._slots), _BASES[view.memory], shape, strides, view.offset))
                self._slots.append(None)
            else:
                self._slots.append(self._tensor(view, heads_first=heads_first))
        return self._index[view, heads_first]

    def _tensor(self, view: View, *, heads_first: bool = False) -> torch.Tensor:
        """A view of fixed memory. Sums of log-sum-exps are [B, H, S], bytes [n]."""
        memory = self._memories[view.memory]
        shape, strides = _geometry(view, heads_first)
        return memory.as_strided(shape, strides, memory.storage_offset() + view.offset)


def _in_order(calls: Sequence[Callable[[], object]]) -> Callable[[Slots], object]:
    """Operations that take no tensor of the call, one after another."""
    if len(calls) == 1:
        (only,) = calls
        return lambda slots: only()

    def run(slots: Slots) -> None:
        for call in calls:
            call()

    return run


def _copy_function(
    sides: Sequence[Sequence[tuple[int, View]]], dtype: torch.dtype, device: torch.device
) -> Callable[[Slots], object]:
    """Copies between (slot, view) pairs, as one launch."""
    bases: dict[int, int] = {}  # index in the call of the kernel, by slot
    kernel = Copies(
        [
            KernelCopy(
                *(Side(bases.setdefault(slot, len(bases)), view.offset, view.strides) for slot, view in pair),
                pair[0][1].shape,
            )
            for pair in sides
        ],
        dtype,
        device,
    )
    slots_of, run = tuple(bases), kernel.run
    return lambda slots: run([slots[slot] for slot in slots_of])


def _geometry(view: View, heads_first: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if len(view.shape) == 1:
        return view.shape, (1,)
    if len(view.shape) == 3:
        return view.shape, view.strides
    (S, B, H, D), (s, b, h) = view.shape, view.strides
    return ((B, H, S, D), (b, h, s, 1)) if heads_first else ((S, B, H, D), (s, b, h, 1))
