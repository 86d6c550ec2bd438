"""Timing and checking of device kernels, for ``bench.gpu``: variants alternate, and caches are flushed between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from sf_xfuser.bench.document import print_row
from sf_xfuser.kernels.attend import SDPA

Variants = dict[str, Callable[[], object]]
_T = TypeVar("_T")

ERROR_FACTOR = 2.0
"""Largest error of a kernel, relative to the library's."""

_SAMPLED = 64  # rows of each head to compare with float64
_FLUSH_BYTES = 256 << 20  # more than the last-level cache of any GPU
_SLEEP_CYCLES = 20_000_000  # GPU sleep before each run, so that the host enqueues ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Tokens of all ranks, by part. ``models``: one attention call of 32 ranks, by model. ``per_rank``: tokens of each
    rank where only the host's time counts."""

    accuracy: int
    models: dict[str, int]
    per_rank: int
    fused: int
    bandwidth: int
    heads: int
    head_sizes: tuple[int, ...]


REAL = Sizes(
    accuracy=1024,
    models={"Flux 2048 px": 16896, "Flux 4096 px": 66048, "HunyuanVideo 720p, 129 frames": 119040},
    per_rank=1024, fused=16384, bandwidth=8192, heads=24, head_sizes=(128, 64),
)  # fmt: skip
SMOKE = Sizes(
    accuracy=40, models={"tiny": 96}, per_rank=4, fused=48, bandwidth=32, heads=24, head_sizes=(64,)
)  # fmt: skip


class BadResult(RuntimeError):
    """A kernel's result is wrong, so it is not timed."""


class Bench:
    """Device, sizes, number of runs, and rows. ``seconds``: after this time, ``cases`` ends."""

    def __init__(self, device: torch.device, sizes: Sizes, repeat: int, warmup: int, seconds: float) -> None:
        self.device, self.sizes, self.repeat, self.warmup = device, sizes, repeat, warmup
        self.on_gpu = device.type == "cuda"
        self._deadline_s = time.monotonic() + seconds
        self._flushed = torch.empty(_FLUSH_BYTES if self.on_gpu else 0, dtype=torch.uint8, device=device)

    def tokens(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Random [B, H, S, D] as a view of [B, S, H, D], the layout of xDiT's models."""
        B, H, S, D = shape
        return torch.randn(B, S, H, D, device=self.device).to(dtype).transpose(1, 2)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def row(self, name: str, what: str, value: float, unit: str, goal: str | None = None, **more: Any) -> None:
        """``goal``: a key of ``gpu.GOALS``."""
        print_row({"name": name, "what": what, "value": value, "unit": unit, "goal": goal, **more})

    def skip(self, name: str, reason: str) -> None:
        print_row({"name": name, "skipped": reason})

    def cases(self, cases: Iterable[_T]) -> Iterator[_T]:
        """The cases while there is time; then one row says that the others did not run."""
        for case in cases:
            if time.monotonic() > self._deadline_s:
                print_row({"name": f"{case} and the following", "not_run": "time"})
                return
            yield case

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """An error inside becomes a row of that name, and the part goes on."""
        try:
            yield
        except Exception as error:
            print_row({"name": name, "failed": f"{type(error).__name__}: {error}"})

    # -- times ---------------------------------------------------------------------------------------------------------

    def us(self, variants: Variants) -> dict[str, list[float]]:
        """Microseconds on the device of ``repeat`` runs of each variant after ``warmup`` runs."""
        return self._alternate(variants, self._device_us)

    def host_us(self, variants: Variants) -> dict[str, list[float]]:
        """Microseconds until the host has enqueued the run."""
        return self._alternate(variants, self._host_us)

    def _alternate(
        self, variants: Variants, measure: Callable[[Callable[[], object]], float]
    ) -> dict[str, list[float]]:
        taken: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(self.warmup + self.repeat):
            for name, work in variants.items():
                us = measure(work)
                if number >= self.warmup:
                    taken[name].append(us)
        return taken

    def _device_us(self, work: Callable[[], object]) -> float:
        if not self.on_gpu:
            return self._host_us(work)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flushed.zero_()
        torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end))

    def _host_us(self, work: Callable[[], object]) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        started_s = time.perf_counter()
        work()
        return 1e6 * (time.perf_counter() - started_s)

    def launches(self, work: Callable[[], object]) -> tuple[int, int]:
        """Kernels, and copies and fills, that one run starts on the GPU, counted by PyTorch's profiler. It does not see
        flags and waits."""
        from torch.autograd import DeviceType  # type: ignore[attr-defined]

        work()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() or [] if event.device_type == DeviceType.CUDA]
        copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
        return len(names) - copies, copies


def summary(us: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    quartiles = statistics.quantiles(us, n=4, method="inclusive") if len(us) > 1 else [us[0]] * 3
    return {"median_us": statistics.median(us), "quartiles_us": [quartiles[0], quartiles[2]], "repeat": len(us)}


def libraries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """PyTorch's attention functions that support these tensors, by xDiT's names."""
    supported: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = {}
    for name in ("SDPA_FLASH",) if q.device.type == "cpu" else ("CUDNN", "SDPA_FLASH"):
        work = partial(SDPA[name], q, k, v, None)
        try:
            work()
        except RuntimeError:  # unsupported head size, dtype or GPU
            continue
        supported[name] = work
    if not supported:
        raise BadResult(f"no attention library supports {tuple(q.shape)} {q.dtype}")
    return supported


def fastest(us: dict[str, list[float]], names: Iterable[str]) -> tuple[str, float]:
    """The name with the lowest median, and its median."""
    medians = {name: statistics.median(us[name]) for name in names}
    name = min(medians, key=medians.__getitem__)
    return name, medians[name]


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block, PyTorch fills new memory with NaN, which exposes elements that are never written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def error_ratio(got: torch.Tensor, library: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Error of ``got`` [B, H, S, D] against float64 relative to that of ``library``, on sampled rows, first and last
    included. inf if an element of ``got`` is not finite."""
    if not bool(got.isfinite().all()):
        return float("inf")
    rows = torch.randint(q.shape[2], (_SAMPLED,), device=q.device)
    rows[0], rows[1] = 0, q.shape[2] - 1
    scores = q[:, :, rows].double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    exact = torch.softmax(scores, -1) @ v.double()
    ours, theirs = (float((x[:, :, rows].double() - exact).abs().max()) for x in (got, library))
    floor = torch.finfo(got.dtype).eps * float(exact.abs().max()) / 2  # half a unit in the last place
    return ours / max(theirs, floor)


def require_exact(
    what: str, got: torch.Tensor, library: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> float:
    """``error_ratio``. Raises BadResult above ``ERROR_FACTOR``."""
    if (ratio := error_ratio(got, library, q, k, v)) > ERROR_FACTOR:
        raise BadResult(f"{what}: the error against float64 is {ratio:.3g} times the library's")
    return ratio
