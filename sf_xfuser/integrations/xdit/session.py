"""What this process runs under ``--sp-backend``: flags in force, mesh, and the attention that xDiT is given.

``plugin`` (hooks into xDiT as it is) and ``native`` (an xDiT that has the dispatch point of ``patches/``) call the same
functions here, in this order: ``settle`` (through ``plugin.settle``, which knows the supported versions), ``start``,
``build_groups``, ``attend`` for every call, ``leave_groups``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from sf_xfuser import config as sp_args
from sf_xfuser.config import XDIT_BACKENDS, TorusArgs
from sf_xfuser.integrations.xdit import degrees as launch
from sf_xfuser.integrations.xdit import repairs
from sf_xfuser.integrations.xdit.degrees import ModelFacts
from sf_xfuser.layout.plan import UNEVEN

# Who gives no flag imports nothing of these: `import xfuser` may take 2 % longer (python -m sf_xfuser.bench.imports).
if TYPE_CHECKING:
    from sf_xfuser.autotune.selector import Choice
    from sf_xfuser.integrations.xdit.usp import TorusUSP
    from sf_xfuser.integrations.yunchang.all_to_all import MeshAllToAll4D
    from sf_xfuser.torus.mesh import Mesh

MARK = "sf_xfuser_args"  # attribute that carries TorusArgs on xFuserArgs and, pickled, on SequenceParallelConfig


@dataclass
class Session:
    """What this process runs: the flags in force, what was read of the model, the mesh of xDiT's groups, and what uses
    it. ``choice``: under ``--sp-backend auto``, with the meshes of Torus Attention."""

    args: TorusArgs | None = None
    command_line: TorusArgs | None = None  # flags taken from a parser that does not know them
    model: ModelFacts | None = None
    mesh: Mesh | None = None
    choice: Choice | None = None
    usp: TorusUSP | None = None
    all_to_all: MeshAllToAll4D | None = None

    def begin_request(self, values: Mapping[str, Any]) -> None:
        """Tell every mesh that a request with these arguments starts, so that ranks in different requests raise an
        error instead of exchanging chunks. Local."""
        if self.mesh is None:
            return
        from sf_xfuser.integrations.request import describe

        what = describe(values)
        for mesh in [self.mesh, *(self.choice.meshes if self.choice else [])]:
            mesh.begin_request(what)


_DEGREES = ("dp", "cfg", "pp", "tp", "ulysses", "ring")  # of xDiT's ParallelConfig

current = Session()


def explain() -> str:
    """What was chosen and why, as text: flags, topology, plan, and which attention calls were served."""
    if current.args is None:
        return "no --sp-backend: xDiT runs untouched"
    lines = [f"flags: {current.args}"]
    if current.model is not None:
        lines.append(f"model: {current.model}")
    if current.mesh is None:
        lines.append("no mesh yet: xDiT has not initialised its sequence-parallel groups")
    else:
        lines += current.mesh.lines()
    if current.choice is not None:
        lines += current.choice.lines()
    if current.all_to_all is not None:
        lines.append(f"all-to-alls of yunchang served by the mesh: {current.all_to_all.served}")
        lines += [f"handed back to yunchang {n} times: {why}" for why, n in current.all_to_all.handed_back.items()]
    if current.usp is not None:
        if current.usp.check:
            lines.append(current.usp.check_line())
        lines.append(f"attention calls served by torus: {current.usp.served}")
        lines += [f"handed back to xDiT {n} times: {why}" for why, n in current.usp.handed_back.items()]
    elif current.mesh is not None:
        lines.append(f"attention runs xDiT's own code: --sp-backend {current.args.backend} is xDiT's own")
    lines += [f"repaired in xDiT: {what}" for what in repairs.used]
    return "\n".join(lines)


# -- flags -----------------------------------------------------------------------------------------------------------


def settle(xfuser_args: Any, given: TorusArgs) -> None:
    """``given`` are in force in this process; fill or check the degrees of ``xfuser_args``. Raises ValueError."""
    setattr(xfuser_args, MARK, given)
    put_in_force(given)
    fill_degrees(xfuser_args)


def put_in_force(given: TorusArgs) -> None:
    """``given`` are in force in this process. That is all there is to settle for groups that are made without
    xFuserArgs: ``initialize_model_parallel`` names the degrees."""
    current.args = given
    repairs.used.clear()
    tried = given.transport == "auto" and given.backend not in XDIT_BACKENDS
    if tried or given.transport in ("symm_mem", "nvshmem"):
        sp_args.set_defaults({sp_args.QUEUES_VARIABLE: "32"})  # heard where nothing has used CUDA yet


def fill_degrees(xfuser_args: Any) -> None:
    """Fill or check its degrees by the flags that it carries, if it does, and by what can be read of its model. Raises
    ValueError."""
    given = getattr(xfuser_args, MARK, None)
    if given is None:
        return
    registry = sys.modules.get("xfuser.model_executor.models.runner_models.base_model")
    entry = registry.MODEL_REGISTRY.get(xfuser_args.model) if registry is not None else None
    current.model = launch.model_facts(xfuser_args.model, getattr(entry, "settings", None))
    planned = launch.fill_degrees(xfuser_args, given, current.model)
    if (xfuser_args.ulysses_degree or 1) * (xfuser_args.ring_degree or 1) > 1:
        from sf_xfuser.integrations.xdit import validation as combinations

        combinations.refuse(xfuser_args, given, current.model)
    if planned is not None:
        log(planned)


# -- groups ----------------------------------------------------------------------------------------------------------


def start(parallel_config: Any, carried: TorusArgs | None) -> None:
    """``carried`` (None: what is in force already) are in force; ranks compare their degrees. Collective over the world
    unless xDiT's groups exist. Raises ValueError, alike on all ranks."""
    import torch.distributed as dist
    from xfuser.core.distributed import model_parallel_is_initialized

    if carried is not None:
        current.args = carried
    if current.args is not None and dist.is_initialized() and not model_parallel_is_initialized():
        # Ranks that make different process groups would wait for each other for half an hour.
        degrees = {f"{name}_degree": getattr(parallel_config, f"{name}_degree") for name in _DEGREES}
        from sf_xfuser.transport.rendezvous import Agreement

        Agreement.of_world(current.args.timeout).require_same("parallel degrees", degrees)


