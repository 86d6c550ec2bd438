"""The one module that knows xDiT and yunchang: hook records, and what each of them does.

Read ``HOOKS`` at the end first: it is the list of places where xDiT is touched. Everything above it is the function
that one record names. Without ``--sp-backend`` every wrapper calls the original and nothing else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from sf_xfuser import args as sp_args
from sf_xfuser import launch, platform_cpu, repairs
from sf_xfuser.agreement import Agreement
from sf_xfuser.args import XDIT_BACKENDS, TorusArgs
from sf_xfuser.hooks import Hook, HookSet
from sf_xfuser.launch import ModelFacts
from sf_xfuser.plan import UNEVEN

# Who gives no flag imports nothing of these: `import xfuser` may take 2 % longer (python -m sf_xfuser.bench.imports).
if TYPE_CHECKING:
    from sf_xfuser.all_to_all import MeshAllToAll4D
    from sf_xfuser.choice import Choice
    from sf_xfuser.mesh import Mesh
    from sf_xfuser.usp import TorusUSP

OLDEST, TOO_NEW = (0, 5), (0, 8)
CHECKED_VERSION = "0.7.0"
_MARK = "sf_xfuser_args"  # attribute that carries TorusArgs on xFuserArgs and, pickled, on SequenceParallelConfig


@dataclass
class _Session:
    """What this process runs: the flags in force, what was read of the model, the mesh of xDiT's groups, and what uses
    it. ``choice``: under ``--sp-backend auto``, with the meshes of Torus Attention."""

    args: TorusArgs | None = None
    command_line: TorusArgs | None = None  # flags taken from a parser that does not know them
    model: ModelFacts | None = None
    mesh: Mesh | None = None
    choice: Choice | None = None
    usp: TorusUSP | None = None
    all_to_all: MeshAllToAll4D | None = None


_DEGREES = ("dp", "cfg", "pp", "tp", "ulysses", "ring")  # of xDiT's ParallelConfig

_session = _Session()
_hook_set: HookSet | None = None


# -- public ----------------------------------------------------------------------------------------------------------


def enable(args: TorusArgs | None = None) -> None:
    """Hook xDiT, now if it is imported already, else when it is. Idempotent.

    ``args`` are used where xDiT is set up without ``--sp-*`` flags, as in a script that builds ``xFuserArgs`` itself.
    On a machine without an accelerator this also supplies what xDiT lacks there (``platform_cpu``).
    """
    global _hook_set
    if args is not None:
        _session.command_line = args
    if _hook_set is None:
        _hook_set = HookSet(_hooks(), roots=("xfuser", "yunchang"))
    _hook_set.install()


def disable() -> None:
    """Put every hooked attribute of xDiT back, and forget flags and mesh. Idempotent."""
    global _hook_set
    if _hook_set is not None:
        _hook_set.remove()
        _hook_set = None
    leave_groups()
    for name, value in vars(_Session()).items():
        setattr(_session, name, value)
    repairs.used.clear()


def explain() -> str:
    """What was chosen and why, as text: flags, topology, plan, and which attention calls were served."""
    if _session.args is None:
        return "no --sp-backend: xDiT runs untouched"
    lines = [f"flags: {_session.args}"]
    if _session.model is not None:
        lines.append(f"model: {_session.model}")
    if _session.mesh is None:
        lines.append("no mesh yet: xDiT has not initialised its sequence-parallel groups")
    else:
        lines += _session.mesh.lines()
    if _session.choice is not None:
        lines += _session.choice.lines()
    if _session.all_to_all is not None:
        lines.append(f"all-to-alls of yunchang served by the mesh: {_session.all_to_all.served}")
        lines += [f"handed back to yunchang {n} times: {why}" for why, n in _session.all_to_all.handed_back.items()]
    if _session.usp is not None:
        if _session.usp.check:
            lines.append(_session.usp.check_line())
        lines.append(f"attention calls served by torus: {_session.usp.served}")
        lines += [f"handed back to xDiT {n} times: {why}" for why, n in _session.usp.handed_back.items()]
    elif _session.mesh is not None:
        lines.append(f"attention runs xDiT's own code: --sp-backend {_session.args.backend} is xDiT's own")
    lines += [f"repaired in xDiT: {what}" for what in repairs.used]
    return "\n".join(lines)


def hook_states() -> list[tuple[Hook, str]]:
    """Every record with its state (see ``HookSet.state``), for ``doctor``."""
    if _hook_set is None:
        return [(hook, "off") for hook in _hooks()]
    return [(hook, _hook_set.state(hook)) for hook in _hook_set.hooks]


def _hooks() -> tuple[Hook, ...]:
    repaired = repairs.hooks(lambda: _session.args is not None, _log) if _xdit_version()[1] >= (0, 7) else ()
    return (*HOOKS, *repaired, *(platform_cpu.HOOKS if platform_cpu.needed() else ()))


def _xdit_version() -> tuple[str, tuple[int, ...]]:
    """As text and as numbers. A source tree names none: it counts as the oldest, and its features alone are checked."""
    try:
        text = importlib.metadata.version("xfuser")
    except importlib.metadata.PackageNotFoundError:
        return "(a source tree)", OLDEST
    return text, tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def import_hooked_modules() -> dict[str, str]:
    """Import every module that a record names, so that its state is known: {module: error} of those that fail. One
    that some supported versions lack may be missing."""
    required = {hook.module for hook, _ in hook_states() if hook.required}
    broken = {}
    for name in dict.fromkeys(hook.module for hook, _ in hook_states()):
        try:
            importlib.import_module(name)
        except Exception as error:
            lacking = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
            if name in required or not lacking:
                broken[name] = f"{type(error).__name__}: {error}"
    return broken


def unsupported() -> str | None:
    """Why this installation of xDiT cannot be served; None if it can."""
    for package in ("xfuser", "yunchang", "diffusers"):
        if importlib.util.find_spec(package) is None:
            return f"package {package} is missing: pip install {package}"
    text, release = _xdit_version()
    missing = [f"{hook.module}.{hook.name}" for hook, state in hook_states() if state == "missing" and hook.required]
    if missing or release < OLDEST or (release >= TOO_NEW and not sp_args.untested_allowed()):
        lacks = f", where {', '.join(missing)} is not found" if missing else ""
        or_else = f", or {sp_args.UNTESTED_VARIABLE}=1 to try it" if release >= TOO_NEW and not missing else ""
        return f"xfuser {text} is not supported{lacks}; supported: 0.5.0 to 0.7.x: pip install 'xfuser==0.7.0'{or_else}"
    return None


# -- flags -----------------------------------------------------------------------------------------------------------


def _wrap_add_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_args(parser: ArgumentParser) -> ArgumentParser:
        parser = original(parser)
        if "--sp-backend" not in parser._option_string_actions:
            sp_args.add_arguments(parser)
        return parser

    return add_args


def _wrap_parse_known_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """For parsers that do not know the flags: take them out of the command line and keep them for xFuserArgs."""

    @functools.wraps(original)
    def parse_known_args(self: ArgumentParser, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:
        known = "--sp-backend" in self._option_string_actions
        given = sys.argv[1:] if args is None else list(args)
        if not known and any(arg.partition("=")[0].replace("_", "-") == "--sp-backend" for arg in given):
            _session.command_line, args = sp_args.extract(given)
        return original(self, args, *rest, **kwargs)

    return parse_known_args


def _wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given = _session.command_line or sp_args.args_from_environment()
        if given is not None:
            setattr(self, _MARK, given)
            if hasattr(self, "sp_backend"):  # xDiT's own field
                self.sp_backend, self.sp_backend_options = given.backend, given.to_mapping()

    return __init__


def _wrap_from_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """``from_cli_args`` takes a namespace, ``from_runner_args`` a dictionary."""

    @functools.wraps(original)
    def from_args(cls: Any, args: Namespace | dict[str, Any]) -> Any:
        xfuser_args = original(cls, args)
        given = sp_args.from_mapping(args if isinstance(args, dict) else vars(args))
        if given is not None:
            setattr(xfuser_args, _MARK, given)
        _fill_degrees(xfuser_args)
        return xfuser_args

    return from_args


def _wrap_create_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """xDiT calls this once or twice per process: each time flags and degrees are settled on the args object."""

    @functools.wraps(original)
    def create_config(self: Any) -> Any:
        given = getattr(self, _MARK, None)
        _session.args = given
        if given is None:
            return original(self)
        settle(self, given)
        engine_config, input_config = original(self)
        setattr(engine_config.parallel_config.sp_config, _MARK, given)
        return engine_config, input_config

    return create_config


def settle(xfuser_args: Any, given: TorusArgs) -> None:
    """``given`` are in force in this process; fill or check the degrees of ``xfuser_args``. Raises ValueError, and
    RuntimeError where this xDiT is not supported."""
    setattr(xfuser_args, _MARK, given)
    _session.args = given
    repairs.used.clear()
    if (problem := unsupported()) is not None:
        raise RuntimeError(f"--sp-backend {given.backend}: {problem}")
    _fill_degrees(xfuser_args)


def _wrap_get_nproc(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def get_nproc_from_args(args: list[str]) -> int:
        return launch.num_processes(args, original)

    return get_nproc_from_args


def _fill_degrees(xfuser_args: Any) -> None:
    given = getattr(xfuser_args, _MARK, None)
    if given is None:
        return
    registry = sys.modules.get("xfuser.model_executor.models.runner_models.base_model")
    entry = registry.MODEL_REGISTRY.get(xfuser_args.model) if registry is not None else None
    _session.model = launch.model_facts(xfuser_args.model, getattr(entry, "settings", None))
    planned = launch.fill_degrees(xfuser_args, given, _session.model)
    if (xfuser_args.ulysses_degree or 1) * (xfuser_args.ring_degree or 1) > 1:
        from sf_xfuser import combinations

        combinations.refuse(xfuser_args, given, _session.model)
    if planned is not None:
        _log(planned)


# -- groups ----------------------------------------------------------------------------------------------------------


def _wrap_check_distributed_env(original: Callable[..., None]) -> Callable[..., None]:
    """A Ray worker never parsed a command line: the flags reach it inside the pickled configuration."""

    @functools.wraps(original)
    def _check_distributed_env(self: Any, parallel_config: Any) -> None:
        start(parallel_config, getattr(parallel_config.sp_config, _MARK, None))
        original(self, parallel_config)

    return _check_distributed_env


def start(parallel_config: Any, carried: TorusArgs | None) -> None:
    """``carried`` (None: what is in force already) are in force; ranks compare their degrees. Collective over the world
    unless xDiT's groups exist. Raises ValueError, alike on all ranks."""
    import torch.distributed as dist
    from xfuser.core.distributed import model_parallel_is_initialized

    if carried is not None:
        _session.args = carried
    if _session.args is not None and dist.is_initialized() and not model_parallel_is_initialized():
        # Ranks that make different process groups would wait for each other for half an hour.
        degrees = {f"{name}_degree": getattr(parallel_config, f"{name}_degree") for name in _DEGREES}
        Agreement.of_world(_session.args.timeout).require_same("parallel degrees", degrees)


