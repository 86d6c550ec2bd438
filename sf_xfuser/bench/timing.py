"""Timing and checking of device kernels, for ``bench.gpu``: variants alternate, and caches are flushed between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sf_xfuser.kernels.attend import SDPA
from sf_xfuser.kernels.fused import HEAD_SIZES

Variants = dict[str, Callable[[], object]]
Row = dict[str, Any]

_ERROR_FACTOR = 2.0  # allowed error relative to the library's
_SAMPLED = 64  # rows of each head to compare with float64
_FLUSH_BYTES = 256 << 20  # more than the last-level cache of any GPU
_SLEEP_CYCLES = 10_000_000  # GPU sleep before each run, so that the host enqueues ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Tokens of all ranks, by part. ``pieces``: numbers of query and of key tokens; every pair is measured."""

    chunking: int
    fused: int
    bandwidth: int
    enqueue: int
    heads: int
    head_sizes: tuple[int, ...]
    pieces: tuple[int, ...]
    piece_heads: int
    piece_head_sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


REAL = Sizes(
    chunking=32768, fused=16384, bandwidth=8192, enqueue=32768, heads=24, head_sizes=(128, 64),
    pieces=(1024, 4096, 16384), piece_heads=6, piece_head_sizes=HEAD_SIZES, dtypes=(torch.bfloat16, torch.float16),
)  # fmt: skip
SMOKE = Sizes(
    chunking=96, fused=48, bandwidth=32, enqueue=128, heads=8, head_sizes=(64,), pieces=(8, 24), piece_heads=2,
    piece_head_sizes=(64, 72), dtypes=(torch.bfloat16,),
)  # fmt: skip


class BadResult(RuntimeError):
    """A kernel's result is wrong, so it is not timed."""


class Bench:
    """Device, sizes and number of runs; ``rows`` collects the results."""

    def __init__(self, device: torch.device, sizes: Sizes, repeat: int, warmup: int) -> None:
        self.device, self.sizes, self.repeat, self.warmup = device, sizes, repeat, warmup
        self.rows: list[Row] = []
        self.on_gpu = device.type == "cuda"
        self._flushed = torch.empty(_FLUSH_BYTES if self.on_gpu else 0, dtype=torch.uint8, device=device)

    def tokens(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Random [B, H, S, D] as a view of [B, S, H, D], the layout of xDiT's models."""
        B, H, S, D = shape
        return torch.randn(B, S, H, D, device=self.device).to(dtype).transpose(1, 2)

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

    def add(self, part: str, variant: str, us: Sequence[float], **more: Any) -> None:
        self.rows.append({"part": part, "variant": variant, **summary(us), **more})


def summary(us: Sequence[float]) -> Row:
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


def fastest(us: dict[str, list[float]], names: Sequence[str]) -> tuple[str, float]:
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


def require_exact(
    what: str, got: torch.Tensor, library: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> float:
    """Compare ``got`` [B, H, S, D] with float64 on sampled rows, first and last included.

    Returns the largest error relative to the allowed one. Raises BadResult above 1 or if an element is not finite.
    """
    if not bool(got.isfinite().all()):
        raise BadResult(f"{what}: {int((~got.isfinite()).sum())} of {got.numel()} elements are not finite")
    rows = torch.randint(q.shape[2], (_SAMPLED,), device=q.device)
    rows[0], rows[1] = 0, q.shape[2] - 1
    scores = q[:, :, rows].double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    exact = torch.softmax(scores, -1) @ v.double()
    ours, theirs = (float((x[:, :, rows].double() - exact).abs().max()) for x in (got, library))
    floor = torch.finfo(got.dtype).eps * float(exact.abs().max()) / 2  # half a unit in the last place
    relative = ours / (_ERROR_FACTOR * max(theirs, floor))
    if relative > 1:
        raise BadResult(f"{what}: error {ours:.3g} against float64; the library has {theirs:.3g}")
    return relative
