"""Rank side of test_usp.py: xDiT's USP by name, hooked, against xDiT's own function in the same groups.

Reports for every case the largest absolute difference, and "handled" or the reason of the fallback.
"""

from __future__ import annotations

import inspect
import sys

import torch
import torch.distributed as dist
from cases import report
from xfuser import xFuserArgs
from xfuser.config import FlexibleArgumentParser
from xfuser.core.cache_manager.cache_manager import get_cache_manager
from xfuser.core.distributed import get_runtime_state, get_sequence_parallel_rank, runtime_state
from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType
from xfuser.model_executor.layers import usp

import sf_xfuser.integrations.xdit.usp
from sf_xfuser.integrations.xdit import session

B, H, D = 2, 8, 16
JOINT = 5


class AnyRuntimeState(runtime_state.RuntimeState):
    """A runtime state without a pipeline: USP uses only the groups and the attention backend."""


def tensors(heads=H, tokens=12, kv_heads=None, kv_tokens=None, seed=0):
    make = torch.Generator().manual_seed(1000 * seed + get_sequence_parallel_rank())

    def rand(h, s):
        return torch.randn(B, s, h, D, generator=make).transpose(1, 2)

    return (
        rand(heads, tokens),
        rand(kv_heads or heads, kv_tokens or tokens),
        rand(kv_heads or heads, kv_tokens or tokens),
    )


def joint(strategy, heads=H):
    make = torch.Generator().manual_seed(7)  # the same on every rank
    q, k, v = (torch.randn(B, JOINT, heads, D, generator=make).transpose(1, 2) for _ in range(3))
    return {"joint_query": q, "joint_key": k, "joint_value": v, "joint_strategy": strategy}


def cases():
    layer = torch.nn.Identity()
    yield "plain", tensors(), {}
    yield "longer keys", tensors(kv_tokens=20), {}
    yield "shorter keys", tensors(kv_tokens=4), {}
    yield "joint front", tensors(), joint("front")
    yield "joint rear", tensors(), joint("rear")
    if "kv_head_repeat" in inspect.signature(usp.USP.__wrapped__).parameters:  # since xfuser 0.7
        yield "repeated kv heads", tensors(kv_heads=4), {"kv_head_repeat": 2}
        yield "repeated kv heads combined", tensors(kv_heads=4), {"kv_head_repeat": 2, "combine_qkv_a2a": True}
    yield "combined", tensors(), {"combine_qkv_a2a": True}
    yield "backend named", tensors(), {"backend": AttentionBackendType.SDPA_FLASH}
    if hasattr(get_cache_manager(), "has_cache_entry"):  # since xfuser 0.7; before, each layer had to have one
        yield "attn_layer", tensors(), {"attn_layer": layer, "head_balance_layer": layer}
        get_runtime_state().runtime_config.use_spargeattn_head_balance = True  # only for xDiT's sparse attention
        yield "head balancing", tensors(), {"head_balance_layer": layer}
        get_runtime_state().runtime_config.use_spargeattn_head_balance = False
    yield "kwargs of None", tensors(), {"attention_kwargs": {"attn_mask": None, "valid_kv_len": None, "thw": (1, 2, 3)}}
    yield "gradient", tuple(x.requires_grad_() for x in tensors()), {}
    padded = hasattr(usp, "_trim_trailing_kv_padding")  # since xfuser 0.7
    if padded:
        yield "valid_kv_len of one rank", tensors(), {"attention_kwargs": {"valid_kv_len": 9}}
    if padded and get_runtime_state().parallel_config.ring_degree == 1:
        yield "valid_kv_len", tensors(), {"attention_kwargs": {"valid_kv_len": 17}}
        yield "valid_kv_len and joint", tensors(), {"attention_kwargs": {"valid_kv_len": 17}, **joint("rear")}
    if get_runtime_state().parallel_config.ring_degree == 1:
        extra = {"ulysses_extra_inputs": ("gate",), "gate": tensors(seed=1)[0]}
        yield "extra Ulysses inputs", tensors(), {"attention_kwargs": extra}
        yield "indices_k", tensors(), {"attention_kwargs": {"indices_k": torch.arange(2 * 17), "valid_kv_len": 17}}
        yield "causal", tensors(), {"is_causal": True}
        yield "backend without lse", tensors(), {"backend": AttentionBackendType.SDPA}
        mask = torch.ones(B, 1, 1, 12 * dist.get_world_size(), dtype=torch.bool)
        mask[..., -3:] = False
        yield "mask", tensors(), {"backend": AttentionBackendType.SDPA, "attention_kwargs": {"attn_mask": mask}}
    cached = torch.nn.Identity()
    get_cache_manager().register_cache_entry(cached, layer_type="attn", cache_type="naive_cache")
    yield "cache entry without PipeFusion", tensors(), {"attn_layer": cached}
    get_runtime_state().num_pipeline_patch = 2
    yield "cache of PipeFusion", tensors(), {"attn_layer": cached}
    get_runtime_state().num_pipeline_patch = 1
    if hasattr(get_runtime_state(), "fp8_comms"):  # since xfuser 0.7
        from xfuser.core.distributed.fp8_comms import Fp8CommsState

        get_runtime_state().fp8_comms = Fp8CommsState()
        yield "fp8 communication", tensors(), {"attn_layer": layer}
        get_runtime_state().fp8_comms = None
    # Hybrid attention schedules change the backend from step to step. FLASH is not installed here: an attention that
    # returns twice the output replaces it, so that the result shows which one ran.
    dense = ATTENTION_FUNCTION_REGISTRY[AttentionBackendType.SDPA_FLASH]
    ATTENTION_FUNCTION_REGISTRY[AttentionBackendType.FLASH] = lambda *a, **kw: twice(*dense(*a, **kw))
    for backend in (AttentionBackendType.FLASH, AttentionBackendType.SDPA_FLASH):
        get_runtime_state().set_attention_backend(backend)
        yield f"scheduled {backend.name}", tensors(), {}


