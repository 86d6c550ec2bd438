"""The state of ``--sp-backend`` in this process: active flags, mesh, and the attention that xDiT calls.

``plugin`` (hooks into xDiT) and ``native`` (xDiT with the dispatch point of ``patches/``) call these functions in this
order: ``configure``, ``start``, ``build_groups``, ``attend`` for each call, ``close_groups``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from sf_xfuser import config
from sf_xfuser.config import XDIT_BACKENDS, TorusArgs
from sf_xfuser.integrations.xdit import degrees, repairs
from sf_xfuser.integrations.xdit.degrees import ModelFacts

# Imported late: without the flag `import xfuser` may take at most 2 % longer (python -m sf_xfuser.bench.imports).
if TYPE_CHECKING:
    from sf_xfuser.autotune.selector import Selector
    from sf_xfuser.integrations.xdit.usp import TorusUSP
    from sf_xfuser.integrations.yunchang.all_to_all import MeshAllToAll4D
    from sf_xfuser.torus.mesh import Mesh

MARK = "sf_xfuser_args"  # attribute that carries TorusArgs on xFuserArgs and, pickled, on SequenceParallelConfig


@dataclass
class Session:
    """``args``: the active flags. ``command_line``: flags removed from the command line of a parser without them.
    ``mesh``: that of xDiT's groups. ``selector``: under ``--sp-backend auto``; it has the meshes of Torus Attention."""

    args: TorusArgs | None = None
    command_line: TorusArgs | None = None
    model: ModelFacts | None = None
    mesh: Mesh | None = None
    selector: Selector | None = None
    usp: TorusUSP | None = None
    all_to_all: MeshAllToAll4D | None = None

    @contextmanager
    def request(self, values: Mapping[str, Any]) -> Iterator[None]:
        """A request with these arguments on every mesh (see ``Mesh.request``): ranks in different requests raise an
        error instead of exchanging chunks, and an error on one rank is raised on all."""
        if self.mesh is None:
            yield
            return
        from sf_xfuser.integrations.request import describe

        request = describe(values)
        with ExitStack() as stack:
            for mesh in [self.mesh, *(self.selector.meshes if self.selector else [])]:
                stack.enter_context(mesh.request(request))
            yield


_DEGREES = ("dp", "cfg", "pp", "tp", "ulysses", "ring")  # of xDiT's ParallelConfig

current = Session()


def explain() -> str:
    """The flags, topology, plan and transport, and how many attention calls torus handled, as text."""
    if current.args is None:
        return "no --sp-backend: xDiT runs untouched"
    lines = [f"flags: {current.args}"]
    if current.model is not None:
        lines.append(f"model: {current.model}")
    if current.mesh is None:
        lines.append("no mesh yet: xDiT has not initialised its sequence-parallel groups")
    else:
        lines += current.mesh.lines()
    if current.selector is not None:
        lines += current.selector.lines()
    if current.all_to_all is not None:
        lines.append(f"yunchang all-to-all calls handled by the mesh: {current.all_to_all.handled}")
        lines += [f"fell back to yunchang {n} times: {reason}" for reason, n in current.all_to_all.fallbacks.items()]
    if current.usp is not None:
        if current.usp.check:
            lines.append(current.usp.check_line())
        lines.append(f"attention calls handled by torus: {current.usp.handled}")
        lines += [f"fell back to xDiT's own USP {n} times: {reason}" for reason, n in current.usp.fallbacks.items()]
    elif current.mesh is not None:
        lines.append(f"attention runs xDiT's own code under --sp-backend {current.args.backend}")
    lines += [f"repaired in xDiT: {repair}" for repair in repairs.used]
    return "\n".join(lines)


# -- flags -----------------------------------------------------------------------------------------------------------


def configure(xfuser_args: Any, args: TorusArgs) -> None:
    """Activate ``args``, and fill or check the degrees of ``xfuser_args``. Raises ValueError."""
    setattr(xfuser_args, MARK, args)
    activate(args)
    fill_degrees(xfuser_args)


def activate(args: TorusArgs) -> None:
    """Make ``args`` the flags of this process. This is enough if the program itself calls
    ``initialize_model_parallel`` with degrees."""
    current.args = args
    repairs.used.clear()
    may_wait_on_gpu = args.transport == "auto" and args.backend not in XDIT_BACKENDS
    if may_wait_on_gpu or args.transport in config.GPU_WINDOWS:
        config.set_defaults({config.QUEUES_VARIABLE: "32"})  # effective only before the first use of CUDA


