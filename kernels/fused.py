"""Attention over lists of Q chunks and KV chunks, in one launch: nothing is concatenated, and no merge follows. Shapes:
B batch, H heads, H_kv heads of keys and values, S tokens of a Q chunk, D head size.

``attend_chunks_`` keeps accumulating; ``attend_chunks_into`` is the last call, which writes the result in its own dtype
where it belongs. On a GPU each is one launch (``triton_fused``); elsewhere, or without Triton, the twin in plain
PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sf_xfuser.kernels.checks import (
    described,
    has_triton,
    is_same,
    require_apart,
    require_rows,
    require_shape,
    require_together,
    runs_kernel,
)

HEAD_SIZES = (64, 72, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fused_unsupported_reason(device: torch.device, dtype: torch.dtype, D: int) -> str | None:
    """None where the fused kernel supports a call. On a CPU its twin runs in its place."""
    if dtype not in DTYPES:
        return f"its dtypes are {', '.join(map(str, DTYPES))}, got {dtype}"
    if D not in HEAD_SIZES:
        return f"its head sizes are {HEAD_SIZES}, got {D}"
    if device.type == "cpu" or (device.type == "cuda" and has_triton()):
        return None
    return f"it needs a CUDA device and Triton, got {device} {'with' if has_triton() else 'without'} Triton"


class Chunks(NamedTuple):
    """The arguments of one call, as ``attend_chunks_`` and ``attend_chunks_into`` describe them."""

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
    """Attend every Q chunk to all KV chunks, and to what its accumulator holds already, in place. Local; on the current
    stream.

    ``q[i]`` [B,H,S_i,D]; ``k[j]``, ``v[j]`` [B,H_kv,Sk_j,D], H a multiple of H_kv; all in one dtype of ``DTYPES``, D of
    ``HEAD_SIZES``, S_i and Sk_j any, 0 included. ``out[i]`` [B,H,S_i,D] fp32 and ``lse[i]`` [B,H,S_i] fp32 (natural
    log) are the accumulator, as ``merge_`` has it: a row with ``lse = -inf`` has seen no key, whatever ``out`` holds
    there, so a new accumulator is one whose ``lse`` is filled with -inf. Any strides with D contiguous. Dense, not
    causal, scores times 1/sqrt(D). Deterministic: the same lists in the same order give the same bits.

    Raises ValueError before anything is written: shapes, dtypes, devices or lengths of lists that do not fit, strided
    D, an accumulator that shares memory with anything else.
    """
    _attend(Chunks(q, k, v, out, lse, ()))


def attend_chunks_into(
    results: Sequence[torch.Tensor],
    q: Sequence[torch.Tensor],
    k: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    lse: Sequence[torch.Tensor],
) -> None:
    """As ``attend_chunks_``, for the last time: the output goes to ``results[i]`` [B,H,S_i,D] in q's dtype, any strides
    with D contiguous, and the accumulator holds nothing of use afterwards; in fp32 ``results[i]`` may be ``out[i]``
    itself. Rows that have seen no key at all are 0."""
    if len(results) != len(q):
        raise ValueError(f"{len(results)} results for {len(q)} chunks of q: give one for each")
    _attend(Chunks(q, k, v, out, lse, results))


def attend_twin(chunks: Chunks) -> None:
    """The same in plain PyTorch: one softmax in fp32 over all keys, in which what is carried counts as one key more."""
    q, k, v, out, lse, results = chunks
    for at, (q_BHSD, out_BHSD, lse_BHS) in enumerate(zip(q, out, lse, strict=True)):
        group = q_BHSD.shape[1] // k[0].shape[1] if k else 1
        keys = [x.float().repeat_interleave(group, 1) for x in k]
        values = [x.float().repeat_interleave(group, 1) for x in v]
        q32 = q_BHSD.float() / math.sqrt(q_BHSD.shape[-1])
        scores = [lse_BHS.unsqueeze(-1), *(q32 @ x.transpose(-1, -2) for x in keys)]
        joined = torch.cat(scores, -1)
        weights = torch.softmax(joined, -1).masked_fill(joined.amax(-1, keepdim=True) == float("-inf"), 0.0)
        carried = out_BHSD.masked_fill(lse_BHS.unsqueeze(-1) == float("-inf"), 0.0) * weights[..., :1]
        total = carried + weights[..., 1:] @ torch.cat(values, 2) if k else carried
        lse_BHS.copy_(torch.logsumexp(joined, -1))
        out_BHSD.copy_(total)
        if results:
            results[at].copy_(out_BHSD)


# -- the operator ----------------------------------------------------------------------------------------------------


def _attend(chunks: Chunks) -> None:
    if torch.compiler.is_compiling():
        _attend_op(*map(list, chunks))
    else:
        _run(chunks)


def _run(chunks: Chunks) -> None:
    check(chunks)
    attend_unchecked(chunks)


def attend_unchecked(chunks: Chunks) -> None:
    """``attend_chunks_``, or with ``results`` ``attend_chunks_into``, for a caller that answers for all of them."""
    if not chunks.q:
        return
    if runs_kernel(chunks.q[0]):
        from sf_xfuser.kernels.triton_fused import launch

        launch(chunks)
    else:
        attend_twin(chunks)


@torch.library.custom_op("sf_xfuser::attend_chunks", mutates_args=("out", "lse", "results"))
def _attend_op(
    q: list[torch.Tensor],
    k: list[torch.Tensor],
    v: list[torch.Tensor],
    out: list[torch.Tensor],
    lse: list[torch.Tensor],
    results: list[torch.Tensor],
) -> None:
    _run(Chunks(q, k, v, out, lse, results))


@_attend_op.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    return None


# -- checks ----------------------------------------------------------------------------------------------------------


def check(chunks: Chunks) -> None:
    """Raises what ``attend_chunks_`` raises."""
    q, k, v, out, lse, results = chunks
    if len(out) != len(q) or len(lse) != len(q) or len(k) != len(v):
        raise ValueError(
            f"lists of {len(q)} q, {len(out)} out, {len(lse)} lse, {len(k)} k and {len(v)} v: give an out and a lse "
            "for each q, and a v for each k"
        )
    read = _named(q=q, k=k, v=v)
    apart = [x for at, x in enumerate(results) if not is_same(x, out[at])]
    written = _named(out=out, lse=lse, results=apart)
    _check_chunks(q, k, v)
    for name, x in _named(out=out).items():
        if x.dtype != torch.float32:
            raise ValueError(f"{name} is {described(x)}: the accumulator must be torch.float32")
    for name, x in _named(lse=lse).items():
        if x.dtype != torch.float32:
            raise ValueError(f"{name} is {described(x)}: log-sum-exps must be torch.float32")
    for at, x in enumerate(q):
        shape = tuple(x.shape)
        require_shape(f"out[{at}]", out[at], shape, f"q[{at}] {shape}")
        require_shape(f"lse[{at}]", lse[at], shape[:3], f"q[{at}] {shape}")
    for at, x in enumerate(results):
        require_shape(f"results[{at}]", x, tuple(q[at].shape), f"q[{at}] {tuple(q[at].shape)}")
        if x.dtype != q[at].dtype:
            raise ValueError(f"results[{at}] is {described(x)}, but q[{at}] is {described(q[at])}: give one dtype")
    require_rows(_named(q=q, k=k, v=v, out=out, results=results))
    if q:
        require_together(read | written)
    require_apart(written, read)


def _check_chunks(q: Sequence[torch.Tensor], k: Sequence[torch.Tensor], v: Sequence[torch.Tensor]) -> None:
    named = _named(q=q, k=k, v=v)
    for name, x in named.items():
        first_name, first = next(iter(named.items()))
        if x.dim() != 4 or x.dtype not in DTYPES:
            raise ValueError(f"{name} is {described(x)}: it must be [B, heads, tokens, D] in one of {DTYPES}")
        if x.shape[-1] not in HEAD_SIZES:
            raise ValueError(f"{name} is {described(x)}: head size {x.shape[-1]} is none of {HEAD_SIZES}")
        if x.dtype != first.dtype or x.shape[0] != first.shape[0] or x.shape[-1] != first.shape[-1]:
            raise ValueError(
                f"{name} is {described(x)}, but {first_name} is {described(first)}: give one batch, head size and dtype"
            )
    for kind, chunks in (("q", q), ("k", k)):
        for at, x in enumerate(chunks):
            if x.shape[1] != chunks[0].shape[1]:
                raise ValueError(
                    f"{kind}[{at}] is {described(x)}, but {kind}[0] is {described(chunks[0])}: give as many heads"
                )
    for at, x in enumerate(k):
        require_shape(f"v[{at}]", v[at], tuple(x.shape), f"k[{at}] {tuple(x.shape)}")
    if q and k and (k[0].shape[1] == 0 or q[0].shape[1] % k[0].shape[1]):
        raise ValueError(
            f"q[0] {tuple(q[0].shape)} has {q[0].shape[1]} heads, no multiple of the {k[0].shape[1]} of k[0] "
            f"{tuple(k[0].shape)}"
        )


def _named(**lists: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}[{at}]": x for name, chunks in lists.items() for at, x in enumerate(chunks)}
