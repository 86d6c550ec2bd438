"""The rank side of ``sf-xfuser bench``: runs cases on the ranks of this process's job and writes rows.

``python -m sf_xfuser.bench.rank ORDER.json`` is what every rank of an emulated cluster runs; under torchrun on GPUs the
``bench`` command calls :func:`run` itself.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from sf_xfuser.bench import calibrate as probe
from sf_xfuser.bench import emulate, usp_variants
from sf_xfuser.bench.case import Case
from sf_xfuser.bench.report import SUBJECT
from sf_xfuser.bench.rows import TOLERANCE, Sample, attention_rows, pipeline_rows
from sf_xfuser.bench.variants import ALONE, SINGLE, Variant, open_variants, traced
from sf_xfuser.config import launch_environment
from sf_xfuser.integrations.xdit import plugin
from sf_xfuser.kernels import sdpa_attend
from sf_xfuser.simulator import CallShape, predict
from sf_xfuser.simulator.cluster import Cluster
from sf_xfuser.torus.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOrder:
    """What the ranks are to do. ``variants``: names, None for all. ``repeat`` timed calls of each variant after ``warmup``
    untimed ones. ``emulated``: ranks are on an emulated cluster, whose links they shape and count. ``predict``: measure
    the cluster first and say what each variant should take."""

    cases: tuple[Case, ...]
    variants: tuple[str, ...] | None = None
    repeat: int = 7
    warmup: int = 2
    seed: int = 0
    topology: str = "auto"
    timeout_s: float = 300.0
    emulated: bool = False
    predict: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> AttentionOrder:
        values = json.loads(text)
        variants = values.pop("variants")
        return cls(cases=tuple(Case(**c) for c in values.pop("cases")), variants=variants and tuple(variants), **values)


def run(order: AttentionOrder, done: Callable[[list[dict[str, Any]], list[dict[str, Any]]], None]) -> None:
    """Measure every case. Collective over the job; on rank 0 ``done(rows, timelines)`` follows each case.

    Rows and timelines are those of ``report``. Sets up torch.distributed. Raises what the ranks raise.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device((launch_environment().local_rank or 0) % torch.cuda.device_count())
    if usp_variants.available() is None:
        plugin.enable()  # before the first group: on a CPU all of them then share one event loop
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=order.timeout_s))
    try:
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=order.timeout_s))
        for case in order.cases:
            if dist.get_world_size() != case.world_size:
                raise ValueError(f"case {case.id} needs {case.world_size} ranks, the job has {dist.get_world_size()}")
            measurement = _Measurement(order, case, control, cuda)
            rows, timelines = measurement.run()
            measurement.close()
            if dist.get_rank() == 0:
                done(rows, timelines)
        dist.barrier(control)
    finally:
        dist.destroy_process_group()