def build_groups(group_ranks: list[list[int]], backend: str, ulysses_group: Any, ring_group: Any) -> tuple[Any, Any]:
    """The mesh of this process, in force from now on: its Ulysses and Ring groups in place of those given.

    Collective over the world. Needs flags in force (``settle``, ``start``)."""
    import torch.distributed as dist

    from sf_xfuser.torus.build import build_mesh

    given = current.args
    assert given is not None
    if len(group_ranks[0]) == 1:
        log(f"--sp-backend {given.backend} has nothing to do: each sequence-parallel group is one rank")
        return ulysses_group, ring_group
    asked = given
    if given.backend in XDIT_BACKENDS:
        asked = replace(given, plan="usp")
    elif given.backend == "auto":  # xDiT's own layout is a candidate; what falls back to it runs as without us
        asked = TorusArgs(backend="usp", plan="usp", topology=given.topology, timeout=given.timeout)
    mesh = build_mesh(
        group_ranks,
        asked,
        heads=current.model.heads if current.model else None,
        kv_heads=current.model.kv_heads if current.model else None,
        ulysses_degree=dist.get_world_size(ulysses_group),
        ring_degree=dist.get_world_size(ring_group),
        backend=backend,
        max_imbalance=launch.max_imbalance(given),
    )
    choice = _candidates(mesh, group_ranks, backend, given) if given.backend == "auto" else None
    _use(mesh, choice, given)
    return mesh.ulysses_group, mesh.ring_group


