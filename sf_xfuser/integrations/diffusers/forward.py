"""Splits the inputs of a model's forward over ranks and gathers its outputs, as the model's plan requires.

Every split tensor has one part per rank, in ascending order of global ranks, with lengths as even as possible.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from sf_xfuser.integrations.diffusers.attention import TorusContextParallel, attention_modules, uncompiled
from sf_xfuser.integrations.diffusers.inputs import flatten, require_same, summarize
from sf_xfuser.integrations.xdit.adapters import CONTROLNET_SAMPLES
from sf_xfuser.torus.all_gather import all_gather

_TEXT_FIRST = ("FluxTransformer2DModel", "Flux2Transformer2DModel")  # in joint attention the text comes first
_TEXT_MASKS = ("encoder_hidden_states_mask", "encoder_attention_mask")
# Plans omit the samples of a ControlNet, one for each image token.
_SAMPLES = dict.fromkeys(CONTROLNET_SAMPLES, SimpleNamespace(split_dim=1, expected_dims=3))
_NOT_SPLIT = {
    "controlnet_mode": "every rank would add the mode token; do not parallelize a union ControlNet",
    "kv_cache_mode": "reference tokens start the whole sequence, not the part of each rank; run without a KV cache",
}


class ParallelForward:
    """The forward hooks of one model. ``torus``: its attention; ``plan``: entries by module name.

    Modules are looked up by name in every forward, because adapters and compilers replace modules and processors may be
    set at any time.
    """

    def __init__(self, torus: TorusContextParallel, plan: Mapping[str, Any]) -> None:
        self.torus, self.mesh, self.plan = torus, torus.mesh, plan
        self.num_ranks = self.mesh.layout.world_size
        self._compared: set[tuple[str, str]] = set()  # (session, input shapes) that all ranks compared
        self._requests: dict[int, AbstractContextManager[None]] = {}  # by thread; one at most
        self._hooked: list[tuple[str, torch.nn.Module, Any]] = []
        self._handles: list[RemovableHandle] = []

    @uncompiled
    def pre_forward(self, model: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Check and split the inputs of the model. Collective. Its thread has the mesh until ``post_forward``."""
        request = self.mesh.guard.in_request()
        request.__enter__()
        self._requests[get_ident()] = request
        if torch.is_grad_enabled():
            raise ValueError("a parallelized model computes no gradients: call it under torch.no_grad()")
        self.torus.is_uneven = False
        self.torus.in_forward = True
        self.mesh.layer = ""
        modules = dict(model.named_modules())
        self._hook(planned_modules(model, modules, self.plan))
        self.torus.configure(attention_modules(modules))
        name, entries = type(model).__name__, _SAMPLES | input_entries(self.plan.get(""))
        inputs = _by_name(model, args, kwargs)
        self._require_same(name, inputs)
        for unsplit, reason in _NOT_SPLIT.items():
            if inputs.get(unsplit) is not None and unsplit not in entries:
                raise ValueError(f"{name} cannot take {unsplit} across ranks: {reason}")
        inputs = self._split_joint_mask(name, self._pad_text(model, inputs))
        return self._split_inputs(entries, model, (), inputs)

    @uncompiled
    def post_forward(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        """Runs after failed forwards, too: without output then."""
        request = self._requests.pop(get_ident(), None)
        if request is not None:  # else another thread has the mesh
            self.torus.in_forward = False
            request.__exit__(*(sys.exc_info() if output is None else (None, None, None)))

    # diffusers' own ContextParallelSplitHook and ContextParallelGatherHook fail 31 of 74 cases in test_diffusers.py
    # (0.42.1): they cannot gather uneven parts over Gloo, torch.compile traces their collectives, they do not split
    # tensors of unexpected dimensions, and they raise for omitted optional inputs. Subclassing only the split hook
    # removes no lines, and its errors cannot name the tensor.
    def _hook(self, planned: list[tuple[str, torch.nn.Module, Any]]) -> None:
        """Hook the modules that currently have the names of the plan, and unhook all others."""
        if planned == self._hooked:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = [handle for entry in planned for handle in self._attach(*entry)]
        self._hooked = planned

    def _attach(self, name: str, module: torch.nn.Module, entry: Any) -> Iterator[RemovableHandle]:
        inputs = input_entries(entry)
        if inputs and name:  # pre_forward splits the inputs of the model itself
            yield module.register_forward_pre_hook(partial(self._split_inputs, inputs), with_kwargs=True)
        if not isinstance(entry, Mapping):
            yield module.register_forward_hook(partial(self._gather_outputs, name, entry))
        elif outputs := {key: part for key, part in entry.items() if key not in inputs}:
            yield module.register_forward_hook(partial(self._split_outputs, name, outputs))

    def _require_same(self, model: str, inputs: Mapping[str, Any]) -> None:
        """Raise RuntimeError on every rank if their inputs differ. Collective. Inputs on GPUs are compared once per set
        of shapes, because reading them synchronizes."""
        leaves = list(flatten(inputs))
        shapes = ", ".join(f"{name} {description}" for name, description, _ in leaves)
        self.mesh.begin_request(f"{model}: {shapes}")
        # A rank that failed during a comparison reconnects in a new session, in which all ranks compare again.
        session = self.mesh.control.session
        known = (session, shapes) in self._compared and not self.mesh.failed
        if known and not all(x is None or x.device.type == "cpu" for *_, x in leaves):
            return
        mine = {name: (description, values.tolist()) for name, (description, values) in summarize(inputs).items()}
        with self.mesh.call():
            summaries = self.mesh.control.gather("forward inputs", mine)
        require_same(dict(zip(self.mesh.members, summaries, strict=True)))
        self._compared.add((self.mesh.control.session, shapes))

    def _pad_text(self, model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Pad text that has fewer tokens than ranks, and mask the padding, if the model accepts a text mask. Every rank
        needs a token, because diffusers' processors cannot reshape an empty tensor."""
        text = inputs.get("encoder_hidden_states")
        name = next((name for name in parameters(model) if name in _TEXT_MASKS), None)
        if not self.torus.splits_text or name is None or text is None or text.shape[1] >= self.num_ranks:
            return inputs
        mask, missing = inputs.get(name), self.num_ranks - text.shape[1]
        if mask is None:
            mask = text.new_ones(text.shape[:2], dtype=torch.bool if name.endswith("states_mask") else text.dtype)
        return inputs | {"encoder_hidden_states": pad(text, (0, 0, 0, missing)), name: pad(mask, (0, missing))}

    def _split_joint_mask(self, model: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """Reduce Flux's mask of all keys to the text and image tokens of this rank."""
        options = inputs.get("joint_attention_kwargs") or {}
        mask = options.get("attention_mask")
        if mask is None or model not in _TEXT_FIRST:
            return inputs
        text, image = inputs["encoder_hidden_states"].shape[1], inputs["hidden_states"].shape[1]
        batch = inputs["hidden_states"].shape[0]
        whole = mask[:, None, None] if mask.dim() == 2 else mask
        if whole.dim() != 4 or whole.shape[0] not in (1, batch) or whole.shape[1:] != (1, 1, text + image):
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)} cannot be split: give one over the {text} + {image} keys "
                f"for all queries and heads, [{batch}, {text + image}] or [{batch}, 1, 1, {text + image}]"
            )
        tokens = torch.arange(text + image, device=mask.device)
        keys = torch.cat([self._own_part(tokens[:text], 0), self._own_part(tokens[text:], 0)])
        return inputs | {"joint_attention_kwargs": options | {"attention_mask": whole.index_select(-1, keys)}}

    def _split_inputs(self, entries: Mapping[str, Any], module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        inputs = _by_name(module, args, kwargs)
        return (), inputs | {name: self._split(name, inputs[name], entries[name]) for name in entries if name in inputs}

    def _split_outputs(self, name: str, entries: Mapping[int, Any], module: Any, args: Any, output: Any) -> Any:
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        for index, part in entries.items():
            outputs[index] = self._split(f"output {index} of {name}", outputs[index], part)
        return outputs[0] if isinstance(output, torch.Tensor) else tuple(outputs)

    def _split(self, name: str, x: Any, part: Any) -> Any:
        """This rank's part of ``x``. ``part``: a ContextParallelInput, or a list of them where ``x`` is a list."""
        if x is None:
            return None
        if isinstance(x, (list, tuple)):
            parts = part if isinstance(part, (list, tuple)) else [part] * len(x)
            if len(parts) != len(x):
                raise ValueError(f"{name} has {len(x)} tensors, and the plan splits {len(parts)}")
            return [self._split(f"{name}[{n}]", *pair) for n, pair in enumerate(zip(x, parts, strict=True))]
        if part.expected_dims is not None and x.dim() != part.expected_dims:
            if part.split_dim >= x.dim():
                return x  # a timestep per sample, not per token
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} cannot be split over tokens: the plan expects {part.expected_dims} "
                f"dimensions, with tokens in dimension {part.split_dim}; give that shape, or another cp_plan="
            )
        if x.shape[part.split_dim] < self.num_ranks:
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} has fewer tokens than the {self.num_ranks} ranks and cannot be "
                f"padded: give more tokens, or start fewer ranks"
            )
        return self._own_part(x, part.split_dim)

    def _own_part(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        self.torus.is_uneven |= x.shape[dim] % self.num_ranks != 0
        return x.tensor_split(self.num_ranks, dim)[sorted(self.mesh.members).index(dist.get_rank())]

    @uncompiled
    def _gather_outputs(self, name: str, entry: Any, module: Any, args: Any, output: Any) -> Any:
        """Concatenate the parts of all ranks. ``entry``: a ContextParallelOutput, or a list of them. Collective."""
        self.mesh.layer = name
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        parts = entry if isinstance(entry, (list, tuple)) else [entry]
        for n, (x, part) in enumerate(zip(outputs, parts, strict=True)):
            if part is not None:
                outputs[n] = all_gather(x, part.gather_dim, self.mesh, uneven=self.torus.is_uneven)
        return outputs[0] if isinstance(output, torch.Tensor) else tuple(outputs)


def planned_modules(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], plan: Mapping[str, Any]
) -> list[tuple[str, torch.nn.Module, Any]]:
    """(name, module, entry) for each module of ``plan``. Raises ValueError if the model has no such module."""
    planned = []
    for pattern, entry in plan.items():
        regex = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        names = [name for name in modules if regex.fullmatch(name)] if "*" in pattern else [pattern]
        if not names or names[0] not in modules:
            raise ValueError(f"{type(model).__name__} has no module {pattern!r}, which its plan names")
        planned += [(name, modules[name], entry) for name in names]
    return planned


def input_entries(entry: Any) -> dict[str, Any]:
    """The part of a plan's entry that splits inputs of the module; the rest splits or gathers its outputs."""
    parts = entry if isinstance(entry, Mapping) else {}
    return {key: part for key, part in parts.items() if not getattr(part, "split_output", False)}


def parameters(module: Any) -> list[str]:
    """Parameter names of the module's ``forward``, also inside ``torch.compile()``."""
    return list(inspect.signature(type(getattr(module, "_orig_mod", module)).forward).parameters)[1:]


def _by_name(module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    return {**dict(zip(parameters(module), args, strict=False)), **kwargs}
