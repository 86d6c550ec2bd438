"""What xDiT lacks on a machine without an accelerator, as hooks: its pipelines then run on CPU ranks over gloo.

``needed()`` probes, ``HOOKS`` is the data, and the caller installs it (``HookSet(HOOKS).install()``) before ``xfuser``
is imported, because several xDiT modules decide at import what they offer. ``HookSet.remove()`` gives every hooked
attribute back; what a module computed at its import (``HAS_LONG_CTX_ATTN``) stays until it is imported again.

One way of speaking about tensors: q/k/v are ``[B, H, S, D]`` and an LSE is ``[B, H, Sq]``, as in xDiT's registry.

Not served: options of xDiT that name a GPU kernel (fp8, AITER, Sparge), its cache-dit adapter, and
``xFuserLongContextAttention`` objects (Sana with sequence parallelism), whose ring package does not import with
yunchang 0.6.4 on any platform.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from sf_xfuser.integrations.hooks import Hook
from sf_xfuser.integrations.xdit.cpu_platform.cuda_names import (
    CpuTorch,
    HostEvent,
    cpu_fsdp,
    cpu_generator,
    nothing_to_offload,
    to_cpu,
)
from sf_xfuser.integrations.xdit.cpu_platform.gloo import (
    all_to_all_both_ways,
    functional_all_to_all_both_ways,
    pair_gathers_both_ways,
    share_event_loop,
)
from sf_xfuser.integrations.xdit.cpu_platform.pipefusion import (
    communicate_shapes,
    destroy_after_delivery,
    pipeline_isend,
    pipeline_isend_skip,
)


def needed() -> bool:
    """True iff no accelerator that xDiT knows can be used here: also for a CUDA build of PyTorch without a GPU.

    Asks in the same way as ``xfuser/envs.py``, but does not trust ``torch.version.cuda``. Never raises, imports
    nothing of xDiT.
    """
    return not any(_usable(name) for name in ("cuda", "musa", "npu", "mps"))


def _usable(accelerator: str) -> bool:
    try:
        if accelerator == "musa":
            __import__("torch_musa")  # xfuser.envs imports it too: without it torch.musa does not exist
        owner = torch.backends if accelerator == "mps" else torch
        return bool(getattr(owner, accelerator).is_available())
    except Exception:
        return False


# --- an absent triton ---------------------------------------------------------------------------------------------
#
# xDiT imports triton in one module without a guard and without declaring it, and a CPU build of PyTorch does not
# bring it. While that module is imported `triton` is a stand-in; elsewhere its absence must stay visible, since
# PyTorch, diffusers and xDiT itself ask for it.


class _NoKernel:
    """What ``triton.jit`` gives without triton: a kernel that can be defined and not launched."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError("this attention backend of xDiT is a Triton kernel and triton is not installed")


class _NoTriton(ModuleType):
    language: ModuleType

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _NoKernel


def _lend_triton(path: Any) -> Any:
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        stand_in = _NoTriton("triton")
        stand_in.language = stand_in
        sys.modules["triton"] = sys.modules["triton.language"] = stand_in
    return path


def _take_triton_back(triton: Any) -> Any:
    if isinstance(triton, _NoTriton):
        sys.modules.pop("triton", None)
        sys.modules.pop("triton.language", None)
    return triton


# --- device and packages -------------------------------------------------------------------------------------------


def _always(value: Any) -> Callable[[Any], Any]:
    """A wrap: the replacement takes any arguments and returns ``value``."""

    def wrap(original: Any) -> Any:
        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return value

        return replacement

    return wrap


def _packages(found: dict[str, Any]) -> dict[str, Any]:
    """xDiT's package table without the GPU kernels (a CUDA build may have them installed), with yunchang."""
    kernels = [name for name in found if name.startswith("has_") and name != "has_long_ctx_attn"]
    return {**found, **dict.fromkeys(kernels, False), "has_long_ctx_attn": _yunchang_process_group() is not None}


def _yunchang_process_group(_: object = None) -> Any:
    """yunchang's one ``PROCESS_GROUP`` object (mutated by ``set_seq_parallel_pg``), or None without yunchang."""
    try:
        from yunchang.globals import PROCESS_GROUP
    except ImportError:
        return None
    return PROCESS_GROUP


def _existing_names(names: list[str]) -> list[str]:
    package = sys.modules["xfuser.core.distributed"]
    return [name for name in names if hasattr(package, name)]


