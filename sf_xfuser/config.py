"""The user's settings: a frozen dataclass, its command-line flags and its environment variables.

Only this module reads the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

XDIT_BACKENDS = ("usp", "ulysses", "ring")  # attention runs xDiT's own code
BACKENDS = (*XDIT_BACKENDS, "torus", "auto")
CHECKS = ("off", "first")
KERNELS = ("library", "fused")
GRAPHS = ("auto", "off")
COMPRESSIONS = ("none", "fp8", "int8")
TRANSPORTS = ("auto", "shm", "tcp", "two_sided", "symm_mem", "nccl_put", "nvshmem")
GPU_WINDOWS = ("symm_mem", "nccl_put", "nvshmem")  # one-sided: streams of a GPU wait for flags
UNCOMPRESSED = ("shm", "nccl_put", "nvshmem")  # they write chunks into remote memory as they are
_PLAN_NAMES = ("auto", "paper", "usp")
_PLAN_KEYS = ("torus", "ulysses", "ring")
_COUNT = "[1-9][0-9]{0,5}"
_SHORT = reprlib.Repr()  # for error texts: values from JSON may be deep and long
_SHORT.maxstring = _SHORT.maxother = 200

MAX_TIMEOUT_S = 86400
"""Ranks wait for each other up to five times this long; a socket timeout overflows beyond 24 days."""

AUTOLOAD_VARIABLE = "SF_XFUSER_AUTOLOAD"
ARGS_VARIABLE = "SF_XFUSER_ARGS"
MACHINE_VARIABLE = "SF_XFUSER_MACHINE"
UNTESTED_VARIABLE = "SF_XFUSER_ALLOW_UNTESTED"
TRACEBACK_VARIABLE = "SF_XFUSER_TRACEBACK"
QUEUES_VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` with the name of ``known`` that is most like ``name``; empty if none is like it."""
    from difflib import get_close_matches  # torch imports this module at every start

    by_lower_case = {other.lower(): other for other in known}
    close = get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.75) if isinstance(name, str) else []
    return f"; did you mean {by_lower_case[close[0]]}?" if close else ""


