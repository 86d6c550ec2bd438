"""``sf-xfuser doctor``: is this installation usable, and what would a run see?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from sf_xfuser import config as sp_args
from sf_xfuser.layout import topology
from sf_xfuser.transport.cpu import shm
from sf_xfuser.transport.gpu import nvshmem, symm_mem

Status = Literal["ok", "info", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. ``fail`` makes the installation unusable. ``why`` is for the JSON only."""

    section: str
    name: str
    status: Status
    detail: str
    why: str = ""


# Environment variables that quietly slow a run down or change it: name -> (values that do it, what it costs).
_TRAPS = {
    "NCCL_P2P_DISABLE": (("1",), "GPUs of one machine talk through host memory (seen: 1.6x instead of 1.9x)"),
    "NCCL_SHM_DISABLE": (("1",), "NCCL inside a machine falls back to the network"),
    "NCCL_IB_DISABLE": (("1",), "NCCL across machines falls back from InfiniBand to TCP"),
    "CUDA_DEVICE_MAX_CONNECTIONS": (
        tuple(map(str, range(1, 16))),
        "kernels and transfers share hardware queues: little overlaps, and one-sided transports may stall; set 32",
    ),
    "CUDA_LAUNCH_BLOCKING": (("1",), "every kernel is waited for: nothing overlaps"),
    "TORCH_NCCL_BLOCKING_WAIT": (("1",), "every NCCL wait blocks the host: nothing overlaps"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (("0",), "a lost rank hangs the others instead of ending them"),
    "TORCH_DEVICE_BACKEND_AUTOLOAD": (("0",), "--sp-backend is not registered: call sf_xfuser.enable() yourself"),
    sp_args.AUTOLOAD_VARIABLE: (
        ("0", "false", "no", "off"),
        "--sp-backend is not registered: call sf_xfuser.enable() yourself",
    ),
}


def examine() -> list[Finding]:
    """All findings. Imports torch and xfuser; opens no connection and starts no process group."""
    return [*_versions(), *_hooks(), *_accelerators(), *_transports(), *_topology(), *_environment()]


def usable(findings: list[Finding]) -> bool:
    return not any(finding.status == "fail" for finding in findings)


def summary(findings: list[Finding]) -> list[tuple[Status, str]]:
    """A line for each section, and below it one for each finding that warns or fails."""
    lines: list[tuple[Status, str]] = []
    for section in dict.fromkeys(finding.section for finding in findings):
        found = [finding for finding in findings if finding.section == section]
        fine = [finding for finding in found if finding.status == "ok"]
        rest = [finding for finding in found if finding.status == "info"]
        wrong = [finding for finding in found if finding.status in ("warn", "fail")]
        if section == "versions":
            said = [f"{finding.name} {finding.detail}" for finding in fine]
        elif section == "hooks":
            said = [f"{len(fine)} of {len(found)} applied", *_counted(finding.detail for finding in rest)]
        elif section == "transports":
            said = [f"{len(fine)} of {len(found)} available ({', '.join(finding.name for finding in fine)})"]
        else:
            said = _counted(finding.detail for finding in fine or rest)
        status: Status = "ok" if fine else "info"
        lines.append((status, f"{section}: {', '.join(said) or 'see below'}"))
        lines += [(finding.status, f"  {finding.status}: {finding.name}: {finding.detail}") for finding in wrong]
    return lines


def _counted(details: Iterable[str]) -> list[str]:
    return [detail if count == 1 else f"{count} x {detail}" for detail, count in Counter(details).items()]


def to_json(findings: list[Finding]) -> str:
    return json.dumps({"usable": usable(findings), "findings": [asdict(finding) for finding in findings]}, indent=2)


def _versions() -> Iterator[Finding]:
    yield Finding(section="versions", name="python", status="ok", detail=platform.python_version())
    required = ("sf-xfuser", "torch", "xfuser", "diffusers", "yunchang")
    optional = ("triton", "flash-attn", "nvshmem4py-cu12", "nvshmem4py-cu13")
    for name in (*required, *optional):
        try:
            detail, status = importlib.metadata.version(name), "ok"
        except importlib.metadata.PackageNotFoundError:
            needed = name in required
            detail = f"not installed: pip install {name}" if needed else "not installed (optional)"
            status = "fail" if needed else "info"
        yield Finding(section="versions", name=name, status=status, detail=detail)  # type: ignore[arg-type]


def _hooks() -> Iterator[Finding]:
    if importlib.util.find_spec("xfuser") is None:
        return
    from sf_xfuser.integrations.xdit import plugin

    plugin.enable()
    broken = plugin.import_hooked_modules()
    for module, error in broken.items():
        yield Finding(section="hooks", name=module, status="fail", detail=f"does not import: {error}")
    for hook, state in plugin.hook_states():
        wrong = state == "missing" and hook.required
        yield Finding(
            section="hooks",
            name=f"{hook.module}.{hook.name}",
            status="fail" if wrong else "ok" if state == "applied" else "info",
            detail=state,
            why=f"{hook.why}; goes when {hook.remove_when}",
        )
    problem = plugin.unsupported()
    checked = f"xfuser {plugin.CHECKED_VERSION}"
    yield Finding(
        section="versions", name="hooks checked on", status="fail" if problem else "ok", detail=problem or checked
    )


def _accelerators() -> Iterator[Finding]:
    import torch

    from sf_xfuser.integrations.xdit import cpu_platform

    if cpu_platform.needed():
        detail = f"none (torch {torch.__version__}): the CPU platform runs xDiT on CPU ranks over gloo"
        yield Finding(section="accelerators", name="accelerator", status="info", detail=detail)
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
        yield Finding(section="accelerators", name=f"cuda:{index}", status="ok", detail=name)


def _transports() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    backends = {
        "tcp": (True, ""),
        "two_sided over nccl": (dist.is_nccl_available() and gpu, "" if gpu else "no NVIDIA or AMD GPU here"),
        "two_sided over gloo": (dist.is_gloo_available(), "this torch was built without gloo"),
    }
    for name, (available, why_not) in backends.items():
        detail = "available" if available else f"not available: {why_not or 'this torch was built without it'}"
        yield Finding(section="transports", name=name, status="ok" if available else "info", detail=detail)
    for name, module in (("shm", shm), ("symm_mem", symm_mem), ("nvshmem", nvshmem)):
        reason = module.unavailable()
        detail = f"not available: {reason}" if reason else "available"
        yield Finding(section="transports", name=name, status="info" if reason else "ok", detail=detail)


def _topology() -> Iterator[Finding]:
    facts = topology.probe()
    yield Finding(section="topology", name="this machine", status="ok", detail=facts.machine)
    domain = facts.nvlink_domain or "none reported: the host is the machine"
    yield Finding(section="topology", name="NVLink domain", status="info", detail=domain)
    launched = sp_args.launch_environment()
    world = f"{launched.world_size} ranks" if launched.world_size else "not started by a launcher"
    yield Finding(section="topology", name="launcher", status="info", detail=world)


def _environment() -> Iterator[Finding]:
    seen = sp_args.environment(_TRAPS)
    sprung = {name: cost for name, (values, cost) in _TRAPS.items() if seen.get(name, "").lower() in values}
    for name, cost in sprung.items():
        detail = f"{name}={seen[name]}: {cost}"
        yield Finding(section="environment", name=name, status="warn", detail=detail)
    found = {} if nvshmem.unavailable() else nvshmem.cautions(sp_args.environment(nvshmem.VARIABLES), nvshmem.has_efa())
    for name, text in found.items():
        detail = f"{name} {text} (for --sp-transport nvshmem)"
        yield Finding(section="environment", name=name, status="warn", detail=detail)
    if not sprung and not found:
        detail = f"none of {len(_TRAPS)} known traps is set"
        yield Finding(section="environment", name="traps", status="ok", detail=detail)
