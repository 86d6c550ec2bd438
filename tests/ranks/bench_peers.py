"""Rank side of test_bench_peers.py: four ranks as two machines of two. Reports each peer in each case."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yunchang
from cases import report
from yunchang.kernels import AttnType

from sf_xfuser.bench import peers
from sf_xfuser.bench.case import make_case
from sf_xfuser.integrations.xdit import plugin

CASES = ({"heads": 8, "seq_len": 64}, {"heads": 7, "seq_len": 61}, {"heads": 6, "seq_len": 64, "kv_heads": 3})


def main() -> None:
    if plugin.unsupported() is None:
        plugin.enable()  # as the bench does
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for number, shape in enumerate(CASES):
        case = make_case({"cluster": "2x2", "head_dim": 16, "batch": 2, **shape})
        torch.manual_seed(number)
        # Views of [B, S, H, D], as in xDiT's models.
        q, k, v = (torch.randn(2, case.seq_len, case.heads, 16).transpose(1, 2) for _ in "qkv")
        first = sum(case.tokens[:rank])
        inputs = [x[:, :, first : first + case.tokens[rank]] for x in (q, k, v)]
        expected = F.scaled_dot_product_attention(inputs[0].double(), k.double(), v.double())

        def error(call, inputs=inputs, expected=expected) -> float:
            call(*inputs)
            out = call(*inputs)  # again, with its buffers in use
            assert out.shape == expected.shape
            return float((out.double() - expected).abs().max())

        for peer in peers.PEERS:
            before = state()
            call, reason = peers.open_peer(peer, case)
            report(f"{number} {peer.name}", reason if call is None else error(call))
            assert state() == before, peer.name
        if number == 0:
            report("exchanges of nccl-zero-sm", error(peers.ulysses(dist.group.WORLD, case, torch.device("cpu"))))
            layer = yunchang.UlyssesAttention(dist.group.WORLD, attn_type=AttnType.TORCH_FLASH)
            report(
                "UlyssesAttention on PyTorch's attention",
                error(lambda *qkv, layer=layer: layer(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)),
            )
    dist.barrier()
    dist.destroy_process_group()


def state() -> list[object]:
    """What xDiT's variants and the single process use."""
    from torch.distributed.tensor.experimental._attention import _cp_options
    from yunchang.globals import PROCESS_GROUP

    return [F.scaled_dot_product_attention, dict(vars(_cp_options)), dict(vars(PROCESS_GROUP))]


if __name__ == "__main__":
    main()
