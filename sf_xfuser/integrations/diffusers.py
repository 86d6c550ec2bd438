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
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from sf_xfuser.config import TorusArgs
from sf_xfuser.integrations.fallback import DropIn, log_on_rank_0
from sf_xfuser.integrations.hooks import Hook, HookSet
from sf_xfuser.integrations.xdit.degrees import facts_of_config
from sf_xfuser.kernels import AttendFunction, sdpa_attend
from sf_xfuser.torus.all_gather import all_gather
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.torus.call import Tokens
from sf_xfuser.torus.mesh import Mesh

_DISPATCH = "diffusers.models.attention_dispatch"
_CARRIER = "sf_xfuser"  # attribute of a ContextParallelConfig, and of attention modules
_uncompiled = partial(torch.compiler.disable, reason="Torus Attention is not traced: compile without fullgraph=True")

_MASKED = -1000.0  # added to a score, it leaves exp() nothing in float32; diffusers adds -10000 (bfloat16: -9984)
_TEXT_FIRST = ("FluxTransformer2DModel", "Flux2Transformer2DModel")  # in their joint attention, before the image
_TEXT_MASKS = ("encoder_hidden_states_mask", "encoder_attention_mask")
_CONTROLNET = (
    "its plan does not split them; give parallelize(..., cp_plan={**plan, '': {**plan.get('', {}), '%s': "
    "ContextParallelInput(split_dim=1, expected_dims=3)}}) with plan = model._cp_plan"
)
_NOT_SPLIT = {
    "controlnet_block_samples": _CONTROLNET % "controlnet_block_samples",
    "controlnet_single_block_samples": _CONTROLNET % "controlnet_single_block_samples",
    "controlnet_mode": "every rank would add the token of the mode; do not parallelize a union ControlNet",
    "kv_cache_mode": "reference tokens lead the whole sequence, not the part of each rank; run it without a KV cache",
}
_PLAN_FAILS = {
    "LTX2VideoTransformer3DModel": "it leaves the rotary embeddings between video and audio whole; give "
    "cp_plan={**plan, 'cross_attn_rope': plan['rope']} with plan = model._cp_plan, or, for rope_type='split', with "
    "both 'rope' and 'cross_attn_rope' at split_dim=2, expected_dims=4",
}


