"""``sf-xfuser doctor``: checks whether this installation is usable."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import socket
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sf_xfuser import __version__, config
from sf_xfuser.bench.document import commit, installed_version
from sf_xfuser.bench.outputs import Outputs
from sf_xfuser.layout import topology

Status = Literal["fail", "warn", "ok", "info"]  # from the worst
_STYLE = {"fail": "bold red", "warn": "yellow", "ok": "green", "info": "cyan"}
_EXAMPLES = """\
Exit status: 0 if xDiT can run with --sp-backend here, 1 if not, 2 if the report
cannot be written.

examples:
  sf-xfuser doctor
  sf-xfuser doctor --verbose
  sf-xfuser doctor --json findings.json
"""
_PACKAGES = ("torch", "xfuser", "diffusers", "transformers", "yunchang")
_SMALL_SHM = 1 << 30
_RESOLVE_S = 5.0  # a resolver without a network may need a minute


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. ``fail`` makes the installation unusable. ``fix``: a command or an instruction. Only the
    JSON output contains ``why``."""

    section: str
    name: str
    status: Status
    detail: str
    fix: str = ""
    why: str = ""


_UNREGISTERED = "--sp-backend is not registered"
# Environment variables that silently slow down or change a run: name -> (values, effect).
_HARMFUL = {
    "NCCL_P2P_DISABLE": (("1",), "GPUs of a machine communicate through host memory"),
    "NCCL_SHM_DISABLE": (("1",), "NCCL uses the network inside a machine"),
    "NCCL_IB_DISABLE": (("1",), "NCCL uses TCP instead of InfiniBand between machines"),
    "CUDA_DEVICE_MAX_CONNECTIONS": (
        tuple(map(str, range(1, 16))),
        "kernels and transfers share hardware queues, so overlap is small and one-sided transports may stall",
    ),
    "CUDA_LAUNCH_BLOCKING": (("1",), "the host waits for every kernel: nothing overlaps"),
    "TORCH_NCCL_BLOCKING_WAIT": (("1",), "every NCCL wait blocks the host: nothing overlaps"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (("0",), "when a rank is lost, the others hang instead of exiting"),
    "TORCH_DEVICE_BACKEND_AUTOLOAD": (("0",), _UNREGISTERED),
    config.AUTOLOAD_VARIABLE: (("0", "false", "no", "off"), _UNREGISTERED),
}


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Checks versions, hooks into xDiT, accelerators, transports, the host, the\ntopology and environment variables."
    )
    parser.epilog = _EXAMPLES
    parser.add_argument("--verbose", action="store_true", help="print every check, for example every hook")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write every check as JSON; - or no FILE: standard output"
    )
    parser.set_defaults(run=doctor_command)