def fill_degrees(xfuser_args: Any) -> None:
    """Fill or check the degrees of ``xfuser_args`` if it carries ``--sp-*`` flags. Raises ValueError."""
    args = getattr(xfuser_args, MARK, None)
    if args is None:
        return
    from sf_xfuser.integrations.xdit import known_models, validation

    runner = sys.modules.get("xfuser.model_executor.models.runner_models.base_model")
    registry, model, unknown = getattr(runner, "MODEL_REGISTRY", {}), xfuser_args.model, ""
    if known_models.runs_xdits_runner():
        known_models.require_registered(model, registry)
    current.model = known_models.local_facts(model, registry)
    if current.model is None and degrees.needs_heads(xfuser_args, args):
        try:
            current.model = known_models.fetched_facts(model, registry)
        except ValueError as error:
            unknown = str(error)
    planned = degrees.fill_degrees(xfuser_args, args, current.model, unknown)
    if (xfuser_args.ulysses_degree or 1) * (xfuser_args.ring_degree or 1) > 1:
        validation.refuse(xfuser_args, args, current.model)
    if planned is not None:
        log(planned)


# -- groups ----------------------------------------------------------------------------------------------------------


def start(parallel_config: Any, args: TorusArgs | None) -> None:
    """Activate ``args`` (None: keep the active ones) and compare the flags and degrees of all ranks, unless xDiT's
    groups exist. Collective over the world. Raises ValueError on all ranks."""
    import torch.distributed as dist
    from xfuser.core.distributed import model_parallel_is_initialized

    if args is not None:
        current.args = args
    if current.args is not None and dist.is_initialized() and not model_parallel_is_initialized():
        # Ranks that create different process groups would wait for each other for half an hour.
        values = {f"{name}_degree": getattr(parallel_config, f"{name}_degree") for name in _DEGREES}
        flags = {f"--sp-{name}": value for name, value in asdict(current.args).items()}
        from sf_xfuser.transport.rendezvous import StoreGroup

        StoreGroup.world(current.args.timeout).require_same("parallel degrees", values | flags)


def build_groups(group_ranks: list[list[int]], backend: str, ulysses_group: Any, ring_group: Any) -> tuple[Any, Any]:
    """Build and activate the mesh of this process; return its Ulysses and Ring groups, which replace xDiT's.

    Collective over the world. Needs active flags (``configure``, ``start``).
    """
    import torch.distributed as dist

    from sf_xfuser.torus.build import build_mesh

    args = current.args
    assert args is not None
    if len(group_ranks[0]) == 1:
        log(f"--sp-backend {args.backend} has no effect: each sequence-parallel group has one rank")
        return ulysses_group, ring_group
    mesh_args = args
    if args.backend in XDIT_BACKENDS:
        mesh_args = replace(args, plan="usp")
    elif args.backend == "auto":  # the groups of xDiT's own USP, as a candidate and as the fallback
        mesh_args = TorusArgs(backend="usp", plan="usp", topology=args.topology, timeout=args.timeout)
    heads, kv_heads = (current.model.heads, current.model.kv_heads) if current.model else (None, None)
    mesh = build_mesh(
        group_ranks,
        mesh_args,
        heads=heads,
        kv_heads=kv_heads,
        ulysses_degree=dist.get_world_size(ulysses_group),
        ring_degree=dist.get_world_size(ring_group),
        backend=backend,
        max_imbalance=degrees.max_imbalance(args),
    )
    selector = None
    if args.backend == "auto":
        from sf_xfuser.autotune.selector import build_selector
        from sf_xfuser.integrations.xdit.usp_groups import XditGroups
        from sf_xfuser.layout.usp_layouts import XditConfig

        own = XditConfig(ulysses_degree=mesh.layout.ulysses_degree, ring_degree=mesh.layout.ring_degree)
        use_degrees = XditGroups(mesh.members, mesh.layout.ranks_per_machine, backend).use
        selector = build_selector(
            group_ranks, args, own, use_degrees, heads=heads, kv_heads=kv_heads, log=log, backend=backend
        )
    _use(mesh, selector, args)
    return mesh.ulysses_group, mesh.ring_group


