"""Rank side of test_yunchang_attention.py: LongContextAttention on 2 machines x 2 ranks.

    torchrun --nproc-per-node 4 yunchang_attention.py [--without-yunchang] CASE...

``--without-yunchang``: only PyTorch, NumPy and their dependencies can be imported.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

FOREIGN = ("xfuser", "yunchang", "diffusers", "transformers", "accelerate", "huggingface_hub", "rich", "einops")

WITHOUT = "--without-yunchang" in sys.argv
if WITHOUT:
    sys.argv.remove("--without-yunchang")
    sys.modules.update(dict.fromkeys(FOREIGN))  # importing them raises ModuleNotFoundError

import torch
import torch.distributed as dist
from cases import run_cases

import sf_xfuser
from sf_xfuser import LongContextAttention, TorusArgs, set_seq_parallel_pg, torus_attention

B, S, H, D = 2, 12, 4, 32
ARGS = TorusArgs(backend="torus", topology="2x2", timeout=20)


def set_up(ulysses: int = 2, ring: int = 2, **options: object) -> sf_xfuser.Mesh:
    return set_seq_parallel_pg(ulysses, ring, dist.get_rank(), dist.get_world_size(), **{"args": ARGS} | options)


def whole(kv_heads: int = H) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(7)
    return [torch.randn(B, 4 * S, heads, D, generator=make) for heads in (H, kv_heads, kv_heads)]


def mine(tensors: list[torch.Tensor], world: int = 4) -> list[torch.Tensor]:
    return [x.chunk(world, dim=1)[dist.get_rank() % world] for x in tensors]


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    """One process, float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


def compare(layer: LongContextAttention, wanted: torch.Tensor, *call: object, **options: object) -> str:
    out = layer(*call, **options)
    assert out.shape == call[0].shape and out.is_contiguous()
    error = (out - wanted).abs().max().item()
    counted = f"{layer.layers.handled} on torus, {sum(layer.layers.fallbacks.values())} fell back"
    return f"{'equal' if error < 2e-6 else error}; {counted} {'; '.join(layer.layers.fallbacks)}".strip()


def on_torus(ulysses: int, ring: int, kv_heads: int = H, scale: float | None = None, **given: object) -> str:
    set_up(ulysses, ring)
    tensors = whole(kv_heads)
    wanted = mine([expected(*tensors, scale=scale)])[0]
    return compare(LongContextAttention(**given), wanted, *mine(tensors), softmax_scale=scale, causal=False)


def case_two_groups(rank: int) -> str:
    """Data parallel 2: ranks 0, 1 and ranks 2, 3 have different sequences."""
    set_up(2, 1)
    tensors = [x.flip(0) if rank >= 2 else x for x in whole()]
    return compare(LongContextAttention(), mine([expected(*tensors)], world=2)[0], *mine(tensors, world=2))


def case_yunchangs_own(rank: int) -> str:
    """Both classes agree on calls that run on torus and on calls that fall back."""
    import yunchang
    from yunchang.kernels import AttnType, attention

    from sf_xfuser.integrations.xdit.cpu_platform import flash_attention

    attention._scaled_dot_product_flash_attention = flash_attention  # PyTorch has no CPU kernel of that name
    results = []
    for ulysses, ring, causal in ((4, 1, False), (2, 2, False), (1, 4, False), (4, 1, True), (2, 2, True)):
        set_up(ulysses, ring)
        layer = LongContextAttention(attn_type=AttnType.TORCH_FLASH)
        own = yunchang.LongContextAttention(attn_type=AttnType.TORCH_FLASH)
        tensors = mine(whole())
        results.append(compare(layer, own(*tensors, causal=causal), *tensors, causal=causal))
    return " | ".join(results)


def fallback(call: dict[str, object] | None = None, gradient: bool = False, **given: object) -> str:
    set_up()
    q, k, v = mine(whole())
    LongContextAttention(**given)(q.requires_grad_(gradient), k, v, **(call or {}))
    return "nothing was raised"


def fused(**call: object) -> None:
    """Head size 32, which the fused kernel does not support."""
    set_up(args=replace(ARGS, kernel="fused"))
    LongContextAttention()(*mine(whole()), **call)


def case_gradient_of_torus_attention(rank: int) -> None:
    tensors = [x.transpose(1, 2).requires_grad_() for x in mine(whole())]
    torus_attention(*tensors, mesh=set_up())


def case_before_set_up(rank: int) -> None:
    LongContextAttention()


def case_degrees(rank: int) -> None:
    set_up(3, 1)


def case_wrong_rank(rank: int) -> None:
    set_seq_parallel_pg(2, 2, rank + 1, 4)


def case_another_backend(rank: int) -> None:
    set_seq_parallel_pg(2, 2, rank, 4, args=TorusArgs(backend="usp"))


CASES = {
    "ulysses": partial(on_torus, 4, 1),
    "unified": partial(on_torus, 2, 2, ring_impl_type="zigzag", use_pack_qkv=True, use_sync=True),
    "ring": partial(on_torus, 1, 4),
    "scale": partial(on_torus, 2, 2, scale=0.3),
    "grouped_queries": partial(on_torus, 2, 2, kv_heads=2),
    "attention_type": partial(on_torus, 2, 2, attn_type=SimpleNamespace(name="FA")),  # like yunchang's AttnType.FA
    "fused": fused,
    "fused_scale": partial(fused, softmax_scale=0.3),
    "causal": partial(fallback, {"causal": True}),
    "dropout": partial(fallback, {"dropout_p": 0.1}),
    "window": partial(fallback, {"window_size": (8, 0)}),
    "softcap": partial(fallback, {"softcap": 30.0}),
    "alibi": partial(fallback, {"alibi_slopes": torch.ones(H)}),
    "quantized": partial(fallback, attn_type=SimpleNamespace(name="SAGE_FP8")),
    "other_exchange": partial(fallback, scatter_idx=1, gather_idx=2),
    "gradient": partial(fallback, gradient=True),
}


def main() -> None:
    dist.init_process_group("gloo")
    cases = {f"case_{name}": lambda rank, call=call: call() for name, call in CASES.items()}
    run_cases(globals() | cases, sys.argv[1:], (ValueError, RuntimeError))
    if WITHOUT:
        assert not [
            name for name, module in sys.modules.items() if name.split(".")[0] in FOREIGN and module is not None
        ]
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