def doctor_command(options: argparse.Namespace) -> int:
    try:
        outputs = Outputs("sf-xfuser doctor", options)
    except ValueError as error:
        print(f"sf-xfuser doctor: {error}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # xDiT and transformers log warnings during import
    with (
        Console(stderr=True).status("importing xDiT and checking its hooks ..."),
        contextlib.redirect_stdout(sys.stderr),  # packages print during import
    ):
        findings = examine()
    outputs.json(to_json(findings))
    if not outputs.on_stdout:
        _show(findings, verbose=options.verbose)
    return 0 if usable(findings) and not outputs.failed else 1


def _show(findings: list[Finding], *, verbose: bool) -> None:
    console = Console()

    def rows(*cells: tuple[Status, str, str]) -> None:
        table = Table.grid(*(Column(overflow="fold") for _ in range(3)), padding=(0, 2))
        for status, name, text in cells:
            table.add_row(*(Text(cell) for cell in (status, name, text)), style=_STYLE[status])
        console.print(table)

    def command(text: str) -> None:  # one line however long it is, so that it can be copied
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if verbose:
        rows(*((finding.status, finding.section, f"{finding.name}: {finding.detail}") for finding in findings))
    else:
        rows(*summary(findings))
    for status, section, text, fix in problems(findings):
        console.print()
        rows((status, section, text))
        if fix:
            command(f"      fix: {fix}")
    if usable(findings):
        console.print("\n[bold green]usable[/]")
    else:
        console.print("\n[bold red]not usable with xDiT[/]: fix the failures above")
    if line := launch_line(findings):
        works = "Try next, then add --sp-backend torus to your xDiT launch line:"
        console.print(works if usable(findings) else "Without xDiT, this works already:")
        command(f"  {line}")


def examine() -> list[Finding]:
    """Run all checks. Imports torch and xfuser; opens no connection and starts no process group. Never raises."""
    findings: list[Finding] = []
    for section, check in _CHECKS:
        if check in _NEED_TORCH and any(f.name == "torch" and f.status == "fail" for f in findings):
            continue
        try:
            for finding in check():
                findings.append(finding)
        except (Exception, SystemExit) as error:  # from any of a dozen packages
            findings.append(Finding(section, "check", "fail", f"{type(error).__name__}: {error}"))
    return findings


def usable(findings: list[Finding]) -> bool:
    return not any(finding.status == "fail" for finding in findings)


def summary(findings: list[Finding]) -> list[tuple[Status, str, str]]:
    """One line per section: its worst status, its name, and what was found."""
    lines: list[tuple[Status, str, str]] = []
    for section in dict.fromkeys(finding.section for finding in findings):
        checks = [finding for finding in findings if finding.section == section]
        passed = [finding for finding in checks if finding.status == "ok"]
        infos = [finding for finding in checks if finding.status == "info"]
        if section == "versions":
            parts = [f"{finding.name} {finding.detail}" for finding in passed]
        elif section == "hooks":
            parts = [f"{len(passed)} of {len(checks)} applied", *_merge_repeated(finding.detail for finding in infos)]
        elif section == "transports":
            parts = [f"{len(passed)} of {len(checks)} available ({', '.join(finding.name for finding in passed)})"]
        else:
            parts = _merge_repeated(finding.detail for finding in passed or infos)
        lines.append((_worst(checks), section, ", ".join(parts) or "see below"))
    return lines


def problems(findings: list[Finding]) -> list[tuple[Status, str, str, str]]:
    """Failures and warnings, one entry per cause: status, section, text and fix."""
    causes: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.status in ("fail", "warn"):
            causes.setdefault(finding.fix or finding.detail, []).append(finding)
    return [(_worst(found), found[0].section, _text(found), found[0].fix) for found in causes.values()]


def _worst(findings: list[Finding]) -> Status:
    return min((finding.status for finding in findings), key=get_args(Status).index)


def _text(found: list[Finding]) -> str:
    """What several findings with one cause say: each detail once with its names, but not much more than five lines."""
    names: dict[str, list[str]] = {}
    for finding in found:
        names.setdefault(finding.detail, []).append(finding.name)
    text, left = "", len(names)
    for detail, (first, *others) in names.items():
        if len(text) + len(detail) > 300 and text:
            return f"{text}and {left} more"
        all_names = ", ".join((first, *others))
        subject = all_names if len(all_names) < 60 or not others else f"{first} and {len(others)} more"
        text += detail if detail.startswith(first) else f"{subject}: {detail}"
        left -= 1
        text += "\n" if left else ""
    return text


def launch_line(findings: list[Finding]) -> str:
    """A command that runs on what was found and downloads nothing; empty if there is none."""
    failed = {(finding.section, finding.name) for finding in findings if finding.status == "fail"}
    without_xdit = {(section, name) for section, name in failed if section == "hooks" or name in _PACKAGES[1:]}
    if failed - without_xdit:
        return ""
    in_path = shutil.which("torchrun")
    own = in_path is not None and Path(in_path).parent == Path(sys.executable).parent
    gpus = sum(finding.section == "accelerators" and finding.status == "ok" for finding in findings)
    if gpus == 1:
        return f"{'python' if own else sys.executable} -m sf_xfuser.bench.gpu"
    ranks = 1 << min(gpus, 8).bit_length() - 1 if gpus else 2  # a power of two divides the heads
    run = f"{'torchrun' if own else f'{sys.executable} -m torch.distributed.run'} --nproc-per-node {ranks}"
    call = "--seq-len 32768 --heads 24 --head-dim 128 --dtype bfloat16" if gpus else "--seq-len 1024"
    return f"{run} -m sf_xfuser.cli bench {call}{' --variants single,torus' if failed else ''}"


def _merge_repeated(details: Iterable[str]) -> list[str]:
    return [detail if count == 1 else f"{count} x {detail}" for detail, count in Counter(details).items()]


def to_json(findings: list[Finding]) -> dict[str, Any]:
    return {
        "usable": usable(findings),
        "commit": commit(),
        "try": launch_line(findings),
        "findings": [asdict(finding) for finding in findings],
    }


# -- checks ----------------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", "ok", platform.python_version())
    if installed_version("sf-xfuser"):
        yield Finding("versions", "sf-xfuser", "ok", __version__)
    else:
        root = Path(__file__).parents[1]
        detail = f"{root} is not installed, so --sp-backend is not registered"
        yield Finding("versions", "sf-xfuser", "fail", detail, f"pip install -e {root}")
    accepted = {needed.name: str(needed.specifier) for needed in _requirements("sf-xfuser")}
    absent = [f"'{name}{accepted.get(name, '')}'" for name in _PACKAGES if installed_version(name) is None]
    for name in _PACKAGES:
        version = installed_version(name)
        if version is None:
            yield Finding("versions", name, "fail", "not installed", f"pip install {' '.join(absent)}")
        elif name != "torch":
            yield Finding("versions", name, "ok", version)
        else:
            try:
                import torch

                yield Finding("versions", name, "ok", torch.__version__)
            except (Exception, SystemExit) as error:
                problem = f"{version} cannot be imported: {type(error).__name__}: {error}"
                yield Finding("versions", name, "fail", problem, f"pip install --force-reinstall torch=={version}")
    for name in ("triton", "flash-attn", "nccl4py", "nvshmem4py-cu12", "nvshmem4py-cu13"):
        version = installed_version(name)
        yield Finding("versions", name, "ok" if version else "info", version or "not installed (optional)")
    yield from _conflicts()


def _requirements(name: str) -> list[Requirement]:
    """What an installed package needs. diffusers and sf-xfuser name some of ``_PACKAGES`` in their extras only."""
    extras = _PACKAGES if name in ("sf-xfuser", "diffusers") else ()
    try:
        requirements = map(Requirement, importlib.metadata.requires(name) or [])
        return [r for r in requirements if r.name in extras or r.marker is None or r.marker.evaluate({"extra": ""})]
    except importlib.metadata.PackageNotFoundError:
        return []


def _conflicts() -> Iterator[Finding]:
    """Missing packages and versions that another package does not accept, as ``pip check`` finds them."""
    found, install = [], []
    for owner in ("sf-xfuser", *_PACKAGES):
        for needed in _requirements(owner):
            version = installed_version(needed.name)
            wanted = f"{needed.name}{needed.specifier}"
            if version is None and needed.name not in _PACKAGES:  # their absence is reported already
                detail = f"not installed, but {owner} {installed_version(owner)} needs {wanted}"
            elif version and needed.name != "xfuser" and not needed.specifier.contains(version, prereleases=True):
                detail = f"{version} is installed, but {owner} {installed_version(owner)} needs {wanted}"
            else:
                continue
            is_too_new = version and any(
                limit.operator not in (">", ">=") and not limit.contains(version) for limit in needed.specifier
            )
            install.append(owner if is_too_new and owner != "sf-xfuser" else wanted)
            found.append((needed.name, "fail" if version and owner == "sf-xfuser" else "warn", detail))
    fix = "pip install --upgrade " + " ".join(f"'{name}'" for name in dict.fromkeys(install))
    for name, status, detail in found:
        yield Finding("versions", name, status, detail, fix)  # type: ignore[arg-type]


def _hooks() -> Iterator[Finding]:
    if importlib.util.find_spec("xfuser") is None:
        return
    from sf_xfuser.integrations.xdit import plugin

    plugin.enable()
    failed = plugin.import_hooked_modules()
    fix = f'{sys.executable} -c "import {next(iter(failed), "xfuser")}" shows where'
    if problem := plugin.unsupported():
        text, separator, remedy = problem.partition("pip install")
        fix = separator + remedy
        yield Finding("hooks", "xfuser", "fail", text.rstrip(": "), fix)
    for module, error in failed.items():
        if "partially initialized" in error:  # an earlier import of the same module has failed
            error = next(iter(failed.values()))
        yield Finding("hooks", module, "fail", f"cannot be imported: {error}", fix)
    for hook, state in plugin.hook_states():
        why = f"{hook.why}; removed when {hook.remove_when}"
        yield Finding("hooks", f"{hook.module}.{hook.name}", "ok" if state == "applied" else "info", state, why=why)


def _accelerators() -> Iterator[Finding]:
    import torch

    from sf_xfuser.integrations.xdit import cpu_platform

    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
        yield Finding("accelerators", f"cuda:{index}", "ok", name)
    if cpu_platform.needed():
        yield Finding("accelerators", "accelerator", "info", "none; xDiT runs on CPU ranks over gloo")
        if torch.version.cuda and Path("/proc/driver/nvidia/version").exists():
            try:
                torch.cuda.init()  # type: ignore[no-untyped-call]
                reason = "no GPU is visible; CUDA_VISIBLE_DEVICES may hide them"
            except (RuntimeError, AssertionError) as error:
                reason = str(error)
            yield Finding("accelerators", "NVIDIA driver", "warn", f"loaded, but PyTorch cannot use it: {reason}")


def _transports() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    from sf_xfuser.torus.links import UNAVAILABLE

    nccl = None if dist.is_nccl_available() else "this torch was built without NCCL"
    reasons = {
        "tcp": None,
        "two_sided over nccl": nccl if torch.cuda.is_available() else "no NVIDIA or AMD GPU",
        "two_sided over gloo": None if dist.is_gloo_available() else "this torch was built without gloo",
        **{name: unavailable() for name, unavailable in UNAVAILABLE.items()},
    }
    for name, reason in reasons.items():
        detail = f"not available: {reason}" if reason else "available"
        yield Finding("transports", name, "info" if reason else "ok", detail)


def _host() -> Iterator[Finding]:
    yield _host_name()
    yield _shared_memory()


def _host_name() -> Finding:
    """gloo binds to the address of the host name, or of GLOO_SOCKET_IFNAME."""
    name = socket.gethostname()
    interfaces = [interface for _, interface in socket.if_nameindex()]
    named = config.environment(["GLOO_SOCKET_IFNAME"]).get("GLOO_SOCKET_IFNAME", "")
    export = f"export GLOO_SOCKET_IFNAME={_default_interface() or 'the interface that they reach'}"
    if unknown := [part for part in named.split(",") if part and part not in interfaces]:
        detail = f"{unknown[0]} is no interface of this host, which has {', '.join(interfaces)}"
        return Finding("host", "GLOO_SOCKET_IFNAME", "fail", detail, f"unset GLOO_SOCKET_IFNAME, or {export}")
    if named:
        return Finding("host", "host name", "ok", f"{name}, at {named}")
    addresses = _resolve(name)
    if not addresses:
        detail = f"{name} has no address, so other machines cannot reach this one over gloo"
    elif all(address.startswith("127.") or address == "::1" for address in addresses):
        detail = f"{name} has the address {addresses[0]}, which other machines cannot reach over gloo"
    else:
        return Finding("host", "host name", "ok", f"{name} is {addresses[0]}")
    return Finding("host", "host name", "warn", detail, f"only for several machines: correct /etc/hosts, or {export}")


def _default_interface() -> str | None:
    """The interface of the default route, if there is one."""
    with contextlib.suppress(OSError):
        routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
        return next((route[0] for route in routes if route[1] == "00000000"), None)
    return None


def _resolve(name: str) -> list[str]:
    """The addresses of a host name; none if it has none, or if the resolver does not answer in time."""
    found: list[str] = []

    def look_up() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found.extend(str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))

    thread = threading.Thread(target=look_up, daemon=True)  # getaddrinfo has no time limit
    thread.start()
    thread.join(_RESOLVE_S)
    return list(found)


