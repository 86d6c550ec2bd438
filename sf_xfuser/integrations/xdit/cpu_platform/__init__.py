"""Hooks that let xDiT's pipelines run on CPU ranks over gloo, on a machine without an accelerator.

Install ``HOOKS`` (``HookSet(HOOKS).install()``) if ``needed()``, before importing ``xfuser``: several xDiT modules
detect devices and packages at import. ``HookSet.remove()`` restores every hooked attribute, but not values computed at
import (``HAS_LONG_CTX_ATTN``).

Shapes: q/k/v ``[B, H, S, D]``, LSE ``[B, H, Sq]``, as in xDiT's registry.

Not supported: options of xDiT that need a GPU kernel (fp8, AITER, Sparge), its cache-dit adapter, and
``xFuserLongContextAttention`` (Sana with sequence parallelism), which does not import with yunchang 0.6.4 on any
platform.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from sf_xfuser.integrations.hooks import Hook, wrapper
from sf_xfuser.integrations.xdit.cpu_platform.cuda_names import (
    CpuTorch,
    HostEvent,
    cpu_fsdp,
    cpu_generator,
    skip_offload,
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
    """Whether no accelerator that xDiT supports is available, even with a CUDA build of PyTorch.

    Makes the checks of ``xfuser/envs.py``, except for ``torch.version.cuda``. Never raises; imports nothing of xDiT.
    """
    return not any(_is_available(name) for name in ("cuda", "musa", "npu", "mps"))


def _is_available(accelerator: str) -> bool:
    try:
        if accelerator == "musa":
            __import__("torch_musa")  # defines torch.musa; xfuser.envs imports it too
        owner = torch.backends if accelerator == "mps" else torch
        return bool(getattr(owner, accelerator).is_available())
    except Exception:
        return False


# --- placeholder for triton ---------------------------------------------------------------------------------------
#
# One module of xDiT imports triton without a guard, and a CPU build of PyTorch does not install it. `triton` is a
# placeholder during that import only, because PyTorch, diffusers and xDiT check whether triton is installed.


class _NoKernel:
    """Replaces a ``triton.jit`` kernel: it can be defined but not launched."""

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


def _add_triton_placeholder(path: Any) -> Any:
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        placeholder = _NoTriton("triton")
        placeholder.language = placeholder
        sys.modules["triton"] = sys.modules["triton.language"] = placeholder
    return path


def _remove_triton_placeholder(triton: Any) -> Any:
    if isinstance(triton, _NoTriton):
        sys.modules.pop("triton", None)
        sys.modules.pop("triton.language", None)
    return triton


# --- device and packages -------------------------------------------------------------------------------------------


def _always(value: Any) -> Callable[[Any], Any]:
    """A ``Hook.wrap``: the replacement takes any arguments and returns ``value``."""
    return wrapper(lambda original, *args, **kwargs: value)


def _packages(info: dict[str, Any]) -> dict[str, Any]:
    """xDiT's package table without GPU kernels, which may be installed with a CUDA build, and with yunchang."""
    kernels = [name for name in info if name.startswith("has_") and name != "has_long_ctx_attn"]
    return {**info, **dict.fromkeys(kernels, False), "has_long_ctx_attn": _yunchang_process_group() is not None}


def _yunchang_process_group(_: object = None) -> Any:
    """yunchang's global ``PROCESS_GROUP``, whose attributes ``set_seq_parallel_pg`` sets; None without yunchang."""
    try:
        from yunchang.globals import PROCESS_GROUP
    except ImportError:
        return None
    return PROCESS_GROUP


def _existing_names(names: list[str]) -> list[str]:
    package = sys.modules["xfuser.core.distributed"]
    return [name for name in names if hasattr(package, name)]


