"""Fills xDiT's ulysses_degree and ring_degree from the model's head counts, the topology and ``--sp-plan``.

Uses xDiT's argument object by its attribute names; imports nothing of xDiT.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, prod
from typing import Any

from sf_xfuser import config
from sf_xfuser.config import XDIT_BACKENDS, TorusArgs
from sf_xfuser.files import read_json, transformer_configs
from sf_xfuser.layout.plan import EVEN, UNEVEN, make_plan
from sf_xfuser.layout.topology import Topology

# Names that diffusers' transformer configs use, most specific first.
_HEADS = ("num_attention_heads", "n_heads", "num_heads")
_KV_HEADS = ("num_kv_heads", "num_key_value_heads", "num_key_value_attention_heads", "n_kv_heads")
_PADS_HEADS = "ZImageTransformer2DModel"  # xDiT pads its heads to a multiple of ulysses_degree


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """``heads``: query heads of the transformer, equal to ``kv_heads`` without grouped-query attention.
    ``transformer``: its class name, empty if the configuration does not name it."""

    heads: int
    kv_heads: int
    source: str
    transformer: str = ""


def read_model_facts(model: str) -> ModelFacts | None:
    """Facts of ``model``, a folder or a hub id in the local cache; None if unknown. No network.

    Reads ``transformer/config.json``, or the folder's own ``config.json`` if it is a transformer's.
    """
    for path in transformer_configs(model):
        try:
            facts = facts_of_config(read_json(path), str(path))
        except (OSError, ValueError):
            continue
        if facts is not None:
            return facts
    return None


def facts_of_config(config: Any, source: str) -> ModelFacts | None:
    """Facts of a transformer's configuration; None if it has no head count."""
    heads = _first(config, _HEADS) if isinstance(config, Mapping) else None
    if heads is None:
        return None
    kv_heads = _first(config, _KV_HEADS) or heads
    return ModelFacts(heads=heads, kv_heads=kv_heads, source=source, transformer=str(config.get("_class_name", "")))


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    values = (config.get(name) for name in names)
    return next((x for x in values if isinstance(x, int) and not isinstance(x, bool) and x > 0), None)


def needs_heads(xfuser_args: Any, args: TorusArgs) -> bool:
    """Whether :func:`fill_degrees` plans by the number of heads. Raises ValueError."""
    world_size = _world_size(xfuser_args)
    if world_size is None or (xfuser_args.ulysses_degree or 1) * (xfuser_args.ring_degree or 1) != 1:
        return False
    is_planned = args.backend in ("torus", "usp", "auto") and (args.backend == "auto" or not args.explicit_plan())
    return is_planned and _sequence_parallel_size(xfuser_args, world_size) > 1


def fill_degrees(xfuser_args: Any, args: TorusArgs, model: ModelFacts | None, unknown: str = "") -> str | None:
    """Set ulysses_degree and ring_degree of ``xfuser_args`` if the user gave none, else check them.

    ``unknown``: why ``model`` is None. Returns the plan as text, for the log. Does nothing while the number of
    processes is unknown; ``create_config`` calls it again later. Raises ValueError.
    """
    world_size = _world_size(xfuser_args)
    if world_size is None:
        return None
    launched = _launched_topology(args, world_size)
    sp_size = _sequence_parallel_size(xfuser_args, world_size)
    ulysses, ring = xfuser_args.ulysses_degree or 1, xfuser_args.ring_degree or 1
    if ulysses * ring != 1 or sp_size == 1:
        _check_degrees(args, model, ulysses, ring, sp_size, world_size)
        return None
    if args.backend in ("ulysses", "ring"):
        ulysses, ring = (sp_size, 1) if args.backend == "ulysses" else (1, sp_size)
        _check_heads(model, ulysses, sp_size)
        planned = f"{sp_size} ranks"
    else:
        stride = xfuser_args.tensor_parallel_degree  # xDiT's rank order: tensor parallel first, then sequence parallel
        grid = launched.fold(range(0, stride * sp_size, stride))
        try:
            plan = make_plan(
                grid.num_machines,
                grid.ranks_per_machine,
                heads=model.heads if model else None,
                kv_heads=model.kv_heads if model else None,
                rule="usp" if args.backend in ("usp", "auto") else args.rule,
                explicit=None if args.backend == "auto" else args.explicit_plan(),  # auto: --sp-plan is torus's layout
                max_imbalance=max_imbalance(args),
            )
        except ValueError as error:
            why = (
                ""
                if model
                else f" (no transformer/config.json found for --model {xfuser_args.model}{unknown and f': {unknown}'})"
            )
            raise ValueError(f"--sp-backend {args.backend}: {error}{why}") from None
        ulysses, ring = plan.even.ulysses_degree, plan.even.ring_degree
        planned = str(plan)
    xfuser_args.ulysses_degree, xfuser_args.ring_degree = ulysses, ring
    return f"--sp-backend {args.backend}: ulysses_degree={ulysses}, ring_degree={ring}, planned for {planned}"


