"""Torus Attention as the context parallelism of a plain diffusers model, without xDiT: :func:`parallelize`.

The model itself says in its ``_cp_plan`` (diffusers' ContextParallelModelPlan) which tensors are split over tokens and
where they are gathered again, and its attention processors pass a ``_parallel_config`` on to the one function that
replaces attention between ranks. Splitting and gathering are done here, since diffusers' own need lengths that divide
and an accelerator; that function is hooked, and left as it is for models that are not parallelized here.

Tensors are [B, S, H, D], as in diffusers: B batch, S tokens of this rank, H heads, D head size.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sf_xfuser.all_gather import all_gather
from sf_xfuser.args import TorusArgs
from sf_xfuser.attention import torus_attention
from sf_xfuser.drop_in import DropIn, log_on_rank_0
from sf_xfuser.hooks import Hook, HookSet
from sf_xfuser.kernels import AttendFunction, sdpa_attend
from sf_xfuser.launch import facts_of_config
from sf_xfuser.mesh import Mesh, build_mesh

_DISPATCH = "diffusers.models.attention_dispatch"
_CARRIER = "sf_xfuser"  # attribute of a ContextParallelConfig


def parallelize(
    model: torch.nn.Module,
    mesh: Mesh | None = None,
    *,
    args: TorusArgs | None = None,
    cp_plan: Mapping[str, Any] | None = None,
) -> TorusContextParallel:
    """Let the ranks of a sequence-parallel group compute ``model`` together, each on its part of the tokens.

    ``model``: a diffusers transformer with the whole weights on every rank; every rank then calls it, or its pipeline,
    with the same inputs, and gets the whole result. Sequence lengths need not divide. For inference only.
    ``mesh``: one that exists (a pipeline's second transformer shares the first one's); None makes one of all ranks,
    as ``args`` say (default: ``TorusArgs(backend="torus")``). ``cp_plan``: in place of the model's own.

    Collective over the world (over the group, where ``mesh`` is given). Returns what runs the model's attention. Raises
    ValueError for a model, plan or flags that do not fit, RuntimeError for a diffusers without context parallelism, on
    every rank alike.
    """
    args = args or TorusArgs(backend="torus")
    plan = cp_plan if cp_plan is not None else getattr(model, "_cp_plan", None)
    name = type(model).__name__
    if plan is None:
        raise ValueError(f"{name} has no _cp_plan, which says what is split over tokens: give cp_plan=, as diffusers' "
                         f"enable_parallelism takes it")  # fmt: skip
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(f"{name} is parallelized already; load it afresh")
    original = _install()
    _require_backend(model)
    if mesh is None:
        if args.backend != "torus":
            raise ValueError(f"parallelize() runs Torus Attention: give TorusArgs(backend='torus'), got {args}")
        facts = facts_of_config(getattr(model, "config", {}), name)
        heads, kv_heads = (facts.heads, facts.kv_heads) if facts else (None, None)
        mesh = build_mesh([range(dist.get_world_size())], args, heads=heads, kv_heads=kv_heads)
    if mesh.layout.world_size == 1:
        raise ValueError("a sequence-parallel group of one rank has nothing to parallelize: start more ranks")
    torus = TorusContextParallel(
        original=original,
        mesh=mesh,
        strict=args.strict,
        log=log_on_rank_0,
    )
    _configure(model, torus)
    model.register_forward_pre_hook(torus.begin)
    for pattern, entry in plan.items():
        for module in _modules(model, pattern):
            torus.attach(module, entry)
    return torus


@dataclass(eq=False, kw_only=True)
class TorusContextParallel(DropIn):
    """What runs the attention of one parallelized model. ``original``: diffusers' own function, which it stands for.
    Tokens are cut into as many parts as ranks, in their order, as even as can be."""

    cannot = "torus cannot serve this attention call exactly"
    owner = "diffusers' own context-parallel attention"
    handing = "handed back to diffusers' own context-parallel attention"

    original: Callable[..., Any]
    _uneven: bool = False  # in this forward, a sequence was cut unevenly
    _attended: bool = False  # in this forward, attention came here

    # -- attention ----------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        *,
        forward_op: Callable[..., Any],
        **rest: Any,
    ) -> Any:
        """As diffusers' own. ``query`` [B, S, H, D], ``key`` and ``value`` [B, S_kv, H_kv, D]; returns [B, S, H, D]."""
        self._attended = True
        reason = self.why_not(attn_mask, dropout_p, is_causal, return_lse, forward_op)
        if reason is not None:
            self._require_own(reason, attn_mask)
            self.note(reason)
            given = (attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)
            return self.original(query, key, value, *given, forward_op=forward_op, **rest)
        self.served += 1
        world_size = self.mesh.layout.world_size
        return torus_attention(
            *(x.transpose(1, 2) for x in (query, key, value)),
            mesh=self.mesh,
            q_tokens=None if self._uneven else (query.shape[1],) * world_size,
            kv_tokens=None if self._uneven else (key.shape[1],) * world_size,
            attend=as_attend_function(forward_op, scale),
        ).transpose(1, 2)

    def why_not(
        self,
        attn_mask: torch.Tensor | None,
        dropout_p: float,
        is_causal: bool,
        return_lse: bool,
        forward_op: Callable[..., Any],
    ) -> str | None:
        """Why this call goes to diffusers' own function; None if torus serves it. Local, and alike on all ranks."""
        if (reason := self.mesh.why_not_now()) is not None:
            return reason
        if attn_mask is not None:
            return "an attention mask needs keys in order"
        if is_causal:
            return "causal attention needs keys in order"
        if dropout_p:
            return "attention dropout"
        if return_lse:
            return "the log-sum-exp is asked for"
        window = getattr(forward_op, "keywords", {}).get("window_size", (-1, -1))
        if tuple(window) != (-1, -1):
            return f"a window of {tuple(window)} needs keys in order"
        return None

    def _require_own(self, reason: str, attn_mask: torch.Tensor | None) -> None:
        """Raise ValueError where diffusers' own function would fail or be wrong: its ring does not pass masks on, its
        Ulysses takes equal parts and splits no mask by heads."""
        layout, only = self.mesh.layout, None
        if layout.ring_degree > 1:
            only = (
                f"without a ring, and this mesh has ring_degree={layout.ring_degree}: give args=TorusArgs("
                f"backend='torus', plan='torus=T,ulysses=U') with T x U the number of ranks"
            )
        elif self._uneven:
            only = f"where sequences divide by the {layout.world_size} ranks: choose such a size and text length"
        elif attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[1] > 1:
            only = f"with a mask that all heads share, and this one has {attn_mask.shape[1]}: leave the mask out"
        if only is not None:
            raise ValueError(f"{self.cannot}: {reason}; {self.owner} can only {only}")

    # -- tokens -------------------------------------------------------------------------------------------------------

    def begin(self, module: torch.nn.Module, inputs: Any) -> None:
        """A forward of the model begins."""
        if torch.is_grad_enabled():
            raise ValueError("a parallelized model computes no gradients: call it under torch.no_grad()")
        self._uneven = self._attended = False

    def attach(self, module: torch.nn.Module, entry: Any) -> None:
        """Split inputs and outputs of ``module``, or gather its output, as one entry of a plan says."""
        if not isinstance(entry, Mapping):
            module.register_forward_hook(partial(self._gather_outputs, entry))
            return
        inputs = {key: part for key, part in entry.items() if not getattr(part, "split_output", False)}
        outputs = {key: part for key, part in entry.items() if key not in inputs}
        if inputs:
            module.register_forward_pre_hook(partial(self._split_inputs, inputs), with_kwargs=True)
        if outputs:
            module.register_forward_hook(partial(self._split_outputs, outputs))

    def _split_inputs(self, parts: Mapping[str, Any], module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        args = list(args)
        for name, part in parts.items():
            if name in kwargs:
                kwargs[name] = self._split(kwargs[name], part)
            elif names.index(name) < len(args):
                args[names.index(name)] = self._split(args[names.index(name)], part)
        return tuple(args), kwargs

    def _split_outputs(self, parts: Mapping[int, Any], module: Any, args: Any, output: Any) -> Any:
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        for index, part in parts.items():
            outputs[index] = self._split(outputs[index], part)
        return outputs[0] if isinstance(output, torch.Tensor) else tuple(outputs)

    def _split(self, x: Any, part: Any) -> Any:
        """This rank's part of ``x``, as a ContextParallelInput or a list of them says."""
        if isinstance(x, (list, tuple)):
            return [self._split(one, its) for one, its in zip(x, part, strict=True)]
        if x is None or (part.expected_dims is not None and x.dim() != part.expected_dims):
            return x
        world_size = self.mesh.layout.world_size
        self._uneven |= x.shape[part.split_dim] % world_size != 0
        return x.tensor_split(world_size, part.split_dim)[sorted(self.mesh.members).index(dist.get_rank())]

    def _gather_outputs(self, parts: Any, module: Any, args: Any, output: Any) -> Any:
        if not self._attended:
            raise RuntimeError(
                "no attention of this forward was computed across ranks: its attention backend knows no context "
                "parallelism; choose another with model.set_attention_backend()"
            )
        if isinstance(output, torch.Tensor):
            return self._gather(output, parts[0] if isinstance(parts, (list, tuple)) else parts)
        return tuple(x if part is None else self._gather(x, part) for x, part in zip(output, parts, strict=True))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _gather(self, x: torch.Tensor, part: Any) -> torch.Tensor:
        """The parts of all ranks, as a ContextParallelOutput says. Collective over the group."""
        return all_gather(x, part.gather_dim, self.mesh, uneven=self._uneven)


def as_attend_function(forward_op: Callable[..., Any], scale: float | None) -> AttendFunction:
    """The local attention of a diffusers backend as ``attend(q, k, v)``. ``forward_op`` is its operator on tensors
    [B, S, H, D] with a log-sum-exp [B, S, H]; the native one returns none, and ``sdpa_attend`` computes the same."""
    if getattr(forward_op, "__name__", "") == "_native_attention_forward_op":
        return sdpa_attend if scale is None else partial(sdpa_attend, scale=scale)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = forward_op(None, *tensors, None, 0.0, False, scale, False, True, _save_ctx=False)
        if lse.dim() == 4:  # cuDNN in some versions: [B, S, H, 1]
            lse = lse.squeeze(-1)
        return out.transpose(1, 2), lse.transpose(1, 2)

    return attend


# -- where it enters diffusers ---------------------------------------------------------------------------------------


def _wrap_dispatch(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _templated_context_parallel_attention(*args: Any, **kwargs: Any) -> Any:
        config = getattr(kwargs.get("_parallel_config"), "context_parallel_config", None)
        torus = getattr(config, _CARRIER, None)
        return (torus or original)(*args, **kwargs)

    return _templated_context_parallel_attention


_HOOK = Hook(
    module=_DISPATCH,
    name="_templated_context_parallel_attention",
    wrap=_wrap_dispatch,
    why="every attention backend of diffusers that knows context parallelism calls it, by its global name",
    remove_when="diffusers' ContextParallelConfig takes the function that computes attention between ranks",
)
_hook_set = HookSet((_HOOK,), roots=("diffusers",))


def _install() -> Callable[..., Any]:
    """Hook diffusers, once; its own function. Raises RuntimeError where there is none."""
    try:
        dispatch = importlib.import_module(_DISPATCH)
        _hook_set.install()
        original: Callable[..., Any] = dispatch._templated_context_parallel_attention.__wrapped__
        return original
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"parallelize() needs a diffusers with context parallelism (tested: 0.42.1): pip install -U diffusers "
            f"({type(error).__name__}: {error})"
        ) from None


def _processors(model: torch.nn.Module) -> list[Any]:
    """The attention processors that pass a parallel configuration on."""
    found = (getattr(module, "processor", None) for module in model.modules())
    return [processor for processor in found if hasattr(processor, "_parallel_config")]


def _require_backend(model: torch.nn.Module) -> None:
    """Raise ValueError where an attention of ``model`` would stay on one rank without a word."""
    registry = importlib.import_module(_DISPATCH)._AttentionBackendRegistry
    processors = _processors(model)
    if not processors:
        raise ValueError(
            f"{type(model).__name__} has no attention processor that takes a context-parallel configuration: diffusers "
            f"{importlib.import_module('diffusers').__version__} cannot split this model over tokens"
        )
    for processor in processors:
        backend = getattr(processor, "_attention_backend", None) or registry.get_active_backend()[0]
        name = str(getattr(backend, "value", backend))
        if name not in registry._supports_context_parallel:
            raise ValueError(
                f"attention backend {name!r} knows no context parallelism; call model.set_attention_backend() with one "
                f"of {sorted(registry._supports_context_parallel)}"
            )


def _configure(model: torch.nn.Module, torus: TorusContextParallel) -> None:
    """What diffusers' enable_parallelism leaves on a model and its attention processors."""
    parallel = importlib.import_module("diffusers.models._modeling_parallel")
    layout = torus.mesh.layout
    config = parallel.ContextParallelConfig(ring_degree=layout.ring_degree, ulysses_degree=layout.ulysses_degree)
    device = "cuda" if dist.get_backend(torus.mesh.ulysses_group) == "nccl" else "cpu"
    config._ulysses_mesh = DeviceMesh.from_group(torus.mesh.ulysses_group, device)
    setattr(config, _CARRIER, torus)
    configs = parallel.ParallelConfig(context_parallel_config=config)
    model._parallel_config = configs
    for processor in _processors(model):
        processor._parallel_config = configs


def _modules(model: torch.nn.Module, pattern: str) -> Iterator[torch.nn.Module]:
    """The modules that a name of a plan means, where ``*`` stands for any one part."""
    wanted = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
    found = [module for name, module in model.named_modules() if wanted.fullmatch(name)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no module {pattern!r}, which its plan names")
    yield from found
