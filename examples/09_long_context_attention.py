"""9. yunchang's ``LongContextAttention`` over Torus Attention: a program without xDiT changes two imports.

torchrun --nproc-per-node 4 examples/09_long_context_attention.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist

# Before: from yunchang import LongContextAttention, set_seq_parallel_pg
from sf_xfuser import LongContextAttention, TorusArgs, set_seq_parallel_pg

HEADS, TOKENS, HEAD_DIM = 8, 1024, 64


def main() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend)
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if backend == "nccl" else torch.device("cpu")

    # One host emulates two machines here. On real machines omit args: topology and transport are detected.
    two_machines = TorusArgs(backend="torus", topology=f"2x{world // 2}")
    set_seq_parallel_pg(sp_ulysses_degree=2, sp_ring_degree=world // 2, rank=rank, world_size=world, args=two_machines)
    attention = LongContextAttention(ring_impl_type="basic")

    torch.manual_seed(0)  # every rank creates the whole q, k, v [B, S, H, D] and keeps its own tokens
    q, k, v = (torch.randn(1, TOKENS, HEADS, HEAD_DIM).to(device) for _ in range(3))
    with torch.no_grad():
        out = attention(*(x.chunk(world, dim=1)[rank] for x in (q, k, v)), causal=False)

    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    difference = (out - expected.chunk(world, dim=1)[rank]).abs().max().item()
    print(f"rank {rank}: max abs difference from one process {difference:.1e}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
