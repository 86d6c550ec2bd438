"""``sf_xfuser.parallelize``: Torus Attention as the context parallelism of a plain diffusers model, without xDiT.

The model's ``_cp_plan`` (diffusers' ContextParallelModelPlan) names the tensors to split over tokens and the outputs to
gather; forward.py does both. Its attention processors pass a ``_parallel_config`` to diffusers' context-parallel
attention function; attention.py replaces that function for models that ``parallelize`` has changed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sf_xfuser.config import TorusArgs
from sf_xfuser.integrations.diffusers import attention, forward
from sf_xfuser.integrations.fallback import log_on_rank_0
from sf_xfuser.integrations.xdit.degrees import facts_of_config
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.torus.mesh import Mesh

_BROKEN_PLANS = {
    "LTX2VideoTransformer3DModel": "it does not split the rotary embeddings between video and audio; give "
    "cp_plan={**plan, 'cross_attn_rope': plan['rope']} with plan = model._cp_plan, or, for rope_type='split', with "
    "both 'rope' and 'cross_attn_rope' at split_dim=2, expected_dims=4",
}


def parallelize(
    model: torch.nn.Module,
    mesh: Mesh | DeviceMesh | None = None,
    *,
    args: TorusArgs | None = None,
    cp_plan: Mapping[str, Any] | None = None,
) -> attention.TorusContextParallel:
    """Split the tokens of a diffusers transformer over ranks and compute its attention with Torus Attention.

    Every rank holds all weights, calls the model or its pipeline with the same inputs (prompt and seed), and gets the
    whole result::

        dist.init_process_group("nccl")  # torchrun --nproc-per-node 8 program.py
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
        pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")
        torus = sf_xfuser.parallelize(pipe.transformer)
        image = pipe("a red chair in the rain", generator=torch.Generator().manual_seed(0)).images[0]

    Sequence lengths need not be divisible by the number of ranks. Adapters, caches, attention processors and
    ``torch.compile`` (without ``fullgraph=True``) work before and after this call. Inference only.

    Args:
        model: A diffusers transformer, compiled or not.
        mesh: An existing mesh, for example ``torus.mesh`` for a pipeline's second transformer. A DeviceMesh: a
            new mesh of its ranks (see ``build_mesh``). None: a new mesh of all ranks.
        args: Topology, plan, transport and timeout of a new mesh. Default: ``TorusArgs(backend="torus")``.
        cp_plan: Replaces ``model._cp_plan``. Samples of a ControlNet are split without an entry.

    Returns:
        The model's attention: its ``mesh``, and how many calls ran on torus (``handled``) or fell back to diffusers'
        own context parallelism (``fallbacks``, by reason).

    Collective over the world, or over the group of a Mesh. Raises ValueError (unsupported model, plan or flags) or
    RuntimeError (diffusers without context parallelism, a missing rank) on every rank.
    """
    args = args or TorusArgs(backend="torus")
    model = getattr(model, "_orig_mod", model)  # inside torch.compile()
    name, modules = type(model).__name__, dict(model.named_modules())
    layers = attention.attention_modules(modules)
    if not any(hasattr(processor, "_parallel_config") for _, _, processor in layers):
        raise ValueError(
            f"{name} has no attention processor that takes a context-parallel configuration: diffusers "
            f"{importlib.import_module('diffusers').__version__} cannot split this model over tokens"
        )
    plan = cp_plan if cp_plan is not None else getattr(model, "_cp_plan", None)
    if plan is None:
        raise ValueError(
            f"{name} has no _cp_plan, which names the tensors to split over tokens: give cp_plan=, in the format of "
            f"diffusers' enable_parallelism"
        )
    if cp_plan is None and name in _BROKEN_PLANS:
        raise ValueError(f"{name}._cp_plan does not work: {_BROKEN_PLANS[name]}")
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(f"{name} is parallelized already; load a new one")
    original = attention.install_hook()
    for part, module, entry in forward.planned_modules(model, modules, plan):
        inputs = forward.parameters(module)
        if unknown := forward.input_entries(entry).keys() - set(inputs):
            raise ValueError(f"{part or name} has no input {sorted(unknown)}, which its plan splits; it has {inputs}")
    attention.require_backend(layers)
    if not isinstance(mesh, Mesh):
        if args.backend != "torus":
            raise ValueError(f"parallelize() runs Torus Attention: give TorusArgs(backend='torus'), got {args}")
        facts = facts_of_config(getattr(model, "config", {}), name)
        heads, kv_heads = (facts.heads, facts.kv_heads) if facts else (None, None)
        ranks = [range(dist.get_world_size())] if mesh is None else mesh
        mesh = build_mesh(ranks, args, heads=heads, kv_heads=kv_heads)
    if mesh.layout.world_size == 1:
        raise ValueError("cannot parallelize a model over one rank: start more ranks")
    torus = attention.TorusContextParallel(
        original=original,
        mesh=mesh,
        strict=args.strict,
        log=log_on_rank_0,
        kernel=args.kernel,
        splits_text=any("encoder_hidden_states" in forward.input_entries(entry) for entry in plan.values()),
    )
    model._parallel_config = torus.config
    hooks = forward.ParallelForward(torus, plan)
    model.register_forward_pre_hook(hooks.pre_forward, with_kwargs=True)
    model.register_forward_hook(hooks.post_forward, always_call=True)
    return torus
