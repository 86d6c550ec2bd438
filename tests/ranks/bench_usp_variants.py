"""Rank side of test_bench_usp_variants.py: four ranks as two machines of two. Reports each call."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import report

from sf_xfuser.bench.usp_variants import attention_timer, call_usp, make_groups, unavailable
from sf_xfuser.layout.usp_layouts import legal_configs

B, S, D = 2, 24, 16
RANKS_PER_MACHINE = 2
SHAPES = ((8, 8), (6, 6), (8, 4))  # query heads, KV heads


def main() -> None:
    assert unavailable() is None, unavailable()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    by_shape = {
        shape: [*legal_configs(world_size, RANKS_PER_MACHINE, *shape),
                *legal_configs(world_size, RANKS_PER_MACHINE, *shape, placement="machines-first")]
        for shape in SHAPES
    }  # fmt: skip
    configs = list(dict.fromkeys(config for configs in by_shape.values() for config in configs))
    groups = make_groups(configs, ranks_per_machine=RANKS_PER_MACHINE)
    check_groups(groups, configs)

    mine = slice(rank * S, (rank + 1) * S)
    for (heads, kv_heads), configs in by_shape.items():
        torch.manual_seed(heads)
        # Views of [B, S, H, D], as in xDiT's models.
        q, k, v = (torch.randn(B, S * world_size, h, D).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)[:, :, mine]
        first = {}
        for config in [*configs, *reversed(configs)]:  # each variant twice, others in between
            before = state()
            kernels: list[tuple[float, float]] = []
            started = time.perf_counter()
            timer = attention_timer(lambda start, end, seen=kernels: seen.append((start, end)))
            with groups.use(config), timer:
                out = call_usp(q[:, :, mine], k[:, :, mine], v[:, :, mine])
            ended = time.perf_counter()
            assert state() == before, "xDiT differs after the call"
            assert out.dtype == q.dtype and out.shape == expected.shape
            record = {
                "heads": heads,
                "kv_heads": kv_heads,
                "config": str(config),
                "error": (out.double() - expected).abs().max().item(),
                "kernels": len(kernels),
                "kernels_in_order": all(started <= a <= b <= ended for a, b in kernels),
                "repeats": torch.equal(first.setdefault(config, out), out),
            }
            report("call", record)
    dist.barrier()
    dist.destroy_process_group()


def state() -> list[object]:
    """Everything that is swapped during a call."""
    from torch.distributed.tensor.experimental._attention import _cp_options
    from xfuser.core.distributed import get_runtime_state, get_sp_group
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY
    from yunchang.globals import PROCESS_GROUP

    kernel = ATTENTION_FUNCTION_REGISTRY[get_runtime_state().attention_backend]
    return [dict(vars(PROCESS_GROUP)), dict(vars(get_sp_group())), _cp_options.rotate_method, kernel]


def check_groups(groups, configs) -> None:
    """``placement="xdit"`` has the groups that xDiT makes; Ulysses crosses machines for ``"machines-first"``."""
    from yunchang import set_seq_parallel_pg
    from yunchang.globals import PROCESS_GROUP

    world_size, kept = dist.get_world_size(), dict(vars(PROCESS_GROUP))
    for config in configs:
        set_seq_parallel_pg(config.ulysses_degree, config.ring_degree, dist.get_rank(), world_size)
        own = [members(PROCESS_GROUP.ULYSSES_PG), members(PROCESS_GROUP.RING_PG)]
        with groups.use(config):
            selected = [members(PROCESS_GROUP.ULYSSES_PG), members(PROCESS_GROUP.RING_PG)]
        if config.placement == "xdit":
            assert selected == own, (config, selected, own)
        else:
            machines = [{rank // RANKS_PER_MACHINE for rank in ranks} for ranks in selected]
            assert [len(m) for m in machines] == [2, 1], (config, selected)
    vars(PROCESS_GROUP).update(kept)


def members(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


if __name__ == "__main__":
    main()
