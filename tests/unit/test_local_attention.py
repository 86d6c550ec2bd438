"""Results of xDiT's attention functions, in the layouts recorded for each backend, can be merged.

``(out, lse)`` by backend, xDiT 0.7.0: FLASH (flash-attn 2), FLASH_3 and AITER return a view of [B,S,H,D] and [B,H,Sq];
CUDNN [B,H,Sq,1] in some versions; SDPA_EFFICIENT on CUDA [B,H,Sq rounded up to a multiple of 32], undefined after Sq.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sf_xfuser.integrations.xdit.attention_backends import LSE_BACKENDS, as_attend_function
from sf_xfuser.kernels import merge_
from tests.kernel_cases import attention64

B, H, S, D = 2, 3, 50, 16


def exact(q, k, v, base=None):
    """Softmax attention and its log-sum-exp in float64."""
    scores = (q.double() @ k.double().transpose(-1, -2)) / q.shape[-1] ** 0.5
    lse = torch.logsumexp(scores, -1)
    return (torch.softmax(scores, -1) @ v.double()).float(), (lse if base is None else lse / base).float()


def view_of_BSHD(out, lse):
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def with_a_last_dimension(out, lse):
    return out, lse.unsqueeze(-1)


def padded_to_32(out, lse):
    wide = torch.full((B, H, -(-lse.shape[2] // 32) * 32), float("inf"))
    wide[..., : lse.shape[2]] = lse
    return out, wide


RECORDED = {
    "SDPA_FLASH": lambda out, lse: (out, lse),
    "FLASH": view_of_BSHD,
    "FLASH_3": view_of_BSHD,
    "FLASH_3_FP8": view_of_BSHD,
    "AITER": view_of_BSHD,
    "CUDNN": with_a_last_dimension,
    "SDPA_EFFICIENT": padded_to_32,
    "SAGE": view_of_BSHD,
    "NPU": view_of_BSHD,
}


def in_two_parts(attend, q, k, v):
    """Attend to two parts of the keys and merge, like ``torus_attention``."""
    out, lse = attend(q, k[:, :, :33], v[:, :, :33])
    total, total_lse = out.float().contiguous(), lse.clone()
    merge_(total, total_lse, *attend(q, k[:, :, 33:], v[:, :, 33:]))
    return total


def tensors(device="cpu", dtype=torch.float32, d=D):
    torch.manual_seed(0)
    return tuple(torch.randn(B, S, H, d, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))


def test_every_accepted_backend_has_a_recorded_layout():
    assert set(RECORDED) == LSE_BACKENDS


@pytest.mark.parametrize("backend", RECORDED)
def test_recorded_layouts_are_merged(backend):
    def raw(q, k, v, dropout_p, is_causal, attention_kwargs):
        assert not dropout_p and not is_causal and attention_kwargs is None
        return RECORDED[backend](*exact(q, k, v))

    q, k, v = tensors()
    error = (in_two_parts(as_attend_function(raw), q, k, v) - attention64(q, k, v)).abs().max()
    assert error < 1e-5


def test_a_base_2_logarithm_gives_a_wrong_result():
    """No accepted backend returns one: SAGE's kernel does, but xDiT's function converts it."""
    q, k, v = tensors()
    base_2 = torch.log(torch.tensor(2.0)).item()
    attend = as_attend_function(lambda q, k, v, **_: exact(q, k, v, base_2))
    assert (in_two_parts(attend, q, k, v) - attention64(q, k, v)).abs().max() > 1e-2


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
    reason="needs a GPU and flash-attn (pip install 'sf-xfuser[flash-attn]')",
)
def test_flash_attn_on_a_gpu():
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType

    q, k, v = tensors("cuda", torch.bfloat16, 64)
    attend = as_attend_function(ATTENTION_FUNCTION_REGISTRY[AttentionBackendType.FLASH])
    exactly = attention64(q, k, v)
    single = (torch.nn.functional.scaled_dot_product_attention(q, k, v).double() - exactly).abs().max()
    assert (in_two_parts(attend, q, k, v) - exactly).abs().max() <= 2 * single
