"""One case on one rank: checks every variant against a single process, then times the variants alternately."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.bench import calibrate, emulate, usp_variants
from sf_xfuser.bench.case import AttentionOptions, Case
from sf_xfuser.bench.progress import Progress
from sf_xfuser.bench.report import SUBJECT
from sf_xfuser.bench.rows import TOLERANCE, Sample, attention_rows
from sf_xfuser.bench.variants import ALONE, SINGLE, Variant, open_variants
from sf_xfuser.config import launch_environment
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.layout.topology import boot_id
from sf_xfuser.simulator import CallShape, predict
from sf_xfuser.simulator.cluster import Cluster
from sf_xfuser.torus.trace import Trace


class Measurement:
    """The variants of one case, their inputs and their samples. All methods are collective."""

    def __init__(self, options: AttentionOptions, case: Case, control: dist.ProcessGroup, cuda: bool) -> None:
        self.options, self.case, self.control = options, case, control
        self.rank = dist.get_rank()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        if options.emulated and case.inter_rate_bps is not None:
            if launch_environment().local_rank == 0:
                emulate.shape(case.inter_rate_bps)
            dist.barrier(control)
        self.variants = open_variants(case, options.topology, options.timeout_s, options.variants, options.against)
        self.samples = {variant.name: Sample() for variant in self.variants}
        shards = [self._shard(rank) for rank in range(case.world_size)]
        self.inputs = tuple(x.to(self.device) for x in shards[self.rank])
        self.keys, self.values = (torch.cat([shard[n] for shard in shards], dim=2) for n in (1, 2))
        self.queries = torch.cat([shard[0] for shard in shards], dim=2) if self.rank == 0 else None
        # On one machine a call takes from the first rank's start to the last rank's end. With more ranks than cores, a
        # rank may start late, and its own time would not show that. Other machines have other clocks.
        self._one_clock = not cuda and len(set(self._gather(boot_id()))) == 1
        self.attention_s = 0.0  # time in attention kernels of the current call
        self.trace: Trace | None = None  # records kernels of variants without a mesh

    def run(self, progress: Progress) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows and timelines, on rank 0. ``progress``: shown by rank 0."""
        if self.options.predict:
            progress.doing("calibrating the simulator")
        sampler = self._calibrate() if self.options.predict else None
        runnable = [variant for variant in self.variants if variant.call is not None or variant.name == SINGLE]
        progress.total = len(runnable) * (self.options.repeat + self.options.warmup + 2)
        with ExitStack() as stack:
            if usp_variants.unavailable() is None:
                stack.enter_context(usp_variants.attention_timer(self._kernel_ran))
            for variant in runnable:
                progress.doing(f"{variant.name}: checking the result")
                self._check(variant)
                while variant.selector is not None and not variant.selector.finished:  # autotune before timing
                    self._call(variant)
                progress.advance()
            samples = self.samples
            passed = [v for v in runnable if not samples[v.name].failure and not samples[v.name].refusal]
            for variant in passed:
                progress.doing(f"{variant.name}: recording memory and timeline")
                self._observe(variant)
                progress.advance()
            for number in range(self.options.warmup + self.options.repeat):
                if sampler is not None:
                    sampler.sample()
                shift = number % len(passed) if passed else 0
                for variant in (*passed[shift:], *passed[:shift]):
                    progress.doing(f"{variant.name}: call {number + 1}")
                    if variant.name != SINGLE or number < 2:  # the reference is slow; two calls are enough
                        self._time(variant, timed=number >= self.options.warmup or variant.name == SINGLE)
                    progress.advance()
        if sampler is not None:
            self._predict(sampler.cluster())
        if self.rank != 0:
            return [], []
        timelines = [s.timeline for s in reversed(self.samples.values()) if s.timeline is not None]  # torus first
        return attention_rows(self.case, self.variants, self.samples, on_gpu=self.device.type == "cuda"), timelines

    def close(self) -> None:
        for variant in self.variants:
            if variant.mesh is not None:
                variant.mesh.close()
            if variant.selector is not None:
                variant.selector.close()

    # -- prediction ------------------------------------------------------------------------------------------------

    def _calibrate(self) -> calibrate.SpeedSampler:
        """Measure the simulator's parameters on this cluster."""
        case = self.case
        mesh = next((variant.mesh for variant in self.variants if variant.name == SUBJECT), None)
        if mesh is None:
            raise ValueError(f"--predict calibrates with the variant {SUBJECT}; add it to --variants")
        rate_bps = case.inter_rate_bps if self.options.emulated else None
        settings = calibrate.CalibrationSettings(
            attend=sdpa_attend if usp_variants.unavailable() else usp_variants.registered_attention(),
            heads=case.heads, head_dim=case.head_dim, dtype=getattr(torch, case.dtype), device=self.device,
            seq_len=case.seq_len, across_gbps=None if rate_bps is None else rate_bps / 1e9,
        )  # fmt: skip
        return calibrate.SpeedSampler(calibrate.measure(mesh, settings, self._gather), mesh, settings, self._gather)

    def _predict(self, cluster: Cluster) -> None:
        case = self.case
        shape = CallShape(
            seq_len=case.seq_len, heads=case.heads, kv_heads=case.kv_heads or case.heads, head_dim=case.head_dim,
            batch=case.batch, dtype=case.dtype,
        )  # fmt: skip
        for variant in self.variants:
            if variant.simulated is not None and variant.call is not None:
                self.samples[variant.name].predicted_s = predict(cluster, shape, variant.simulated).seconds
        self.samples[ALONE].cluster = cluster.to_json()

    # -- correctness, memory, timeline and time --------------------------------------------------------------------

    def _check(self, variant: Variant) -> None:
        """Make the first call and compare its result with the single process's. Code of a peer may raise any error."""
        sample = self.samples[variant.name]
        started = time.perf_counter()
        try:
            out = self._call(variant)
            self._synchronize()
        except Exception as error:
            if variant.family != "peer":
                raise
            sample.refusal = f"{type(error).__name__}: {error}"
        took = time.perf_counter() - started
        if refusals := [text for text in self._gather(sample.refusal) if text]:
            sample.refusal = refusals[0]
            return
        errors = [0.0, 0.0, 0.0]
        if variant.name not in (SINGLE, ALONE):
            difference = (out.float().cpu() - self._expected).abs()
            errors = [x.item() for x in (difference.max(), difference.square().mean(), self._expected.square().mean())]
        reports = self._gather([took, *errors])
        sample.first_call_s = max(r[0] for r in reports)
        if variant.name in (SINGLE, ALONE):
            return
        if not all(math.isfinite(x) for r in reports for x in r):
            sample.failure = "wrong result: not all elements are finite"
            return
        sample.max_abs_error = max(r[1] for r in reports)
        sample.rms_error = math.sqrt(statistics.fmean(r[2] for r in reports))
        allowed = TOLERANCE[self.case.dtype]
        if variant.relative_error is not None:
            relative = sample.rms_error / math.sqrt(statistics.fmean(r[3] for r in reports))
            if relative > variant.relative_error:
                sample.failure = f"wrong result: relative error {relative:.1%}, allowed {variant.relative_error:.0%}"
        elif sample.max_abs_error > allowed:
            sample.failure = f"wrong result: error {sample.max_abs_error:.2e}, allowed {allowed:g}"

    @cached_property
    def _expected(self) -> torch.Tensor:
        """This rank's rows of PyTorch's attention over all keys."""
        k, v = self._all_keys_and_values()
        return torch.nn.functional.scaled_dot_product_attention(self.inputs[0], k, v).float().cpu()

    def _all_keys_and_values(self) -> tuple[torch.Tensor, ...]:
        """Of all ranks, on the device, with one head per query head."""
        repeat = self.case.heads // self.keys.shape[1]
        return tuple(x.to(self.device).repeat_interleave(repeat, dim=1) for x in (self.keys, self.values))

    def _observe(self, variant: Variant) -> None:
        """Make two untimed calls: one measures peak memory, one records the timeline (not of a peer)."""
        if variant.name == SINGLE:
            return
        sample, mesh = self.samples[variant.name], variant.mesh
        self._barrier()
        with peak_memory(self.device) as peak:
            self._call(variant)
        window = mesh.window if mesh is not None else None  # PyTorch's allocator does not count it
        sample.peak_bytes = self._gather(peak[0] + (window.window_bytes if window is not None else 0))
        if variant.family == "peer":
            return  # nothing of it can be recorded
        trace = Trace()
        if mesh is None:
            self.trace = trace
        else:
            mesh.trace = trace
        self._barrier()
        start = time.perf_counter()
        self._call(variant)
        self._synchronize()
        duration = time.perf_counter() - start
        self.trace = None
        if mesh is not None:
            mesh.trace = None
        reports = self._gather({"duration_s": duration, "spans": trace.finished(start)})
        m = self.case.ranks_per_machine
        sample.timeline = {
            "case": self.case.id,
            "variant": variant.name,
            "duration_s": max(report["duration_s"] for report in reports),
            "ranks": [{"rank": n, "machine": n // m, "spans": report["spans"]} for n, report in enumerate(reports)],
        }

    def _time(self, variant: Variant, timed: bool) -> None:
        sample = self.samples[variant.name]
        before = self._sent()  # before the barrier, after which the first rank already sends
        self._barrier()
        self.attention_s = 0.0
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            self._call(variant)
            end.record()
            end.synchronize()
            took = start.elapsed_time(end) / 1e3
            started_s = 0.0
        else:
            started_s = time.perf_counter()
            self._call(variant)
            took = time.perf_counter() - started_s
        reports = self._gather([took, self.attention_s, started_s])
        after = self._sent()
        if timed and self.rank == 0:
            first_s = min(r[2] for r in reports)
            late_s = [r[2] - first_s if self._one_clock else 0.0 for r in reports]
            sample.times_s.append(max(r[0] + late for r, late in zip(reports, late_s, strict=True)))
            sample.attention_s.append(max(r[1] for r in reports))
            sample.exposed_s.append(statistics.fmean(r[0] - r[1] for r in reports))
            if before is not None and after is not None:
                pairs = zip(before, after, strict=True)
                sample.wire.append([[b - a for a, b in zip(*lines, strict=True)] for lines in pairs])

    def _call(self, variant: Variant) -> torch.Tensor:
        if variant.name == SINGLE:
            if self.rank != 0:
                return self.inputs[0]
            assert self.queries is not None
            return self._timed_kernel(self.queries.to(self.device), *self._all_keys_and_values())
        assert variant.call is not None
        out: torch.Tensor = variant.call(*self.inputs)
        return out

    def _timed_kernel(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        out: torch.Tensor = sdpa_attend(q, k, v)[0]
        self._kernel_ran(start, time.perf_counter())
        return out

    def _kernel_ran(self, start_s: float, end_s: float) -> None:
        self.attention_s += end_s - start_s
        if self.trace is not None:
            self.trace.add("compute", "attention", start_s, end_s)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _shard(self, rank: int) -> tuple[torch.Tensor, ...]:
        """q, k, v of one rank: [B, H, S, D] as views of [B, S, H, D], the layout of xDiT's models."""
        case = self.case
        generator = torch.Generator().manual_seed(1000 * self.options.seed + rank)
        heads = (case.heads, *[case.kv_heads or case.heads] * 2)
        shapes = [(case.batch, case.tokens[rank], h, case.head_dim) for h in heads]
        dtype = getattr(torch, case.dtype)
        return tuple(torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes)

    def _gather(self, value: Any) -> list[Any]:
        reports: list[Any] = [None] * self.case.world_size
        dist.all_gather_object(reports, value, group=self.control)
        return reports

    def _barrier(self) -> None:
        self._synchronize()
        dist.barrier(self.control)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _sent(self) -> list[list[int]] | None:
        if self.rank != 0 or not self.options.emulated or self.case.num_machines == 1:
            return None
        return emulate.read_matrix(self.case.num_machines)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Yields ``[bytes]``: the peak memory that PyTorch allocates inside the block, set when the block ends."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak[0] = torch.cuda.max_memory_allocated() - before
        return
    # The profiler records each CPU allocation of this thread, the one that calls PyTorch.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield peak
    results = profile.profiler.kineto_results
    held = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"):
        held += change
        peak[0] = max(peak[0], held)
