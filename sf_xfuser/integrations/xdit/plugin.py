"""The plugin's hooks on xDiT and yunchang: ``HOOKS`` at the end lists them.

Their wrappers call ``session``. Without ``--sp-backend`` every wrapper only calls the original.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from sf_xfuser import config
from sf_xfuser.config import TorusArgs
from sf_xfuser.integrations.hooks import Hook, HookSet, wrapper
from sf_xfuser.integrations.xdit import adapters, cpu_platform, degrees, repairs, session
from sf_xfuser.integrations.xdit.refusals import one_sentence

OLDEST, TOO_NEW = (0, 5), (0, 8)
CHECKED_VERSION = "0.7.0"

_hook_set: HookSet | None = None


# -- public ----------------------------------------------------------------------------------------------------------


def enable(args: TorusArgs | None = None) -> None:
    """Hook xDiT, at its import if it is not imported yet. Idempotent.

    ``args`` apply to programs without ``--sp-*`` flags: those that build ``xFuserArgs`` by keyword, or only call
    ``initialize_model_parallel``. Without an accelerator this also installs ``cpu_platform``.
    """
    global _hook_set
    if args is not None:
        session.current.command_line = args
    if _hook_set is None:
        _hook_set = HookSet(_hooks(), roots=("xfuser", "yunchang"))
    _hook_set.install()


def disable() -> None:
    """Restore every hooked attribute of xDiT, and clear flags and mesh. Idempotent."""
    global _hook_set
    if _hook_set is not None:
        _hook_set.remove()
        _hook_set = None
    session.reset()


def hook_states() -> list[tuple[Hook, str]]:
    """Every hook with its state (see ``HookSet.state``), for ``doctor``."""
    if _hook_set is None:
        return [(hook, "off") for hook in _hooks()]
    return [(hook, _hook_set.state(hook)) for hook in _hook_set.hooks]


def _hooks() -> tuple[Hook, ...]:
    repaired: tuple[Hook, ...] = ()
    if _xdit_version()[1] >= (0, 7):
        repaired = repairs.hooks(lambda: session.current.args is not None, session.log)
    return (*HOOKS, *repaired, *(cpu_platform.HOOKS if cpu_platform.needed() else ()))


def _xdit_version() -> tuple[str, tuple[int, ...]]:
    """xDiT's version as text and numbers. A source tree has none and counts as the oldest: only hooks are checked."""
    try:
        text = importlib.metadata.version("xfuser")
    except importlib.metadata.PackageNotFoundError:
        return "(a source tree)", OLDEST
    return text, tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def import_hooked_modules() -> dict[str, str]:
    """Import every module with a hook, so that its state is known: {module: error} of the imports that failed.

    Optional modules, which some supported versions do not have, may be missing.
    """
    required = {hook.module for hook, _ in hook_states() if hook.required}
    failed = {}
    for name in dict.fromkeys(hook.module for hook, _ in hook_states()):
        try:
            importlib.import_module(name)
        except Exception as error:
            is_missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
            if name in required or not is_missing:
                failed[name] = f"{type(error).__name__}: {error}"
    return failed


def unsupported() -> str | None:
    """Why this installation of xDiT is not supported; None if it is."""
    for package in ("xfuser", "yunchang", "diffusers"):
        if importlib.util.find_spec(package) is None:
            return f"package {package} is missing: pip install {package}"
    text, release = _xdit_version()
    missing = [f"{hook.module}.{hook.name}" for hook, state in hook_states() if state == "missing" and hook.required]
    if missing or release < OLDEST or (release >= TOO_NEW and not config.untested_allowed()):
        reason = f" ({', '.join(missing)} is missing)" if missing else ""
        remedy = f", or {config.UNTESTED_VARIABLE}=1 to try it" if release >= TOO_NEW and not missing else ""
        return f"xfuser {text} is not supported{reason}; supported: 0.5.0 to 0.7.x: pip install 'xfuser==0.7.0'{remedy}"
    return None


def require_supported(args: TorusArgs) -> None:
    """Raise RuntimeError if this installation of xDiT is not supported."""
    if (problem := unsupported()) is not None:
        raise RuntimeError(f"--sp-backend {args.backend}: {problem}")


