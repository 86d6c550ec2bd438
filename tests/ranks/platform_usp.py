"""Four ranks: xDiT's USP at U2, R2, U2R2, U4 and R4 equals single-process SDPA of the whole sequence."""

from pathlib import Path

import torch
import torch.nn.functional as F
from xfuser import xFuserArgs
from xfuser.core.distributed import (
    get_ring_parallel_world_size,
    get_runtime_state,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
    get_ulysses_parallel_world_size,
    get_world_group,
    init_distributed_environment,
    runtime_state,
)
from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType
from xfuser.core.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
from xfuser.model_executor.layers.usp import USP

B, H, D = 2, 4, 16
S_LOCAL, S_JOINT = 10, 7


class AnyRuntimeState(runtime_state.RuntimeState):
    """A runtime state without a pipeline: USP uses only the groups and the attention backend."""


def qkv(sequence, dtype):
    """The same random q, k, v [B, H, sequence, D] on every rank, as views of [B, sequence, H, D] like a model's."""
    return [torch.randn(B, sequence, H, D).to(dtype).transpose(1, 2) for _ in range(3)]


def check_local_attention():
    attention = ATTENTION_FUNCTION_REGISTRY[AttentionBackendType.SDPA_FLASH]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        q, k, v = qkv(33, dtype)
        k = k.transpose(2, 3).contiguous().transpose(2, 3)  # D has a stride: PyTorch's CPU kernel would not notice
        out, lse = attention(q, k, v, dropout_p=0.0, is_causal=False)
        scores = (q.float() @ k.float().mT) * D**-0.5
        assert out.dtype == dtype and lse.dtype == torch.float32 and lse.shape == (B, H, 33)
        torch.testing.assert_close(lse, scores.logsumexp(-1), atol=tolerance, rtol=0)
        torch.testing.assert_close(out.float(), scores.softmax(-1) @ v.float(), atol=tolerance, rtol=0)
    try:
        attention(q, k[:, :, :0], v[:, :, :0], dropout_p=0.0, is_causal=False)
    except ValueError as error:
        assert "empty" in str(error)
    else:
        raise AssertionError("an empty key sequence kills the process in PyTorch")


def check_usp(joint_strategy, dtype, tolerance):
    rank, world_size = get_sequence_parallel_rank(), get_sequence_parallel_world_size()
    q, k, v = qkv(S_LOCAL * world_size, dtype)
    mine = slice(rank * S_LOCAL, (rank + 1) * S_LOCAL)
    local = [tensor[:, :, mine] for tensor in (q, k, v)]
    if joint_strategy is None:
        expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())[:, :, mine]
        out = USP(*local)
    else:
        joint = qkv(S_JOINT, dtype)
        front = joint_strategy == "front"
        whole = [torch.cat([j, t] if front else [t, j], dim=2).float() for j, t in zip(joint, (q, k, v), strict=True)]
        of_joint, of_image = F.scaled_dot_product_attention(*whole).split(
            [S_JOINT, S_LOCAL * world_size] if front else [S_LOCAL * world_size, S_JOINT], dim=2
        )[:: 1 if front else -1]
        parts = (of_joint, of_image[:, :, mine])
        expected = torch.cat(parts if front else parts[::-1], dim=2)
        out = USP(*local, joint_query=joint[0], joint_key=joint[1], joint_value=joint[2], joint_strategy=joint_strategy)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=0)
    return (out.float() - expected).abs().max().item()


def main():
    torch.manual_seed(0)
    check_local_attention()
    init_distributed_environment()
    assert torch.distributed.get_backend() == "gloo"
    for copies, ulysses, ring in ((2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1), (1, 1, 4)):
        config, _ = xFuserArgs(
            model="none", data_parallel_degree=copies, ulysses_degree=ulysses, ring_degree=ring
        ).create_config()
        assert config.runtime_config.dtype == torch.float32
        runtime_state._RUNTIME = AnyRuntimeState(config)
        assert get_runtime_state().attention_backend is AttentionBackendType.SDPA_FLASH
        assert (get_ulysses_parallel_world_size(), get_ring_parallel_world_size()) == (ulysses, ring)
        for joint_strategy in (None, "front", "rear"):
            worst = check_usp(joint_strategy, torch.float32, 1e-5)
            check_usp(joint_strategy, torch.bfloat16, 2e-2)
            if get_world_group().rank == 0:
                print(f"U{ulysses} R{ring} joint={joint_strategy}: {worst:.1e}")
        destroy_model_parallel()
    threads = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    assert sum("gloo_tcp_loop" in name for name in threads) == 1, threads
    destroy_distributed_environment()


main()
