"""How it enters xDiT and yunchang: hook records, and the wrapper that each of them names.

Read ``HOOKS`` at the end first: it is the list of places where xDiT is touched. What wrappers do is in ``session``.
Without ``--sp-backend`` every wrapper calls the original and nothing else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from sf_xfuser import config as sp_args
from sf_xfuser.config import TorusArgs
from sf_xfuser.integrations.hooks import Hook, HookSet
from sf_xfuser.integrations.xdit import cpu_platform as platform_cpu
from sf_xfuser.integrations.xdit import degrees as launch
from sf_xfuser.integrations.xdit import repairs, session

OLDEST, TOO_NEW = (0, 5), (0, 8)
CHECKED_VERSION = "0.7.0"

_hook_set: HookSet | None = None


# -- public ----------------------------------------------------------------------------------------------------------


def enable(args: TorusArgs | None = None) -> None:
    """Hook xDiT, now if it is imported already, else when it is. Idempotent.

    ``args`` are used where xDiT is set up without ``--sp-*`` flags, as in a script that builds ``xFuserArgs`` itself,
    or its groups alone by ``initialize_model_parallel``.
    On a machine without an accelerator this also supplies what xDiT lacks there (``platform_cpu``).
    """
    global _hook_set
    if args is not None:
        session.current.command_line = args
    if _hook_set is None:
        _hook_set = HookSet(_hooks(), roots=("xfuser", "yunchang"))
    _hook_set.install()


def disable() -> None:
    """Put every hooked attribute of xDiT back, and forget flags and mesh. Idempotent."""
    global _hook_set
    if _hook_set is not None:
        _hook_set.remove()
        _hook_set = None
    session.reset()


def hook_states() -> list[tuple[Hook, str]]:
    """Every record with its state (see ``HookSet.state``), for ``doctor``."""
    if _hook_set is None:
        return [(hook, "off") for hook in _hooks()]
    return [(hook, _hook_set.state(hook)) for hook in _hook_set.hooks]


def _hooks() -> tuple[Hook, ...]:
    repaired: tuple[Hook, ...] = ()
    if _xdit_version()[1] >= (0, 7):
        repaired = repairs.hooks(lambda: session.current.args is not None, session.log)
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
            session.current.command_line, args = sp_args.extract(given)
        return original(self, args, *rest, **kwargs)

    return parse_known_args


def _given() -> TorusArgs | None:
    """What was asked for otherwise than by flags of xFuserArgs."""
    return session.current.command_line or sp_args.args_from_environment()


def _wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given = _given()
        if given is not None:
            setattr(self, session.MARK, given)
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
            setattr(xfuser_args, session.MARK, given)
        session.fill_degrees(xfuser_args)
        return xfuser_args

    return from_args


def _wrap_create_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """xDiT calls this once or twice per process: each time flags and degrees are settled on the args object."""

    @functools.wraps(original)
    def create_config(self: Any) -> Any:
        given = getattr(self, session.MARK, None)
        session.current.args = given
        if given is None:
            return original(self)
        settle(self, given)
        engine_config, input_config = original(self)
        setattr(engine_config.parallel_config.sp_config, session.MARK, given)
        return engine_config, input_config

    return create_config


def settle(xfuser_args: Any, given: TorusArgs) -> None:
    """As ``session.settle``. Raises RuntimeError where this xDiT is not supported, too."""
    _require_supported(given)
    session.settle(xfuser_args, given)


def _require_supported(given: TorusArgs) -> None:
    if (problem := unsupported()) is not None:
        raise RuntimeError(f"--sp-backend {given.backend}: {problem}")


def _wrap_get_nproc(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def get_nproc_from_args(args: list[str]) -> int:
        return launch.num_processes(args, original)

    return get_nproc_from_args


# -- groups ----------------------------------------------------------------------------------------------------------


def _wrap_check_distributed_env(original: Callable[..., None]) -> Callable[..., None]:
    """A Ray worker never parsed a command line: the flags reach it inside the pickled configuration."""

    @functools.wraps(original)
    def _check_distributed_env(self: Any, parallel_config: Any) -> None:
        session.start(parallel_config, getattr(parallel_config.sp_config, session.MARK, None))
        original(self, parallel_config)

    return _check_distributed_env


def _wrap_init_group(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace yunchang's Ulysses and Ring groups by those of the plan, built from xDiT's true rank lists.

    yunchang assumes that the ranks of a sequence-parallel group are contiguous, which tensor parallelism breaks.
    """

    @functools.wraps(original)
    def init_model_parallel_group(
        group_ranks: list[list[int]], local_rank: int, backend: str, parallel_mode: str, **kwargs: Any
    ) -> Any:
        if parallel_mode == "sequence" and session.current.args is None and (given := _given()) is not None:
            _require_supported(given)  # a program that makes its groups without xFuserArgs
            session.put_in_force(given)
        if parallel_mode == "sequence" and session.current.args is not None:
            from yunchang.globals import PROCESS_GROUP

            # One object, imported by name in several modules of xDiT: mutate it, never rebind it.
            groups = session.build_groups(group_ranks, backend, **kwargs)
            PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = groups
            kwargs = dict(zip(("ulysses_group", "ring_group"), groups, strict=True))
        return original(group_ranks, local_rank, backend, parallel_mode, **kwargs)

    return init_model_parallel_group


