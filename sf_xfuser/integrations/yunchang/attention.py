"""yunchang's ``LongContextAttention`` over Torus Attention, for programs that use yunchang without xDiT.

Two lines of such a program change: ``set_seq_parallel_pg`` and ``LongContextAttention`` are imported from here. Nothing
of yunchang need be installed; where it is, calls that Torus Attention cannot serve go to its own class.

Tensors are [B, S, H, D]: B batch, S tokens of this rank, H heads, D head size.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.config import TorusArgs
from sf_xfuser.integrations.fallback import DropIn, log_on_rank_0
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.torus.attention import NO_GRADIENT, needs_gradient, torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.torus.call import Tokens
from sf_xfuser.torus.mesh import Mesh

# Names of yunchang's AttnType whose result PyTorch's fused kernels give: dense attention of unquantised tensors.
_DENSE = frozenset({"FA", "FA3", "TORCH_MATH", "TORCH_FLASH", "TORCH_EFFICIENT", "TORCH_CUDNN"})


@dataclass(eq=False, kw_only=True)
class TorusLayers(DropIn):
    """What all layers of a process share: its mesh, and how many of their calls were served and handed back.
    ``make_own``: yunchang's class; None where it is not installed."""

    cannot = "torus cannot serve this LongContextAttention call exactly"
    owner = "yunchang's own LongContextAttention"
    handing = "handed back to yunchang's own LongContextAttention"

    make_own: Callable[..., torch.nn.Module] | None


_layers: TorusLayers | None = None  # as yunchang's groups: one per process, made by set_seq_parallel_pg


def set_seq_parallel_pg(
    sp_ulysses_degree: int,
    sp_ring_degree: int,
    rank: int,
    world_size: int,
    use_ulysses_low: bool = True,
    *,
    args: TorusArgs | None = None,
) -> Mesh:
    """Set up the layers of this process, as yunchang's function of this name does. Collective over the world.

    The sequence-parallel groups are runs of ``sp_ulysses_degree * sp_ring_degree`` consecutive ranks. Both degrees are
    kept; heads are split across machines first. Layers that exist already keep what they were made with.
    ``use_ulysses_low`` places yunchang's own groups, which are made too where yunchang is installed, for calls that
    are handed back. ``args``: topology, transport, time-out, strictness (default: ``TorusArgs(backend="torus")``).

    Returns the mesh. Raises ValueError (bad degrees or flags) or RuntimeError (a rank is missing), on every rank alike.
    """
    global _layers
    args = args or TorusArgs(backend="torus")
    if args.backend != "torus":
        raise ValueError(f"these layers run Torus Attention: give TorusArgs(backend='torus'), got {args.backend!r}")
    if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
        raise ValueError(
            f"rank {rank} of {world_size} is not what torch.distributed says: {dist.get_rank()} of "
            f"{dist.get_world_size()}; pass its values"
        )
    size = sp_ulysses_degree * sp_ring_degree
    if size < 2 or world_size % size:
        raise ValueError(
            f"sp_ulysses_degree={sp_ulysses_degree} x sp_ring_degree={sp_ring_degree} = {size}, but {world_size} ranks "
            f"can be cut into groups of a divisor of {world_size} above 1"
        )
    groups = [range(first, first + size) for first in range(0, world_size, size)]
    mesh = build_mesh(groups, args, ulysses_degree=sp_ulysses_degree, ring_degree=sp_ring_degree)
    make_own = None
    if importlib.util.find_spec("yunchang") is not None:
        yunchang = importlib.import_module("yunchang")
        yunchang.set_seq_parallel_pg(sp_ulysses_degree, sp_ring_degree, rank, world_size, use_ulysses_low)
        make_own = yunchang.LongContextAttention
    _layers = TorusLayers(make_own=make_own, mesh=mesh, strict=args.strict, log=log_on_rank_0, kernel=args.kernel)
    return mesh