def max_imbalance(args: TorusArgs) -> Fraction:
    """``max_imbalance`` of the layout that xDiT's groups follow; under ``auto`` that is xDiT's own layout."""
    return EVEN if args.backend in (*XDIT_BACKENDS, "auto") else UNEVEN


def _sequence_parallel_size(xfuser_args: Any, world_size: int) -> int:
    """Size of one sequence-parallel group: the world size divided by the other degrees."""
    if xfuser_args.vae_parallel_size > 0:
        raise ValueError(
            f"--sp-backend does not work with --vae_parallel_size {xfuser_args.vae_parallel_size}: the ranks of a "
            f"separate VAE do not take part in creating process groups; use only --use_parallel_vae"
        )
    others = prod(
        (
            xfuser_args.tensor_parallel_degree,
            xfuser_args.data_parallel_degree,
            xfuser_args.pipefusion_parallel_degree,
            2 if xfuser_args.use_cfg_parallel else 1,
        )
    )
    if others < 1 or world_size % others:
        raise ValueError(
            f"data, CFG, pipefusion and tensor parallel degrees multiply to {others}, which does not divide the "
            f"{world_size} processes"
        )
    return world_size // int(others)


def _check_degrees(
    args: TorusArgs, model: ModelFacts | None, ulysses: int, ring: int, sp_size: int, world_size: int
) -> None:
    if ulysses * ring != sp_size:
        raise ValueError(
            f"ulysses_degree={ulysses} x ring_degree={ring} = {ulysses * ring}, but {world_size} processes leave "
            f"{sp_size} for sequence parallelism; give degrees with that product, or none to use --sp-plan"
        )
    if (args.backend == "ulysses" and ring > 1) or (args.backend == "ring" and ulysses > 1):
        raise ValueError(
            f"--sp-backend {args.backend} excludes ulysses_degree={ulysses}, ring_degree={ring}; use --sp-backend usp "
            f"or torus, or give no degrees"
        )
    _check_heads(model, ulysses, sp_size)
    explicit = args.explicit_plan()
    if explicit is not None and sp_size > 1:
        planned = explicit["torus"] * explicit["ulysses"]
        even = gcd(planned, model.heads, model.kv_heads) if model else planned  # xDiT splits heads evenly
        if ulysses not in (even, planned):  # for ``planned`` xDiT pads the heads of some models
            raise ValueError(
                f"--sp-plan {args.plan} means ulysses_degree={even} and ring_degree={sp_size // even}, but "
                f"ulysses_degree={ulysses} and ring_degree={ring} were given; give only one of them"
            )


