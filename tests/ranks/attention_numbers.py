"""Rank side of test_attention.py: extreme numbers, dtypes and views against one process. Runs over TCP between two
machines, in each granularity."""

from __future__ import annotations

import sys
from typing import get_args

import torch
import torch.distributed as dist
from attention_accuracy import attention64
from cases import run_cases

from sf_xfuser.config import TorusArgs
from sf_xfuser.layout import chunking
from sf_xfuser.layout.schedule import Granularity
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.torus.mesh import Mesh

TOKENS, INF = 12, float("inf")
meshes: list[Mesh] = []


def tensors(dtype=torch.float32):
    """Query, key and value of all ranks. Queries are positive, so that keys of -inf have scores of -inf."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 4 * TOKENS, 16, generator=make, dtype=torch.float64).to(dtype) for _ in range(3))
    return q.abs(), k, v


def own(x):
    """This rank's tokens."""
    return x.chunk(4, dim=2)[dist.get_rank()]


def attend_by_softmax(q, k, v):
    """Attention that returns NaN for the output and log-sum-exp of a row without weights."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    return weights @ v / total, (largest + total.log()).squeeze(-1)


def compare(q, k, v, expected, rounding, **kwargs):
    """Compare this rank's rows, in each granularity. Returns the differences as text."""
    wrong, local, expected = "", [own(x) for x in (q, k, v)], own(expected).double()
    for mesh in meshes:
        for granularity in get_args(Granularity):
            out = torus_attention(*local, mesh=mesh, granularity=granularity, **kwargs).double()
            if not torch.allclose(out, expected, rtol=rounding, atol=rounding, equal_nan=True):
                wrong += f"{mesh.layout} {granularity=}: off by {(out - expected).abs().max():.2g}\n"
    return wrong


def keys_of_one_rank(dtype, rounding, **kwargs):
    wrong = ""
    for without in range(4):
        q, k, v = tensors(dtype)
        k.chunk(4, dim=2)[without].fill_(-INF)
        wrong += compare(q, k, v, attention64(q, k, v), rounding, **kwargs)
    return wrong


def case_keys_of_one_rank_without_weight(rank):
    return keys_of_one_rank(torch.float32, 1e-6)


def case_keys_of_one_rank_without_weight_bf16(rank):
    return keys_of_one_rank(torch.bfloat16, 2e-2)


def case_keys_of_one_rank_are_nan_to_the_library(rank):
    return keys_of_one_rank(torch.float32, 1e-6, attention=attend_by_softmax)


def case_no_key_has_a_weight(rank):
    q, k, v = tensors()
    k.fill_(-INF)
    return compare(q, k, v, torch.nn.functional.scaled_dot_product_attention(q, k, v), 0)


def case_a_weight_of_one(rank):
    """One key with a score of 0: its log-sum-exp of 0 is also PyTorch's mark of a row without weights."""
    q, k, v = tensors()
    k[:, :, 1:], k[:, :, 0] = -INF, 0.0
    return compare(q, k, v, v[:, :, :1].expand(v.shape), 0)


def case_infinite_values(rank):
    q, k, v = tensors()
    v[:, :, 5, 0], v[:, :, 30, 1] = INF, -INF
    return compare(q, k, v, torch.nn.functional.scaled_dot_product_attention(q, k, v), 1e-6)


def case_values_near_overflow(rank):
    """Keys of two ranks share the weight, and the difference of their values overflows."""
    q, k, v = tensors()
    k[:, :, 5] = k[:, :, 30] = 10.0
    v[:, :, 5], v[:, :, 30] = 3e38, -2e38
    return compare(q, k, v, attention64(q, k, v), 1e-4)


def case_float64(rank):
    q, k, v = tensors(torch.float64)
    return compare(q, k, v, attention64(q, k, v), 1e-14)


def case_negated_views(rank):
    """Views like ``conj().imag``, with one token per rank, which is sent without a copy."""
    q, k, v = (x[:, :, :4].contiguous() for x in tensors())
    views = [torch._neg_view(-x) for x in (q, k, v)]
    return compare(*views, attention64(q, k, v), 1e-6)


def case_mixed_dtypes_under_autocast(rank):
    """As RMS norm leaves them on a GPU: autocast gives float32 for Q and K."""
    q, k, v = tensors(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        return compare(q.float(), k.float(), v, attention64(q, k, v), 2e-2)


def main() -> None:
    """``attention_numbers.py TRANSPORT CASE...``"""
    dist.init_process_group("gloo")
    chunking._TOKENS_PER_PART.update(cpu=2)
    for plan in ("torus=2,ulysses=2,ring=1", "torus=2,ulysses=1,ring=2", "torus=1,ulysses=1,ring=4"):
        args = TorusArgs(backend="torus", plan=plan, topology="2x2", transport=sys.argv[1])
        meshes.append(build_mesh([list(range(4))], args))
        meshes[-1].one_host = False  # on one host all granularities are unstaged
    run_cases(globals(), sys.argv[2:], AssertionError)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
