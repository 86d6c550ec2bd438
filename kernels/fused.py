"""Attention over lists of Q chunks and KV chunks in one launch, without concatenation or a separate merge. Shapes: B
batch, H query heads, H_kv KV heads, S tokens of a Q chunk, Sk tokens of a KV chunk, D head size.

``attend_chunks_`` accumulates in place. ``attend_chunks_into`` is the last call for a Q chunk: it writes the result, in
q's dtype, to its final tensor. ``FusedAttention`` is either of them, recorded once for fixed memory and run in every
call. Each is one launch on a GPU with Triton (``triton_fused``), else a reference in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sf_xfuser.kernels.checks import (
    describe,
    has_triton,
    is_same_view,
    named,
    require_contiguous_rows,
    require_no_overlap,
    require_same_device,
    require_shape,
    uses_triton,
)

HEAD_SIZES = (64, 72, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fused_unsupported_reason(device: torch.device, dtype: torch.dtype, D: int) -> str | None:
    """Why the fused kernel does not support a call, else None. A CPU runs the PyTorch reference."""
    if dtype not in DTYPES:
        return f"its dtypes are {', '.join(map(str, DTYPES))}, got {dtype}"
    if D not in HEAD_SIZES:
        return f"its head sizes are {HEAD_SIZES}, got {D}"
    if device.type == "cpu" or (device.type == "cuda" and has_triton()):
        return None
    return f"it needs a CUDA device and Triton, got {device} {'with' if has_triton() else 'without'} Triton"


class Chunks(NamedTuple):
    """The arguments of ``attend_chunks_`` (empty ``results``) or ``attend_chunks_into``, with at least one Q chunk."""

    q: Sequence[torch.Tensor]
    k: Sequence[torch.Tensor]
    v: Sequence[torch.Tensor]
    out: Sequence[torch.Tensor]
    lse: Sequence[torch.Tensor]
    results: Sequence[torch.Tensor]


def attend_chunks_(
    q: Sequence[torch.Tensor],
    k: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    lse: Sequence[torch.Tensor],
) -> None:
    """Attend every Q chunk to all KV chunks and merge with its accumulator, in place. Local; on the current stream.

    | argument | shape | dtype |
    |---|---|---|
    | ``q[i]`` | [B,H,S_i,D], D of ``HEAD_SIZES`` | one of ``DTYPES`` |
    | ``k[j]``, ``v[j]`` | [B,H_kv,Sk_j,D], H a multiple of H_kv | as q |
    | ``out[i]`` | [B,H,S_i,D] | fp32 |
    | ``lse[i]`` | [B,H,S_i], natural log | fp32 |

    S_i and Sk_j may be 0. Any strides with D contiguous. Dense, not causal, scale 1/sqrt(D). ``lse = -inf`` marks a row
    without keys, whose ``out`` is ignored: fill ``lse`` with -inf to start a new accumulator. Deterministic for equal
    lists in equal order.

    Raises ValueError before any write: mismatched shapes, dtypes, devices or list lengths, strided D, an accumulator
    that shares memory with another tensor.
    """
    (_attend_op if torch.compiler.is_compiling() else _attend)(list(q), list(k), list(v), list(out), list(lse), [])


def attend_chunks_into(
    results: Sequence[torch.Tensor],
    q: Sequence[torch.Tensor],
    k: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    lse: Sequence[torch.Tensor],
) -> None:
    """As ``attend_chunks_``, but write the output to ``results[i]`` [B,H,S_i,D] in q's dtype, any strides with D
    contiguous. The accumulator is undefined afterwards. In fp32 ``results[i]`` may be ``out[i]`` itself. Rows without
    keys are 0."""
    if len(results) != len(q):
        raise ValueError(f"{len(results)} results for {len(q)} chunks of q: pass one for each")
    op = _attend_op if torch.compiler.is_compiling() else _attend
    op(list(q), list(k), list(v), list(out), list(lse), list(results))


class FusedAttention:
    """``attend_chunks_``, or with results ``attend_chunks_into``, for fixed memory and without argument checks.

    Results, and all tensors of ``q``, ``k`` or ``v``, may be on the meta device. They stand for views of a tensor that
    each ``run`` passes, with a storage offset from its data pointer. ``kv_of_q``: the KV head of each query head (None:
    groups of equal size). ``first``: the accumulator is undefined before a run.

    Local. Making one uploads a table to the GPU. A run only launches one kernel there, so a CUDA graph can hold it.
    """

    def __init__(self, chunks: Chunks, *, kv_of_q: Sequence[int] | None = None, first: bool = False) -> None:
        self._chunks, self._first = chunks, first
        H, H_kv = chunks.q[0].shape[1], chunks.k[0].shape[1] if chunks.k else 1
        self._kv_of_q = [h * H_kv // H for h in range(H)] if kv_of_q is None else list(kv_of_q)
        self._launch = None
        if uses_triton(chunks.out[0]):
            from sf_xfuser.kernels.triton_fused import record

            self._launch = record(chunks, self._kv_of_q, first)

    def run(
        self,
        q: torch.Tensor | None = None,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        result: torch.Tensor | None = None,
    ) -> None:
        """Attend. Each tensor: that of the views on the meta device in ``q``, ``k``, ``v`` or ``results``; ignored if
        there are none. Local; on the current stream."""
        if self._launch is not None:
            self._launch(q, k, v, result)
        else:
            bases = q, k, v, None, None, result
            chunks = Chunks(*([_view(x, base) for x in xs] for xs, base in zip(self._chunks, bases, strict=True)))
            attend_reference(chunks, self._kv_of_q, self._first)


def _view(x: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """``x``, or if it is on the meta device, the view of ``base`` for which it stands."""
    if not x.is_meta:
        return x
    assert base is not None
    return base.as_strided(x.shape, x.stride(), base.storage_offset() + x.storage_offset())


def attend_reference(chunks: Chunks, kv_of_q: Sequence[int], first: bool = False) -> None:
    """``FusedAttention`` in plain PyTorch: one fp32 softmax over all keys, with the accumulator as one extra key."""
    q, k, v, out, lse, results = chunks
    for i, (q_BHSD, out_BHSD, lse_BHS) in enumerate(zip(q, out, lse, strict=True)):
        if first:
            lse_BHS.fill_(float("-inf"))
        keys = [x[:, kv_of_q].float() for x in k]
        values = [x[:, kv_of_q].float() for x in v]
        q32 = q_BHSD.float() / math.sqrt(q_BHSD.shape[-1])
        scores = [lse_BHS.unsqueeze(-1), *(q32 @ x.transpose(-1, -2) for x in keys)]
        scores_BHSK = torch.cat(scores, -1)
        weights = torch.softmax(scores_BHSK, -1).masked_fill(scores_BHSK.amax(-1, keepdim=True) == float("-inf"), 0.0)
        old = out_BHSD.masked_fill(lse_BHS.unsqueeze(-1) == float("-inf"), 0.0) * weights[..., :1]
        total = old + weights[..., 1:] @ torch.cat(values, 2) if k else old
        lse_BHS.copy_(torch.logsumexp(scores_BHSK, -1))
        out_BHSD.copy_(total)
        if results:
            results[i].copy_(out_BHSD)


def _attend(
    q: list[torch.Tensor],
    k: list[torch.Tensor],
    v: list[torch.Tensor],
    out: list[torch.Tensor],
    lse: list[torch.Tensor],
    results: list[torch.Tensor],
) -> None:
    chunks = Chunks(q, k, v, out, lse, results)
    check(chunks)
    if q:
        FusedAttention(chunks).run()


_attend_op = torch.library.custom_op("sf_xfuser::attend_chunks", _attend, mutates_args=("out", "lse", "results"))


# -- checks ----------------------------------------------------------------------------------------------------------


def check(chunks: Chunks) -> None:
    """Raises the errors of ``attend_chunks_``."""
    q, k, v, out, lse, results = chunks
    if len(out) != len(q) or len(lse) != len(q) or len(k) != len(v):
        raise ValueError(
            f"lists of {len(q)} q, {len(out)} out, {len(lse)} lse, {len(k)} k and {len(v)} v: pass an out and a lse "
            "for each q, and a v for each k"
        )
    read = named(q=q, k=k, v=v)
    separate = [x for i, x in enumerate(results) if not is_same_view(x, out[i])]
    written = named(out=out, lse=lse, results=separate)
    _check_chunks(q, k, v)
    for name, x in named(out=out, lse=lse).items():
        if x.dtype != torch.float32:
            raise ValueError(f"{name} is {describe(x)}: the accumulator must be torch.float32")
    for i, x in enumerate(q):
        shape = tuple(x.shape)
        require_shape(f"out[{i}]", out[i], shape, f"q[{i}] {shape}")
        require_shape(f"lse[{i}]", lse[i], shape[:3], f"q[{i}] {shape}")
    for i, x in enumerate(results):
        require_shape(f"results[{i}]", x, tuple(q[i].shape), f"q[{i}] {tuple(q[i].shape)}")
        if x.dtype != q[i].dtype:
            raise ValueError(f"results[{i}] is {describe(x)}, but q[{i}] is {describe(q[i])}: use one dtype")
    require_contiguous_rows(named(q=q, k=k, v=v, out=out, results=results))
    if q:
        require_same_device(read | written)
    require_no_overlap(written, read)


def _check_chunks(q: Sequence[torch.Tensor], k: Sequence[torch.Tensor], v: Sequence[torch.Tensor]) -> None:
    tensors = named(q=q, k=k, v=v)
    for name, x in tensors.items():
        first_name, first = next(iter(tensors.items()))
        if x.dim() != 4 or x.dtype not in DTYPES:
            raise ValueError(f"{name} is {describe(x)}: it must be [B, heads, tokens, D] in one of {DTYPES}")
        if x.shape[-1] not in HEAD_SIZES:
            raise ValueError(f"{name} is {describe(x)}: head size {x.shape[-1]} is not in {HEAD_SIZES}")
        if x.dtype != first.dtype or x.shape[0] != first.shape[0] or x.shape[-1] != first.shape[-1]:
            raise ValueError(
                f"{name} is {describe(x)}, but {first_name} is {describe(first)}: use one batch, head size and dtype"
            )
    for kind, chunks in (("q", q), ("k", k)):
        for i, x in enumerate(chunks):
            if x.shape[1] != chunks[0].shape[1]:
                raise ValueError(
                    f"{kind}[{i}] is {describe(x)}, but {kind}[0] is {describe(chunks[0])}: use one number of heads"
                )
    for i, x in enumerate(k):
        require_shape(f"v[{i}]", v[i], tuple(x.shape), f"k[{i}] {tuple(x.shape)}")
    if q and k and (k[0].shape[1] == 0 or q[0].shape[1] % k[0].shape[1]):
        raise ValueError(
            f"q[0] {tuple(q[0].shape)} has {q[0].shape[1]} heads, not a multiple of the {k[0].shape[1]} of k[0] "
            f"{tuple(k[0].shape)}"
        )
