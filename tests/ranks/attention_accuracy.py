"""Rank side of test_attention.py: torus_attention against float64 attention on one process, for many layouts."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from functools import partial

import torch
import torch.distributed as dist

from sf_xfuser.config import TorusArgs
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.layout import chunking
from sf_xfuser.layout.plan import head_ranges
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.torus.call import Joint, Tokens


def attention64(q, k, v):
    """Plain softmax attention in float64, KV heads repeated."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v


def sdpa(q, k, v):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def spread(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def check(
    mesh, device, fused, granularity, *, heads, kv_heads, tokens, kv_tokens, batch, dtype, joint, joint_tokens, seed
):
    """Check one call: (its error over that of one process, its result). Every rank makes the same global tensors and
    uses its own part."""
    make = torch.Generator().manual_seed(seed)
    D = 64 if fused else 16  # the fused kernel does not support 16

    def rand(h, s):
        return torch.randn(batch, s, h, D, generator=make).to(device, dtype).transpose(1, 2)  # view of [B,S,H,D]

    q, k, v = rand(heads, tokens), rand(kv_heads, kv_tokens), rand(kv_heads, kv_tokens)
    jq, jk, jv = rand(heads, joint_tokens), rand(kv_heads, joint_tokens), rand(kv_heads, joint_tokens)
    me, world = mesh.position, mesh.layout.world_size
    local_q, local_k, local_v = (
        x.split(spread(n, world), dim=2)[me] for x, n in ((q, tokens), (k, kv_tokens), (v, kv_tokens))
    )
    kwargs = {}
    full_q, full_k, full_v = local_q, k, v
    if joint:
        ends = (lambda a, b: (a, b)) if joint == "front" else (lambda a, b: (b, a))
        full_q = local_q = torch.cat(ends(jq, local_q), dim=2)
        full_k, full_v = torch.cat(ends(jk, k), dim=2), torch.cat(ends(jv, v), dim=2)
        kwargs = {"joint": Joint(jk, jv, joint)}
    extra = joint_tokens if joint else 0
    counts = {"tokens": Tokens([n + extra for n in spread(tokens, world)], spread(kv_tokens, world))}
    seen = []

    def attend(q, k, v):
        seen.append(k)
        return sdpa_attend(q, k, v)

    if mesh.one_host and device.type == "cpu":  # unstaged: one call with the keys in sequence order
        kwargs["attention"] = attend
    call = partial(torus_attention, local_q, local_k, local_v, mesh=mesh, granularity=granularity, **kwargs)
    kernel = {"attention": "fused"} if fused else {}
    out, again = call(**kernel), call(**kernel, **counts)
    what = f"{mesh.layout} {mesh.one_host=} {granularity} {heads=} {kv_heads=} {tokens=} {kv_tokens=} {batch=} {dtype=}"
    what += f" {joint=}"
    assert out.shape == local_q.shape and out.dtype == dtype, what
    assert torch.equal(out, again), f"not bitwise repeatable: {what}"
    low, high = head_ranges(heads, kv_heads, mesh.layout.ulysses_degree)[0][mesh.layout.head_group(me)]
    expected = full_k.repeat_interleave(heads // kv_heads, dim=1)[:, low:high]
    assert seen or not ("attention" in kwargs and not fused and out.numel()), what
    assert all(torch.equal(k, expected) for k in seen), f"keys are not in sequence order: {what}"
    if fused:
        rounding = max(4 * torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(out, call(**counts), rtol=rounding, atol=rounding, msg=what)
    # Each rank has the error of its own rows; take the maximum.
    exact = attention64(full_q, full_k, full_v)
    ours = torch.zeros(1, dtype=torch.float64, device=device)
    if out.numel():
        ours = (out.double() - exact).abs().max().view(1)
    dist.all_reduce(ours, dist.ReduceOp.MAX)
    all_q = torch.cat([jq, q], dim=2) if joint else q
    exact_all = attention64(all_q, full_k, full_v)
    single = (sdpa(all_q, full_k, full_v).double() - exact_all).abs().max().item()
    floor = torch.finfo(dtype).eps * exact_all.abs().max().item() / 2  # half a unit in the last place of the result
    assert ours.item() <= 2 * max(single, floor), f"error {ours.item():.3e}, single-process SDPA {single:.3e}: {what}"
    return ours.item() / max(single, floor), out


def main() -> None:
    """``attention_accuracy.py SIZES [cuda] [fused] [TRANSPORT]``. SIZES: group sizes that divide the world size. cuda:
    GPUs and NCCL instead of CPUs and gloo. fused: use the fused kernel, and compare it with the library as well."""
    transport = next((x for x in sys.argv[2:] if x not in ("cuda", "fused")), "auto")
    device = torch.device("cpu")
    if "cuda" in sys.argv[2:]:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    chunking._TOKENS_PER_PART.update(cpu=2, cuda=2)  # split small slabs into parts, like real sizes
    world = dist.get_world_size()
    sizes = [int(x) for x in sys.argv[1].split(",")]
    worst, digest = 0.0, hashlib.sha256()
    for size in sizes:
        lists = [list(range(i, i + size)) for i in range(0, world, size)]
        for torus, ulysses, ring in itertools.product((1, 2, 3, 4), repeat=3):
            if torus * ulysses * ring != size:
                continue
            # Every placement of the ring: inside the machine, across machines, or both.
            for across in (x for x in range(1, ring + 1) if ring % x == 0):
                machines, per_machine = torus * across, ulysses * ring // across
                topology = f"{machines * len(lists)}x{per_machine}"
                args = TorusArgs(
                    backend="torus",
                    plan=f"torus={torus},ulysses={ulysses},ring={ring}",
                    topology=topology,
                    transport=transport,
                    timeout=60,
                )
                mesh = build_mesh(lists, args)
                assert (mesh.layout.torus, mesh.layout.ulysses, mesh.layout.ring_across) == (torus, ulysses, across)
                head_degree = torus * ulysses
                base = {
                    "tokens": 24,
                    "kv_tokens": 24,
                    "batch": 1,
                    "dtype": torch.float32,
                    "joint": None,
                    "joint_tokens": 5,
                }
                even, odd = (
                    {"heads": 2 * head_degree, "kv_heads": 2 * head_degree},
                    {"heads": 2 * head_degree + 1, "kv_heads": 2 * head_degree + 1},
                )
                cases = [
                    base | even,
                    base | odd | {"tokens": 93, "kv_tokens": 95, "batch": 2, "joint": "front"},
                    base | even | {"heads": 4 * head_degree, "dtype": torch.bfloat16, "joint": "rear", "tokens": 23},
                    base | {"heads": 6 * head_degree, "kv_heads": 3} | {"batch": 2, "tokens": 3, "kv_tokens": 6},
                    base | even | {"dtype": torch.bfloat16, "tokens": 40, "kv_tokens": 64},
                    # Only one rank's shape changes between these calls.
                    base | even | {"tokens": 40, "kv_tokens": 40},
                    base | even | {"tokens": 41, "kv_tokens": 41},
                ]
                ways = [(False, "block"), (False, "slab"), (False, "unstaged")]
                ways += [(True, None)] if mesh.one_host else []  # one call with the keys in sequence order
                for mesh.one_host, granularity in ways:
                    mesh.calls.clear()
                    for seed, case in enumerate(cases) if granularity == "block" else list(enumerate(cases))[1:4]:
                        ratio, out = check(mesh, device, "fused" in sys.argv[2:], granularity, seed=seed, **case)
                        worst = max(worst, ratio)
                        if not mesh.one_host:
                            digest.update(out.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    digests = [None] * world
    dist.all_gather_object(digests, digest.hexdigest())
    if dist.get_rank() == 0:
        print(f"worst error {worst:.2f}x single-process SDPA, bits {digests}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