def _candidates(mesh: Mesh, group_ranks: list[list[int]], backend: str, given: TorusArgs) -> Choice:
    """Those of ``--sp-backend auto``: xDiT's own on ``mesh``, and Torus Attention on meshes of its own. Collective over
    the world."""
    from sf_xfuser.autotune.selector import Choice, flat_ulysses, layouts
    from sf_xfuser.integrations.xdit.usp_groups import XditGroups
    from sf_xfuser.layout.usp_layouts import XditConfig
    from sf_xfuser.torus.build import build_mesh

    model = current.model
    own = XditConfig(ulysses_degree=mesh.layout.ulysses_degree, ring_degree=mesh.layout.ring_degree)
    heads, kv_heads = (model.heads, model.kv_heads) if model else (None, None)
    grids = {(g.num_machines, g.ranks_per_machine) for g in map(mesh.topology.fold, group_ranks)}
    plans = [given.plan]
    if len(grids) == 1:  # else each group plans its own
        found = layouts(*grids.pop(), heads, kv_heads, own.ulysses_degree, given)
        plans = [layout.flag for layout in found]
    meshes = [
        build_mesh(
            group_ranks,
            replace(given, backend="torus", plan=plan),
            heads=heads,
            kv_heads=kv_heads,
            ulysses_degree=own.ulysses_degree if heads is None and plan == "auto" else None,
            backend=backend,
            max_imbalance=UNEVEN,
        )
        for plan in plans
    ]
    return Choice(
        own,
        flat_ulysses(own, heads, kv_heads),
        XditGroups(mesh.members, mesh.layout.ranks_per_machine, backend).selected,
        meshes,
        kv_ratio=Fraction(kv_heads, heads) if heads and kv_heads else Fraction(1),
        log=log,
    )


def _use(mesh: Mesh, choice: Choice | None, given: TorusArgs) -> None:
    """Attention of this process, and yunchang's all-to-all, run on these from now on."""
    from sf_xfuser.integrations.xdit import usp
    from sf_xfuser.integrations.yunchang.all_to_all import MeshAllToAll4D

    current.mesh, current.choice = mesh, choice
    meshes = [mesh] if choice is None else [mesh, *choice.meshes]
    for one in meshes:
        one.log = log
    xdits = given.backend in XDIT_BACKENDS
    if not xdits:
        original = importlib.import_module("xfuser.model_executor.layers.usp").USP
        original = getattr(original, "__wrapped__", original)
        current.usp = usp.TorusUSP(
            original=original,
            host=_XditHost(),
            mesh=mesh if choice is None else choice.mesh,
            ring_degree=mesh.layout.ring_degree,
            choice=choice,
            strict=given.strict,
            log=log,
            kernel=given.kernel,
            check=given.check == "first",
        )
    else:
        current.usp = None
    usp.activate(current.usp)
    current.all_to_all = None
    evenly = mesh.plan.even == mesh.layout  # its tensors are cut into equal parts
    if evenly and mesh.layout.ulysses_degree > 1 and mesh.transports:
        own = importlib.import_module("yunchang.comm.all_to_all").all_to_all_4D
        own = getattr(own, "__wrapped__", own)
        current.all_to_all = MeshAllToAll4D(original=own, mesh=mesh, strict=given.strict, log=log)
    runs = "Torus Attention"
    if xdits:
        runs = f"xDiT's own attention (--sp-backend {given.backend} is xDiT's own)"
    elif choice is not None:
        runs = f"the fastest of {', '.join(choice.candidates)}, by the first calls of each shape"
    log(f"--sp-backend {given.backend}: {runs}; {mesh}")


def forget_flags() -> None:
    """No flags are in force until ``settle`` or ``start`` says so. Idempotent."""
    current.args = None


def reset() -> None:
    """Nothing is in force or remembered. Idempotent."""
    leave_groups()
    for name, value in vars(Session()).items():
        setattr(current, name, value)
    repairs.used.clear()


def leave_groups() -> None:
    """The mesh of this process is closed, and nothing uses it any more. Idempotent."""
    if current.mesh is None:
        return
    from sf_xfuser.integrations.xdit import usp

    current.mesh.close()
    if current.choice is not None:
        current.choice.close()
    current.mesh = current.choice = current.usp = current.all_to_all = None
    usp.activate(None)