class LongContextAttention(torch.nn.Module):
    """Attention over the tokens of a sequence-parallel group, with the constructor and call of yunchang's class.

    Dense attention that is not causal runs as Torus Attention, its pieces on PyTorch's fused kernels, whatever
    ``ring_impl_type`` and ``use_pack_qkv`` say (they do not change the result) and for every ``attn_type`` that means
    dense attention (FA, FA3, TORCH_*; None: the same). Anything else (causal, dropout, a window, ALiBi, a quantised or
    sparse ``attn_type``, a gradient) goes to yunchang's own class, made with the same arguments; where that is not
    installed, ValueError says so. ``layers`` counts both.

    Raises RuntimeError before :func:`set_seq_parallel_pg` has been called.
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
            raise RuntimeError("call sf_xfuser.set_seq_parallel_pg on all ranks before making LongContextAttention")
        self.layers = _layers
        self._exchanged = (scatter_idx, gather_idx)
        self._attn_type = attn_type
        self._attn_processor = attn_processor
        self.use_sync = use_sync
        self.own = None
        if self.layers.make_own is not None:
            given = (scatter_idx, gather_idx, ring_impl_type, use_pack_qkv, use_sync)
            named = {} if attn_type is None else {"attn_type": attn_type}
            self.own = self.layers.make_own(*given, attn_processor=attn_processor, **named)

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
        """``query`` [B, S, H, D] and ``key``, ``value`` [B, S, H_kv, D] hold this rank's tokens, as many on every rank
        of the group, and all heads; H_kv divides H. Returns [B, S, H, D]. Collective over the group.

        Raises what :func:`torus_attention` raises; ValueError where a call can be neither served nor handed back.
        """
        reason = self._why_not(dropout_p, causal, window_size, softcap, alibi_slopes, args)
        if reason is None and needs_gradient(query, key, value):
            reason = NO_GRADIENT
        if reason is not None:
            if self.own is None:
                raise ValueError(f"{self.layers.cannot}: {reason}; yunchang's own class can (pip install yunchang)")
            self.layers.note(reason)
            given = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
            own: torch.Tensor = self.own(query, key, value, *given, return_attn_probs, *args)
            return own
        self.layers.served += 1
        world_size = self.layers.mesh.layout.world_size
        out = torus_attention(
            *(x.transpose(1, 2) for x in (query, key, value)),
            mesh=self.layers.mesh,
            attention=self.layers.attention(partial(sdpa_attend, scale=softmax_scale), softmax_scale, query.shape[3]),
            tokens=Tokens((query.shape[1],) * world_size, (key.shape[1],) * world_size),
        ).transpose(1, 2)
        if self.use_sync and out.is_cuda:
            torch.cuda.synchronize()
        return out

    def _why_not(
        self,
        dropout_p: float,
        causal: bool,
        window_size: Sequence[int],
        softcap: float,
        alibi_slopes: torch.Tensor | None,
        more: tuple[Any, ...],
    ) -> str | None:
        """Why this call goes to yunchang's own class; None if torus serves it. Local, and alike on all ranks."""
        if (reason := self.layers.mesh.unavailable_reason()) is not None:
            return reason
        if causal:
            return "causal attention needs keys in order"
        if dropout_p:
            return "attention dropout"
        if tuple(window_size) != (-1, -1):
            return f"a window of {tuple(window_size)} needs keys in order"
        if softcap:
            return f"softcap={softcap}"
        if alibi_slopes is not None:
            return "ALiBi needs keys in order"
        if more:
            return f"{len(more)} arguments that this version does not know"
        if self._exchanged != (2, 1):
            return f"scatter_idx and gather_idx {self._exchanged} are not Ulysses' of [B, S, H, D]"
        name = getattr(self._attn_type, "name", self._attn_type)
        if self._attn_processor is not None or not (name is None or name in _DENSE):
            return f"attention of type {name} is not dense attention of unquantised tensors"
        return None
