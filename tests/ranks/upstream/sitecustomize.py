"""Runs in every Python process that has this folder on PYTHONPATH: upstream's tests of ranks, on a CPU (upstream.py).

They were written for CUDA over NCCL: here ``"cuda:0"`` is the CPU, NCCL is gloo, and flash-attn is the folder beside
this file. With SF_XFUSER_AUTOLOAD=0 the CPU platform stands in the plugin's place. With SF_XFUSER_ARGS, how many
calls the plugin has handled is said at the end.
"""

import atexit
import functools
import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from sf_xfuser import config as args
from sf_xfuser.integrations.hooks import Hook, HookSet
from sf_xfuser.integrations.xdit import cpu_platform, session
from sf_xfuser.integrations.xdit.cpu_platform.cuda_names import to_cpu
from sf_xfuser.integrations.yunchang import attention as long_context


class CudaIsTheCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is torch.Tensor.cuda else to_cpu(func)(*args, **(kwargs or {}))


CudaIsTheCpu().__enter__()
torch.cuda.set_device = torch.cuda.reset_peak_memory_stats = lambda *_: None
torch.cuda.max_memory_allocated = lambda *_: 0
start_ranks = dist.init_process_group
dist.init_process_group = lambda backend="gloo", **more: start_ranks(backend.replace("nccl", "gloo"), **more)


def told(module, answer):
    """A wrap: those modules are given ``answer(what the original returns)``, all others what the original returns."""

    def wrap(original):
        @functools.wraps(original)
        def replacement(*given):
            asking = sys._getframe(1).f_globals["__name__"]
            return answer(original(*given)) if asking.startswith(module) else original(*given)

        return replacement

    return wrap


def report():
    counted = (session.current.usp, session.current.all_to_all, long_context._layers)
    handled = sum(each.handled for each in counted if each is not None)
    runpy.run_path(str(Path(__file__).parents[1] / "cases.py"))["report"]("handled", handled)


BECAUSE = {"why": "upstream's tests on CPU ranks", "remove_when": "upstream's tests name no accelerator"}
HOOKS = [
    Hook(
        module="yunchang.kernels.attention",
        name="_scaled_dot_product_flash_attention",
        wrap=lambda _: cpu_platform.flash_attention,
        **BECAUSE,
    ),
    Hook(  # without CUDA it takes yunchang in only where there is an NPU
        module="xfuser.envs",
        name="_is_npu",
        wrap=told("xfuser.core.long_ctx_attention", lambda _: True),
        **BECAUSE,
    ),
    Hook(
        module="xfuser.envs",
        name="PackagesEnvChecker.get_packages_info",
        wrap=told("__main__", lambda found: {**found, "has_flash_attn": True}),
        **BECAUSE,
    ),
]
if os.environ.get("SF_XFUSER_AUTOLOAD") == "0":
    HOOKS += cpu_platform.HOOKS
if args.ARGS_VARIABLE in os.environ:
    atexit.register(report)
HOOK_SET = HookSet(HOOKS, roots=("xfuser", "yunchang"))
HOOK_SET.install()

import yunchang.ring.utils  # noqa: E402

yunchang.ring.utils.update_npu_out = None  # xDiT imports it and only an NPU calls it; yunchang 0.6.4 has it not