def _float32_by_default(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def replacement(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) < 2:  # (warmup_steps, dtype, ...)
            kwargs.setdefault("dtype", torch.float32)
        init(self, *args, **kwargs)

    return replacement


# --- attention -----------------------------------------------------------------------------------------------------


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q ``[B, H, Sq, D]`` on k/v ``[B, Hkv, Skv, D]``: (out in q's dtype, natural-log LSE ``[B, H, Sq]``).

    The inputs may be views; the LSE is float32 (float64 for float64). Raises ValueError for an empty sequence.
    """
    if query.numel() == 0 or key.numel() == 0:
        # PyTorch 2.13 dies of SIGFPE here; on a GPU the same call returns an empty tensor or an error.
        raise ValueError(f"attention of q {tuple(query.shape)} on k {tuple(key.shape)}: a sequence is empty")
    # The CPU kernel reads D with stride 1 whatever the stride is: a transposed view gave an error of 1.5, unreported.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, scale=scale)
    return out, lse


class _CpuAten:
    """``torch.ops.aten`` with the one operator that has no CPU kernel replaced by its CPU twin."""

    _scaled_dot_product_flash_attention = staticmethod(flash_attention)

    def __init__(self, aten: Any) -> None:
        self._aten = aten

    def __getattr__(self, name: str) -> Any:
        return getattr(self._aten, name)


def _sdpa_flash_by_default(select: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(select)
    def replacement(self: Any, engine_config: Any = None) -> Any:
        if engine_config and engine_config.runtime_config.attention_backend:
            return select(self, engine_config)
        from xfuser.core.distributed.attention_backend import AttentionBackendType

        return AttentionBackendType.SDPA_FLASH

    return replacement


# --- the hooks -----------------------------------------------------------------------------------------------------

_ENVS = "xfuser.envs"
_FUNCTIONAL = "torch.distributed._functional_collectives"
_COORDINATOR = "xfuser.core.distributed.group_coordinator"
_NO_CPU_IN_XDIT = "xDiT names a CPU device itself (envs.get_device_version and its neighbours stop raising)"
_NATIVE = "_is_cpu"  # of xfuser.envs, where it names the CPU (patches/)
_NO_GLOO_IN_XDIT = "xDiT's PipelineGroupCoordinator keeps the Work of its sends and does not wait for handshakes"

_PROCESS_GROUP_HOLDERS = (
    "xfuser.model_executor.layers.usp",
    "xfuser.core.sparge_attention.head_balance",
    "xfuser.core.distributed.fp8_comms",
)

HOOKS: tuple[Hook, ...] = (
    Hook(
        module="xfuser.core.sparge_attention",
        name="__path__",
        wrap=_lend_triton,
        why="core/sparge_attention/block_mask.py, the next import, has an unguarded `import triton`: lend a stand-in",
        remove_when="block_mask.py guards the import as core/vsa_attention.py does",
    ),
    Hook(
        module="xfuser.core.sparge_attention.block_mask",
        name="triton",
        wrap=_take_triton_back,
        why="the stand-in for triton must not outlive the import that needed it",
        remove_when="block_mask.py guards the import as core/vsa_attention.py does",
    ),
    *(
        Hook(
            module=_ENVS,
            name=name,
            wrap=_always(False),
            sweep=True,
            why=f"envs.py: {name} asks how PyTorch was built, not whether there is a GPU",
            remove_when=_NO_CPU_IN_XDIT,
            native=_NATIVE,
        )
        for name in ("_is_cuda", "_is_hip")
    ),
    Hook(
        module=_ENVS,
        name="get_device_version",
        wrap=_always(None),
        sweep=True,
        why="envs.py: raises NotImplementedError without an accelerator, and config/config.py asks at import",
        remove_when=_NO_CPU_IN_XDIT,
        native=_NATIVE,
    ),
    Hook(
        module=_ENVS,
        name="get_torch_distributed_backend",
        wrap=_always("gloo"),
        sweep=True,
        why="envs.py: raises NotImplementedError without an accelerator; parallel_state.py asks it for the backend",
        remove_when=_NO_CPU_IN_XDIT,
        native=_NATIVE,
    ),
    Hook(
        module=_ENVS,
        name="PACKAGES_CHECKER.packages_info",
        wrap=_packages,
        sweep=True,
        why="envs.py: yunchang counts as absent without CUDA (sp_degree > 1 refused), installed GPU kernels as usable",
        remove_when="envs.check_long_ctx_attn no longer asks for CUDA",
    ),
    *(
        Hook(
            module=module,
            name="PROCESS_GROUP",
            wrap=_yunchang_process_group,
            why="without CUDA the module sets PROCESS_GROUP = None instead of importing yunchang's",
            remove_when="the module imports yunchang.globals.PROCESS_GROUP unconditionally",
            required=False,
        )
        for module in _PROCESS_GROUP_HOLDERS
    ),
    Hook(
        module="xfuser.core.distributed",
        name="__all__",
        wrap=_existing_names,
        why="core/distributed/__init__.py: __all__ names init_model_parallel_group, which it lacks: `import *` fails",
        remove_when="the package imports every name of its __all__",
    ),
    Hook(
        module="xfuser.config.config",
        name="RuntimeConfig.__init__",
        wrap=_float32_by_default,
        why="config/config.py: the default dtype float16 sizes the PipeFusion receive buffers; CPU models are float32",
        remove_when="the default dtype depends on the device",
    ),
    Hook(
        module="xfuser.core.distributed.attention_backend",
        name="aten",
        wrap=_CpuAten,
        why="attention_backend.py: SDPA_FLASH calls aten._scaled_dot_product_flash_attention, which has no CPU kernel",
        remove_when="PyTorch registers a CPU kernel for that operator or xDiT calls the CPU one",
    ),
    Hook(
        module="xfuser.core.distributed.runtime_state",
        name="RuntimeState._select_attention_backend",
        wrap=_sdpa_flash_by_default,
        why="runtime_state.py: the default is SDPA (no LSE, refused by ring), or CUDNN with a CUDA build without a GPU",
        remove_when="xDiT's default on a CPU returns an LSE",
    ),
    *(
        Hook(
            module=_COORDINATOR,
            name=f"PipelineGroupCoordinator.{name}",
            wrap=wrap,
            why=f"group_coordinator.py: {why}",
            remove_when=_NO_GLOO_IN_XDIT,
        )
        for name, wrap, why in (
            ("pipeline_isend", pipeline_isend, "drops the Work of the send, and gloo then drops the send"),
            ("pipeline_isend_skip", pipeline_isend_skip, "drops the Work of the send, and gloo then drops the send"),
            ("_communicate_shapes", communicate_shapes, "waits for its own send: asynchronous PipeFusion deadlocks"),
            ("destroy", destroy_after_delivery, "does not wait for sends that are still under way"),
        )
    ),
    Hook(
        module="torch.distributed.distributed_c10d",
        name="ProcessGroupGloo.__init__",
        wrap=share_event_loop,
        why="PyTorch gives each gloo group a thread that wakes every 10 ms, and xDiT makes some twenty groups",
        remove_when="PyTorch shares one gloo device among the groups of a process",
        required=False,
    ),
    *(
        Hook(
            module=module,
            name=name,
            wrap=wrap,
            why="gloo's collectives post sends before receives, and two ranks then send one after the other",
            remove_when="gloo says that it is ready to receive before it begins to send",
            required=False,
        )
        for module, name, wrap in (
            ("torch.distributed", "all_to_all_single", all_to_all_both_ways),
            (_FUNCTIONAL, "all_to_all_single", functional_all_to_all_both_ways),
            (_FUNCTIONAL, "all_gather_single", pair_gathers_both_ways),
            (_FUNCTIONAL, "all_gather_tensor", pair_gathers_both_ways),  # its older name
        )
    ),
    Hook(
        module="torch.cuda",
        name="synchronize",
        wrap=_always(None),
        sweep=True,
        why="runner.py, runner_models/base_model.py, group_coordinator.py call it unconditionally; it raises here",
        remove_when="xDiT asks torch.accelerator, or synchronizes only where there is a device",
    ),
    Hook(
        module="torch.cuda",
        name="Event",
        wrap=lambda _: HostEvent,
        why="runner_models/base_model.py times every run with torch.cuda.Event, which cannot be made here",
        remove_when="xDiT times with torch.Event or on the host clock",
    ),
    Hook(
        module="torch",
        name="Generator",
        wrap=cpu_generator,
        why='entrypoints/launch.py and the example scripts make a torch.Generator(device="cuda")',
        remove_when="they use envs.get_device",
    ),
    Hook(
        module="diffusers.pipelines.pipeline_utils",
        name="DiffusionPipeline.to",
        wrap=to_cpu,
        why='runner_models (base_model.py or loading/placement.py) and the examples move a pipeline to "cuda:<rank>"',
        remove_when="they use envs.get_device",
    ),
    *(
        Hook(
            module=module,
            name=name,
            wrap=nothing_to_offload,
            why='runner_models/base_model.py: the offload options name the device "cuda:<rank>", and CUDA streams',
            remove_when="it offloads only where envs.get_device is not the CPU",
        )
        for module, name in (
            ("diffusers.hooks", "apply_group_offloading"),
            ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline.enable_model_cpu_offload"),
            ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline.enable_sequential_cpu_offload"),
        )
    ),
    *(
        Hook(
            module=module,
            name=f"{owner}.to",
            wrap=to_cpu,
            why='runner_models (loading/shard.py, lingbot_video.py) move single components to "cuda:<rank>"',
            remove_when="they use envs.get_device",
        )
        for module, owner in (
            ("diffusers.models.modeling_utils", "ModelMixin"),
            ("transformers.modeling_utils", "PreTrainedModel"),
        )
    ),
    *(
        Hook(
            module=f"xfuser.model_executor.models.runner_models.{module}",
            name="torch",
            wrap=CpuTorch,
            why=f'runner_models/{module}: makes tensors or a torch.Generator on the device "cuda"',
            remove_when="it uses envs.get_device",
            required=False,
        )
        for module in ("loading.meta_load", "ideogram4", "krea2", "lingbot_video", "ltx", "minimax_h3")
    ),
    Hook(
        module="xfuser.model_executor.cache.adapters.cache_dit",
        name="torch",
        wrap=CpuTorch,
        why="cache/adapters/cache_dit.py: ranks agree on what to skip by a tensor on torch.cuda.current_device()",
        remove_when="it uses envs.get_device",
        required=False,
    ),
    Hook(
        module="xfuser.core.distributed.sharding",
        name="FSDP",
        wrap=cpu_fsdp,
        why="sharding.py: passes the rank as device_id, which FSDP takes for one of the accelerator",
        remove_when="it passes a torch.device, and synchronizes the states itself on a CPU",
    ),
)