def _shared_memory() -> Finding:
    fix = "docker run --shm-size=8g (or --ipc=host), or mount -o remount,rw,size=8g /dev/shm"
    try:
        stat = os.statvfs("/dev/shm")
    except OSError as error:
        return Finding("host", "/dev/shm", "warn", f"{error.strerror}: no shm transport, and NCCL may fail", fix)
    total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    size = f"{free / (1 << 30):.2g} of {total / (1 << 30):.2g} GiB free"
    if not os.access("/dev/shm", os.W_OK):
        return Finding("host", "/dev/shm", "warn", "read-only: no shm transport, and NCCL may fail", fix)
    if free < _SMALL_SHM:
        return Finding("host", "/dev/shm", "warn", f"{size}: large models need more for shm and NCCL", fix)
    return Finding("host", "/dev/shm", "ok", f"/dev/shm {size}")


def _topology() -> Iterator[Finding]:
    facts = topology.probe()
    yield Finding("topology", "this machine", "ok", f"machine {facts.machine}")
    domain = facts.nvlink_domain or facts.nvlink_unknown or "none reported; each host is one machine"
    yield Finding("topology", "NVLink domain", "warn" if facts.nvlink_unknown else "info", domain)
    launched = config.launch_environment()
    world = f"{launched.world_size} ranks" if launched.world_size else "none; no launcher started this process"
    yield Finding("topology", "launcher", "info", world)