def parse_grid(text: object) -> tuple[int, int] | None:
    """``"NxM"`` as (machines, ranks per machine); None for anything else."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX]\s*(\d{1,6})\s*", text) if isinstance(text, str) else None
    return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TorusArgs:
    """The values of ``--sp-*``. Raises ValueError for invalid values.

    ``backend``: the sequence-parallel backend that runs attention; ``None``: xDiT is untouched.
    ``plan``: ``"auto"``, ``"paper"``, ``"usp"`` or ``"torus=T,ulysses=U,ring=R"``.
    ``topology``: ``"auto"`` (gathered from the hosts) or ``"NxM"``: machines x ranks per machine.
    ``transport``: how chunks move between ranks; ``"auto"``: benchmark the available transports on the first call and
    use the fastest. xDiT's own backends use a named transport for yunchang's all-to-all.
    ``timeout``: seconds to wait for a chunk. Ranks may start a call up to five times this long apart.
    ``kernel``: local attention of torus: ``"library"`` (xDiT's attention backend) or ``"fused"`` (one Triton kernel).
    ``graphs``: ``"auto"`` captures the calls of a shape as a CUDA graph, where the transport allows it.
    ``compress``: quantization of Torus Attention's Q, V and O between machines; K keeps the input dtype.
    ``check``: ``"first"`` compares the first call of each shape with xDiT's own USP.
    ``strict``: raise an error instead of falling back to xDiT's own USP or yunchang's own all-to-all.
    """

    backend: str | None = None
    plan: str = "auto"
    topology: str = "auto"
    transport: str = "auto"
    timeout: float = 60.0
    check: str = "off"
    compress: str = "none"
    kernel: str = "library"
    graphs: str = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        # Values from JSON (SF_XFUSER_ARGS) and from callers may have any type.
        if self.backend is not None:
            self._require_one_of("backend", BACKENDS)
        self.explicit_plan()
        if self.topology != "auto" and not all(parse_grid(self.topology) or [0]):
            raise ValueError(
                f"--sp-topology must be 'auto' or NxM (for instance 4x8), got {_SHORT.repr(self.topology)}"
            )
        self._require_one_of("transport", TRANSPORTS)
        self._require_one_of("compress", COMPRESSIONS)
        self._require_one_of("check", CHECKS)
        self._require_one_of("kernel", KERNELS)
        self._require_one_of("graphs", GRAPHS)
        if not isinstance(self.strict, bool):
            raise ValueError(f"--sp-strict must be true or false, got {_SHORT.repr(self.strict)}")
        is_number = isinstance(self.timeout, int | float) and not isinstance(self.timeout, bool)
        if not (is_number and 0 < self.timeout <= MAX_TIMEOUT_S):
            raise ValueError(
                f"--sp-timeout must be a positive number of seconds, at most {MAX_TIMEOUT_S} (a day), "
                f"got {_SHORT.repr(self.timeout)}"
            )
        if self.backend in XDIT_BACKENDS:
            self._refuse_flags_of_torus()
        if self.compress != "none" and self.transport in UNCOMPRESSED:
            raise ValueError(
                f"--sp-compress {self.compress} cannot be used with --sp-transport {self.transport}, which writes "
                f"uncompressed chunks into remote memory; use two_sided, tcp (CPU ranks), symm_mem or auto"
            )

    def _require_one_of(self, name: str, allowed: Sequence[str]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in allowed:
            got = f"{_SHORT.repr(value)}{did_you_mean(value, allowed)}"
            raise ValueError(f"--sp-{name} must be one of {', '.join(allowed)}, got {got}")

    def _refuse_flags_of_torus(self) -> None:
        runs = f"--sp-backend {self.backend} runs xDiT's own code"
        named = self.transport != "auto"
        all_to_all = named and self.backend != "ring"  # yunchang's all-to-all uses a named transport
        for flag, is_set, about in (
            (f"--sp-compress {self.compress}", self.compress != "none", "compresses Torus Attention's chunks"),
            (f"--sp-plan {self.plan}", self.plan not in ("auto", "usp"), "sets Torus Attention's layout"),
            (f"--sp-kernel {self.kernel}", self.kernel != "library", "selects Torus Attention's kernel"),
            (f"--sp-graphs {self.graphs}", self.graphs != "auto", "applies to Torus Attention's calls"),
            (f"--sp-check {self.check}", self.check != "off", "compares Torus Attention with xDiT's own code"),
            (f"--sp-transport {self.transport}", named and not all_to_all, "does not apply to a ring"),
            ("--sp-strict", self.strict and not all_to_all, "applies to calls that fall back to xDiT's own code"),
        ):
            if is_set:
                raise ValueError(f"{flag} {about}, but {runs}: use --sp-backend torus or remove {flag.split()[0]}")

    def explicit_plan(self) -> dict[str, int] | None:
        """``{"torus": T, "ulysses": U, "ring": R}`` if the plan gives degrees, else None."""
        if isinstance(self.plan, str) and self.plan in _PLAN_NAMES:
            return None
        degrees: dict[str, int] = {}
        for part in self.plan.split(",") if isinstance(self.plan, str) else [""]:
            key, _, value = part.strip().partition("=")
            if key not in _PLAN_KEYS or key in degrees or not re.fullmatch(_COUNT, value):
                raise ValueError(
                    f"--sp-plan must be {', '.join(_PLAN_NAMES)} or torus=T,ulysses=U,ring=R with positive integers, "
                    f"got {_SHORT.repr(self.plan)}"
                )
            degrees[key] = int(value)
        return {key: degrees.get(key, 1) for key in _PLAN_KEYS}

    @property
    def rule(self) -> str:
        """The planning rule of ``plan``; "auto" if ``plan`` gives degrees."""
        return self.plan if self.plan in _PLAN_NAMES else "auto"

    def to_mapping(self) -> dict[str, Any]:
        """Return the values as parsed arguments: the inverse of :func:`from_mapping`."""
        return {f"sp_{name}": value for name, value in asdict(self).items()}

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--sp-*`` to ``parser``, with dashes and with underscores."""
    add_options(parser.add_argument_group("Sequence-parallel backend (sf-xfuser)"), backend=True)


def add_options(group: argparse._ArgumentGroup, *, backend: bool) -> None:
    """Add the options to ``group``; ``backend=False`` if xDiT itself has ``--sp_backend``.

    ``TorusArgs`` checks the values: for a wrong one argparse would print all flags of xDiT on every rank.
    """

    def add(name: str, choices: Sequence[str] = (), **options: Any) -> None:
        if choices:
            options["metavar"] = f"{{{','.join(choices)}}}"
        # xDiT's parser rewrites dashes to underscores and looks the result up; a plain ArgumentParser does not.
        group.add_argument(f"--sp-{name}", f"--sp_{name}", dest=f"sp_{name}", **options)

    if backend:
        add(
            "backend",
            choices=BACKENDS,
            default=None,
            help="Backend that runs attention across a sequence-parallel group: torus = Torus Attention (Ulysses "
            "across machines, Ring inside, overlapped); usp, ulysses, ring = xDiT's own code, with the degrees filled "
            "in; auto = the fastest of torus and xDiT's USP, timed on the first calls of each shape. Without this flag "
            "xDiT is untouched.",
        )
    add(
        "plan",
        default="auto",
        metavar="PLAN",
        help="Layout of the group: auto (fewest bytes between machines), paper (largest Ulysses degree, machines "
        "first), usp (xDiT's own layout) or torus=T,ulysses=U,ring=R. Default: auto",
    )
    add(
        "topology",
        default="auto",
        metavar="NxM",
        help="Machines x ranks per machine, or auto (gathered from the hosts). Default: auto",
    )
    add(
        "transport",
        choices=TRANSPORTS,
        default="auto",
        help="How chunks move between ranks: shm (CPU ranks of one host), tcp (CPU ranks), two_sided "
        "(torch.distributed send and recv, over NCCL or gloo), symm_mem (GPUs connected by NVLink; two_sided between "
        "others), nccl_put (NCCL's one-sided operations), nvshmem (NVIDIA GPUs) or auto (benchmark the available "
        "transports on the first call and use the fastest). With usp and ulysses, a named transport is used for "
        "yunchang's all-to-all. Default: auto",
    )
    add(
        "timeout",
        type=_number_or_text,
        default=60.0,
        metavar="SECONDS",
        help="Longest wait for a chunk from another rank. Ranks may start a call up to five times this long apart. "
        "Default: 60",
    )
    add(
        "compress",
        choices=COMPRESSIONS,
        default="none",
        help="Quantize inter-machine Q, V and O (scale per token and head); K keeps the input dtype. fp8 and int8 "
        "halve the bytes of Q, V and O in 16-bit models, with a small error that explain() reports. Default: none",
    )
    add(
        "kernel",
        choices=KERNELS,
        default="library",
        help="Local attention of torus: library = xDiT's attention backend (without xDiT: PyTorch's attention) and a "
        "merge kernel; fused = one Triton kernel, for float32, float16 and bfloat16 with head sizes 64, 72, 96, 128 "
        "and 256 (other calls raise an error). Default: library",
    )
    add(
        "graphs",
        choices=GRAPHS,
        default="auto",
        help="auto = on GPUs with a one-sided transport on all links, capture the attention calls of a shape as a CUDA "
        "graph after a few calls, so that a later call is one launch. Default: auto",
    )
    add(
        "check",
        choices=CHECKS,
        default="off",
        help="first: compare the first attention call of each shape with xDiT's own USP. If they differ, all ranks "
        "fall back to xDiT's own USP, with a warning (with --sp-strict: raise an error). Not under torch.compile. "
        "Default: off",
    )
    add("strict", action="store_true", help="Raise an error instead of falling back to xDiT's own USP.")


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def require_known_flags(argv: Iterable[str], options: Iterable[str]) -> None:
    """Raise ValueError if ``argv`` has a misspelled ``--sp-*`` flag. ``options``: all those of its parser."""
    known = [f"--sp-{field.name}" for field in fields(TorusArgs)]
    others = tuple(option.replace("_", "-") for option in options)
    for arg in argv:
        name = arg.partition("=")[0].replace("_", "-")
        is_option = any(option.startswith(name) for option in others)  # argparse completes flags
        if name.startswith("--s") and not is_option and (suggestion := did_you_mean(name, known)):
            raise ValueError(f"{name} is not a flag{suggestion}")


def from_mapping(values: Mapping[str, Any]) -> TorusArgs | None:
    """``TorusArgs`` from the ``sp_*`` entries of parsed arguments; None without ``sp_backend``. Raises ValueError."""
    if values.get("sp_backend") is None:
        ignored = sorted(
            f"--sp-{field.name}"
            for field in fields(TorusArgs)
            if field.name not in ("backend", "timeout")
            and values.get(f"sp_{field.name}", field.default) != field.default
        )
        if ignored:
            raise ValueError(f"{', '.join(ignored)} has no effect without --sp-backend; add --sp-backend torus")
        return None
    names = [field.name for field in fields(TorusArgs)]
    return TorusArgs(**{name: values[f"sp_{name}"] for name in names if f"sp_{name}" in values})


def extract(argv: Sequence[str]) -> tuple[TorusArgs | None, list[str]]:
    """Split a command line into the values of its ``--sp-*`` flags and the arguments for another parser."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    parsed, rest = parser.parse_known_args(list(argv))
    return from_mapping(vars(parsed)), rest


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchEnvironment:
    """torchrun's environment variables and ``SF_XFUSER_MACHINE``; None if not set."""

    rank: int | None = None
    world_size: int | None = None
    local_world_size: int | None = None
    local_rank: int | None = None
    machine: str | None = None


_assumed: LaunchEnvironment | None = None


@contextmanager
def launched_as(launched: LaunchEnvironment) -> Iterator[None]:
    """Let :func:`launch_environment` return ``launched`` inside the block: what a rank finds that is to be started."""
    global _assumed
    _assumed = launched
    try:
        yield
    finally:
        _assumed = None


def launch_environment() -> LaunchEnvironment:
    if _assumed is not None:
        return _assumed

    def number(name: str) -> int | None:
        value = os.environ.get(name, "")
        return int(value) if re.fullmatch("[0-9]{1,9}", value) else None

    return LaunchEnvironment(
        rank=number("RANK"),
        world_size=number("WORLD_SIZE"),
        local_world_size=number("LOCAL_WORLD_SIZE"),
        local_rank=number("LOCAL_RANK"),
        machine=os.environ.get(MACHINE_VARIABLE) or None,
    )


def environment(names: Iterable[str]) -> dict[str, str]:
    """The environment variables among ``names`` that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}


def variables_named(prefix: str) -> list[str]:
    """The names of the environment variables that are set and start with ``prefix``."""
    return [name for name in os.environ if name.startswith(prefix)]


def with_environment(values: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process, updated with ``values``, to start another process."""
    return {**os.environ, **values}


def set_defaults(values: Mapping[str, str]) -> None:
    """Set the environment variables that are not set."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def autoload_wanted() -> bool:
    return os.environ.get(AUTOLOAD_VARIABLE, "1").lower() not in ("0", "false", "no", "off")


def traceback_wanted() -> bool:
    """Whether a refused launch prints a traceback on every rank, not one sentence."""
    return os.environ.get(TRACEBACK_VARIABLE, "") == "1"


def untested_allowed() -> bool:
    """Whether an xfuser newer than the supported versions may be used if every hook applies."""
    return os.environ.get(UNTESTED_VARIABLE, "") == "1"


def args_from_environment() -> TorusArgs | None:
    """``TorusArgs`` from ``SF_XFUSER_ARGS``, JSON for launchers that pass no flags; None if it names no backend. Raises
    ValueError."""
    text = os.environ.get(ARGS_VARIABLE)
    if not text:
        return None
    names = [field.name for field in fields(TorusArgs)]
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or not set(values) <= set(names):
            raise ValueError(f"it must be an object with the keys {', '.join(names)}")
    except (ValueError, RecursionError) as error:
        example = TorusArgs(backend="torus").to_json()
        raise ValueError(f"{ARGS_VARIABLE} must be JSON like {example}, got {_SHORT.repr(text)}: {error}") from None
    try:
        return from_mapping({f"sp_{name}": value for name, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{ARGS_VARIABLE}: {error}") from None
