"""2. Torus Attention alone: four ranks that emulate two machines, compared with attention in one process.

torchrun --nproc-per-node 4 examples/02_attention_on_four_ranks.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from sf_xfuser import TorusArgs, build_mesh, torus_attention

HEADS, TOKENS, HEAD_DIM = 8, 1024, 64


def main() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend)
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if backend == "nccl" else torch.device("cpu")

    # One sequence-parallel group of all ranks. On real machines omit the topology: it is detected from the hosts.
    mesh = build_mesh([list(range(world))], TorusArgs(backend="torus", topology=f"2x{world // 2}"), heads=HEADS)
    if rank == 0:
        print("\n".join(mesh.lines()))

    torch.manual_seed(0)  # every rank creates the whole q, k, v and keeps its own tokens
    q, k, v = (torch.randn(1, HEADS, TOKENS, HEAD_DIM).to(device) for _ in range(3))
    mine = [x.chunk(world, dim=2)[rank] for x in (q, k, v)]
    out = torus_attention(*mine, mesh=mesh)

    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).chunk(world, dim=2)[rank]
    print(f"rank {rank}: max abs difference from one process {(out - expected).abs().max().item():.1e}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
