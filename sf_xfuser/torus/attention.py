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
from sf_xfuser.layout.schedule import JOINT, Attend, Exchange, Granularity, Message, Piece
from sf_xfuser.torus.buffers import Buffers
from sf_xfuser.torus.call import Call, Joint, Tokens, negotiate_call
from sf_xfuser.torus.mesh import Mesh
from sf_xfuser.transport.base import Parcel, Ticket

# On a CPU, queries are attended in blocks of rows, to keep partial results small. PyTorch's kernel is slower on blocks
# of fewer than 768 rows, and not faster on blocks of more than 1024.
_MIN_ROWS, _MAX_ROWS = 768, 1024

NO_GRADIENT = "autograd records this call, and Torus Attention has no backward pass"


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records operations on these tensors."""
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
    granularity: Granularity | None = None,
) -> torch.Tensor:
    """Dense, non-causal attention over the tokens of all ranks of ``mesh``. Collective over the group. Source: Torus
    Attention of StreamFusion, arXiv 2601.20273.

    ``query`` [B, H, S_q, D] and ``key``, ``value`` [B, H_kv, S_kv, D] hold this rank's tokens and all heads, with any
    strides. S_q and S_kv may differ from each other and between ranks, and may be 0. H_kv divides H. Returns
    [B, H, S_q, D] (a view of [B, S_q, H, D]) in the input dtype.

    ``attention`` attends one piece (see ``kernels.attend``). Pieces are merged by log-sum-exp in fp32 (fp64 for fp64
    inputs) in a fixed order, so the same call gives the same bits. ``"fused"``: one Triton kernel attends and merges a
    piece; on a CPU, its PyTorch reference.
    ``joint``: tokens that every rank holds. They are attended once, with the first or the last KV.
    ``tokens``: S_q and S_kv of every rank, by position in ``mesh``. With it, the ranks exchange shapes only when a call
    shape is new. Without it, they exchange them in every call.
    ``granularity`` (equal on every rank): how much one attention call attends (``layout.schedule``). ``"unstaged"``
    exchanges all chunks first, then attends everything in one call; CPU ranks of one host always do this. None:
    chosen by ``choose_granularity``.

    On CUDA the work is on the current stream. No transfer is pending afterwards. Inference only. Raises TypeError if an
    argument is not a dense tensor or a list of counts; ValueError if autograd records the call, and on every rank if
    ranks disagree, a shape cannot be split, or the fused kernel does not support the call; TransportError if a transfer
    times out, a rank is missing, or the call of another rank has failed.
    """

    def inputs() -> tuple[_Inputs, Tokens | None]:
        parts = {"query": query, "key": key, "value": value}
        if joint is not None:
            parts |= {"joint.key": joint.key, "joint.value": joint.value}
        tensors = [_plain(name, x) for name, x in parts.items()]
        if needs_gradient(*tensors):
            raise ValueError(f"{NO_GRADIENT}: call it under torch.no_grad(), or detach the inputs")
        if attention == "fused":
            if reason := fused_unsupported_reason(query.device, query.dtype, query.shape[-1]):
                raise ValueError(
                    f"the fused kernel does not support this call: {reason}; use --sp-kernel library (from Python: "
                    f"omit attention='fused')"
                )
        elif not callable(attention):
            raise TypeError(f"attention must be a function (q, k, v) -> (out, lse) or 'fused', got {attention!r}")
        return tensors, _counts(tokens)

    with mesh.call(inputs) as (tensors, counts):  # an error on one rank fails the call on all ranks

        def run(attention: Attention) -> torch.Tensor:
            call = negotiate_call(mesh, tensors, joint.strategy if joint else None, counts, granularity)
            compressed = "none" if mesh.compression is None else mesh.compression.format
            prepare(query.device, query.dtype, query.shape[3], compressed, attention == "fused")
            return _Run(mesh, call, attention, tensors).run()

        return mesh.attempt(lambda: run(attention), lambda: run(attend_nothing), query.device)


_Inputs = Sequence[torch.Tensor]  # query, key, value and, with joint tokens, their key and value


def _plain(name: str, x: object) -> torch.Tensor:
    """``x`` with a lazy negation applied (views like ``conj().imag``), since transports copy raw memory."""
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
    """A no-op instead of local attention, to time the transfers of a call. The log-sum-exp is 1, because 0 takes the
    slow path of ``fix_fully_masked_lse``."""
    return q, q.new_ones(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


class _Run:
    """One call: its buffers and pending transfers."""

    def __init__(self, mesh: Mesh, call: Call, attention: Attention, tensors: _Inputs) -> None:
        self.mesh, self.call, self.attention = mesh, call, attention
        query, key, value, *joint = tensors
        self.query = query
        self.links = dict(mesh.links)
        if mesh.compression is not None:
            self.links["across"] = mesh.compression.over(mesh.links["across"])
        self.window_links = mesh.window_links
        self.buffers = Buffers(call, {"q": (query,), "kv": (key, value)}, tuple(joint), mesh.begin(call, call.digest))
        self.rows_per_block = self.buffers.q_rows.total
        if query.device.type == "cpu":
            self.rows_per_block = max(_MIN_ROWS, min(_MAX_ROWS, self.rows_per_block // 4))
        self.started: set[Piece] = set()  # queries with a partial result in the accumulator
        # What to call before the first use of a piece. Local pieces are copied only then: transfers start first.
        self.pending: dict[tuple[str, Piece], Callable[[], object]] = {
            local: partial(self.buffers.copy_in, *local) for local in self.buffers.local_pieces()
        }
        self.outputs: list[tuple[Ticket, Parcel, Message]] = []
        self.posted: list[tuple[float, Ticket, Exchange, int]] = []  # for a trace: start, ticket, step, bytes

    def run(self) -> torch.Tensor:
        for step in self.call.schedule.steps:
            if isinstance(step, Exchange):
                self._exchange(step)
            else:
                self._attend(step)
        return self._collect()

    def _exchange(self, step: Exchange) -> None:
        """Start one round of transfers."""
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
                self.pending.update({(message.tensor, piece): ticket.wait for piece in message.pieces})

    def _attend(self, step: Attend) -> None:
        """Attend queries to keys once both have arrived, and merge. The last merge writes the final output."""
        with self._traced("wait", step):
            self._wait("q", step.queries)
            self._wait("kv", step.keys)
        keys, rows = self.buffers.keys(step.keys), self.buffers.q_rows[step.queries]
        if keys is not None:
            kernel = partial(self._attend_rows, self.attention) if callable(self.attention) else self._attend_fused
            with self._traced("compute", step):
                kernel(rows, *keys, self.started.isdisjoint(step.queries), step.queries_last)
            self.started.update(step.queries)
        elif step.queries_last:
            for part, result in self.buffers.outputs(rows):
                result.copy_(self.buffers.accumulator(part)[0])
        del keys
        if step.keys_last:
            self.buffers.release_keys(step.keys)
        if step.queries_last:
            self.buffers.release_queries(step.queries)

    def _attend_rows(
        self, attend: AttendFunction, rows: slice, k: torch.Tensor, v: torch.Tensor, first: bool, last: bool
    ) -> None:
        k, v = self.buffers.with_all_heads(k, v)
        if first and last and rows == slice(0, self.buffers.q_rows.total) and rows.stop:
            self.buffers.finish(attend(self.buffers.queries(rows), k, v)[0])
            return
        for start in range(rows.start, rows.stop, self.rows_per_block):
            block = slice(start, min(start + self.rows_per_block, rows.stop))
            queries = self.buffers.queries(block)
            out, lse = attend(queries, k, v)
            lse = fix_fully_masked_lse(queries, k, out, lse)
            for at, result in self.buffers.outputs(block) if last else [(block, None)]:
                total_out, total_lse = self.buffers.accumulator(at)
                part = slice(at.start - start, at.stop - start)
                if not first:
                    merge_partial(total_out, total_lse, out[:, :, part], lse[:, :, part], result)
                elif result is not None:
                    result.copy_(out[:, :, part])
                else:
                    total_out.copy_(out)
                    total_lse.copy_(lse)
            del out, lse  # free the memory before the next block

    def _attend_fused(self, rows: slice, k: torch.Tensor, v: torch.Tensor, first: bool, last: bool) -> None:
        """Attend and merge in one kernel launch."""
        if not self.call.grouped:
            k, v = self.buffers.with_all_heads(k, v)
        outputs = self.buffers.outputs(rows) if last else []
        runs = [at for at, _ in outputs] or [rows]
        queries = [self.buffers.queries(at) for at in runs]
        outs, lses = zip(*map(self.buffers.accumulator, runs), strict=True)
        if first:
            self.buffers.accumulator(rows)[1].fill_(float("-inf"))
        attend_unchecked(Chunks(queries, [k], [v], outs, lses, [result for _, result in outputs]))

    def _collect(self) -> torch.Tensor:
        """Wait for the outputs that other ranks computed for this rank's tokens, and complete the result."""
        for ticket, parcel, message in self.outputs:
            ticket.wait()
            self.buffers.store_output(message, parcel.parts[0])
        result_BSHD = self.buffers.result_BSHD
        self.mesh.end(self.links, result_BSHD)
        self._trace_wire()
        return result_BSHD.transpose(1, 2)

    def _outgoing(self, message: Message, in_window: bool) -> Parcel:
        """The parcel to send. ``in_window``: the transport writes it into the window of the peer."""
        is_forward = self.buffers.is_forward(message)
        if is_forward:
            self._wait(message.tensor, message.pieces)
        parcel = self.buffers.outgoing(message, *self.call.destination(message) if in_window else ())
        if self.mesh.window is not None and not in_window and (is_forward or message.tensor == "o"):
            for part in parcel.parts:
                self.mesh.window.poison(part)
        return parcel

    def _wait(self, name: str, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if wait := self.pending.pop((name, piece), None):
                wait()

    def _traced(self, link: str, step: Attend) -> AbstractContextManager[None]:
        if self.mesh.trace is None:
            return nullcontext()
        queries, keys = ("+".join(str(s) for s in sorted({p.source for p in x})) for x in (step.queries, step.keys))
        return self.mesh.trace.span(link, f"Q {queries} x KV {keys}".replace(str(JOINT), "joint"), self.query.device)

    def _trace_wire(self) -> None:
        """Add the transfers of each round, if the transport records arrival times."""
        if self.mesh.trace is None:
            return
        for started_s, ticket, step, moved in self.posted:
            if ticket.arrived_s is not None and moved:
                name = f"{step.receives[0].tensor} from {'+'.join(str(m.peer) for m in step.receives)}"
                self.mesh.trace.add(step.link, name, started_s, ticket.arrived_s, moved)
