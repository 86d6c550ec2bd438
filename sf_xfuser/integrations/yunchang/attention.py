"""yunchang's ``LongContextAttention`` over Torus Attention, for programs that use yunchang without xDiT.

Such a program changes two lines: it imports ``set_seq_parallel_pg`` and ``LongContextAttention`` from ``sf_xfuser``.
yunchang is optional. If it is installed, calls that Torus Attention cannot run fall back to yunchang's own class.

Tensors are [B, S, H, D]: B batch, S tokens of this rank, H heads, D head size.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.config import TorusArgs
from sf_xfuser.integrations.fallback import DropIn, log_on_rank_0
from sf_xfuser.kernels import AttendFunction, sdpa_attend
from sf_xfuser.torus.attention import NO_GRADIENT, needs_gradient, torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.torus.call import Tokens
from sf_xfuser.torus.mesh import Mesh

# Members of yunchang's AttnType for dense attention of unquantized tensors, which PyTorch's fused kernels compute too.
_DENSE = frozenset({"FA", "FA3", "TORCH_MATH", "TORCH_FLASH", "TORCH_EFFICIENT", "TORCH_CUDNN"})


@dataclass(eq=False, kw_only=True)
class TorusLayers(DropIn):
    """State that all layers of a process share. ``original``: yunchang's class; None if it is not installed."""

    unsupported = "torus cannot run this LongContextAttention call exactly"
    original_name = "yunchang's own LongContextAttention"

    original: Callable[..., torch.nn.Module] | None


_layers: TorusLayers | None = None  # one per process, like yunchang's groups; set by set_seq_parallel_pg


def set_seq_parallel_pg(
    sp_ulysses_degree: int,
    sp_ring_degree: int,
    rank: int,
    world_size: int,
    use_ulysses_low: bool = True,
    *,
    args: TorusArgs | None = None,
) -> Mesh:
    """Create the mesh for the layers of this process. Same signature as yunchang's function. Collective over the world.

    Sequence-parallel groups are runs of ``sp_ulysses_degree * sp_ring_degree`` consecutive ranks. The mesh keeps both
    degrees and splits heads across machines first. Existing layers keep their mesh. If yunchang is installed, its own
    groups are created too, for fallbacks, with ``use_ulysses_low``. ``args``: topology, transport, timeout and
    strictness; default ``TorusArgs(backend="torus")``.

    Returns the mesh. Raises ValueError (bad degrees or flags) or RuntimeError (a rank is missing) on every rank.
    """
    global _layers
    args = args or TorusArgs(backend="torus")
    if args.backend != "torus":
        raise ValueError(f"these layers run Torus Attention: give TorusArgs(backend='torus'), got {args.backend!r}")
    if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
        raise ValueError(
            f"got rank {rank} of {world_size}, but torch.distributed has rank {dist.get_rank()} of "
            f"{dist.get_world_size()}: pass its values"
        )
    size = sp_ulysses_degree * sp_ring_degree
    if size < 2 or world_size % size:
        raise ValueError(
            f"sp_ulysses_degree={sp_ulysses_degree} x sp_ring_degree={sp_ring_degree} = {size}: the product must be "
            f"above 1 and divide the {world_size} ranks"
        )
    groups = [range(first, first + size) for first in range(0, world_size, size)]
    mesh = build_mesh(groups, args, ulysses_degree=sp_ulysses_degree, ring_degree=sp_ring_degree)
    original = None
    if importlib.util.find_spec("yunchang") is not None:
        yunchang = importlib.import_module("yunchang")
        yunchang.set_seq_parallel_pg(sp_ulysses_degree, sp_ring_degree, rank, world_size, use_ulysses_low)
        original = yunchang.LongContextAttention
    _layers = TorusLayers(original=original, mesh=mesh, strict=args.strict, log=log_on_rank_0, kernel=args.kernel)
    return mesh