def _use(mesh: Mesh, selector: Selector | None, args: TorusArgs) -> None:
    """Make ``mesh`` and ``selector`` active for attention and for yunchang's all-to-all."""
    from sf_xfuser.integrations import caches
    from sf_xfuser.integrations.xdit import usp
    from sf_xfuser.integrations.xdit.attention_backends import XditState
    from sf_xfuser.integrations.yunchang.all_to_all import MeshAllToAll4D

    caches.install()
    current.mesh, current.selector, current.usp, current.all_to_all = mesh, selector, None, None
    mesh.log = log
    for candidate_mesh in selector.meshes if selector else ():
        candidate_mesh.log = log
    if args.backend not in XDIT_BACKENDS:
        current.usp = usp.TorusUSP(
            original=_unhooked("xfuser.model_executor.layers.usp", "USP"),
            host=XditState(),
            mesh=mesh if selector is None else selector.mesh,
            ring_degree=mesh.layout.ring_degree,
            selector=selector,
            strict=args.strict,
            log=log,
            kernel=args.kernel,
            check=args.check == "first",
        )
    usp.activate(current.usp)
    even = mesh.plan.even == mesh.layout  # yunchang splits tensors into equal parts
    if even and mesh.layout.ulysses_degree > 1 and mesh.transports:
        original = _unhooked("yunchang.comm.all_to_all", "all_to_all_4D")
        current.all_to_all = MeshAllToAll4D(original=original, mesh=mesh, strict=args.strict, log=log)
    if selector is not None:
        names = ", ".join(selector.candidates)
        attention = f"uses the fastest candidate, timed on the first calls of each shape: {names}; xDiT's groups:"
    else:
        attention = "xDiT's own attention;" if current.usp is None else "Torus Attention;"
    log(f"--sp-backend {args.backend}: {attention} {mesh}")


def _unhooked(module: str, name: str) -> Any:
    function = getattr(importlib.import_module(module), name)
    return getattr(function, "__wrapped__", function)


def deactivate() -> None:
    """Clear the active flags. Idempotent."""
    current.args = None


def reset() -> None:
    """Close the mesh and clear all state. Idempotent."""
    close_groups()
    for name, value in vars(Session()).items():
        setattr(current, name, value)
    repairs.used.clear()


def close_groups() -> None:
    """Close the meshes of this process. Idempotent."""
    if current.mesh is None:
        return
    from sf_xfuser.integrations.xdit import usp

    current.mesh.close()
    if current.selector is not None:
        current.selector.close()
    current.mesh = current.selector = current.usp = current.all_to_all = None
    usp.activate(None)


# -- attention -------------------------------------------------------------------------------------------------------


def attend(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run attention on the active mesh, or on ``original``, which is xDiT's USP."""
    return (current.usp or original)(*args, **kwargs)


@contextmanager
def without_torus() -> Iterator[None]:
    """Run attention on xDiT's own USP inside the block, for comparisons. All ranks must enter it."""
    saved, current.usp = current.usp, None
    try:
        yield
    finally:
        current.usp = saved


@contextmanager
def torus_on(mesh: Mesh, selector: Selector | None = None) -> Iterator[None]:
    """Run Torus Attention on another mesh of the same ranks inside the block, or, with a ``selector``, attention as
    under ``--sp-backend auto``. For comparisons."""
    usp = current.usp
    assert usp is not None
    saved = usp.mesh, usp.selector
    usp.mesh, usp.selector = mesh, selector
    try:
        yield
    finally:
        usp.mesh, usp.selector = saved


def require_lse(attention_backend: Any) -> None:
    """Raise RuntimeError if neither Torus Attention nor xDiT's own USP can use this member of xDiT's
    ``AttentionBackendType``."""
    if current.usp is None or current.mesh is None:
        return
    from sf_xfuser.integrations.xdit.attention_backends import LSE_BACKENDS, no_fallback_reason

    if attention_backend.name not in LSE_BACKENDS:
        ring_degree = current.mesh.plan.even.ring_degree
        why = no_fallback_reason(attention_backend.name, ring_degree, current.usp.strict)
        if why is not None:
            raise RuntimeError(f"attention backend {attention_backend.name} returns no log-sum-exp, {why}")


def prefer_lse(attention_backend: Any) -> Any:
    """``attention_backend``, or another member of xDiT's ``AttentionBackendType`` that Torus Attention can use."""
    if current.usp is None or current.selector is not None:  # auto: its calls fall back, and may be faster
        return attention_backend
    from sf_xfuser.integrations.xdit.attention_backends import with_lse

    replacement = with_lse(attention_backend)
    if replacement is not attention_backend:
        log(f"attention backend {replacement.name} replaces {attention_backend.name}, which returns no log-sum-exp")
    return replacement


def log(message: str) -> None:
    """Log on rank 0 through xDiT's logger."""
    import torch.distributed as dist
    from xfuser.logger import init_logger

    rank = dist.get_rank() if dist.is_initialized() else config.launch_environment().rank
    if not rank:
        init_logger("xfuser.sf_xfuser").info(message)
