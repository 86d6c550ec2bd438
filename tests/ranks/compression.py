"""Rank side of test_compression.py: attention with compressed chunks between machines, against float64.

Reports the relative error, the error of the chunks, and compressed / uncompressed bytes between machines.
Usage: compression.py {name: [topology, plan, transport, format, dtype, heads, KV heads, joint], ...}
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from attention_accuracy import attention64, spread
from cases import report

from sf_xfuser.config import TorusArgs
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.torus.call import Joint

D = 64


def counted(mesh):
    """Counts the bytes of all parcels on the link between machines."""
    link = mesh.links["across"]
    record, sent = link.record, [0]

    def counting(round, sends, receives):
        transfer, nbytes = record(round, sends, receives), sum(parcel.nbytes for parcel in sends)
        post = transfer.post

        def counted_post():
            sent[0] += nbytes
            post()

        transfer.post = counted_post
        return transfer

    link.record = counting
    mesh.calls.clear()  # the next call records its program again
    return sent


def main() -> None:
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    for name, case in json.loads(sys.argv[1]).items():
        topology, plan, transport, format, dtype, H, H_kv, joint = case
        args = TorusArgs(backend="torus", plan=plan, topology=topology, transport=transport, timeout=60)
        without_shm = replace(
            args, transport="tcp" if transport == "auto" else transport
        )  # shm uses one object for both links
        plain, mesh = (build_mesh([list(range(world))], x) for x in (without_shm, replace(args, compress=format)))
        make = torch.Generator().manual_seed(3)
        tokens = spread(90, world)

        def rand(h, s, make=make, dtype=dtype):
            return torch.randn(2, s, h, D, generator=make).to(getattr(torch, dtype)).transpose(1, 2)

        q, k, v = rand(H, 90), rand(H_kv, 90), rand(H_kv, 90)
        local_q, local_k, local_v = (x.split(tokens, dim=2)[mesh.position] for x in (q, k, v))
        kwargs = {}
        if joint:
            jk, jv = rand(H_kv, 7), rand(H_kv, 7)
            k, v = torch.cat((jk, k), dim=2), torch.cat((jv, v), dim=2)
            kwargs = {"joint": Joint(jk, jv, joint)}
        torus_attention(local_q, local_k, local_v, mesh=mesh, **kwargs)  # the first call may select a transport
        torus_attention(local_q, local_k, local_v, mesh=plain, **kwargs)
        sent, without = counted(mesh), counted(plain)
        out = torus_attention(local_q, local_k, local_v, mesh=mesh, **kwargs)
        torus_attention(local_q, local_k, local_v, mesh=plain, **kwargs)
        share = sent[0] / without[0]
        assert torch.equal(out, torus_attention(local_q, local_k, local_v, mesh=mesh, **kwargs)), "not repeatable"
        exact = attention64(local_q, k, v)
        error = ((out.double() - exact).square().mean() / exact.square().mean()).sqrt().item()
        chunks = next(line for line in mesh.lines() if line.startswith("--sp-compress"))
        report(name, {"error": error, "chunks": chunks, "share": share})
        mesh.close()
        plain.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
