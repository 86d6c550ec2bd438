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
from sf_xfuser.kernels.attend import uses_cudnn
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


H100, B200, B300, RTX_5090, A100 = (9, 0), (10, 0), (10, 3), (12, 0), (8, 0)
bf16 = torch.bfloat16
# capability, cuDNN version, dtype, D, queries, keys -> whether cuDNN attends
CUDNN = {
    "the usual call": (H100, 91900, bf16, 128, 4096, 1000, True),
    "fp16": (B300, 91900, torch.float16, 64, 4096, 1000, True),
    "fp32": (H100, 91900, torch.float32, 128, 4096, 1000, False),
    "A100: flash is as fast": (A100, 91900, bf16, 128, 4096, 1000, False),
    "consumer GPU": (RTX_5090, 91900, bf16, 128, 4096, 1000, False),
    "no cuDNN": (H100, 0, bf16, 128, 4096, 1024, False),
    "cuDNN 8": (H100, 8907, bf16, 128, 4096, 1024, False),
    "cuDNN 9.10, whole blocks": (H100, 91002, bf16, 128, 4096, 1024, True),
    "cuDNN 9.10, odd queries": (H100, 91002, bf16, 128, 4095, 1024, False),
    "cuDNN 9.15.0, odd keys": (H100, 91500, bf16, 128, 4096, 1023, False),
    "cuDNN 9.15.1, odd keys": (H100, 91501, bf16, 128, 4096, 1023, True),
    "D of 8 n": (H100, 91900, bf16, 72, 4096, 1000, True),
    "other D": (H100, 91900, bf16, 76, 4096, 1000, False),
    "D = 136": (H100, 91900, bf16, 136, 4096, 1000, False),
    "D = 256, cuDNN 9.10, Hopper": (H100, 91002, bf16, 256, 4096, 1024, True),
    "D = 256, cuDNN 9.10, Blackwell": (B200, 91002, bf16, 256, 4096, 1024, False),
    "D = 256, cuDNN 9.11": (H100, 91100, bf16, 256, 4096, 1024, False),
    "D = 256, cuDNN 9.22.0": (B200, 92200, bf16, 256, 4096, 1000, False),
    "D = 256, cuDNN 9.23": (B200, 92300, bf16, 256, 4096, 1000, True),
    "D = 264, cuDNN 9.23": (B200, 92300, bf16, 264, 4096, 1000, False),
    "D = 256, a later GPU": ((10, 7), 92300, bf16, 256, 4096, 1000, False),
    "one key": (H100, 91900, bf16, 128, 4096, 1, False),
    "one query": (H100, 91900, bf16, 128, 1, 1000, False),
    "no query": (H100, 91900, bf16, 128, 0, 1000, False),
}


@pytest.mark.parametrize("name", CUDNN)
def test_cudnn_attends_where_pytorch_would_use_it(name):
    *call, expected = CUDNN[name]
    assert uses_cudnn(*call) == expected


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