def _environment() -> Iterator[Finding]:
    variables = config.environment(_HARMFUL)
    active = {name: effect for name, (values, effect) in _HARMFUL.items() if variables.get(name, "").lower() in values}
    for name, effect in active.items():
        fix = f"export {name}=32" if name == config.QUEUES_VARIABLE else f"unset {name}"
        status: Status = "fail" if effect is _UNREGISTERED else "warn"
        yield Finding("environment", name, status, f"{name}={variables[name]}: {effect}", fix)
    try:
        args = config.args_from_environment()
        if args is not None:
            yield Finding("environment", config.ARGS_VARIABLE, "ok", f"{config.ARGS_VARIABLE}={args.to_json()}")
    except ValueError as error:
        example = f"export {config.ARGS_VARIABLE}='{config.TorusArgs(backend='torus').to_json()}'"
        yield Finding("environment", config.ARGS_VARIABLE, "fail", str(error), example)
    known = {value for name, value in vars(config).items() if name.endswith("_VARIABLE")}
    for name in sorted(name for name in config.variables_named("SF_XFUSER_") if name not in known):
        detail = f"has no effect; sf-xfuser reads {', '.join(sorted(n for n in known if n.startswith('SF_')))}"
        yield Finding("environment", name, "warn", detail, f"unset {name}")
    if not active:
        yield Finding("environment", "variables", "ok", f"none of {len(_HARMFUL)} harmful variables is set")


def _nvshmem_variables() -> Iterator[Finding]:
    from sf_xfuser.transport.gpu import facts, nvshmem

    if nvshmem.unavailable() is None:
        warnings = nvshmem.environment_warnings(config.environment(nvshmem.VARIABLES), facts.has_efa())
        for name, text in warnings.items():
            yield Finding("environment", name, "warn", f"{name} {text} (for --sp-transport nvshmem)")


_CHECKS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("versions", _versions),
    ("hooks", _hooks),
    ("accelerators", _accelerators),
    ("transports", _transports),
    ("host", _host),
    ("topology", _topology),
    ("environment", _environment),
    ("environment", _nvshmem_variables),
)
_NEED_TORCH = (_hooks, _accelerators, _transports, _nvshmem_variables)