# -- wrappers --------------------------------------------------------------------------------------------------------


@wrapper
def _add_args(original: Any, parser: ArgumentParser) -> ArgumentParser:
    parser = original(parser)
    if "--sp-backend" not in parser._option_string_actions:
        config.add_arguments(parser)
    return parser


@wrapper
@one_sentence()
def _parse_known_args(original: Any, self: Any, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:
    """If the parser does not have the flags, remove them from the command line and keep them for xFuserArgs."""
    argv = sys.argv[1:] if args is None else list(args)
    options = self._option_string_actions
    if "--sp-backend" in options:
        if "--sp-plan" in options:  # xDiT's parser, not that of a program with a --sp-backend of its own
            config.require_known_flags(argv, options)
    elif any(arg.partition("=")[0].replace("_", "-") == "--sp-backend" for arg in argv):
        session.current.command_line, args = config.extract(argv)
    return original(self, args, *rest, **kwargs)


def _default_args() -> TorusArgs | None:
    """The flags of programs that do not pass them to xFuserArgs."""
    return session.current.command_line or config.args_from_environment()


@wrapper
@one_sentence()
def _init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    torus_args = _default_args()
    if torus_args is not None:
        setattr(self, session.MARK, torus_args)
        if hasattr(self, "sp_backend"):  # xDiT's own field
            self.sp_backend, self.sp_backend_options = torus_args.backend, torus_args.to_mapping()


@wrapper
@one_sentence()
def _from_args(original: Any, cls: Any, args: Namespace | dict[str, Any]) -> Any:
    """``from_cli_args`` takes a namespace, ``from_runner_args`` a dictionary."""
    xfuser_args = original(cls, args)
    torus_args = config.from_mapping(args if isinstance(args, dict) else vars(args))
    if torus_args is not None:
        setattr(xfuser_args, session.MARK, torus_args)
        if cpu_platform.needed() and not xfuser_args.use_ray:
            session.log("no accelerator was found: ranks run on CPUs, over gloo")
    session.fill_degrees(xfuser_args)
    return xfuser_args


@wrapper
@one_sentence()
def _create_config(original: Any, self: Any) -> Any:
    """xDiT calls this once or twice per process, before it loads the model. Each call configures the args object."""
    args = getattr(self, session.MARK, None)
    session.current.args = args
    if args is None:
        return original(self)
    require_supported(args)
    session.configure(self, args)
    engine_config, input_config = original(self)
    setattr(engine_config.parallel_config.sp_config, session.MARK, args)
    session.start(engine_config.parallel_config, args)
    return engine_config, input_config


@wrapper
@one_sentence()
def _get_nproc(original: Any, args: list[str]) -> int:
    return degrees.num_processes(args, original)


@wrapper
@one_sentence()
def _start_ranks(original: Any, args: list[str] | None = None) -> None:
    """``xdit``: refuse what the ranks would refuse before torchrun starts them, since torchrun reports each of them."""
    argv = sys.argv[1:] if args is None else args
    if any(arg.startswith(("--sp-", "--sp_")) for arg in argv) or _default_args() is not None:
        degrees.check_launch(argv)
    original(args)


@wrapper
@one_sentence()
def _check_distributed_env(original: Any, self: Any, parallel_config: Any) -> None:
    """A Ray worker parses no command line: the pickled configuration carries the flags."""
    session.start(parallel_config, getattr(parallel_config.sp_config, session.MARK, None))
    original(self, parallel_config)


@wrapper
@one_sentence()
def _init_group(
    original: Any, group_ranks: list[list[int]], local_rank: int, backend: str, parallel_mode: str, **kwargs: Any
) -> Any:
    """Replace yunchang's Ulysses and Ring groups by those of the plan, built from xDiT's rank lists.

    yunchang assumes contiguous ranks in a sequence-parallel group, which is wrong under tensor parallelism.
    """
    if parallel_mode == "sequence":
        if session.current.args is None and (args := _default_args()) is not None:
            require_supported(args)  # a program that creates its groups without xFuserArgs
            session.activate(args)
        if session.current.args is not None:
            from yunchang.globals import PROCESS_GROUP

            # Several modules of xDiT import this object by name: change its attributes, do not replace it.
            groups = session.build_groups(group_ranks, backend, **kwargs)
            PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = groups
            kwargs = dict(zip(("ulysses_group", "ring_group"), groups, strict=True))
    return original(group_ranks, local_rank, backend, parallel_mode, **kwargs)


@wrapper
def _destroy(original: Any) -> None:
    session.close_groups()
    original()


@wrapper
def _all_to_all(original: Any, *args: Any, **kwargs: Any) -> Any:
    return (session.current.all_to_all or original)(*args, **kwargs)


@wrapper
def _check_backend(original: Any, self: Any, attention_backend: Any) -> None:
    session.require_lse(attention_backend)
    original(self, attention_backend)


@wrapper
def _select_backend(original: Any, self: Any, engine_config: Any = None) -> Any:
    """If the user names no attention backend, replace a selected one without log-sum-exp (FLASH_4, SDPA)."""
    selected = original(self, engine_config)
    named = engine_config is not None and engine_config.runtime_config.attention_backend
    return selected if named else session.prefer_lse(selected)


@wrapper
def _pipeline_call(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs before data parallelism splits the prompts, so all ranks have the same arguments."""
    names = list(inspect.signature(original).parameters)[1:]
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    adapters.require_known(self, original, arguments)
    with session.current.request(arguments):
        return original(self, *args, **kwargs)


@wrapper
def _initialize_runtime_state(original: Any, pipeline: Any = None, *args: Any, **kwargs: Any) -> None:
    """Scripts and runner models pass the pipeline that they will call, usually one of diffusers."""
    original(pipeline, *args, **kwargs)
    owner = next((c for c in type(pipeline).__mro__ if "__call__" in vars(c)), None)
    if owner is not None and _hook_set is not None:
        _hook_set.add(_request_hook(owner.__module__, f"{owner.__qualname__}.__call__", _pipeline_call))


@wrapper
def _runner_run(original: Any, self: Any, input_args: dict[str, Any]) -> Any:
    """``input_args`` also holds the runner's flags, which may differ between ranks (such as the output directory)."""
    names = {"prompt", "seed", "input_images", "task", *vars(self.default_input_values)}
    with session.current.request({name: value for name, value in input_args.items() if name in names}):
        return original(self, input_args)


# -- the hooks -------------------------------------------------------------------------------------------------------

# Every pipeline that users call, by module: xFuser<name> in pipeline_<module>.
_PIPELINES = {
    "cogvideox": "CogVideoXPipeline",
    "consisid": "ConsisIDPipeline",
    "flux": "FluxPipeline",
    "flux2": "Flux2PipelineBase",
    "flux_control": "PipelineFluxControlPipeline",
    "hunyuandit": "HunyuanDiTPipeline",
    "latte": "LattePipeline",
    "lumina2": "Lumina2Pipeline",
    "pixart_alpha": "PixArtAlphaPipeline",
    "pixart_sigma": "PixArtSigmaPipeline",
    "sana": "SanaPipeline",
    "sana_sprint": "SanaSprintPipeline",
    "stable_diffusion_3": "StableDiffusion3Pipeline",
    "stable_diffusion_xl": "StableDiffusionXLPipeline",
}

_ARGS = "xfuser.config.args"
_RUNTIME = "xfuser.core.distributed.runtime_state"
_GROUPS = "xfuser.core.distributed.parallel_state"
_USP = "xfuser.model_executor.layers.usp"

# Name that a module has if xDiT has the dispatch point of patches/. native.py then replaces the hooks of that module.
_NATIVE = {
    _ARGS: "find_sp_backend",
    _RUNTIME: "get_sp_backend",
    _GROUPS: "get_sp_backend",
    _USP: "dispatch_to_sp_backend",
    "xfuser.cli": "get_sp_backend_from_args",
}


def _hook(module: str, name: str, wrap: Callable[[Any], Any], why: str, **options: Any) -> Hook:
    remove_when = "xDiT has a dispatch point for sequence-parallel backends and the flag (see patches/)"
    defaults = {"remove_when": remove_when, "native": _NATIVE.get(module)}
    return Hook(module=module, name=name, wrap=wrap, why=why, **{**defaults, **options})


def _request_hook(module: str, name: str, wrap: Callable[[Any], Any], **options: Any) -> Hook:
    return Hook(
        module=module,
        name=name,
        wrap=wrap,
        why="a request starts here: ranks in different requests must raise an error",
        remove_when="xDiT calls the sequence-parallel backend at the start of a request",
        required=False,
        **options,
    )


# fmt: off
HOOKS: tuple[Hook, ...] = (
    _hook(_ARGS, "xFuserArgs.add_cli_args", _add_args, "example scripts build their parser here"),
    _hook(_ARGS, "xFuserArgs.add_runner_args", _add_args, "the runner and the xdit command build their parser here"),
    _hook("argparse", "ArgumentParser.parse_known_args", _parse_known_args,
          "the HTTP service (entrypoints/launch.py) parses with a plain ArgumentParser, which refuses the flags",
          remove_when="the HTTP service builds its parser with xFuserArgs.add_cli_args"),
    _hook(_ARGS, "xFuserArgs.__init__", _init,
          "programs that build xFuserArgs by keyword (HTTP service, enable(args)) have no namespace to copy from",
          native=None),
    _hook(_ARGS, "xFuserArgs.from_cli_args", _from_args,
          "copies only the dataclass fields, not the flags; xDiT reads the degrees from the object later"),
    _hook(_ARGS, "xFuserArgs.from_runner_args", _from_args, "as from_cli_args, for the runner's dictionary"),
    _hook(_ARGS, "xFuserArgs.create_config", _create_config,
          "asserts that the degrees multiply to the number of processes; Ray workers get the flags in its result"),
    _hook("xfuser.cli", "main", _start_ranks, "starts ranks by torchrun, which reports each rank that refuses",
          native=None),
    _hook("xfuser.cli", "get_nproc_from_args", _get_nproc, "starts one process if no degree is given"),
    _hook(_RUNTIME, "RuntimeState._check_distributed_env", _check_distributed_env,
          "initialises the groups, in Ray workers from the pickled configuration; ranks compare degrees first"),
    _hook(_GROUPS, "init_model_parallel_group", _init_group,
          "receives the rank lists of sequence-parallel groups; yunchang's own are wrong under tensor parallelism",
          remove_when="xDiT builds its Ulysses and Ring groups from these lists and a layout argument"),
    _hook(_GROUPS, "destroy_model_parallel", _destroy, "the mesh's process groups are destroyed with xDiT's"),
    *(_request_hook(f"xfuser.model_executor.pipelines.pipeline_{module}", f"xFuser{name}.__call__", _pipeline_call)
      for module, name in _PIPELINES.items()),
    *(_request_hook("xfuser.model_executor.models.runner_models.base_model", f"xFuserModel.{name}", _runner_run)
      for name in ("run", "profile")),
    _request_hook(_RUNTIME, "initialize_runtime_state", _initialize_runtime_state, sweep=True),
    _hook(_RUNTIME, "RuntimeState._select_attention_backend", _select_backend,
          "may select a backend without log-sum-exp, which the merge of partial results needs"),
    _hook(_RUNTIME, "RuntimeState._check_if_backend_compatible_with_current_configuration", _check_backend,
          "every selected attention backend is checked here: refuse those without log-sum-exp"),
    *(_hook(module, name, wrap, why, required=False, remove_when="xDiT does this itself, or refuses it")
      for module, name, wrap, why in adapters.HOOKED),
    _hook(_USP, "USP", wrapper(session.attend),
          "the attention call of every sequence-parallel transformer; models import this name", sweep=True),
    _hook("yunchang.comm.all_to_all", "all_to_all_4D", _all_to_all,
          "the all-to-all of xFuserLongContextAttention and yunchang's layers; SeqAllToAll4D looks it up at each call",
          remove_when="yunchang takes the all-to-all function as an argument", sweep=True),
)
# fmt: on