class LongContextAttention(torch.nn.Module):
    """Attention over the tokens of a sequence-parallel group, with the constructor and call of yunchang's class.

    Dense, non-causal attention runs as Torus Attention on PyTorch's fused kernels, for every ``attn_type`` that means
    dense attention (FA, FA3, TORCH_*, None). ``ring_impl_type`` and ``use_pack_qkv`` do not change the result and are
    ignored. All other calls (causal, dropout, window, softcap, ALiBi, quantized or sparse ``attn_type``, gradients)
    fall back to yunchang's own class with the same arguments, or raise ValueError if it is not installed. ``layers``
    counts both kinds. Raises RuntimeError before :func:`set_seq_parallel_pg`.
    """

    def __init__(
        self,
        scatter_idx: int = 2,
        gather_idx: int = 1,
        ring_impl_type: str = "basic",
        use_pack_qkv: bool = False,
        use_sync: bool = False,
        attn_type: Any = None,
        attn_processor: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        if _layers is None:
            raise RuntimeError("call sf_xfuser.set_seq_parallel_pg on all ranks before LongContextAttention()")
        self.layers = _layers
        self._dims = (scatter_idx, gather_idx)
        self._attn_type = attn_type
        self._attn_processor = attn_processor
        self.use_sync = use_sync
        self.original = None
        if self.layers.original is not None:
            options = (scatter_idx, gather_idx, ring_impl_type, use_pack_qkv, use_sync)
            named = {} if attn_type is None else {"attn_type": attn_type}  # None is not yunchang's default
            self.original = self.layers.original(*options, attn_processor=attn_processor, **named)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Sequence[int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        *args: Any,
    ) -> torch.Tensor:
        """``query`` [B, S, H, D] and ``key``, ``value`` [B, S, H_kv, D] hold this rank's tokens and all heads. S is the
        same on all ranks, and H_kv divides H. Returns [B, S, H, D]. Collective over the group.

        Raises ValueError if torus cannot run the call and yunchang is not installed, else as :func:`torus_attention`.
        """
        name = getattr(self._attn_type, "name", self._attn_type)
        is_dense = self._attn_processor is None and (name is None or name in _DENSE)
        reasons = {
            "causal attention needs keys in order": causal,
            "attention dropout": dropout_p,
            f"a window of {tuple(window_size)} needs keys in order": tuple(window_size) != (-1, -1),
            f"softcap={softcap}": softcap,
            "ALiBi needs keys in order": alibi_slopes is not None,
            f"{len(args)} arguments that sf-xfuser does not support": args,
            f"scatter_idx and gather_idx {self._dims} are not Ulysses' (2, 1) for [B, S, H, D]": self._dims != (2, 1),
            f"attention of type {name} is not dense attention of unquantized tensors": not is_dense,
            NO_GRADIENT: needs_gradient(query, key, value),
        }
        reason = self.layers.mesh.unavailable_reason() or next(
            (text for text, applies in reasons.items() if applies), None
        )
        if reason is not None:
            if self.original is None:
                raise ValueError(f"{self.layers.unsupported}: {reason}; pip install yunchang for this call")
            self.layers.count_fallback(reason)
            options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
            result: torch.Tensor = self.original(query, key, value, *options, return_attn_probs, *args)
            return result
        self.layers.handled += 1
        world_size = self.layers.mesh.layout.world_size
        out = torus_attention(
            *(x.transpose(1, 2) for x in (query, key, value)),
            mesh=self.layers.mesh,
            attention=self.layers.attention(_sdpa_with_scale(softmax_scale), softmax_scale, query.shape[3]),
            tokens=Tokens((query.shape[1],) * world_size, (key.shape[1],) * world_size),
        ).transpose(1, 2)
        if self.use_sync and out.is_cuda:
            torch.cuda.synchronize()
        return out


@lru_cache(maxsize=64)  # a CUDA graph of calls refers to the function
def _sdpa_with_scale(scale: float | None) -> AttendFunction:
    return partial(sdpa_attend, scale=scale)