def parallelize(
    model: torch.nn.Module,
    mesh: Mesh | DeviceMesh | None = None,
    *,
    args: TorusArgs | None = None,
    cp_plan: Mapping[str, Any] | None = None,
) -> TorusContextParallel:
    """Let the ranks of a sequence-parallel group compute ``model`` together, each on its part of the tokens.

    ``model``: a diffusers transformer with the whole weights on every rank, compiled or not; every rank then calls it,
    or its pipeline, with the same inputs (the same prompt and the same seed), and gets the whole result. Sequence
    lengths need not divide. Adapters, caches and attention processors may be set before or after. For inference only.
    ``mesh``: one that exists (a pipeline's second transformer shares the first one's). A DeviceMesh gives the ranks of
    a new one (see ``build_mesh``), None takes all. ``args``: of a new one; default: ``TorusArgs(backend="torus")``.
    ``cp_plan``: in place of the model's own; a Flux ControlNet's samples, for instance, are split by ``{**plan, "":
    {**plan[""], "controlnet_block_samples": part}}`` with ``plan = model._cp_plan`` and ``part =
    ContextParallelInput(split_dim=1, expected_dims=3)``.

    Collective over the world (over the group, where ``mesh`` is a Mesh). Returns what runs the model's attention.
    Raises ValueError for a model, plan or flags that do not fit, RuntimeError for a diffusers without context
    parallelism, on every rank alike.
    """
    args = args or TorusArgs(backend="torus")
    model = _unwrapped(model)
    plan = cp_plan if cp_plan is not None else getattr(model, "_cp_plan", None)
    name = type(model).__name__
    if plan is None:
        raise ValueError(f"{name} has no _cp_plan, which says what is split over tokens: give cp_plan=, as diffusers' "
                         f"enable_parallelism takes it")  # fmt: skip
    if cp_plan is None and name in _PLAN_FAILS:
        raise ValueError(f"{name}._cp_plan does not work: {_PLAN_FAILS[name]}")
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(f"{name} is parallelized already; load a new one")
    original = _install()
    modules = dict(model.named_modules())
    for part, module, entry in _planned(model, modules, plan):
        if unknown := _inputs_of(entry).keys() - set(_parameters(module)):
            raise ValueError(f"{part or name} takes no {sorted(unknown)}, which its plan splits: {_parameters(module)}")
    attention = _attention(modules)
    if not any(hasattr(processor, "_parallel_config") for _, _, processor in attention):
        raise ValueError(
            f"{name} has no attention processor that takes a context-parallel configuration: diffusers "
            f"{importlib.import_module('diffusers').__version__} cannot split this model over tokens"
        )
    _require_backend(attention)
    if not isinstance(mesh, Mesh):
        if args.backend != "torus":
            raise ValueError(f"parallelize() runs Torus Attention: give TorusArgs(backend='torus'), got {args}")
        facts = facts_of_config(getattr(model, "config", {}), name)
        heads, kv_heads = (facts.heads, facts.kv_heads) if facts else (None, None)
        mesh = build_mesh(
            [range(dist.get_world_size())] if mesh is None else mesh, args, heads=heads, kv_heads=kv_heads
        )
    if mesh.layout.world_size == 1:
        raise ValueError("a sequence-parallel group of one rank has nothing to parallelize: start more ranks")
    torus = TorusContextParallel(
        original=original,
        mesh=mesh,
        strict=args.strict,
        log=log_on_rank_0,
        kernel=args.kernel,
        plan=plan,
    )
    model._parallel_config = torus.config
    model.register_forward_pre_hook(torus.begin, with_kwargs=True)
    model.register_forward_hook(torus.end, always_call=True)
    return torus


