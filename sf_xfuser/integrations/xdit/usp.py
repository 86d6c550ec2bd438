"""A drop-in for xDiT's ``USP``: serves the calls that Torus Attention computes exactly, hands the others back.

Knows the contract of ``USP`` and nothing of where it lives: all that is asked of xDiT goes through :class:`Host`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from sf_xfuser.autotune.selector import Choice
from sf_xfuser.integrations.fallback import DropIn
from sf_xfuser.kernels import AttendFunction
from sf_xfuser.torus.attention import NO_GRADIENT, needs_gradient, torus_attention
from sf_xfuser.torus.call import Joint, Tokens
from sf_xfuser.torus.compression import EPS
from sf_xfuser.torus.mesh import Mesh

# xDiT's attention backends that return the natural-log log-sum-exp that a merge needs, for dense attention.
LSE_BACKENDS = frozenset(
    {"SDPA_FLASH", "SDPA_EFFICIENT", "CUDNN", "FLASH", "FLASH_3", "FLASH_3_FP8", "AITER", "SAGE", "NPU"}
)

# Entries of ``attention_kwargs`` that give keys an order or a mask: KV that arrives in any order cannot serve them.
_ORDERED_KWARGS = ("attn_mask", "indices_k", "ulysses_extra_inputs", "pre_quantized")


class Host(Protocol):
    """What a call asks of xDiT at run time."""

    def attention_backend(self, explicit: Any) -> str:
        """Name of the attention backend that serves a call (``explicit``: the call's own ``backend=``)."""

    def raw_attention(self, backend: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """The registered function of a backend, without the joint-tensor decorator."""

    def fp8_communication(self) -> bool:
        """Whether xDiT compresses its all-to-all for this run."""

    def cached_by_pipefusion(self, attn_layer: Any) -> bool:
        """Whether USP itself keeps a PipeFusion KV cache for this layer."""


@dataclass(eq=False, kw_only=True)
class TorusUSP(DropIn):
    """The replacement: call it as xDiT calls ``USP``. ``original`` is xDiT's own function, ``ring_degree`` that of the
    groups in which it runs."""

    cannot = "torus cannot serve this attention call exactly"
    owner = "xDiT's own USP"
    handing = "handed back to xDiT's own USP"

    original: Callable[..., torch.Tensor]
    host: Host
    ring_degree: int
    choice: Choice | None = None
    """Which of several meshes runs a call, or ``original``; None: ``mesh`` runs all."""
    check: bool = False
    """Compare the first call of each shape with ``original``."""
    checked: dict[Any, float] = field(default_factory=dict)
    """By shape: how far the first call was from ``original``, in parts of what is allowed."""
    wrong: str = ""
    """What a check has found, from when on nothing is served."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        joint_query: torch.Tensor | None = None,
        joint_key: torch.Tensor | None = None,
        joint_value: torch.Tensor | None = None,
        joint_strategy: str | None = None,
        attn_layer: Any = None,
        combine_qkv_a2a: bool | None = None,
        backend: Any = None,
        attention_kwargs: dict[str, Any] | None = None,
        head_balance_layer: Any = None,
        kv_head_repeat: int = 1,
        **newer: Any,
    ) -> torch.Tensor:
        """Attention over the sequence-parallel group. Tensors [B, H, S_local, D]; returns [B, H, S_local(+S_joint), D].

        As USP does, the joint query is put in front of or behind the local one, and its output comes back with it.
        ``combine_qkv_a2a`` (one all-to-all instead of three) changes nothing here: chunks travel one by one.
        """

        def xdits() -> torch.Tensor:
            if kv_head_repeat != 1:
                newer["kv_head_repeat"] = kv_head_repeat  # xDiT before 0.7 has no such parameter
            return self.original(
                query,
                key,
                value,
                dropout_p=dropout_p,
                is_causal=is_causal,
                joint_query=joint_query,
                joint_key=joint_key,
                joint_value=joint_value,
                joint_strategy=joint_strategy,
                attn_layer=attn_layer,
                combine_qkv_a2a=combine_qkv_a2a,
                backend=backend,
                attention_kwargs=attention_kwargs,
                head_balance_layer=head_balance_layer,
                **newer,
            )

        name = self.host.attention_backend(backend)
        reason = self.why_not(
            name, dropout_p, is_causal, joint_strategy, attn_layer, attention_kwargs, kv_head_repeat, newer
        )
        if reason is None and needs_gradient(query, key, value, joint_query, joint_key, joint_value):
            reason = NO_GRADIENT
        if reason is not None:
            self.note(reason)
            return xdits()
        keys, values, rows = joint_key, joint_value, query
        if not joint_strategy:
            keys = values = None
        elif joint_query is not None:
            rows = torch.cat((joint_query, query) if joint_strategy == "front" else (query, joint_query), dim=2)
        valid = (attention_kwargs or {}).get("valid_kv_len")
        if torch.compiler.is_compiling():  # the graph is to be the same on every rank, before anything is measured
            if self.choice is not None and not self.choice.torus_first:
                return xdits()
            compiled: torch.Tensor = _torus_usp(rows, key, value, keys, values, joint_strategy or "", name, valid)
            return compiled
        torus = partial(self.attend, rows, key, value, keys, values, joint_strategy or None, name, valid)
        if self.choice is None:
            out = torus()
        else:
            kind = name if valid is None else f"{name} with padded keys"
            candidate, out = self.choice.serve(rows, key, keys, kind, torus, xdits)
            if candidate not in self.choice.ways:
                return out
        if self.check:
            joint = (joint_strategy or None, None if keys is None else keys.shape)
            # Where a rank did not come to the end of a check, it has met the others anew since, and all check again.
            session = self.mesh.control.session
            shape = (session, rows.shape, key.shape, valid, joint, rows.dtype, name)
            if shape not in self.checked and not self.agrees(shape, out, expected := xdits()):
                self.note(self.wrong)
                return expected
        self.served += 1
        return out

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        joint_key: torch.Tensor | None,
        joint_value: torch.Tensor | None,
        joint_strategy: Any,
        backend: str,
        valid_kv_len: int | None = None,
        mesh: Mesh | None = None,
        overlap: bool = True,
    ) -> torch.Tensor:
        """Over ``mesh`` (None: the first), with ``overlap`` as in ``torus_attention``. ``valid_kv_len``: only that many
        keys count, from the first of the lowest rank on; the others are padding."""
        mesh = mesh or self.mesh
        world_size = mesh.layout.world_size
        kv_tokens = (key.shape[2],) * world_size  # xDiT gives every rank of a group the same number of tokens
        if valid_kv_len is not None:
            if not 0 < valid_kv_len <= sum(kv_tokens):
                raise ValueError(f"valid_kv_len must be in [1, {sum(kv_tokens)}], got {valid_kv_len}")
            kv_tokens = _leading(valid_kv_len, key.shape[2], mesh.members)
            key, value = (x[:, :, : kv_tokens[mesh.position]] for x in (key, value))
        return torus_attention(
            query,
            key,
            value,
            mesh=mesh,
            attention=self.attention(as_attend_function(self.host.raw_attention(backend)), None, query.shape[3]),
            joint=None if joint_key is None or joint_value is None else Joint(joint_key, joint_value, joint_strategy),
            tokens=Tokens((query.shape[2],) * world_size, kv_tokens),
            overlap=overlap,
        )

    def agrees(self, shape: Any, out: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether ``out`` is ``expected`` but for rounding, on all ranks. Collective.

        The measure is the largest difference of a row (a token's head), as root mean square, in parts of that row's
        size or of a typical one's. Results of two orders of summation share nearly all digits of their dtype, and a
        row with a wrong chunk in it shares none: half the digits is the limit.
        """
        compression = self.mesh.compression
        limit = max(torch.finfo(out.dtype).eps, EPS[compression.format] if compression else 0.0) ** 0.5
        rows, expected_rows = (x.detach().float() for x in (out, expected))
        same = (rows == expected_rows) | (rows.isnan() & expected_rows.isnan())
        off = torch.where(same, 0.0, rows - expected_rows).square().mean(-1).sqrt()
        size = expected_rows.nan_to_num(0.0, 0.0, 0.0).square().mean(-1).sqrt()
        size = torch.maximum(size, size.square().mean().sqrt())
        worst = (
            float((off / size.clamp_min(1e-30)).nan_to_num(float("inf"), float("inf")).max()) if out.numel() else 0.0
        )
        with self.mesh.call():
            found: float = max(self.mesh.control.gather("first-call check", worst))
        self.checked[shape] = found / limit
        shared = (
            f"a call of {list(out.shape)} differs from xDiT's own USP by {found:.2g} of a row (allowed: {limit:.2g})"
        )
        if found > limit:
            self.wrong = f"--sp-check first: {shared}"
            warnings.warn(f"{self.wrong}; from now on {self.owner} serves all calls", RuntimeWarning, stacklevel=2)
        else:
            self.log(f"--sp-check first: {shared}")
        return not self.wrong

    def check_line(self) -> str:
        """What the checks found, as text."""
        if not self.checked:
            return "--sp-check first: no call has been compared with xDiT's own USP yet"
        worst = max(self.checked.values())
        return (
            f"--sp-check first: {len(self.checked)} shape(s), at most {worst:.2g} times the difference that is allowed"
        )

    def why_not(
        self,
        backend: str,
        dropout_p: float,
        is_causal: bool,
        joint_strategy: str | None,
        attn_layer: Any,
        attention_kwargs: dict[str, Any] | None,
        kv_head_repeat: int,
        newer: dict[str, Any],
    ) -> str | None:
        """Why this call goes to xDiT's own USP; None if torus serves it. No communication; alike on all ranks,
        because everything it looks at is."""
        if self.wrong:
            return self.wrong
        if (reason := (self.choice or self.mesh).unavailable_reason()) is not None:
            return reason
        if is_causal:
            return "causal attention needs keys in order"
        if dropout_p:
            return "attention dropout"
        wanted = attention_kwargs or {}
        for key in _ORDERED_KWARGS:
            if wanted.get(key) is not None:
                return f"attention_kwargs[{key!r}] needs keys in order"
        if wanted.get("valid_kv_len") is not None and self.ring_degree > 1:
            return "attention_kwargs['valid_kv_len'] counts the keys of all ranks, and xDiT's ring sees those of some"
        if backend not in LSE_BACKENDS:
            return f"attention backend {backend} returns no log-sum-exp"
        if self.host.fp8_communication():
            return "FP8 communication (--use_fp8_comms) compresses xDiT's own all-to-all"
        if self.host.cached_by_pipefusion(attn_layer):
            return "PipeFusion's KV cache sits inside USP for this layer"
        if joint_strategy and kv_head_repeat != 1:
            return "joint tensors with repeated KV heads, which xDiT refuses"
        if newer:
            return f"USP arguments this version does not know: {', '.join(sorted(newer))}"
        return None


def _leading(count: int, each: int, members: Sequence[int]) -> tuple[int, ...]:
    """How many of the first ``count`` tokens lie on each position, where every rank holds ``each`` and ranks follow
    each other in ascending order. (5 of 3 ranks with 2 each: 2, 2, 1.)"""
    before = {rank: each * index for index, rank in enumerate(sorted(members))}
    return tuple(min(each, max(0, count - before[rank])) for rank in members)


def as_attend_function(raw: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> AttendFunction:
    """A registered xDiT function as ``attend(q, k, v)``, its log-sum-exp brought to [B, H, Sq]."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = raw(q, k, v, dropout_p=0.0, is_causal=False, attention_kwargs=None)
        if lse.dim() == 4:  # cuDNN in some versions: [B, H, Sq, 1]
            lse = lse.squeeze(-1)
        return out, lse[..., : q.shape[2]]  # memory-efficient SDPA pads Sq to a multiple of 32

    return attend


# -- torch.compile: one opaque operator, the same graph on every rank ------------------------------------------------

_active: TorusUSP | None = None


def activate(usp: TorusUSP | None) -> None:
    """Name the instance that the compiled operator calls. One sequence-parallel group per process."""
    global _active
    _active = usp


# inductor leaves it out of the CUDA graphs that it makes, in PyTorch that knows the tag
@torch.library.custom_op(
    "sf_xfuser::torus_usp",
    mutates_args=(),
    tags=[tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None],
)
def _torus_usp(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    joint_key: torch.Tensor | None,
    joint_value: torch.Tensor | None,
    joint_strategy: str,
    backend: str,
    valid_kv_len: int | None,
) -> torch.Tensor:
    if _active is None:
        raise RuntimeError("a compiled model calls Torus Attention, but its mesh is gone; compile again after set-up")
    _active.served += 1
    return _active.attend(query, key, value, joint_key, joint_value, joint_strategy or None, backend, valid_kv_len)


@_torus_usp.register_fake
def _(query, key, value, joint_key, joint_value, joint_strategy, backend, valid_kv_len):  # type: ignore[no-untyped-def]
    b, h, s, d = query.shape
    return query.new_empty(b, s, h, d).transpose(1, 2)