def _wrap_destroy(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def destroy_model_parallel() -> None:
        session.leave_groups()
        original()

    return destroy_model_parallel


# -- attention -------------------------------------------------------------------------------------------------------


def _wrap_usp(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def USP(*args: Any, **kwargs: Any) -> Any:
        return session.attend(original, *args, **kwargs)

    return USP


def _wrap_all_to_all(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_to_all_4D(*args: Any, **kwargs: Any) -> Any:
        if session.current.all_to_all is None:
            return original(*args, **kwargs)
        return session.current.all_to_all(*args, **kwargs)

    return all_to_all_4D


def _wrap_check_backend(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _check_if_backend_compatible_with_current_configuration(self: Any, attention_backend: Any) -> None:
        session.require_lse(attention_backend)
        original(self, attention_backend)

    return _check_if_backend_compatible_with_current_configuration


def _wrap_select_backend(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where the user named no attention backend, do not let xDiT pick one that torus must refuse (FLASH_4, SDPA)."""

    @functools.wraps(original)
    def _select_attention_backend(self: Any, engine_config: Any = None) -> Any:
        chosen = original(self, engine_config)
        named = engine_config is not None and engine_config.runtime_config.attention_backend
        return chosen if named else session.with_lse(chosen)

    return _select_attention_backend


# -- requests --------------------------------------------------------------------------------------------------------


def _wrap_pipeline_call(original: Callable[..., Any]) -> Callable[..., Any]:
    """Called before data parallelism splits the prompts: all ranks get the same arguments."""
    names = list(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        session.current.begin_request({**dict(zip(names, args, strict=False)), **kwargs})
        return original(self, *args, **kwargs)

    return __call__


def _wrap_initialize_runtime_state(original: Callable[..., None]) -> Callable[..., None]:
    """Scripts and runner models give it the pipeline that they will call, mostly one of diffusers."""

    @functools.wraps(original)
    def initialize_runtime_state(pipeline: Any = None, *args: Any, **kwargs: Any) -> None:
        original(pipeline, *args, **kwargs)
        owner = next((c for c in type(pipeline).__mro__ if "__call__" in vars(c)), None)
        if owner is not None and _hook_set is not None:
            name = f"{owner.__qualname__}.__call__"
            _hook_set.add(_hook(owner.__module__, name, _wrap_pipeline_call, _REQUEST, **_OF_REQUESTS))

    return initialize_runtime_state


def _wrap_runner_run(original: Callable[..., Any]) -> Callable[..., Any]:
    """``input_args`` also holds the runner's flags, which may differ between ranks (say, the output directory)."""

    @functools.wraps(original)
    def run(self: Any, input_args: dict[str, Any]) -> Any:
        names = {"prompt", "seed", "input_images", "task", *vars(self.default_input_values)}
        session.current.begin_request({name: value for name, value in input_args.items() if name in names})
        return original(self, input_args)

    return run


# -- the records -----------------------------------------------------------------------------------------------------

_UNTIL_UPSTREAM = "xDiT has a dispatch point for sequence-parallel backends and the flag (see patches/)"

_REQUEST = "a request starts here in scripts, Ray workers and the HTTP service: ranks in different requests must fail"
_OF_REQUESTS: dict[str, Any] = {
    "remove_when": "xDiT tells a sequence-parallel backend where a request starts",
    "required": False,
}

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
    *(
        _hook(
            f"xfuser.model_executor.pipelines.pipeline_{module}",
            f"xFuser{name}.__call__",
            _wrap_pipeline_call,
            _REQUEST,
            **_OF_REQUESTS,
        )
        for module, name in _PIPELINES.items()
    ),
    *(
        _hook(
            "xfuser.model_executor.models.runner_models.base_model",
            f"xFuserModel.{name}",
            _wrap_runner_run,
            "a request of the runner starts here",
            **_OF_REQUESTS,
        )
        for name in ("run", "profile")
    ),
    _hook(
        _RUNTIME,
        "initialize_runtime_state",
        _wrap_initialize_runtime_state,
        "gets the pipeline of a script or runner model: a request starts where that is called",
        native=None,
        sweep=True,
        **_OF_REQUESTS,
    ),
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