@dataclass(eq=False, kw_only=True)
class TorusContextParallel(DropIn):
    """What runs the attention of one parallelized model. ``original``: diffusers' own function, which it stands for;
    ``plan``: what is split, by name of a module. Tokens are cut into as many parts as ranks, in the order of global
    ranks, as even as can be.

    Modules are looked up by name when a forward begins: adapters and compilers replace modules, and processors may be
    set at any time."""

    cannot = "torus cannot run this attention call exactly"
    owner = "diffusers' own context-parallel attention"
    handing = "falls back to diffusers' own context-parallel attention"

    original: Callable[..., Any]
    plan: Mapping[str, Any]
    _uneven: bool = False  # in this forward, a sequence was cut unevenly
    _began: bool = False  # a forward of the model runs
    on_torus: set[str] = field(default_factory=set)  # names of the attention modules that ran on torus
    _seen: set[tuple[str, str]] = field(default_factory=set)  # session, and shapes of inputs that ranks have compared
    _hooked: list[tuple[str, torch.nn.Module, Any]] = field(default_factory=list)
    _handles: list[RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        """What diffusers' enable_parallelism leaves on a model and its attention processors."""
        parallel = importlib.import_module("diffusers.models._modeling_parallel")
        layout = self.mesh.layout
        config = parallel.ContextParallelConfig(ring_degree=layout.ring_degree, ulysses_degree=layout.ulysses_degree)
        device = "cuda" if dist.get_backend(self.mesh.ulysses_group) == "nccl" else "cpu"
        config._ulysses_mesh = DeviceMesh.from_group(self.mesh.ulysses_group, device)
        setattr(config, _CARRIER, self)
        self.splits_text = any("encoder_hidden_states" in _inputs_of(entry) for entry in self.plan.values())
        self.config = parallel.ParallelConfig(context_parallel_config=config)

    # -- attention ----------------------------------------------------------------------------------------------------

    @_uncompiled
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
        """As diffusers' own. ``query`` [B, S, H, D], ``key`` and ``value`` [B, S_kv, H_kv, D]; returns [B, S, H, D].
        ``attn_mask``: of this rank's keys."""
        if not self._began:
            raise RuntimeError(
                "attention of a parallelized model ran outside its forward, where nothing has been split: call the "
                "model itself, not model.forward() or a part of it"
            )
        self.on_torus.add(self.mesh.layer)
        self._require_any_order(key, attn_mask, is_causal, forward_op)
        reason = self.why_not(dropout_p, return_lse)
        if reason is not None:
            self._require_own(reason, attn_mask)
            self.note(reason)
            given = (attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)
            return self.original(query, key, value, *given, forward_op=forward_op, **rest)
        self.served += 1
        attention = self.attention(as_attend_function(forward_op, scale), scale, query.shape[3])
        attend = partial(torus_attention, mesh=self.mesh, attention=attention)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if attn_mask is not None:
            return self._without_masked_keys(attend, q, k, v, attn_mask).transpose(1, 2)
        counts = Tokens(*((x.shape[2],) * self.mesh.layout.world_size for x in (q, k)))
        return attend(q, k, v, tokens=None if self._uneven else counts).transpose(1, 2)

    def _require_any_order(
        self, key: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool, forward_op: Callable[..., Any]
    ) -> None:
        """Raise ValueError where the order of keys matters: joint attention concatenates this rank's text and image, so
        that over all ranks they are not in the order of the model's inputs. Local, and alike on all ranks."""
        reason = None
        window = tuple(getattr(forward_op, "keywords", {}).get("window_size", (-1, -1)))
        if is_causal:
            reason = "causal attention needs keys in order"
        elif window != (-1, -1):
            reason = f"a window of {window} needs keys in order"
        elif attn_mask is not None and (attn_mask.dim() != 4 or attn_mask.shape[2:] != (1, key.shape[1])):
            reason = (
                f"a mask of shape {tuple(attn_mask.shape)} is not of the {key.shape[1]} keys on this rank, alike for "
                f"all queries"
            )
        if reason is not None:
            raise ValueError(f"{self.cannot}: {reason}, and tokens are split over ranks; leave it out")

    def _without_masked_keys(
        self, attend: Callable[..., torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Attention to the keys that ``mask`` [B or 1, H or 1, 1, S_kv] keeps, as if the others were not there: exact
        with every kernel. Collective: ranks exchange the number of keys they keep. One call for each sample that has a
        mask of its own; on a GPU each call waits for the mask."""
        kept = mask if mask.dtype == torch.bool else mask > _MASKED
        reason = None
        if not torch.equal(kept, kept[:, :1].expand_as(kept)):
            reason = "the mask differs between heads; give one for all heads"
        elif mask.dtype != torch.bool and mask[kept].any():
            reason = f"the mask has values between {_MASKED:g} and 0, which weigh keys; give a boolean mask"
        keys = [row.nonzero().flatten() for row in kept[:, 0, 0]]
        with self.mesh.call():
            told = self.mesh.control.gather("attention mask", [reason, q.shape[2], [len(some) for some in keys]])
            if not all(map(sum, zip(*(left for _, _, left in told), strict=True))):
                reason = "the mask leaves a sample without keys; keep one at least"
            if reasons := {reason, *(its for its, _, _ in told)} - {None}:
                self.mesh.refuse(f"{self.cannot}: {min(reasons)}")
        q_tokens = [queries for _, queries, _ in told]
        outs = []
        for n, some in enumerate(keys):
            sample = slice(n, n + 1) if len(keys) > 1 else slice(None)
            its = (x[sample].index_select(2, some) for x in (k, v))
            outs.append(attend(q[sample], *its, tokens=Tokens(q_tokens, [left[n] for _, _, left in told])))
        return torch.cat(outs)

    def why_not(self, dropout_p: float, return_lse: bool) -> str | None:
        """Why this call falls back to diffusers' own function; None if it runs on torus. Local, alike on all ranks."""
        if (reason := self.mesh.unavailable_reason()) is not None:
            return reason
        if dropout_p:
            return "attention dropout"
        if return_lse:
            return "the log-sum-exp is asked for"
        return None

    def _require_own(self, reason: str, attn_mask: torch.Tensor | None) -> None:
        """Raise ValueError where diffusers' own function would fail or be wrong: its ring does not pass masks on, its
        Ulysses takes equal parts."""
        layout, only = self.mesh.layout, None
        if layout.ring_degree > 1:
            only = (
                f"without a ring, and this mesh has ring_degree={layout.ring_degree}: give args=TorusArgs("
                f"backend='torus', plan='torus=T,ulysses=U') with T x U the number of ranks"
            )
        elif self._uneven:
            only = f"where sequences divide by the {layout.world_size} ranks: choose such a size and text length"
        elif attn_mask is not None:
            only = "without a mask: leave the mask out"
        if only is not None:
            raise ValueError(f"{self.cannot}: {reason}; {self.owner} can only run it {only}")

    # -- tokens -------------------------------------------------------------------------------------------------------

    @_uncompiled
    def begin(self, model: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A forward of the model begins. Returns its inputs, split."""
        if torch.is_grad_enabled():
            raise ValueError("a parallelized model computes no gradients: call it under torch.no_grad()")
        self._uneven = False
        self._began = True
        self.mesh.layer = ""
        modules = dict(model.named_modules())
        self._hook(_planned(model, modules, self.plan))
        self._configure(_attention(modules))
        given = dict(zip(_parameters(model), args, strict=False)) | kwargs
        self._require_same(type(model).__name__, given)
        _require_supported(type(model).__name__, given, self.plan)
        given = self._with_local_mask(type(model).__name__, self._with_enough_text(model, given))
        return (), self._split_inputs(_inputs_of(self.plan.get("")), given)

    def end(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        """A forward of the model ends, or has failed."""
        self._began = False

    def _hook(self, planned: list[tuple[str, torch.nn.Module, Any]]) -> None:
        """Hooks on the modules that have the plan's names now, and on no others."""
        if planned == self._hooked:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = [handle for name, module, entry in planned for handle in self._attach(name, module, entry)]
        self._hooked = planned

    def _attach(self, name: str, module: torch.nn.Module, entry: Any) -> Iterator[RemovableHandle]:
        """Split inputs and outputs of ``module``, or gather its output, as one entry of a plan says."""
        if not isinstance(entry, Mapping):
            yield module.register_forward_hook(partial(self._gather_outputs, name, entry))
            return
        inputs = _inputs_of(entry)
        outputs = {key: part for key, part in entry.items() if key not in inputs}

        def split_inputs(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return (), self._split_inputs(inputs, dict(zip(_parameters(module), args, strict=False)) | kwargs)

        if inputs and name:  # those of the model itself: begin()
            yield module.register_forward_pre_hook(split_inputs, with_kwargs=True)
        if outputs:
            yield module.register_forward_hook(partial(self._split_outputs, name, outputs))

    def _configure(self, attention: list[tuple[str, torch.nn.Module, Any]]) -> None:
        """Attention across ranks for the processors that are set now, and a check that it runs on torus."""
        _require_backend(attention)
        for name, module, processor in attention:
            if hasattr(processor, "_parallel_config"):
                processor._parallel_config = self.config
            setattr(module, _CARRIER, (self, name))
            _watch(type(processor), name)

    def _require_same(self, model: str, given: Mapping[str, Any]) -> None:
        """Raise RuntimeError on every rank unless all have the same inputs. Collective. On GPUs, which would have to be
        waited for, only inputs of new shapes are compared."""
        described = list(_described(given))
        shapes = ", ".join(f"{name} {description}" for name, description, _ in described)
        self.mesh.begin_request(f"{model}: {shapes}")
        # Where a rank did not come to the end of a comparison, it has met the others anew since, and all compare again.
        known = (self.mesh.control.session, shapes) in self._seen and not self.mesh.failed
        if known and not all(x is None or x.device.type == "cpu" for *_, x in described):
            return
        mine = {name: (description, values.tolist()) for name, (description, values) in _inputs_summary(given).items()}
        with self.mesh.call():
            told = self.mesh.control.gather("forward inputs", mine)
        _require_same_inputs(dict(zip(self.mesh.members, told, strict=True)))
        self._seen.add((self.mesh.control.session, shapes))

    def _with_enough_text(self, model: torch.nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """Text of fewer tokens than ranks is padded, and the padding masked, if the model takes a mask of its text: no
        rank may have none, since diffusers' processors cannot reshape a tensor without elements."""
        text, world_size = given.get("encoder_hidden_states"), self.mesh.layout.world_size
        name = next((name for name in _parameters(model) if name in _TEXT_MASKS), None)
        if not self.splits_text or name is None or text is None or text.shape[1] >= world_size:
            return given
        mask, missing = given.get(name), world_size - text.shape[1]
        if mask is None:
            mask = text.new_ones(text.shape[:2], dtype=torch.bool if name.endswith("states_mask") else text.dtype)
        return given | {"encoder_hidden_states": pad(text, (0, 0, 0, missing)), name: pad(mask, (0, missing))}

    def _with_local_mask(self, model: str, given: dict[str, Any]) -> dict[str, Any]:
        """A mask of all keys, as Flux's attention takes one, cut to this rank's text and image."""
        options = given.get("joint_attention_kwargs") or {}
        mask = options.get("attention_mask")
        if mask is None or model not in _TEXT_FIRST:
            return given
        text, image = given["encoder_hidden_states"].shape[1], given["hidden_states"].shape[1]
        batch = given["hidden_states"].shape[0]
        whole = mask[:, None, None] if mask.dim() == 2 else mask
        if whole.dim() != 4 or whole.shape[0] not in (1, batch) or whole.shape[1:] != (1, 1, text + image):
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)} cannot be split: give one of the {text} + {image} keys "
                f"for all queries and heads, [{batch}, {text + image}] or [{batch}, 1, 1, {text + image}]"
            )
        tokens = torch.arange(text + image, device=mask.device)
        keys = torch.cat([self._cut(tokens[:text], 0), self._cut(tokens[text:], 0)])
        return given | {"joint_attention_kwargs": options | {"attention_mask": whole.index_select(-1, keys)}}

    def _split_inputs(self, parts: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        return given | {name: self._split(name, given[name], part) for name, part in parts.items() if name in given}

    def _split_outputs(self, name: str, parts: Mapping[int, Any], module: Any, args: Any, output: Any) -> Any:
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        for index, part in parts.items():
            outputs[index] = self._split(f"output {index} of {name}", outputs[index], part)
        return outputs[0] if isinstance(output, torch.Tensor) else tuple(outputs)

    def _split(self, name: str, x: Any, part: Any) -> Any:
        """This rank's part of ``x``, as a ContextParallelInput or a list of them says; one stands for all of a list."""
        if x is None:
            return None
        if isinstance(x, (list, tuple)):
            each = part if isinstance(part, (list, tuple)) else [part] * len(x)
            if len(each) != len(x):
                raise ValueError(f"{name} has {len(x)} tensors, and the plan splits {len(each)}")
            return [self._split(f"{name}[{n}]", one, its) for n, (one, its) in enumerate(zip(x, each, strict=True))]
        if part.expected_dims is not None and x.dim() != part.expected_dims:
            if part.split_dim >= x.dim():
                return x  # a timestep for each sample, not for each token
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} cannot be split over tokens: the plan takes {part.expected_dims} "
                f"dimensions, with tokens in dimension {part.split_dim}; give it like that, or another cp_plan="
            )
        if x.shape[part.split_dim] < self.mesh.layout.world_size:
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} has fewer tokens than the {self.mesh.layout.world_size} ranks, and "
                f"cannot be padded: give more tokens, or start fewer ranks"
            )
        return self._cut(x, part.split_dim)

    def _cut(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        world_size = self.mesh.layout.world_size
        self._uneven |= x.shape[dim] % world_size != 0
        return x.tensor_split(world_size, dim)[sorted(self.mesh.members).index(dist.get_rank())]

    def _gather_outputs(self, name: str, parts: Any, module: Any, args: Any, output: Any) -> Any:
        self.mesh.layer = name
        if isinstance(output, torch.Tensor):
            return self._gather(output, parts[0] if isinstance(parts, (list, tuple)) else parts)
        return tuple(x if part is None else self._gather(x, part) for x, part in zip(output, parts, strict=True))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _gather(self, x: torch.Tensor, part: Any) -> torch.Tensor:
        """The parts of all ranks, as a ContextParallelOutput says. Collective over the group."""
        return all_gather(x, part.gather_dim, self.mesh, uneven=self._uneven)


# -- inputs ----------------------------------------------------------------------------------------------------------


def _described(value: Any, name: str = "") -> Iterator[tuple[str, str, torch.Tensor | None]]:
    """Name, description and tensor of each value in nested ``value``. Numbers count as tensors."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _described(one, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for n, one in enumerate(value):
            yield from _described(one, f"{name}[{n}]")
    elif isinstance(value, torch.Tensor):
        yield name, f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}", value
    elif isinstance(value, (int, float)):
        yield name, type(value).__name__, torch.tensor(value, dtype=torch.float64)
    else:
        yield name, repr(value) if value is None or isinstance(value, str) else type(value).__name__, None


def _inputs_summary(given: Mapping[str, Any]) -> dict[str, tuple[str, torch.Tensor]]:
    """Description and summary of each input by name. A summary is float64 on the input's device: tolerance, mean, root
    mean square, and up to 16 elements. Waits for no GPU.

    No bit digest: GPUs of different kinds round differently. Tensors of 3 dimensions or more may come from networks of
    low precision: they may differ by 1/16 of their root mean square, other floats by half the digits of their dtype.
    """
    summary = {}
    for name, description, x in _described(given):
        values = torch.empty(0, dtype=torch.float64)
        if x is not None and x.numel():
            share = 0.0 if not x.is_floating_point() else 2**-4 if x.dim() > 2 else torch.finfo(x.dtype).eps ** 0.5
            flat = x.detach().flatten()
            norm = torch.linalg.vector_norm(flat if x.is_floating_point() else flat.double(), dtype=torch.float64)
            size = norm / x.numel() ** 0.5
            moments = torch.stack([share * size, flat.mean(dtype=torch.float64), size])
            values = torch.cat([moments, flat[:: -(-x.numel() // 16)].double()])
        summary[name] = description, values
    return summary


def _require_same_inputs(summaries: Mapping[int, Mapping[str, Any]]) -> None:
    """Raise RuntimeError, with the same text on every rank, unless the summaries of all ranks are alike."""
    (first, reference), *others = summaries.items()
    for name in dict.fromkeys(name for summary in summaries.values() for name in summary):
        if differing := [rank for rank, summary in others if not _alike(reference.get(name), summary.get(name))]:
            seen = {rank: summaries[rank].get(name, ["absent"])[0] for rank in (first, *differing)}
            raise RuntimeError(
                f"ranks were called with different inputs: {name} differs on rank(s) {differing} from rank {first} "
                f"({seen if len(set(seen.values())) > 1 else 'in its values'}); give every rank the same inputs, and "
                f"its pipeline the same seed: generator=torch.Generator().manual_seed(0)"
            )


def _alike(one: Any, other: Any) -> bool:
    if one is None or other is None or one[0] != other[0]:
        return one is other
    ours, theirs = (torch.tensor(values, dtype=torch.float64) for _, values in (one, other))
    tolerance = float(ours[0].nan_to_num()) if len(ours) else 0.0
    return torch.allclose(ours, theirs, rtol=0, atol=tolerance, equal_nan=True)


def _require_supported(model: str, given: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Raise ValueError for inputs that would have to be split, and are not."""
    for name, why in _NOT_SPLIT.items():
        if given.get(name) is not None and name not in _inputs_of(plan.get("")):
            raise ValueError(f"{model} cannot take {name} across ranks: {why}")


def _parameters(module: torch.nn.Module) -> list[str]:
    return list(inspect.signature(type(_unwrapped(module)).forward).parameters)[1:]


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """What torch.compile() wraps."""
    wrapped: torch.nn.Module = getattr(module, "_orig_mod", module)
    return wrapped


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


def _watch(processor: type, name: str) -> None:
    """Check around each call of a processor of this class, in a parallelized model, that its attention runs on torus.
    Around the processor, not the attention module: caches replace the forward of the module, and skip the processor.
    ValueError for a function, which has no class of its own."""
    call: Any = processor.__call__
    if hasattr(call, _CARRIER):
        return
    if not inspect.isfunction(call):
        raise ValueError(f"{name} has a {processor.__name__} as attention processor; give an instance of a class")

    @functools.wraps(call)
    def watched(self: Any, attention: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(attention, _CARRIER):
            return call(self, attention, *args, **kwargs)
        _enter(attention)
        output = call(self, attention, *args, **kwargs)
        _leave(attention, self)
        return output

    setattr(watched, _CARRIER, True)
    processor.__call__ = watched  # type: ignore[method-assign]


@_uncompiled
def _enter(attention: torch.nn.Module) -> None:
    torus, name = getattr(attention, _CARRIER)
    torus.mesh.layer = name
    torus.on_torus.discard(name)


@_uncompiled
def _leave(attention: torch.nn.Module, processor: Any) -> None:
    """Raise RuntimeError where it attended to this rank's tokens only. Cross-attention may: where the text is not
    split, every rank has all its keys."""
    torus, name = getattr(attention, _CARRIER)
    may = getattr(attention, "is_cross_attention", False) and not torus.splits_text
    if name not in torus.on_torus and not may:
        raise RuntimeError(
            f"{name} attended to the tokens of this rank only: its processor {type(processor).__name__} does not pass "
            f"its _parallel_config on to diffusers' dispatch_attention_fn, or its attention backend knows no context "
            f"parallelism; set a processor that does, or another backend with model.set_attention_backend()"
        )


def _attention(modules: Mapping[str, torch.nn.Module]) -> list[tuple[str, torch.nn.Module, Any]]:
    """Name, module and processor of each attention."""
    found = ((name, module, getattr(module, "processor", None)) for name, module in modules.items())
    return [(name, module, processor) for name, module, processor in found if processor is not None]


def _require_backend(attention: list[tuple[str, torch.nn.Module, Any]]) -> None:
    """Raise ValueError where an attention backend would leave attention on one rank without a word."""
    registry = importlib.import_module(_DISPATCH)._AttentionBackendRegistry
    for _, _, processor in attention:
        backend = getattr(processor, "_attention_backend", None) or registry.get_active_backend()[0]
        name = str(getattr(backend, "value", backend))
        if name not in registry._supports_context_parallel:
            raise ValueError(
                f"attention backend {name!r} knows no context parallelism; call model.set_attention_backend() with one "
                f"of {sorted(registry._supports_context_parallel)}"
            )


def _planned(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], plan: Mapping[str, Any]
) -> list[tuple[str, torch.nn.Module, Any]]:
    """Name, module and entry of all that a plan names. ValueError where the model has no such module or argument."""
    planned = []
    for pattern, entry in plan.items():
        wanted = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        names = [name for name in modules if wanted.fullmatch(name)] if "*" in pattern else [pattern]
        if not names or names[0] not in modules:
            raise ValueError(f"{type(model).__name__} has no module {pattern!r}, which its plan names")
        planned += [(name, modules[name], entry) for name in names]
    return planned


def _inputs_of(entry: Any) -> dict[str, Any]:
    """What an entry of a plan splits before the module runs."""
    parts = entry if isinstance(entry, Mapping) else {}
    return {key: part for key, part in parts.items() if not getattr(part, "split_output", False)}
