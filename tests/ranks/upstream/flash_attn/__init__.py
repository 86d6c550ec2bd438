"""flash-attn's interface, as far as upstream's tests call it, on PyTorch's flash kernels for the CPU."""

import torch

from flash_attn.flash_attn_interface import _flash_attn_forward

__version__ = "2.8.0"


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False, **_):
    """[B, S, H, D], with gradients; (out, lse, None) where ``return_attn_probs``."""
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), dropout_p=dropout_p, scale=softmax_scale, is_causal=causal
    ).transpose(1, 2)
    if not return_attn_probs:
        return out
    return out, _flash_attn_forward(q.detach(), k.detach(), v.detach(), dropout_p, softmax_scale, causal)[1], None


def flash_attn_qkvpacked_func(qkv, **options):
    """[B, S, 3, H, D]."""
    return flash_attn_func(*qkv.unbind(2), **options)
