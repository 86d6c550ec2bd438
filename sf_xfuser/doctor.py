"""``sf-xfuser doctor``: checks whether this installation is usable."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from sf_xfuser import config
from sf_xfuser.layout import topology
from sf_xfuser.transport.cpu import segment
from sf_xfuser.transport.gpu import nccl_put, nvshmem, symm_mem

Status = Literal["ok", "info", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. ``fail`` makes the installation unusable. Only the JSON output contains ``why``."""

    section: str
    name: str
    status: Status
    detail: str
    why: str = ""


# Environment variables that silently slow down or change a run: name -> (values, effect).
_HARMFUL = {
    "NCCL_P2P_DISABLE": (
        ("1",),
        "GPUs of a machine communicate through host memory (measured speedup 1.6x instead of 1.9x)",
    ),
    "NCCL_SHM_DISABLE": (("1",), "NCCL uses the network inside a machine"),
    "NCCL_IB_DISABLE": (("1",), "NCCL uses TCP instead of InfiniBand between machines"),
    "CUDA_DEVICE_MAX_CONNECTIONS": (
        tuple(map(str, range(1, 16))),
        "kernels and transfers share hardware queues, so overlap is small and one-sided transports may stall; use 32",
    ),
    "CUDA_LAUNCH_BLOCKING": (("1",), "the host waits for every kernel: nothing overlaps"),
    "TORCH_NCCL_BLOCKING_WAIT": (("1",), "every NCCL wait blocks the host: nothing overlaps"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (("0",), "when a rank is lost, the others hang instead of exiting"),
    "TORCH_DEVICE_BACKEND_AUTOLOAD": (("0",), "--sp-backend is not registered: call sf_xfuser.enable() yourself"),
    config.AUTOLOAD_VARIABLE: (
        ("0", "false", "no", "off"),
        "--sp-backend is not registered: call sf_xfuser.enable() yourself",
    ),
}


def examine() -> list[Finding]:
    """Run all checks. Imports torch and xfuser; opens no connection and starts no process group."""
    return [*_versions(), *_hooks(), *_accelerators(), *_transports(), *_topology(), *_environment()]


def usable(findings: list[Finding]) -> bool:
    return not any(finding.status == "fail" for finding in findings)


def summary(findings: list[Finding]) -> list[tuple[Status, str]]:
    """One line per section, followed by one line for each of its warnings and failures."""
    lines: list[tuple[Status, str]] = []
    for section in dict.fromkeys(finding.section for finding in findings):
        checks = [finding for finding in findings if finding.section == section]
        passed = [finding for finding in checks if finding.status == "ok"]
        infos = [finding for finding in checks if finding.status == "info"]
        problems = [finding for finding in checks if finding.status in ("warn", "fail")]
        if section == "versions":
            parts = [f"{finding.name} {finding.detail}" for finding in passed]
        elif section == "hooks":
            parts = [f"{len(passed)} of {len(checks)} applied", *_merge_repeated(finding.detail for finding in infos)]
        elif section == "transports":
            parts = [f"{len(passed)} of {len(checks)} available ({', '.join(finding.name for finding in passed)})"]
        else:
            parts = _merge_repeated(finding.detail for finding in passed or infos)
        status: Status = "ok" if passed else "info"
        lines.append((status, f"{section}: {', '.join(parts) or 'see below'}"))
        lines += [(finding.status, f"  {finding.status}: {finding.name}: {finding.detail}") for finding in problems]
    return lines


def _merge_repeated(details: Iterable[str]) -> list[str]:
    return [detail if count == 1 else f"{count} x {detail}" for detail, count in Counter(details).items()]


def to_json(findings: list[Finding]) -> str:
    return json.dumps({"usable": usable(findings), "findings": [asdict(finding) for finding in findings]}, indent=2)


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", "ok", platform.python_version())
    required = ("sf-xfuser", "torch", "xfuser", "diffusers", "yunchang")
    optional = ("triton", "flash-attn", "nccl4py", "nvshmem4py-cu12", "nvshmem4py-cu13")
    for name in (*required, *optional):
        try:
            detail, status = importlib.metadata.version(name), "ok"
        except importlib.metadata.PackageNotFoundError:
            detail, status = "not installed (optional)", "info"
            if name in required:
                detail, status = f"not installed: pip install {name}", "fail"
        yield Finding("versions", name, status, detail)  # type: ignore[arg-type]


def _hooks() -> Iterator[Finding]:
    if importlib.util.find_spec("xfuser") is None:
        return
    from sf_xfuser.integrations.xdit import plugin

    plugin.enable()
    for module, error in plugin.import_hooked_modules().items():
        yield Finding("hooks", module, "fail", f"cannot be imported: {error}")
    for hook, state in plugin.hook_states():
        status: Status = "ok" if state == "applied" else "fail" if state == "missing" and hook.required else "info"
        why = f"{hook.why}; removed when {hook.remove_when}"
        yield Finding("hooks", f"{hook.module}.{hook.name}", status, state, why)
    problem = plugin.unsupported()
    detail = problem or f"xfuser {plugin.CHECKED_VERSION}"
    yield Finding("versions", "hooks checked on", "fail" if problem else "ok", detail)


def _accelerators() -> Iterator[Finding]:
    import torch

    from sf_xfuser.integrations.xdit import cpu_platform

    if cpu_platform.needed():
        detail = f"none (torch {torch.__version__}); the CPU platform runs xDiT on CPU ranks over gloo"
        yield Finding("accelerators", "accelerator", "info", detail)
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
        yield Finding("accelerators", f"cuda:{index}", "ok", name)


def _transports() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    nccl = None if dist.is_nccl_available() else "this torch was built without NCCL"
    reasons = {
        "tcp": None,
        "two_sided over nccl": nccl if torch.cuda.is_available() else "no NVIDIA or AMD GPU",
        "two_sided over gloo": None if dist.is_gloo_available() else "this torch was built without gloo",
        "shm": segment.unavailable(),
        "symm_mem": symm_mem.unavailable(),
        "nccl_put": nccl_put.unavailable(),
        "nvshmem": nvshmem.unavailable(),
    }
    for name, reason in reasons.items():
        detail = f"not available: {reason}" if reason else "available"
        yield Finding("transports", name, "info" if reason else "ok", detail)


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
        detail = f"{name}={variables[name]}: {effect}"
        yield Finding("environment", name, "warn", detail)
    warnings = {}
    if nvshmem.unavailable() is None:
        warnings = nvshmem.environment_warnings(config.environment(nvshmem.VARIABLES), nvshmem.has_efa())
    for name, text in warnings.items():
        detail = f"{name} {text} (for --sp-transport nvshmem)"
        yield Finding("environment", name, "warn", detail)
    if not active and not warnings:
        detail = f"none of {len(_HARMFUL)} harmful variables is set"
        yield Finding("environment", "variables", "ok", detail)
