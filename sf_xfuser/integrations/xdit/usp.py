"""A drop-in for xDiT's ``USP``: runs the calls that Torus Attention computes exactly; others fall back to ``USP``."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from sf_xfuser.autotune.selector import Selector
from sf_xfuser.integrations.fallback import DropIn
from sf_xfuser.integrations.xdit.attention_backends import LSE_BACKENDS, XditState, as_attend_function
from sf_xfuser.layout.schedule import Granularity
from sf_xfuser.torus.attention import NO_GRADIENT, autocast, needs_gradient, torus_attention
from sf_xfuser.torus.call import Joint, Tokens
from sf_xfuser.torus.compression import EPS
from sf_xfuser.torus.mesh import Mesh

# Entries of ``attention_kwargs`` that need keys in their global order. Torus Attention gets them in any order.
_ORDERED_KWARGS = ("attn_mask", "indices_k", "ulysses_extra_inputs", "pre_quantized")


@dataclass(eq=False, kw_only=True)
class TorusUSP(DropIn):
    """Has the signature of ``USP``. ``original`` is xDiT's own function, ``ring_degree`` that of its groups."""

    unsupported = "torus cannot run this attention call exactly"
    original_name = "xDiT's own USP"

    original: Callable[..., torch.Tensor]
    host: XditState
    ring_degree: int
    selector: Selector | None = None
    """Under ``--sp-backend auto``; None: all calls run on ``mesh``."""
    check: bool = False
    """Compare the first call of each shape with ``original``."""
    checked: dict[Any, float] = field(default_factory=dict)
    """By shape: the error of the first call, as a fraction of the limit."""
    check_failure: str = ""
    """Set when a check failed; all later calls fall back."""

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

        The joint query is concatenated before or after the local one, as in USP. ``combine_qkv_a2a`` (one all-to-all
        instead of three) has no effect on torus, which sends chunks one by one.
        """

        def usp() -> torch.Tensor:
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
        reason = self.fallback_reason(
            name, dropout_p, is_causal, joint_strategy, attn_layer, attention_kwargs, kv_head_repeat, newer
        )
        if reason is None and needs_gradient(query, key, value, joint_query, joint_key, joint_value):
            reason = NO_GRADIENT
        if reason is not None:
            self.count_fallback(reason)
            return usp()
        q, joint_k, joint_v = query, joint_key, joint_value
        if not joint_strategy:
            joint_k = joint_v = None
        elif joint_query is not None:
            q = torch.cat((joint_query, query) if joint_strategy == "front" else (query, joint_query), dim=2)
        valid = (attention_kwargs or {}).get("valid_kv_len")
        arguments = (q, key, value, joint_k, joint_v, joint_strategy or None, name, valid)
        if torch.compiler.is_compiling():  # without a trial, so that the graph is the same on every rank
            if self.selector is not None and not self.selector.torus_first:
                return usp()
            cast = [autocast(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            compiled: torch.Tensor = _torus_usp(*cast)
            return compiled
        if self.selector is None:
            out = self.attend(*arguments)
        else:
            kind = name if valid is None else f"{name} with padded keys"
            candidate, out = self.selector.run(q, key, joint_k, kind, partial(self.attend, *arguments), usp)
            if candidate.mesh is None:
                return out
        if self.check:
            joint = (joint_strategy or None, None if joint_k is None else joint_k.shape)
            # The session changes after a failed call: a rank may have missed a check, so all ranks check again.
            session = self.mesh.control.session
            shape = (session, q.shape, key.shape, valid, joint, q.dtype, name)
            if shape not in self.checked and not self._matches(shape, out, expected := usp()):
                self.count_fallback(self.check_failure)
                return expected
        self.handled += 1
        return out

    def calls(self) -> dict[str, int]:
        """As ``explain()``: under ``--sp-backend auto`` also by candidate of xDiT's own USP."""
        xdit = {} if self.selector is None else self.selector.xdit_calls()
        return dict(Counter(super().calls()) + Counter(xdit))

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
        granularity: Granularity | None = None,
    ) -> torch.Tensor:
        """Torus Attention over ``mesh`` (None: ``self.mesh``). ``granularity`` as in ``torus_attention``.
        ``valid_kv_len``: the first keys of the whole sequence, in rank order, that are not padding."""
        mesh = mesh or self.mesh
        world_size = mesh.layout.world_size
        kv_tokens = (key.shape[2],) * world_size  # xDiT gives every rank of a group the same number of tokens
        if valid_kv_len is not None:
            if not 0 < valid_kv_len <= sum(kv_tokens):
                raise ValueError(f"valid_kv_len must be in [1, {sum(kv_tokens)}], got {valid_kv_len}")
            kv_tokens = _valid_per_rank(valid_kv_len, key.shape[2], mesh.members)
            key, value = (x[:, :, : kv_tokens[mesh.position]] for x in (key, value))
        return torus_attention(
            query,
            key,
            value,
            mesh=mesh,
            attention=self.attention(as_attend_function(self.host.registered_attention(backend)), None, query.shape[3]),
            joint=None if joint_key is None or joint_value is None else Joint(joint_key, joint_value, joint_strategy),
            tokens=Tokens((query.shape[2],) * world_size, kv_tokens),
            granularity=granularity,
        )

    def _matches(self, shape: Any, out: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether ``out`` equals ``expected`` up to rounding, on all ranks. Collective.

        The error of a row (one head of one token) is the root mean square of its difference, relative to that of the
        row or of all rows, whichever is larger. Another order of summation changes the last digits of the dtype, a
        wrong chunk changes all digits. The limit is half of the digits.
        """
        compression = self.mesh.compression
        limit = max(torch.finfo(out.dtype).eps, EPS[compression.format] if compression else 0.0) ** 0.5
        rows, expected_rows = (x.detach().float() for x in (out, expected))
        same = (rows == expected_rows) | (rows.isnan() & expected_rows.isnan())
        rms = torch.where(same, 0.0, rows - expected_rows).square().mean(-1).sqrt()
        size = expected_rows.nan_to_num(0.0, 0.0, 0.0).square().mean(-1).sqrt()
        size = torch.maximum(size, size.square().mean().sqrt()).clamp_min(1e-30)
        worst = float((rms / size).nan_to_num(float("inf"), float("inf")).max()) if out.numel() else 0.0
        with self.mesh.call():
            error: float = max(self.mesh.control.gather("first-call check", worst))
        self.checked[shape] = error / limit
        text = (
            f"--sp-check first: a call of {list(out.shape)} differs from {self.original_name} by {error:.2g} of a row "
            f"(allowed: {limit:.2g})"
        )
        if error > limit:
            self.check_failure = text
            if self.mesh.position == 0:  # one line per group
                warnings.warn(f"{text}; all later calls run on {self.original_name}", RuntimeWarning, stacklevel=2)
        else:
            self.log(text)
        return not self.check_failure

    def check_line(self) -> str:
        """The results of the checks, as text."""
        if not self.checked:
            return "--sp-check first: no call has been compared with xDiT's own USP yet"
        worst = max(self.checked.values())
        return f"--sp-check first: {len(self.checked)} shape(s), at most {worst:.2g} times the allowed difference"

    def fallback_reason(
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
        """Why this call falls back to xDiT's own USP; None if torus runs it. Local, with the same result on all ranks,
        because all ranks have the same inputs."""
        if self.check_failure:
            return self.check_failure
        if (reason := (self.selector or self.mesh).unavailable_reason()) is not None:
            return reason
        if is_causal:
            return "causal attention needs keys in order"
        if dropout_p:
            return "attention dropout"
        options = attention_kwargs or {}
        for key in _ORDERED_KWARGS:
            if options.get(key) is not None:
                return f"attention_kwargs[{key!r}] needs keys in order"
        if options.get("valid_kv_len") is not None and self.ring_degree > 1:
            return "attention_kwargs['valid_kv_len'] counts keys of all ranks, but a step of xDiT's ring has only some"
        if backend not in LSE_BACKENDS:
            return f"attention backend {backend} returns no log-sum-exp, so its calls hide no transfer"
        if self.host.fp8_communication():
            return "FP8 communication (--use_fp8_comms) compresses xDiT's own all-to-all"
        if self.host.cached_by_pipefusion(attn_layer):
            return "USP keeps PipeFusion's KV cache for this layer"
        if joint_strategy and kv_head_repeat != 1:
            return "joint tensors with repeated KV heads, which xDiT refuses"
        if newer:
            return f"USP arguments that sf-xfuser does not support: {', '.join(sorted(newer))}"
        return None


def _valid_per_rank(valid: int, tokens_per_rank: int, members: Sequence[int]) -> tuple[int, ...]:
    """How many of the first ``valid`` tokens each member holds: 5 tokens on 3 ranks with 2 tokens each are 2, 2, 1."""
    offsets = {rank: tokens_per_rank * index for index, rank in enumerate(sorted(members))}
    return tuple(min(tokens_per_rank, max(0, valid - offsets[rank])) for rank in members)


# -- torch.compile: one opaque operator, so that the graph is the same on every rank ----------------------------------

_active: TorusUSP | None = None


def activate(usp: TorusUSP | None) -> None:
    """Set the instance that the compiled operator calls: one per process."""
    global _active
    _active = usp


# With this tag, where PyTorch has it, inductor keeps the operator out of its CUDA graphs.
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
    joint_strategy: str | None,
    backend: str,
    valid_kv_len: int | None,
) -> torch.Tensor:
    if _active is None:
        raise RuntimeError("a compiled model calls Torus Attention, but its mesh is closed; compile the model again")
    _active.handled += 1
    return _active.attend(query, key, value, joint_key, joint_value, joint_strategy or None, backend, valid_kv_len)


@_torus_usp.register_fake
def _(query, key, value, joint_key, joint_value, joint_strategy, backend, valid_kv_len):  # type: ignore[no-untyped-def]
    b, h, s, d = query.shape
    return query.new_empty(b, s, h, d).transpose(1, 2)
