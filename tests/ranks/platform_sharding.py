"""Ranks: a module that xDiT shards with FSDP (both versions) equals the whole module of rank 0."""

import os
import sys

import torch
import torch.distributed as dist
from xfuser.core.distributed import init_distributed_environment
from xfuser.core.distributed.sharding import shard_component, shard_dit


class Blocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.proj_out = torch.nn.Linear(8, 8)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x) + self.shift


def main():
    init_distributed_environment()
    rank = dist.get_rank()
    x = torch.ones(2, 8)
    for version in ("FSDP1", "FSDP2"):
        torch.manual_seed(0)
        whole = Blocks().to(torch.bfloat16)
        expected = whole(x.to(torch.bfloat16))
        if version == "FSDP1":
            torch.manual_seed(rank)  # different weights by rank: sync_module_states broadcasts those of rank 0
            sharded = shard_dit(Blocks(), local_rank=rank)
        else:
            sharded = shard_component(whole, ["blocks"], device_id=rank, memory_efficient_init=True)
        local = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in sharded.parameters())
        assert local <= 4 * 72 / dist.get_world_size(), f"{version} left {local} parameters on rank {rank}"
        torch.testing.assert_close(sharded(x.to(torch.bfloat16)), expected, atol=2e-2, rtol=2e-2)
        print(f"rank {rank}: {version} equals the whole module")
    dist.destroy_process_group()
    # FSDP's states and meshes still hold groups, and gloo now and then aborts a process that unloads it with one alive.
    sys.stdout.flush()
    os._exit(0)


main()
