"""Torus Attention: one call of all ranks. Shapes are in names: B batch, H heads, S tokens, D head size."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch

from sf_xfuser.kernels import Attention, fused_unsupported_reason, prepare, sdpa_attend
from sf_xfuser.layout.schedule import Granularity
from sf_xfuser.torus.call import Joint, Tokens, negotiate_call
from sf_xfuser.torus.mesh import Mesh
from sf_xfuser.transport.gpu.memory import is_capturing

NO_GRADIENT = "autograd records this call, and Torus Attention has no backward pass"


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def autocast(x: torch.Tensor) -> torch.Tensor:
    """``x`` as autocast passes it to PyTorch's attention. Kernels below that level would get mixed dtypes."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if casts else x


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
    [B, H, S_q, D] (a view of [B, S_q, H, D]) in the input dtype. Under autocast, inputs are cast as those of PyTorch's
    own attention are.

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
            if reason := fused_unsupported_reason(query.device, tensors[0].dtype, query.shape[-1]):
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
            prepare(query.device, tensors[0].dtype, query.shape[3], call.placement.compressed, attention == "fused")
            if is_capturing():
                call.keep_programs(mesh, tensors, attention == "fused")
            window = mesh.begin(call.placement.memory_maps, call.digest)
            program = call.bound_program(mesh, tensors, window, attention == "fused")
            result_BSHD = program.call(tensors, attention)
            mesh.end()
            return result_BSHD.transpose(1, 2)

        return mesh.attempt(lambda: run(attention), lambda: run(attend_nothing), query.device)


_Inputs = Sequence[torch.Tensor]  # query, key, value and, with joint tokens, their key and value


def _plain(name: str, x: object) -> torch.Tensor:
    """``x`` in the dtype of autocast, with D contiguous, which kernels need, and a lazy negation applied (views like
    ``conj().imag``), since transports copy raw memory."""
    if isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_meta:
        x = autocast(x).resolve_neg()
        return x if x.dim() != 4 or x.stride(3) == 1 else x.contiguous()
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
