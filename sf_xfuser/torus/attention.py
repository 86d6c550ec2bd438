"""Torus Attention: runs one rank's schedule. Shapes are in names: B batch, H heads, S tokens, D head size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import index

import torch

from sf_xfuser.kernels import (
    AttendFunction,
    Attention,
    Chunks,
    attend_unchecked,
    fix_fully_masked_lse,
    fused_unsupported_reason,
    merge_partial,
    prepare,
    sdpa_attend,
)
from sf_xfuser.layout.schedule import JOINT, Attend, Exchange, Message, Piece
from sf_xfuser.torus.buffers import Buffers
from sf_xfuser.torus.call import Call, Joint, Tokens, agree
from sf_xfuser.torus.mesh import Mesh
from sf_xfuser.transport.base import Parcel, Ticket

# On a CPU, queries are attended in runs of rows, so that a partial result stays small beside O. PyTorch's kernel works
# on fewer rows at a time, and more slowly, below 768; beyond 1024 it gains nothing.
_MIN_ROWS, _MAX_ROWS = 768, 1024

NO_GRADIENT = "a gradient is asked for, and Torus Attention computes none"


def asks_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what is done with these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def torus_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mesh: Mesh,
    attention: Attention = sdpa_attend,
    joint: Joint | None = None,
    tokens: Tokens | tuple[Sequence[int], Sequence[int]] | None = None,
    overlap: bool = True,
) -> torch.Tensor:
    """Dense, non-causal attention over the tokens of all ranks of ``mesh``. Collective over the group.

    ``query`` [B, H, S_q, D] and ``key``, ``value`` [B, H_kv, S_kv, D] hold this rank's tokens and all heads, any
    strides; S_q and S_kv may differ from each other and from rank to rank (0 included), H_kv divides H. Returns
    [B, H, S_q, D] (a view of [B, S_q, H, D]) in the input dtype.

    ``attention`` computes one piece (see ``kernels.attend``). Pieces are merged by log-sum-exp in fp32 (fp64 inputs: in
    fp64) in a fixed order, so the same call gives the same bits. ``"fused"``: one Triton kernel computes and merges a
    piece; on a CPU its PyTorch reference does.
    ``joint`` holds tokens that every rank has. They are attended once, at the first or last KV.
    ``tokens`` gives S_q and S_kv of every rank, by position in ``mesh``. With it, only chunks are exchanged once a call
    shape has been seen. Without it, the ranks exchange their counts at every call.
    ``overlap=False`` (alike on every rank) exchanges all chunks first, then attends everything in one call: faster
    where a call is short. CPU ranks of one host always do this.

    On CUDA the work is on the current stream. No transfer is pending afterwards. For inference: ValueError where
    autograd would record the call. Raises TypeError where an argument is not a dense tensor or a list of counts,
    ValueError on every rank when ranks disagree, a shape cannot be split or the fused kernel does not support the call,
    TransportError when a transfer times out, a rank is missing, or another rank's call has failed. Source:
    StreamFusion, arXiv 2601.20273, Torus Attention.
    """

    def inputs() -> tuple[_Inputs, Tokens | None]:
        parts = {"query": query, "key": key, "value": value}
        if joint is not None:
            parts |= {"joint.key": joint.key, "joint.value": joint.value}
        tensors = [_plain(name, x) for name, x in parts.items()]
        if asks_gradient(*tensors):
            raise ValueError(f"{NO_GRADIENT}: call it under torch.no_grad(), or detach its inputs")
        if attention == "fused":
            if reason := fused_unsupported_reason(query.device, query.dtype, query.shape[-1]):
                raise ValueError(
                    f"the fused kernel does not support this call: {reason}; use --sp-kernel library (from Python: "
                    f"leave attention='fused' out)"
                )
        elif not callable(attention):
            raise TypeError(f"attention must be a function (q, k, v) -> (out, lse) or 'fused', got {attention!r}")
        return tensors, _counts(tokens)

    with mesh.call(inputs) as (tensors, counts):  # an error on one rank fails the call on all

        def call(attention: Attention) -> torch.Tensor:
            agreed = agree(mesh, tensors, joint.strategy if joint else None, counts, overlap)
            compressed = "none" if mesh.compression is None else mesh.compression.format
            prepare(query.device, query.dtype, query.shape[3], compressed, attention == "fused")
            return _Run(mesh, agreed, attention, tensors).run()

        return mesh.attempt(lambda: call(attention), lambda: call(attend_nothing), query.device)


_Inputs = Sequence[torch.Tensor]  # query, key, value and, with joint tokens, their key and value


def _plain(name: str, x: object) -> torch.Tensor:
    """``x`` without a pending negation, which a view like ``conj().imag`` has: transports move memory as it is."""
    if isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_meta:
        return x.resolve_neg()
    got = f"one of {x.layout} on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
    raise TypeError(f"{name} must be a dense tensor [batch, heads, tokens, head size] with data, got {got}")


def _counts(tokens: Tokens | tuple[Sequence[int], Sequence[int]] | None) -> Tokens | None:
    if tokens is None:
        return None
    try:
        queries, keys = (tuple(map(index, counts)) for counts in tokens)
        return Tokens(queries, keys)
    except (TypeError, ValueError):
        raise TypeError(
            f"tokens must be two lists of integers (of queries, of keys), one integer for each rank, got {tokens!r}"
        ) from None


def attend_nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of local attention: what a call takes when nothing is computed. No log-sum-exp is 0, which would be
    looked into (``fix_fully_masked_lse``)."""
    return q, q.new_ones(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


class _Local(Ticket):
    """Something that is here, once it has been put in place."""

    def __init__(self, place: Callable[[], object]) -> None:
        self._place = place

    def wait(self) -> None:
        self._place()


class _Run:
    """One call: its buffers, and what is on its way."""

    def __init__(self, mesh: Mesh, call: Call, attention: Attention, tensors: _Inputs) -> None:
        self.mesh, self.call, self.attention = mesh, call, attention
        query, key, value, *joint = tensors
        self.query = query
        self.links = dict(mesh.links)
        if mesh.compression is not None:
            self.links["across"] = mesh.compression.over(mesh.links["across"])
        self.window_links = mesh.window_links
        self.buffers = Buffers(call, {"q": (query,), "kv": (key, value)}, tuple(joint), mesh.begin(call, call.digest))
        self.rows_at_once = self.buffers.q_rows.total
        if query.device.type == "cpu":
            self.rows_at_once = max(_MIN_ROWS, min(_MAX_ROWS, self.rows_at_once // 4))
        self.begun: set[Piece] = set()  # queries whose accumulator holds something
        # What this rank holds already is put in place when it is first asked for: the wire comes first.
        self.arriving: dict[tuple[str, Piece], Ticket] = {
            held: _Local(partial(self.buffers.place, *held)) for held in self.buffers.to_place()
        }
        self.outputs: list[tuple[Ticket, Parcel, Message]] = []
        self.posted: list[tuple[float, Ticket, Exchange, int]] = []  # for a trace: when, what, bytes to receive

    def run(self) -> torch.Tensor:
        for step in self.call.schedule.steps:
            if isinstance(step, Exchange):
                self._exchange(step)
            else:
                self._attend(step)
        return self._collect()

    # -- the verbs ----------------------------------------------------------------------------------------------------

    def _exchange(self, step: Exchange) -> None:
        """Start one round."""
        in_window = step.link in self.window_links
        sends = [self._outgoing(m, in_window) for m in step.sends]
        receives = [(m, self.buffers.incoming(m)) for m in step.receives]
        started_s = time.perf_counter()
        ticket = self.links[step.link].exchange(step.round, sends, [parcel for _, parcel in receives])
        if self.mesh.trace is not None:
            moved = sum(parcel.nbytes for _, parcel in receives)
            self.posted.append((started_s, ticket, step, moved))
        for message, parcel in receives:
            if message.tensor == "o":
                self.outputs.append((ticket, parcel, message))
            else:
                self.arriving.update({(message.tensor, piece): ticket for piece in message.pieces})

    def _attend(self, step: Attend) -> None:
        """Attend queries to keys as soon as both are here, and merge; for the last time straight into where the output
        belongs."""
        with self._traced("wait", step):
            self._await("q", step.queries)
            self._await("kv", step.keys)
        keys, rows = self.buffers.keys(step.keys), self.buffers.q_rows[step.queries]
        if keys is not None:
            kernel = partial(self._attend_rows, self.attention) if callable(self.attention) else self._attend_fused
            with self._traced("compute", step):
                kernel(rows, *keys, self.begun.isdisjoint(step.queries), step.queries_last)
            self.begun.update(step.queries)
        elif step.queries_last:
            for some, result in self.buffers.outcome(rows):
                result.copy_(self.buffers.accumulator(some)[0])
        del keys
        if step.keys_last:
            self.buffers.let_go_keys(step.keys)
        if step.queries_last:
            self.buffers.let_go_queries(step.queries)

    def _attend_rows(
        self, attend: AttendFunction, rows: slice, k: torch.Tensor, v: torch.Tensor, first: bool, last: bool
    ) -> None:
        k, v = self.buffers.with_all_heads(k, v)
        if first and last and rows == slice(0, self.buffers.q_rows.total) and rows.stop:
            self.buffers.finish(attend(self.buffers.queries(rows), k, v)[0])
            return
        for start in range(rows.start, rows.stop, self.rows_at_once):
            some = slice(start, min(start + self.rows_at_once, rows.stop))
            queries = self.buffers.queries(some)
            out, lse = attend(queries, k, v)
            lse = fix_fully_masked_lse(queries, k, out, lse)
            for at, result in self.buffers.outcome(some) if last else [(some, None)]:
                total_out, total_lse = self.buffers.accumulator(at)
                part = slice(at.start - start, at.stop - start)
                if not first:
                    merge_partial(total_out, total_lse, out[:, :, part], lse[:, :, part], result)
                elif result is not None:
                    result.copy_(out[:, :, part])
                else:
                    total_out.copy_(out)
                    total_lse.copy_(lse)
            del out, lse  # before the next ones are made

    def _attend_fused(self, rows: slice, k: torch.Tensor, v: torch.Tensor, first: bool, last: bool) -> None:
        """In one launch, by the kernel that merges what it attends."""
        if not self.call.grouped:
            k, v = self.buffers.with_all_heads(k, v)
        outcome = self.buffers.outcome(rows) if last else []
        runs = [at for at, _ in outcome] or [rows]
        queries = [self.buffers.queries(at) for at in runs]
        outs, lses = zip(*map(self.buffers.accumulator, runs), strict=True)
        if first:
            self.buffers.accumulator(rows)[1].fill_(float("-inf"))
        attend_unchecked(Chunks(queries, [k], [v], outs, lses, [result for _, result in outcome]))

    def _collect(self) -> torch.Tensor:
        """The heads that other ranks attended of this rank's own tokens join those that are in the result already;
        leave nothing posted."""
        for ticket, parcel, message in self.outputs:
            ticket.wait()
            self.buffers.take_back(message, parcel.parts[0])
        result_BSHD = self.buffers.result_BSHD
        self.mesh.end(self.links, result_BSHD)
        self._trace_wire()
        return result_BSHD.transpose(1, 2)

    def _outgoing(self, message: Message, in_window: bool) -> Parcel:
        """``in_window``: it is written into the peer's."""
        passed_on = self.buffers.passes_on(message)
        if passed_on:
            self._await(message.tensor, message.pieces)
        parcel = self.buffers.outgoing(message, *self.call.landing(message) if in_window else ())
        if self.mesh.window is not None and not in_window and (passed_on or message.tensor == "o"):
            for part in parcel.parts:
                self.mesh.window.poison(part)
        return parcel

    def _await(self, name: str, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            ticket = self.arriving.pop((name, piece), None)
            if ticket is not None:
                ticket.wait()

    # -- for a trace --------------------------------------------------------------------------------------------------

    def _traced(self, link: str, step: Attend) -> AbstractContextManager[None]:
        if self.mesh.trace is None:
            return nullcontext()
        queries, keys = ("+".join(str(s) for s in sorted({p.source for p in x})) for x in (step.queries, step.keys))
        return self.mesh.trace.span(link, f"Q {queries} x KV {keys}".replace(str(JOINT), "joint"), self.query.device)

    def _trace_wire(self) -> None:
        """What arrived when, in rounds; where the transport knows."""
        if self.mesh.trace is None:
            return
        for started_s, ticket, step, moved in self.posted:
            if ticket.arrived_s is not None and moved:
                name = f"{step.receives[0].tensor} from {'+'.join(str(m.peer) for m in step.receives)}"
                self.mesh.trace.add(step.link, name, started_s, ticket.arrived_s, moved)