def _check_heads(model: ModelFacts | None, ulysses: int, sp_size: int) -> None:
    """xDiT makes the same check once it has loaded the model."""
    if model is not None and model.heads % ulysses and model.transformer != _PADS_HEADS:
        allowed = [degree for degree in range(1, sp_size) if not (model.heads % degree or sp_size % degree)]
        raise ValueError(
            f"ulysses_degree={ulysses} does not divide the {model.heads} heads of the model ({model.source}); allowed "
            f"for {sp_size} ranks: {', '.join(map(str, allowed))}, or no degrees with --sp-backend torus"
        )


def _world_size(xfuser_args: Any) -> int | None:
    import torch.distributed as dist

    if xfuser_args.use_ray:
        return int(xfuser_args.ray_world_size)
    if dist.is_initialized():
        return int(dist.get_world_size())
    return config.launch_environment().world_size


def _launched_topology(args: TorusArgs, world_size: int) -> Topology:
    """The topology of ``--sp-topology`` or the launcher, for the degrees only; the mesh gathers the real hosts."""
    if args.topology != "auto":
        return Topology.parse(args.topology, world_size)
    per_machine = config.launch_environment().local_world_size or world_size
    if world_size % per_machine:
        per_machine = world_size
    return Topology.uniform(world_size // per_machine, per_machine, source="launcher")


def num_processes(args: Sequence[str], original: Callable[[list[str]], int]) -> int:
    """Processes per node for the ``xdit`` command. ``original`` is xDiT's count: the product of the given degrees.

    Without ulysses and ring degrees, --sp-plan or --sp-topology sets the count, else the number of local devices.
    """
    torus_args, rest = config.extract(args)
    others = original(rest)
    names = {arg.partition("=")[0].replace("_", "-") for arg in rest}
    if torus_args is None or names & {"--ulysses-degree", "--ring-degree"}:
        return others
    if "--use-cfg-parallel" in rest:
        others *= 2  # xDiT's count includes only the spelling with underscores
    num_nodes = _num_nodes(sys.argv)
    explicit = torus_args.explicit_plan()
    if explicit is not None:
        return max(1, others * prod(explicit.values()) // num_nodes)
    if grid := config.parse_grid(torus_args.topology):
        return max(1, prod(grid) // num_nodes)
    import torch

    devices = torch.cuda.device_count() or os.cpu_count() or 1
    unit = others if others % num_nodes else others // num_nodes
    return max(unit, devices - devices % unit)


def check_launch(argv: Sequence[str]) -> None:
    """Raise ValueError if the ranks that ``xdit`` starts for this command line would refuse it. Exits as argparse does
    for flags that xDiT does not have. Loads no model."""
    from xfuser import cli, xFuserArgs
    from xfuser.config import FlexibleArgumentParser
    from xfuser.model_executor.models.runner_models.base_model import MODEL_REGISTRY

    from sf_xfuser.integrations.xdit import known_models

    torchrun, rest = cli.extract_torchrun_args(list(argv))
    local, nodes = torchrun["--nproc_per_node"] or str(cli.get_nproc_from_args(rest)), torchrun["--nnodes"]
    values: dict[str, Any] = vars(xFuserArgs.add_runner_args(FlexibleArgumentParser(prog="xdit")).parse_args(rest))
    if not (local.isdecimal() and nodes.isdecimal()):
        return  # torchrun's "gpu", "auto" or "1:4"
    size = int(local) * int(nodes)
    last = config.LaunchEnvironment(
        rank=size - 1, world_size=size, local_world_size=int(local), local_rank=int(local) - 1
    )
    known_models.require_registered(values["model"], MODEL_REGISTRY)
    with config.launched_as(last):
        xFuserArgs.from_runner_args(values)


def _num_nodes(argv: Sequence[str]) -> int:
    for index, arg in enumerate(argv):
        key, separator, value = arg.partition("=")
        if key == "--nnodes":
            text = value if separator else (argv[index + 1] if index + 1 < len(argv) else "")
            return int(text) if text.isdecimal() and int(text) > 0 else 1
    return 1
