"""CPU replacements for CUDA names in the runner and in diffusers: events, ``"cuda:<rank>"`` devices, offload, FSDP."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from sf_xfuser.integrations.hooks import wrapper


class HostEvent:
    """``torch.cuda.Event`` on the host clock: on a CPU, work is complete when its call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time_s: float | None = None

    def record(self, stream: Any = None) -> None:
        self._time_s = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: HostEvent) -> float:
        """Milliseconds from this event to ``end_event``. Raises RuntimeError if one was not recorded."""
        if self._time_s is None or end_event._time_s is None:
            raise RuntimeError("elapsed_time needs two recorded events; call record() on both")
        return (end_event._time_s - self._time_s) * 1e3


def _cpu_for_cuda(value: Any) -> Any:
    """``value``, or the CPU if it is a CUDA device."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


@wrapper
def to_cpu(call: Any, *args: Any, **kwargs: Any) -> Any:
    return call(*map(_cpu_for_cuda, args), **{key: _cpu_for_cuda(value) for key, value in kwargs.items()})


def cpu_generator(generator: type[torch.Generator]) -> type:
    """``torch.Generator`` that creates a CPU generator for a CUDA device."""

    class AnyGenerator(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, generator)

    class Generator(metaclass=AnyGenerator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator(device=_cpu_for_cuda(device))

    return Generator


class CpuTorch:
    """``torch`` for xDiT modules with hard-coded CUDA devices: functions with a device argument get the CPU."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._owner, name)
        if name == "cuda":
            return CpuCuda(value)
        return to_cpu(value) if name in ("tensor", "empty", "Generator") else value


class CpuCuda:
    """``torch.cuda`` for the same modules: the current device is the CPU."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._owner, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")


@wrapper
def skip_offload(offload: Any, *args: Any, **kwargs: Any) -> None:
    """Do nothing for a CUDA device: the weights are in host memory already."""
    values = (*args, *kwargs.values())
    if all(_cpu_for_cuda(value) is value for value in values if isinstance(value, (str, torch.device))):
        offload(*args, **kwargs)


def cpu_fsdp(fsdp: type) -> Callable[..., Any]:
    @functools.wraps(fsdp, updated=())
    def replacement(module: Any, process_group: Any = None, **kwargs: Any) -> Any:
        if kwargs.pop("sync_module_states", False):  # FSDP does not support it on a CPU
            group = process_group or torch.distributed.group.WORLD
            for tensor in (*module.parameters(), *module.buffers()):
                torch.distributed.broadcast(tensor.detach(), group=group, group_src=0)
        return fsdp(module, process_group, **{**kwargs, "device_id": torch.device("cpu")})

    return replacement
