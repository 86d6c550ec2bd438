"""Rank side of test_attention.py: bad input must raise the same error on every rank, without a hang."""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
from cases import run_cases
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sf_xfuser.config import TorusArgs
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.torus.call import Joint


def qkv(heads=4, tokens=8, kv_heads=None, dtype=torch.float32, dim=16):
    q = torch.randn(1, heads, tokens, dim, dtype=dtype)
    k = torch.randn(1, kv_heads or heads, tokens, dim, dtype=dtype)
    return q, k, k.clone()


def mesh(**kwargs):
    world = dist.get_world_size()
    options = {"backend": "torus", "topology": f"2x{world // 2}", "timeout": 5.0} | kwargs.pop("args", {})
    return build_mesh([list(range(world))], TorusArgs(**options), **{"heads": 4} | kwargs)


def case_disagree_on_dtype(rank):
    m = mesh()
    torus_attention(*qkv(dtype=torch.bfloat16 if rank == 1 else torch.float32), mesh=m)


def case_disagree_on_heads(rank):
    m = mesh()
    torus_attention(*qkv(heads=8 if rank == 1 else 4), mesh=m)


def case_bad_shape_on_one_rank(rank):
    m = mesh()
    q, k, v = qkv()
    torus_attention(q[0] if rank == 1 else q, k, v, mesh=m)


def case_integers(rank):
    torus_attention(*(x.long() for x in qkv()), mesh=mesh())


def case_no_value(rank):
    q, k, _ = qkv()
    torus_attention(q, k, None, mesh=mesh())


def case_sparse(rank):
    torus_attention(*(x.to_sparse() for x in qkv()), mesh=mesh())


def case_without_data(rank):
    q, k, v = qkv()
    torus_attention(q, k.to("meta"), v, mesh=mesh())


def case_count_in_place_of_counts(rank):
    torus_attention(*qkv(), mesh=mesh(), tokens=(8, [8] * 4))


def case_counts_of_queries_alone(rank):
    torus_attention(*qkv(), mesh=mesh(), tokens=([8] * 4, None))


def case_other_batch(rank):
    q, k, v = qkv()
    torus_attention(q, torch.cat((k, k)), torch.cat((v, v)), mesh=mesh())


def case_float64_compressed(rank):
    m = mesh(args={"compress": "int8", "transport": "tcp"})
    torus_attention(*qkv(dtype=torch.float64), mesh=m)


def case_too_few_heads(rank):
    torus_attention(*qkv(heads=2), mesh=mesh())


def case_kv_heads_do_not_divide(rank):
    torus_attention(*qkv(heads=4, kv_heads=3), mesh=mesh())


def case_counts_that_do_not_fit(rank):
    torus_attention(*qkv(), mesh=mesh(), tokens=([8, 8, 8, 9], [8] * 4))


def case_fused_head_size(rank):
    torus_attention(*qkv(), mesh=mesh(), attention="fused")


def case_fused_dtype(rank):
    torus_attention(*qkv(dtype=torch.float64, dim=64), mesh=mesh(), attention="fused")


def case_unknown_attention(rank):
    torus_attention(*qkv(), mesh=mesh(), attention="flash")


def case_unknown_joint_strategy(rank):
    q, k, v = qkv()
    torus_attention(q, k, v, mesh=mesh(), joint=Joint(k, v, "middle"))


def case_heads_that_no_plan_splits(rank):
    mesh(args={"plan": "torus=2,ulysses=2,ring=1"}, heads=6)


def case_product_is_not_the_world(rank):
    mesh(args={"plan": "torus=2,ulysses=1,ring=1"})


def case_topology_does_not_match(rank):
    mesh(args={"topology": "3x2"})


def case_different_flags(rank):
    mesh(args={"plan": "paper" if rank == 1 else "auto"})


def case_degrees_are_not_the_world(rank):
    mesh(ulysses_degree=3, ring_degree=1)


def case_device_mesh_of_three_dimensions(rank):
    build_mesh(init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("dp", "ring", "ulysses")), TorusArgs(backend="torus"))


def case_device_mesh_without_names(rank):
    build_mesh(init_device_mesh("cpu", (2, 2)), TorusArgs(backend="torus"))


def case_device_meshes_that_overlap(rank):
    build_mesh(DeviceMesh("cpu", [0, 1] if rank < 2 else [1, 2, 3], _init_backend=False), TorusArgs(backend="torus"))


def case_a_rank_is_missing(rank):
    m = mesh(args={"timeout": 1.0})  # ranks may start a call five times this apart
    started = time.monotonic()
    if rank == 1:
        time.sleep(8)
        return
    try:
        torus_attention(*qkv(), mesh=m)
    finally:
        assert time.monotonic() - started < 15, "the wait is not bounded"


def main() -> None:
    """``attention_refusals.py CASE...`` runs the cases in order. ``--uncaught CASE`` does not catch the error."""
    names = sys.argv[1:]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    if names[0] == "--uncaught":
        globals()[f"case_{names[1]}"](rank)
    run_cases(globals(), names, (TypeError, ValueError, RuntimeError, AssertionError))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