def twice(out, lse):
    return 2 * out, lse


def swap_two_rows(torus_attention):
    """Swap the first two tokens of one head on rank 2."""

    def wrong(*args, **kwargs):
        out = torus_attention(*args, **kwargs)
        if dist.get_rank() == 2:
            out[0, 1, [0, 1]] = out[0, 1, [1, 0]]
        return out

    return wrong


def main() -> None:
    if "--wrong" in sys.argv:
        sys.argv.remove("--wrong")
        sf_xfuser.integrations.xdit.usp.torus_attention = swap_two_rows(sf_xfuser.integrations.xdit.usp.torus_attention)
    apart = "--apart" in sys.argv
    if apart:
        sys.argv.remove("--apart")
    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
    engine_config, _ = xFuserArgs.from_cli_args(parser.parse_args(["--model", "m", *sys.argv[1:]])).create_config()
    runtime_state._RUNTIME = AnyRuntimeState(engine_config)
    get_runtime_state().patch_mode = False
    if apart:  # as if ranks shared no memory: in stages, with rounding that differs from xDiT's
        session.current.mesh.one_host = False
    for name, (q, k, v), kwargs in cases():
        # xDiT's own function may change its kwargs: give each call a copy.
        expected = usp.USP.__wrapped__(q, k, v, **copied(kwargs))
        before = handled_calls()
        try:
            out = usp.USP(q, k, v, **copied(kwargs))
        except RuntimeError as error:
            report(name, [float("nan"), f"{type(error).__name__}: {error}"])
            continue
        assert out.shape == expected.shape and out.dtype == expected.dtype
        difference = (out - expected).abs().max().item()
        reasons = [line for line in sf_xfuser.explain().splitlines() if not line.startswith("repaired in xDiT")]
        how = "handled" if handled_calls() > before else reasons[-1]
        report(name, [difference, how])
    if "--sp-check" in sys.argv:
        line = next(line for line in sf_xfuser.explain().splitlines() if line.startswith("--sp-check"))
        report("checks", [0.0, line])
    dist.barrier()
    get_runtime_state().destroy_distributed_env()


def copied(kwargs):
    return {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}


def handled_calls() -> int:
    return int(next(line for line in sf_xfuser.explain().splitlines() if "handled by torus" in line).rpartition(" ")[2])


if __name__ == "__main__":
    main()