class _Measurement:
    """One case on one rank."""

    def __init__(self, order: AttentionOrder, case: Case, control: dist.ProcessGroup, cuda: bool) -> None:
        self.order, self.case, self.control = order, case, control
        self.rank = dist.get_rank()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        if order.emulated and case.inter_rate_bps is not None:
            if launch_environment().local_rank == 0:
                emulate.shape(case.inter_rate_bps)
            dist.barrier(control)
        self.variants = open_variants(case, order.topology, order.timeout_s, order.variants)
        self.samples = {variant.name: Sample() for variant in self.variants}
        shards = [self._shard(rank) for rank in range(case.world_size)]
        self.inputs = tuple(x.to(self.device) for x in shards[self.rank])
        self.keys, self.values = (torch.cat([shard[n] for shard in shards], dim=2) for n in (1, 2))
        self.queries = torch.cat([shard[0] for shard in shards], dim=2) if self.rank == 0 else None
        self.spent = 0.0  # seconds inside attention kernels since last reset

    def run(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        pace = self._probe() if self.order.predict else None
        runnable = [variant for variant in self.variants if variant.call is not None or variant.name == SINGLE]
        total = len(runnable) * (self.order.repeat + self.order.warmup + 3)
        with ExitStack() as stack:
            if usp_variants.available() is None:
                stack.enter_context(usp_variants.attention_timer(self._kernel_ran))
            advance = stack.enter_context(self._progress(total))
            for variant in runnable:
                advance(f"{variant.name}: checking")
                self._gate(variant)
                while variant.choice is not None and not variant.choice.finished:  # its trial
                    self._call(variant)
            for variant in runnable:
                if not self.samples[variant.name].failure:
                    advance(f"{variant.name}: memory and timeline")
                    self._observe(variant)
            passed = [variant for variant in runnable if not self.samples[variant.name].failure]
            for number in range(self.order.warmup + self.order.repeat):
                if pace is not None:
                    pace.sample()
                shift = number % len(passed) if passed else 0
                for variant in (*passed[shift:], *passed[:shift]):
                    advance(f"{variant.name}: call {number + 1}")
                    if variant.name == SINGLE and number >= 2:
                        continue  # a whole computation on one rank: two calls are enough for a reference
                    self._time(variant, timed=number >= self.order.warmup or variant.name == SINGLE)
        if pace is not None:
            self._predict(pace.cluster())
        if self.rank != 0:
            return [], []
        timelines = [s.timeline for s in reversed(self.samples.values()) if s.timeline is not None]
        return attention_rows(
            self.case, self.variants, self.samples, on_gpu=self.device.type == "cuda"
        ), timelines  # torus first

    def close(self) -> None:
        for variant in self.variants:
            if variant.mesh is not None:
                variant.mesh.close()
            if variant.choice is not None:
                variant.choice.close()

    # -- measurements ----------------------------------------------------------------------------------------------

    def _probe(self) -> probe.Pace:
        """Measure the cluster, in pieces."""
        case = self.case
        mesh = next(
            (variant.mesh for variant in self.variants if variant.mesh is not None and variant.name == SUBJECT), None
        )
        if mesh is None:
            raise ValueError(
                f"--predict measures over the links of the variant {SUBJECT}, which is not among the variants"
            )
        rate_bps = case.inter_rate_bps if self.order.emulated else None
        order = probe.Order(
            attend=sdpa_attend if usp_variants.available() else usp_variants.registered_attention(),
            heads=case.heads,
            head_dim=case.head_dim,
            dtype=getattr(torch, case.dtype),
            device=self.device,
            seq_len=case.seq_len,
            across_gbps=None if rate_bps is None else rate_bps / 1e9,
        )
        return probe.Pace(probe.measure(mesh, order, self._gather), mesh, order, self._gather)

    def _predict(self, cluster: Cluster) -> None:
        """Ask the simulator what each variant takes on it."""
        case = self.case
        shape = CallShape(
            seq_len=case.seq_len,
            heads=case.heads,
            kv_heads=case.kv_heads or case.heads,
            head_dim=case.head_dim,
            batch=case.batch,
            dtype=case.dtype,
        )
        for variant in self.variants:
            if variant.replayed is not None and variant.call is not None:
                self.samples[variant.name].predicted_s = predict(cluster, shape, variant.replayed).seconds
        self.samples[ALONE].cluster = cluster.to_json()

    def _gate(self, variant: Variant) -> None:
        """First call, and whether its result is the single process's."""
        sample = self.samples[variant.name]
        started = time.perf_counter()
        out = self._call(variant)
        self._synchronize()
        took = time.perf_counter() - started
        errors = [0.0, 0.0, 0.0]
        if variant.name not in (SINGLE, ALONE):
            error = (out.float().cpu() - self._expected).abs()
            errors = [x.item() for x in (error.max(), error.square().mean(), self._expected.square().mean())]
        reports = self._gather([took, *errors])
        sample.first_call_s = max(r[0] for r in reports)
        if variant.name in (SINGLE, ALONE):
            return
        finite = all(math.isfinite(x) for r in reports for x in r)
        if not finite:
            sample.failure = "wrong result: it is not finite everywhere"
            return
        sample.max_abs_error = max(r[1] for r in reports)
        sample.rms_error = math.sqrt(statistics.fmean(r[2] for r in reports))
        allowed = TOLERANCE[self.case.dtype]
        if variant.relative_error is not None:
            relative = sample.rms_error / math.sqrt(statistics.fmean(r[3] for r in reports))
            if relative > variant.relative_error:
                sample.failure = f"wrong result: differs by {relative:.1%} ({variant.relative_error:.0%} allowed)"
        elif sample.max_abs_error > allowed:
            seen = f"{sample.max_abs_error:.2e}"
            sample.failure = f"wrong result: differs by {seen} from one process ({allowed:g} allowed)"

    @cached_property
    def _expected(self) -> torch.Tensor:
        """This rank's rows of the single-process result, by PyTorch's attention on one process."""
        k, v = self._every_key_and_value()
        return torch.nn.functional.scaled_dot_product_attention(self.inputs[0], k, v).float().cpu()

    def _every_key_and_value(self) -> tuple[torch.Tensor, ...]:
        """Those of all ranks, on the device, with one head for each query head."""
        repeat = self.case.heads // self.keys.shape[1]
        return tuple(x.to(self.device).repeat_interleave(repeat, dim=1) for x in (self.keys, self.values))

    def _observe(self, variant: Variant) -> None:
        """One call each, not timed: activation memory at its peak, and what happens when."""
        if variant.name == SINGLE:
            return
        sample = self.samples[variant.name]
        self._barrier()
        with _peak_memory(self.device) as peak:
            self._call(variant)
        window = (
            variant.mesh.window if variant.mesh is not None else None
        )  # memory that PyTorch's allocator does not see
        sample.peak_bytes = self._gather(peak[0] + (window.window_bytes if window is not None else 0))
        trace = Trace()
        self._recording = trace if variant.mesh is None else None
        traced(variant, trace)
        self._barrier()
        start = time.perf_counter()
        self._call(variant)
        self._synchronize()
        duration = time.perf_counter() - start
        traced(variant, None)
        self._recording = None
        ranks = self._gather({"duration_s": duration, "spans": trace.finished(start)})
        sample.timeline = {
            "case": self.case.id,
            "variant": variant.name,
            "duration_s": max(r["duration_s"] for r in ranks),
            "ranks": [
                {"rank": rank, "machine": rank // self.case.ranks_per_machine, "spans": report["spans"]}
                for rank, report in enumerate(ranks)
            ],
        }

    def _time(self, variant: Variant, timed: bool) -> None:
        sample = self.samples[variant.name]
        before = self._sent()  # before any rank starts: a chunk leaves without being asked for
        self._barrier()
        self.spent = 0.0
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            self._call(variant)
            end.record()
            end.synchronize()
            took = start.elapsed_time(end) / 1e3
        else:
            started = time.perf_counter()
            self._call(variant)
            took = time.perf_counter() - started
        reports = self._gather([took, self.spent])
        after = self._sent()
        if timed and self.rank == 0:
            sample.times_s.append(max(r[0] for r in reports))
            sample.attention_s.append(max(r[1] for r in reports))
            sample.exposed_s.append(statistics.fmean(r[0] - r[1] for r in reports))
            if before is not None and after is not None:
                sample.wire.append(
                    [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip(before, after, strict=True)]
                )

    def _call(self, variant: Variant) -> torch.Tensor:
        if variant.name == SINGLE:
            if self.rank != 0:
                return self.inputs[0]
            assert self.queries is not None
            return self._timed_kernel(self.queries.to(self.device), *self._every_key_and_value())
        assert variant.call is not None
        out: torch.Tensor = variant.call(*self.inputs)
        return out

    def _timed_kernel(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        out: torch.Tensor = sdpa_attend(q, k, v)[0]
        self._kernel_ran(start, time.perf_counter())
        return out

    _recording: Trace | None = None

    def _kernel_ran(self, start_s: float, end_s: float) -> None:
        self.spent += end_s - start_s
        if self._recording is not None:
            self._recording.add("compute", "attention", start_s, end_s)

    # -- small things ----------------------------------------------------------------------------------------------

    def _shard(self, rank: int) -> tuple[torch.Tensor, ...]:
        """q, k, v of one rank, as views [B,H,S,D] of [B,S,H,D], as xDiT's models hand them over."""
        case = self.case
        make = torch.Generator().manual_seed(1000 * self.order.seed + rank)
        heads = (case.heads, *[case.kv_heads or case.heads] * 2)
        shapes = [(case.batch, case.tokens[rank], h, case.head_dim) for h in heads]
        dtype = getattr(torch, case.dtype)
        return tuple(torch.randn(shape, generator=make).to(dtype).transpose(1, 2) for shape in shapes)

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
        if self.rank != 0 or not self.order.emulated or self.case.num_machines == 1:
            return None
        return emulate.read_matrix(self.case.num_machines)

    @contextmanager
    def _progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """``advance(text)`` on rank 0's terminal."""
        console = Console(stderr=True)
        if self.rank != 0 or not console.is_terminal:
            yield lambda text: None
            return
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(self.case.id, total=total)
            yield lambda text: progress.update(task, advance=1, description=f"{self.case.id}  {text}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOrder:
    """What the ranks are to do with a pipeline. ``case`` goes into the rows; empty where the cluster is real."""

    model: str
    topology: str
    plan: str
    case: dict[str, Any]
    steps: int
    rounds: int
    dtype: str
    seed: int
    timeout_s: float
    compress: Sequence[str] = ()


def run_pipeline(order: PipelineOrder) -> list[dict[str, Any]]:
    """Rows of whole denoising steps, on rank 0. Collective over the job. Raises ValueError for an unknown model."""
    from sf_xfuser.bench.pipeline import SHAPES, PipelineOptions, make_model, measure

    missing = usp_variants.available()
    if missing is not None:
        raise ValueError(f"--pipeline runs xDiT's pipelines: {missing}")
    with ExitStack() as stack:
        model, shape = order.model, SHAPES.get(order.model)
        if shape is not None:  # every rank of a host could share one; making it is a matter of seconds
            model = str(make_model(order.model, stack.enter_context(tempfile.TemporaryDirectory())))
        records = measure(
            PipelineOptions(
                model=model,
                topology=order.topology,
                plan=order.plan,
                compress=tuple(order.compress),
                size=shape.size if shape else {},
                text_length=shape.text_length if shape else 256,
                steps=order.steps,
                rounds=order.rounds,
                dtype=order.dtype,
                seed=order.seed,
                timeout=order.timeout_s,
            )
        )
        rank = dist.get_rank()
        dist.barrier()
        world_size = dist.get_world_size()
        dist.destroy_process_group()
    if rank != 0:
        return []
    case = order.case or {"id": f"{order.model} on {world_size} ranks", "model": order.model}
    return pipeline_rows(case, order.dtype, records)


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """``[bytes]`` that PyTorch's allocator held at most inside, above what it held before; filled at the end."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak[0] = torch.cuda.max_memory_allocated() - before
        return
    # The profiler sees each allocation of the CPU allocator on this thread, where PyTorch calls are made.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield peak
    results = profile.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = 0
    for _, change in changes:
        held += change
        peak[0] = max(peak[0], held)


def main() -> None:
    """``[--pipeline] ORDER.json``. Rank 0 rewrites ``ORDER.rows`` after each case, so that what was measured survives
    a failure."""
    path = Path(sys.argv[-1])
    rows: list[dict[str, Any]] = []
    timelines: list[dict[str, Any]] = []

    def done(new_rows: list[dict[str, Any]], new_timelines: list[dict[str, Any]]) -> None:
        rows.extend(new_rows)
        timelines.extend(new_timelines)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps({"rows": rows, "timelines": timelines}))
        partial.replace(path.with_suffix(".rows"))

    if sys.argv[1] == "--pipeline":
        if found := run_pipeline(PipelineOrder(**json.loads(path.read_text()))):
            done(found, [])
    else:
        run(AttentionOrder.from_json(path.read_text()), done)


if __name__ == "__main__":
    main()