@wrapper
def _float32_by_default(init: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    if len(args) < 2:  # (warmup_steps, dtype, ...)
        kwargs.setdefault("dtype", torch.float32)
    init(self, *args, **kwargs)


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
        # PyTorch 2.13 crashes with SIGFPE; on a GPU the same call returns an empty tensor or an error.
        raise ValueError(f"attention of q {tuple(query.shape)} on k {tuple(key.shape)}: a sequence is empty")
    # The CPU kernel ignores the stride of D and reads it with stride 1: a transposed view gave an error of 1.5.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, scale=scale)
    return out, lse


class _CpuAten:
    """``torch.ops.aten`` with ``flash_attention`` for the operator without a CPU kernel."""

    _scaled_dot_product_flash_attention = staticmethod(flash_attention)

    def __init__(self, aten: Any) -> None:
        self._aten = aten

    def __getattr__(self, name: str) -> Any:
        return getattr(self._aten, name)


@wrapper
def _sdpa_flash_by_default(select: Any, self: Any, engine_config: Any = None) -> Any:
    if engine_config and engine_config.runtime_config.attention_backend:
        return select(self, engine_config)
    from xfuser.core.distributed.attention_backend import AttentionBackendType

    return AttentionBackendType.SDPA_FLASH


# --- the hooks -----------------------------------------------------------------------------------------------------

_ENVS = "xfuser.envs"
_FUNCTIONAL = "torch.distributed._functional_collectives"
_COORDINATOR = "xfuser.core.distributed.group_coordinator"
_NO_CPU_IN_XDIT = "xDiT supports the CPU device (envs.get_device_version and similar functions do not raise)"
_TRITON_GUARD = "block_mask.py guards the import as core/vsa_attention.py does"
_NATIVE = "_is_cpu"  # of xfuser.envs, if it supports the CPU (patches/)
_NO_GLOO_IN_XDIT = "xDiT's PipelineGroupCoordinator keeps the Work of its sends and does not wait for handshakes"

_PROCESS_GROUP_HOLDERS = (
    "xfuser.model_executor.layers.usp",
    "xfuser.core.sparge_attention.head_balance",
    "xfuser.core.distributed.fp8_comms",
)

HOOKS: tuple[Hook, ...] = (
    *(
        Hook(module=f"xfuser.core.sparge_attention{module}", name=name, wrap=wrap, why=why, remove_when=_TRITON_GUARD)
        for module, name, wrap, why in (
            ("", "__path__", _add_triton_placeholder, "block_mask.py, the next import, imports triton without a guard"),
            (".block_mask", "triton", _remove_triton_placeholder, "the placeholder must exist during that import only"),
        )
    ),
    *(
        Hook(
            module=_ENVS,
            name=name,
            wrap=_always(value),
            sweep=True,
            why=f"envs.py: {why}",
            remove_when=_NO_CPU_IN_XDIT,
            native=_NATIVE,
        )
        for name, value, why in (
            ("_is_cuda", False, "checks how PyTorch was built, not whether there is a GPU"),
            ("_is_hip", False, "checks how PyTorch was built, not whether there is a GPU"),
            ("get_device_version", None, "raises NotImplementedError here, and config/config.py calls it at import"),
            ("get_torch_distributed_backend", "gloo", "raises NotImplementedError here; parallel_state.py calls it"),
        )
    ),
    Hook(
        module=_ENVS,
        name="PackagesEnvChecker._on_rdna4",
        wrap=_always(False),
        required=False,
        why="envs.py: --use_torch_compile asks CUDA for the architecture of an AMD GPU",
        remove_when="_on_rdna4 needs no GPU",
    ),
    Hook(
        module=_ENVS,
        name="PACKAGES_CHECKER.packages_info",
        wrap=_packages,
        sweep=True,
        why="envs.py: without CUDA yunchang counts as missing (no sp_degree > 1), and installed GPU kernels as usable",
        remove_when="envs.check_long_ctx_attn does not need CUDA",
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
        why="core/distributed/__init__.py: __all__ names init_model_parallel_group, which is missing: `import *` fails",
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
            ("destroy", destroy_after_delivery, "does not wait for pending sends"),
        )
    ),
    Hook(
        module="torch.distributed.distributed_c10d",
        name="ProcessGroupGloo.__init__",
        wrap=share_event_loop,
        why="PyTorch gives each gloo group a thread that wakes every 10 ms, and xDiT creates about twenty groups",
        remove_when="PyTorch shares one gloo device between the groups of a process",
        required=False,
    ),
    *(
        Hook(
            module=module,
            name=name,
            wrap=wrap,
            why="gloo's collectives post sends before receives, so two ranks may send one after the other",
            remove_when="gloo posts receives before sends",
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
        remove_when="xDiT uses torch.accelerator, or synchronizes only if there is a device",
    ),
    Hook(
        module="torch.cuda",
        name="Event",
        wrap=lambda _: HostEvent,
        why="runner_models/base_model.py times every run with torch.cuda.Event, which raises here",
        remove_when="xDiT times with torch.Event or on the host clock",
    ),
    Hook(
        module="torch",
        name="Generator",
        wrap=cpu_generator,
        why='entrypoints/launch.py and the example scripts create a torch.Generator(device="cuda")',
        remove_when="they use envs.get_device",
    ),
    *(
        Hook(
            module=module,
            name=name,
            wrap=skip_offload,
            why='runner_models/base_model.py: the offload options use the device "cuda:<rank>" and CUDA streams',
            remove_when="it does not offload if envs.get_device is the CPU",
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
            why='runner_models and the examples move pipelines and components to the device "cuda:<rank>"',
            remove_when="they use envs.get_device",
        )
        for module, owner in (
            ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline"),
            ("diffusers.models.modeling_utils", "ModelMixin"),
            ("transformers.modeling_utils", "PreTrainedModel"),
        )
    ),
    *(
        Hook(
            module=f"xfuser.model_executor.models.runner_models.{module}",
            name="torch",
            wrap=CpuTorch,
            why=f'runner_models/{module}: creates tensors or a torch.Generator on the device "cuda"',
            remove_when="it uses envs.get_device",
            required=False,
        )
        for module in ("loading.meta_load", "ideogram4", "krea2", "lingbot_video", "ltx", "minimax_h3")
    ),
    Hook(
        module="xfuser.model_executor.cache.adapters.cache_dit",
        name="torch",
        wrap=CpuTorch,
        why="cache_dit.py: ranks exchange which steps to skip in a tensor on torch.cuda.current_device()",
        remove_when="it uses envs.get_device",
        required=False,
    ),
    Hook(
        module="xfuser.core.distributed.sharding",
        name="FSDP",
        wrap=cpu_fsdp,
        why="sharding.py: passes the rank as device_id, which FSDP interprets as an accelerator",
        remove_when="it passes a torch.device, and broadcasts the module states itself on a CPU",
    ),
)