# -- attention -------------------------------------------------------------------------------------------------------


def attend(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Attention as the mesh in force runs it, else as ``original``, which is xDiT's USP, does."""
    return (current.usp or original)(*args, **kwargs)


@contextmanager
def xdits_own() -> Iterator[None]:
    """Inside, attention is xDiT's own USP, as without a backend: for comparisons call by call. Alike on all ranks."""
    kept, current.usp = current.usp, None
    try:
        yield
    finally:
        current.usp = kept


@contextmanager
def torus_over(mesh: Mesh) -> Iterator[None]:
    """Inside, Torus Attention runs on another mesh of the same ranks: for comparisons, too."""
    kept = current.usp
    assert kept is not None
    current.usp = replace(kept, mesh=mesh)
    try:
        yield
    finally:
        current.usp = kept


class _XditHost:
    """``usp.Host`` over xDiT's runtime state."""

    def attention_backend(self, explicit: Any) -> str:
        from xfuser.core.distributed import get_runtime_state

        backend = explicit if explicit is not None else get_runtime_state().attention_backend
        return str(backend.name)

    def raw_attention(self, backend: str) -> Callable[..., Any]:
        from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType

        function: Callable[..., Any] = ATTENTION_FUNCTION_REGISTRY[AttentionBackendType[backend]]
        return function

    def fp8_communication(self) -> bool:
        from xfuser.core.distributed import get_runtime_state

        return getattr(get_runtime_state(), "fp8_comms", None) is not None

    def cached_by_pipefusion(self, attn_layer: Any) -> bool:
        from xfuser.core.distributed import get_runtime_state

        if attn_layer is None or get_runtime_state().num_pipeline_patch == 1:
            return False  # entries exist for every wrapped layer also without PipeFusion; then the cache is an identity
        from xfuser.core.cache_manager.cache_manager import get_cache_manager

        manager = get_cache_manager()
        return bool(manager.has_cache_entry(attn_layer)) if hasattr(manager, "has_cache_entry") else True


def require_lse(attention_backend: Any) -> None:
    """Raises RuntimeError where Torus Attention cannot use this member of xDiT's ``AttentionBackendType``."""
    if not _torus_alone():
        return
    from sf_xfuser.integrations.xdit import usp

    if attention_backend.name not in usp.LSE_BACKENDS:
        raise RuntimeError(
            f"attention backend {attention_backend.name} returns no log-sum-exp, which --sp-backend "
            f"{current.args.backend if current.args else 'torus'} needs to merge partial results; use "
            f"--attention_backend with one of {', '.join(sorted(usp.LSE_BACKENDS))}"
        )


def _torus_alone() -> bool:
    """Whether attention has to be such that torus can serve it. Under ``auto`` xDiT's choice stands: a backend without
    log-sum-exp may be the faster one, and its calls are handed back."""
    return current.usp is not None and current.choice is None


def with_lse(chosen: Any) -> Any:
    """``chosen``, or the member of xDiT's ``AttentionBackendType`` that Torus Attention can use in its place."""
    if not _torus_alone():
        return chosen
    import torch
    from xfuser.envs import PACKAGES_CHECKER

    from sf_xfuser.integrations.xdit import usp

    if chosen.name in usp.LSE_BACKENDS:
        return chosen

    have = PACKAGES_CHECKER.get_packages_info()
    if have.get("has_flash_attn_3"):
        name = "FLASH_3"
    elif torch.cuda.is_available() and torch.version.hip is None and torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        name = "CUDNN"
    else:
        name = "FLASH" if have.get("has_flash_attn") else "SDPA_FLASH"
    log(f"attention backend {name} instead of {chosen.name}, which returns no log-sum-exp")
    return type(chosen)[name]


def log(message: str) -> None:
    """Once per job, through xDiT's own logger."""
    import torch.distributed as dist
    from xfuser.logger import init_logger

    if not dist.is_initialized() or dist.get_rank() == 0:
        init_logger("xfuser.sf_xfuser").info(message)