def _wrap_init_group(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace yunchang's Ulysses and Ring groups by those of the plan, built from xDiT's true rank lists.

    yunchang assumes that the ranks of a sequence-parallel group are contiguous, which tensor parallelism breaks.
    """

    @functools.wraps(original)
    def init_model_parallel_group(
        group_ranks: list[list[int]], local_rank: int, backend: str, parallel_mode: str, **kwargs: Any
    ) -> Any:
        if parallel_mode == "sequence" and _session.args is not None:
            from yunchang.globals import PROCESS_GROUP

            # One object, imported by name in several modules of xDiT: mutate it, never rebind it.
            groups = build_groups(group_ranks, backend, **kwargs)
            PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = groups
            kwargs = dict(zip(("ulysses_group", "ring_group"), groups, strict=True))
        return original(group_ranks, local_rank, backend, parallel_mode, **kwargs)

    return init_model_parallel_group


def build_groups(group_ranks: list[list[int]], backend: str, ulysses_group: Any, ring_group: Any) -> tuple[Any, Any]:
    """The mesh of this process, in force from now on: its Ulysses and Ring groups in place of those given.

    Collective over the world. Needs flags in force (``settle``, ``start``)."""
    import torch.distributed as dist

    from sf_xfuser.mesh import build_mesh

    given = _session.args
    assert given is not None
    if len(group_ranks[0]) == 1:
        _log(f"--sp-backend {given.backend} has nothing to do: each sequence-parallel group is one rank")
        return ulysses_group, ring_group
    asked = given
    if given.backend in XDIT_BACKENDS:
        asked = replace(given, plan="usp")
    elif given.backend == "auto":  # xDiT's own layout is one of the arms; what is handed back runs as without us
        asked = TorusArgs(backend="usp", plan="usp", topology=given.topology, timeout=given.timeout)
    mesh = build_mesh(
        group_ranks,
        asked,
        heads=_session.model.heads if _session.model else None,
        kv_heads=_session.model.kv_heads if _session.model else None,
        ulysses_degree=dist.get_world_size(ulysses_group),
        ring_degree=dist.get_world_size(ring_group),
        backend=backend,
        max_imbalance=launch.max_imbalance(given),
    )
    choice = _arms(mesh, group_ranks, backend, given) if given.backend == "auto" else None
    _use(mesh, choice, given)
    return mesh.ulysses_group, mesh.ring_group


def _arms(mesh: Mesh, group_ranks: list[list[int]], backend: str, given: TorusArgs) -> Choice:
    """Those of ``--sp-backend auto``: xDiT's own on ``mesh``, and Torus Attention on meshes of its own. Collective over
    the world."""
    from sf_xfuser.choice import Choice, control_group, layouts
    from sf_xfuser.mesh import build_mesh
    from sf_xfuser.xdit_layouts import XditConfig

    own, model = mesh.layout, _session.model
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
        XditConfig(ulysses_degree=own.ulysses_degree, ring_degree=own.ring_degree),
        meshes,
        control_group(group_ranks, given.timeout),
        kv_ratio=Fraction(kv_heads, heads) if heads and kv_heads else Fraction(1),
        folder=sp_args.cache_folder(),
        log=_log,
    )


def _use(mesh: Mesh, choice: Choice | None, given: TorusArgs) -> None:
    """Attention of this process, and yunchang's all-to-all, run on these from now on."""
    from sf_xfuser import usp
    from sf_xfuser.all_to_all import MeshAllToAll4D

    _session.mesh, _session.choice = mesh, choice
    meshes = [mesh] if choice is None else [mesh, *choice.meshes]
    for one in meshes:
        one.log = _log
    xdits = given.backend in XDIT_BACKENDS
    if not xdits:
        original = importlib.import_module("xfuser.model_executor.layers.usp").USP
        original = getattr(original, "__wrapped__", original)
        _session.usp = usp.TorusUSP(
            original=original,
            host=_XditHost(),
            mesh=mesh if choice is None else choice.mesh,
            ring_degree=mesh.layout.ring_degree,
            choice=choice,
            strict=given.strict,
            log=_log,
            check=given.check == "first",
        )
    else:
        _session.usp = None
    usp.activate(_session.usp)
    _session.all_to_all = None
    evenly = mesh.plan.even == mesh.layout  # its tensors are cut into equal parts
    if evenly and mesh.layout.ulysses_degree > 1 and mesh.transports:
        own = importlib.import_module("yunchang.comm.all_to_all").all_to_all_4D
        own = getattr(own, "__wrapped__", own)
        _session.all_to_all = MeshAllToAll4D(original=own, mesh=mesh, strict=given.strict, log=_log)
    runs = "Torus Attention"
    if xdits:
        runs = f"xDiT's own attention (--sp-backend {given.backend} is xDiT's own)"
    elif choice is not None:
        runs = f"the fastest of {', '.join(choice.arms)}, as predicted and as the first calls of each shape go"
    _log(f"--sp-backend {given.backend}: {runs}; {mesh}")


def _wrap_destroy(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def destroy_model_parallel() -> None:
        leave_groups()
        original()

    return destroy_model_parallel


def forget_flags() -> None:
    """No flags are in force until ``settle`` or ``start`` says so. Idempotent."""
    _session.args = None


def leave_groups() -> None:
    """The mesh of this process is closed, and nothing uses it any more. Idempotent."""
    if _session.mesh is None:
        return
    from sf_xfuser import usp

    _session.mesh.close()
    if _session.choice is not None:
        _session.choice.close()
    _session.mesh = _session.choice = _session.usp = _session.all_to_all = None
    usp.activate(None)


# -- attention -------------------------------------------------------------------------------------------------------


def _wrap_usp(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def USP(*args: Any, **kwargs: Any) -> Any:
        return attend(original, *args, **kwargs)

    return USP


def attend(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Attention as the mesh in force runs it, else as ``original``, which is xDiT's USP, does."""
    return (_session.usp or original)(*args, **kwargs)


@contextmanager
def xdits_own() -> Iterator[None]:
    """Inside, attention is xDiT's own USP, as without a backend: for comparisons call by call. Alike on all ranks."""
    kept, _session.usp = _session.usp, None
    try:
        yield
    finally:
        _session.usp = kept


@contextmanager
def torus_over(mesh: Mesh) -> Iterator[None]:
    """Inside, Torus Attention runs on another mesh of the same ranks: for comparisons, too."""
    kept = _session.usp
    assert kept is not None
    _session.usp = replace(kept, mesh=mesh)
    try:
        yield
    finally:
        _session.usp = kept


def _wrap_all_to_all(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_to_all_4D(*args: Any, **kwargs: Any) -> Any:
        if _session.all_to_all is None:
            return original(*args, **kwargs)
        return _session.all_to_all(*args, **kwargs)

    return all_to_all_4D


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


def _wrap_check_backend(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _check_if_backend_compatible_with_current_configuration(self: Any, attention_backend: Any) -> None:
        require_lse(attention_backend)
        original(self, attention_backend)

    return _check_if_backend_compatible_with_current_configuration


def require_lse(attention_backend: Any) -> None:
    """Raises RuntimeError where Torus Attention cannot use this member of xDiT's ``AttentionBackendType``."""
    if not _torus_alone():
        return
    from sf_xfuser import usp

    if attention_backend.name not in usp.LSE_BACKENDS:
        raise RuntimeError(
            f"attention backend {attention_backend.name} returns no log-sum-exp, which --sp-backend "
            f"{_session.args.backend if _session.args else 'torus'} needs to merge partial results; use "
            f"--attention_backend with one of {', '.join(sorted(usp.LSE_BACKENDS))}"
        )


def _torus_alone() -> bool:
    """Whether attention has to be such that torus can serve it. Under ``auto`` xDiT's choice stands: a backend without
    log-sum-exp may be the faster one, and its calls are handed back."""
    return _session.usp is not None and _session.choice is None


def _wrap_select_backend(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where the user named no attention backend, do not let xDiT pick one that torus must refuse (FLASH_4, SDPA)."""

    @functools.wraps(original)
    def _select_attention_backend(self: Any, engine_config: Any = None) -> Any:
        chosen = original(self, engine_config)
        named = engine_config is not None and engine_config.runtime_config.attention_backend
        return chosen if named else with_lse(chosen)

    return _select_attention_backend


def with_lse(chosen: Any) -> Any:
    """``chosen``, or the member of xDiT's ``AttentionBackendType`` that Torus Attention can use in its place."""
    if not _torus_alone():
        return chosen
    import torch
    from xfuser.envs import PACKAGES_CHECKER

    from sf_xfuser import usp

    if chosen.name in usp.LSE_BACKENDS:
        return chosen

    have = PACKAGES_CHECKER.get_packages_info()
    if have.get("has_flash_attn_3"):
        name = "FLASH_3"
    elif torch.cuda.is_available() and torch.version.hip is None and torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        name = "CUDNN"
    else:
        name = "FLASH" if have.get("has_flash_attn") else "SDPA_FLASH"
    _log(f"attention backend {name} instead of {chosen.name}, which returns no log-sum-exp")
    return type(chosen)[name]


def _log(message: str) -> None:
    """Once per job, through xDiT's own logger."""
    import torch.distributed as dist
    from xfuser.logger import init_logger

    if not dist.is_initialized() or dist.get_rank() == 0:
        init_logger("xfuser.sf_xfuser").info(message)


# -- the records -----------------------------------------------------------------------------------------------------

_UNTIL_UPSTREAM = "xDiT has a dispatch point for sequence-parallel backends and the flag (see patches/)"

_ARGS = "xfuser.config.args"
_RUNTIME = "xfuser.core.distributed.runtime_state"
_GROUPS = "xfuser.core.distributed.parallel_state"
_USP = "xfuser.model_executor.layers.usp"

# What a module holds where xDiT has the dispatch point of patches/: native.py then serves it, and not these hooks.
_NATIVE = {
    _ARGS: "find_sp_backend",
    _RUNTIME: "get_sp_backend",
    _GROUPS: "get_sp_backend",
    _USP: "dispatch_to_sp_backend",
    "xfuser.cli": "get_sp_backend_from_args",
}


def _hook(module: str, name: str, wrap: Callable[[Any], Any], why: str, **options: Any) -> Hook:
    defaults = {"remove_when": _UNTIL_UPSTREAM, "native": _NATIVE.get(module)}
    return Hook(module=module, name=name, wrap=wrap, why=why, **{**defaults, **options})


HOOKS: tuple[Hook, ...] = (
    _hook(
        _ARGS,
        "xFuserArgs.add_cli_args",
        _wrap_add_args,
        "example scripts build their parser here: the flags appear in every one of them",
    ),
    _hook(
        _ARGS,
        "xFuserArgs.add_runner_args",
        _wrap_add_args,
        "the runner and the xdit command build their parser here",
    ),
    _hook(
        "argparse",
        "ArgumentParser.parse_known_args",
        _wrap_parse_known_args,
        "the HTTP service (entrypoints/launch.py) parses with a plain ArgumentParser that would refuse the flags",
        remove_when="the HTTP service builds its parser with xFuserArgs.add_cli_args",
    ),
    _hook(
        _ARGS,
        "xFuserArgs.__init__",
        _wrap_init,
        "scripts that build xFuserArgs by keyword (HTTP service, enable(args)) have no namespace to copy from",
        native=None,
    ),
    _hook(
        _ARGS,
        "xFuserArgs.from_cli_args",
        _wrap_from_args,
        "copies dataclass fields only, so flags would be lost; degrees are read from the object before any runtime",
    ),
    _hook(_ARGS, "xFuserArgs.from_runner_args", _wrap_from_args, "as from_cli_args, for the runner's dictionary"),
    _hook(
        _ARGS,
        "xFuserArgs.create_config",
        _wrap_create_config,
        "asserts that the degrees multiply to the number of processes; the pickled config carries the flags to Ray",
    ),
    _hook("xfuser.cli", "get_nproc_from_args", _wrap_get_nproc, "starts one process when no degree is given"),
    _hook(
        _RUNTIME,
        "RuntimeState._check_distributed_env",
        _wrap_check_distributed_env,
        "initialises the groups, in Ray workers from the pickled configuration alone; ranks compare degrees before it",
    ),
    _hook(
        _GROUPS,
        "init_model_parallel_group",
        _wrap_init_group,
        "the only place where the true rank lists of sequence-parallel groups arrive; yunchang guesses, wrongly under "
        "tensor parallelism",
        remove_when="xDiT builds its Ulysses and Ring groups from these lists and by a given layout",
    ),
    _hook(_GROUPS, "destroy_model_parallel", _wrap_destroy, "the mesh's process groups end with xDiT's"),
    _hook(
        _RUNTIME,
        "RuntimeState._select_attention_backend",
        _wrap_select_backend,
        "may pick a backend without log-sum-exp, which partial results cannot be merged from",
    ),
    _hook(
        _RUNTIME,
        "RuntimeState._check_if_backend_compatible_with_current_configuration",
        _wrap_check_backend,
        "the one gate that every choice of attention backend passes: a backend without log-sum-exp is refused here",
    ),
    _hook(
        _USP,
        "USP",
        _wrap_usp,
        "the attention call of every sequence-parallel transformer; models bind this name when they are imported",
        sweep=True,
    ),
    _hook(
        "yunchang.comm.all_to_all",
        "all_to_all_4D",
        _wrap_all_to_all,
        "moves the tensors of xFuserLongContextAttention and yunchang's layers: SeqAllToAll4D looks it up at each call",
        remove_when="yunchang takes the function that moves chunks as an argument",
        sweep=True,
    ),
)
