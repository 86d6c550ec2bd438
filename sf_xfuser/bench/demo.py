"""The rank side of ``make demo``: xDiT's Flux pipeline with several kinds of attention, in one process group.

``python -m sf_xfuser.bench.demo JOB.json`` runs on every rank. Rank 0 writes ``JOB.result`` and a picture of each
variant, and prints a line that starts with ``PROGRESS`` before each part of the work.

On an emulated cluster the rate of the links is set such that a call takes as many times longer on the wire than in
attention as Flux does at 4096 px on four machines with eight H100 each and 400 Gbit/s. The simulator gives this ratio,
and all ranks attend at once to measure the attention of this computer.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.autotune.selector import build_selector
from sf_xfuser.bench import emulate
from sf_xfuser.bench.measurement import peak_memory
from sf_xfuser.bench.pipeline import PipelineOptions, denoise, open_pipeline
from sf_xfuser.bench.usp_variants import attention_timer, make_groups, registered_attention
from sf_xfuser.config import launch_environment
from sf_xfuser.integrations.xdit import plugin, session
from sf_xfuser.layout.plan import UNEVEN, make_plan
from sf_xfuser.layout.usp_layouts import XditConfig
from sf_xfuser.simulator import TorusVariant, predict
from sf_xfuser.simulator.models import MODELS
from sf_xfuser.simulator.presets import preset
from sf_xfuser.torus.trace import Trace

PROGRESS = "@progress "
"""Starts a line of rank 0: ``[done, total, text]`` as JSON."""
SINGLE, USP, ULYSSES, TORUS, AUTO = "one process", "xDiT USP", "flat Ulysses", "torus", "auto"
TOLERANCE = 1e-3  # of pixel values in [0, 1], and of latents, in fp32
_GBPS = 400
_SAMPLES = 5  # attention calls after each picture, before the rate is set
_TRACED = 3  # attention calls per timeline; the one with the median duration is shown


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """``pipeline``: the model folder, the prompt, the size and the steps of a picture. ``make_model``: arguments of
    ``save_tiny_model`` (None: the model exists). ``emulated``: the ranks run on an emulated cluster with shaped links.
    ``rounds``: timed denoising steps of each variant. ``out``: folder of the pictures."""

    pipeline: PipelineOptions
    make_model: dict[str, int] | None
    emulated: bool
    rounds: int
    out: str


def picture_name(variant: str) -> str:
    """The file of a variant's picture."""
    return f"{variant.replace(' ', '-').lower()}.png"


def save_picture(folder: str, variant: str, picture: torch.Tensor) -> None:
    from diffusers.image_processor import VaeImageProcessor

    VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(picture))[0].save(Path(folder, picture_name(variant)))


def wire_to_compute() -> float:
    """Seconds on the wire over seconds of attention of one call of Flux at 4096 px on 4 x 8 H100, by the simulator."""
    cluster = preset("dgx-h100").with_rates(across_gbps=_GBPS)
    shape = MODELS["flux"].call(cluster.world_size, 4096, 4096, None)
    plan = make_plan(cluster.num_machines, cluster.ranks_per_machine, heads=shape.heads, max_imbalance=UNEVEN)
    predicted = predict(cluster, shape, TorusVariant(layout=plan.layout, pattern="put"))
    return predicted.across_bytes * 8e-9 / _GBPS / predicted.compute_s


@dataclass
class _Variant:
    """``sent``: bytes that the busiest machine sent in each timed step."""

    name: str
    layout: str
    selected: Callable[[], AbstractContextManager[None]]
    times_s: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    max_abs_difference: float = 0.0
    peak_bytes: int = 0

    def row(self, *, emulated: bool) -> dict[str, Any]:
        return {
            "variant": self.name, "layout": self.layout, "times_s": self.times_s, "peak_bytes": self.peak_bytes,
            "bytes_between_machines": statistics.median(self.sent) if emulated else None,
            "max_abs_difference": self.max_abs_difference,
        }  # fmt: skip


class Demo:
    """The variants on this rank's pipeline. All methods are collective over the world."""

    def __init__(self, options: DemoOptions) -> None:
        self.options = options
        self.step = replace(options.pipeline, steps=1, output_type="latent")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._done, self._total = 0, 14 + 4 * options.rounds
        self._advance("one process: plain diffusers makes the picture", 4)
        self.opened = open_pipeline(options.pipeline)
        self.latents: torch.Tensor | None = None  # after one step; of the first variant
        if self.rank == 0:
            save_picture(options.out, SINGLE, self.opened.expected)
        config = self.opened.pipeline.transformer.config
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        size = options.pipeline.size
        tokens = size["height"] * size["width"] // 256 + options.pipeline.text_length
        self.tensor_bytes = tokens * heads * head_dim * 4
        self.inputs = [torch.randn(1, heads, tokens // self.world_size, head_dim) for _ in range(3)]
        share = -(-heads // self.world_size)
        self.alone = [torch.randn(1, share, tokens, head_dim) for _ in range(3)]  # a rank's attention in torus
        self._open_variants()

    def run(self) -> dict[str, Any]:
        """The results, the same on every rank."""
        *configured, auto = self.variants
        samples: list[float] = []
        for variant in configured:
            self._make_picture(variant)
            samples += [self._attend() for _ in range(_SAMPLES)]
        matched = self._set_rate(samples) if self.options.emulated else None
        while not self.selector.finished:
            self._call(auto)
        self._make_picture(auto)
        self._advance("recording one attention call of USP and of torus", 2)
        timelines = [self._timeline(variant) for variant in configured if variant.name in (USP, TORUS)]
        (trial,) = self.selector.trials.values()  # one call shape: that of the pipeline
        auto.layout = trial.selected or ""
        attended: list[float] = []
        for number in range(self.options.rounds):
            attended += [self._attend() for _ in range(2)]
            shift = number % len(self.variants)
            for variant in (*self.variants[shift:], *self.variants[:shift]):
                self._advance(f"timed step {number + 1} of {self.options.rounds}: {variant.name}")
                before = self._sent()
                _, times_s = self._denoise(variant, self.step, self.latents)
                variant.times_s += times_s
                variant.sent.append(max(now - then for now, then in zip(self._sent(), before, strict=True)))
        if matched is not None:
            matched["measured"] = matched["wire_s"] / _undisturbed(attended)
        single = _Variant(SINGLE, "-", nullcontext, times_s=self.opened.single["times_s"])
        rows = [single.row(emulated=False), *(v.row(emulated=self.options.emulated) for v in self.variants)]
        return {"rows": rows, "timelines": timelines, "wire_to_compute": matched}

    def _make_picture(self, variant: _Variant) -> None:
        self._advance(f"{variant.name}: makes the picture", 2)
        picture, _ = self._denoise(variant, self.options.pipeline, self.opened.expected)
        if self.rank == 0:
            save_picture(self.options.out, variant.name, picture)
        with peak_memory(torch.device("cpu")) as peak:
            self._denoise(variant, self.step, self.latents)
        variant.peak_bytes = max(self._gather(peak[0]))

    def _denoise(
        self, variant: _Variant, options: PipelineOptions, expected: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[float]]:
        """Call the pipeline and compare its result. Returns the result, and the seconds of each step on the slowest
        rank."""
        self._barrier()
        with variant.selected():
            result, _, steps = denoise(self.opened.pipeline, options, lambda: 0.0)
        assert result is not None, "the pipeline of xDiT's runner returns its result on every rank"
        if expected is None:
            self.latents = expected = result
        error = (result - expected).abs().max().item()
        reports = self._gather((math.inf if math.isnan(error) else error, [seconds for seconds, _ in steps]))
        variant.max_abs_difference = max(variant.max_abs_difference, *(report[0] for report in reports))
        return result, [max(times) for times in zip(*(report[1] for report in reports), strict=True)]

    # -- variants ------------------------------------------------------------------------------------------------------

    def _open_variants(self) -> None:
        flags, heads, grid = self.opened.flags, self.opened.heads, self.opened.grid
        machines, per_machine = grid.num_machines, grid.ranks_per_machine
        own = make_plan(machines, per_machine, **heads, rule="usp").layout
        usp = XditConfig(ulysses_degree=own.ulysses_degree, ring_degree=own.ring_degree)
        configs = {USP: usp}
        if heads["heads"] % self.world_size == 0:
            configs[ULYSSES] = XditConfig(ulysses_degree=self.world_size, ring_degree=1)
        groups = make_groups(configs.values(), ranks_per_machine=per_machine, members=grid.members)
        mesh = session.current.mesh
        assert mesh is not None
        self.mesh, self.torus_bytes = mesh, float(mesh.layout.egress()) * self.tensor_bytes
        self.selector = build_selector(
            [range(self.world_size)], flags, usp, groups.use, **heads, log=lambda message: None
        )  # fmt: skip

        @contextmanager
        def on_xdit(config: XditConfig) -> Iterator[None]:
            with session.without_torus(), groups.use(config):
                yield

        @contextmanager
        def on_auto() -> Iterator[None]:
            with groups.use(usp), session.torus_on(mesh, self.selector):
                yield

        self.variants = [
            *(_Variant(name, str(x), functools.partial(on_xdit, x)) for name, x in configs.items()),
            _Variant(TORUS, str(mesh.layout), nullcontext),
            _Variant(AUTO, "", on_auto),
        ]

    def _call(self, variant: _Variant) -> None:
        """One attention call of the pipeline's shape, through xDiT's ``USP``."""
        from xfuser.model_executor.layers import usp

        with variant.selected(), torch.no_grad():
            usp.USP(*self.inputs, dropout_p=0.0, is_causal=False)

    def _timeline(self, variant: _Variant) -> dict[str, Any]:
        """The attention call with the median duration. All ranks have one clock."""
        calls = []
        for _ in range(_TRACED):
            trace = Trace()
            self._barrier()
            started_s = time.perf_counter()
            if variant.name == TORUS:
                self.mesh.trace = trace
                self._call(variant)
                self.mesh.trace = None
            else:
                with attention_timer(functools.partial(trace.add, "compute", "attention")):
                    self._call(variant)
            first_s = min(self._gather(started_s))
            reports = self._gather((time.perf_counter() - first_s, trace.finished(first_s)))
            duration_s = max(report[0] for report in reports)
            per_machine = self.world_size // self.opened.grid.num_machines
            ranks = [{"rank": n, "machine": n // per_machine, "spans": spans} for n, (_, spans) in enumerate(reports)]
            calls.append({"variant": variant.name, "case": "demo", "duration_s": duration_s, "ranks": ranks})
        return sorted(calls, key=lambda call: call["duration_s"])[_TRACED // 2]

    # -- the links -----------------------------------------------------------------------------------------------------

    def _set_rate(self, samples: Sequence[float]) -> dict[str, float]:
        """Set the rate of the links to the target ratio. ``samples``: of ``_attend``."""
        wire_s = wire_to_compute() * _undisturbed(samples)
        rate_bps = round(self.torus_bytes * 8 / wire_s)
        if launch_environment().local_rank == 0:
            emulate.shape(rate_bps)
        self._barrier()
        return {"target": wire_to_compute(), "rate_bps": rate_bps, "wire_s": wire_s}

    def _attend(self) -> float:
        """Seconds in which all ranks make their attention of one call at the same time, without any exchange."""
        attend = registered_attention()
        self._barrier()
        started_s = time.perf_counter()
        attend(*self.alone)
        ended_s = time.perf_counter()
        spans = self._gather((started_s, ended_s))
        return float(max(end for _, end in spans) - min(start for start, _ in spans))

    def _sent(self) -> list[int]:
        """Bytes that each machine has sent to others so far, on rank 0 of an emulated cluster."""
        machines = self.opened.grid.num_machines
        if self.rank != 0 or not self.options.emulated:
            return [0] * machines
        return [sum(line) for line in emulate.read_matrix(machines)]

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _advance(self, text: str, units: int = 1) -> None:
        """Report the next part of the work, which counts as ``units``."""
        if self.rank == 0:
            print(PROGRESS + json.dumps([self._done, self._total, text]), flush=True)
        self._done += units

    def _gather(self, value: Any) -> list[Any]:
        reports: list[Any] = [None] * self.world_size
        dist.all_gather_object(reports, value)
        return reports

    def _barrier(self) -> None:
        dist.barrier()


def _undisturbed(samples: Sequence[float]) -> float:
    """The lower quartile: other programs slow some samples, and so do three ranks that get the same core."""
    return statistics.quantiles(samples, n=4, method="inclusive")[0]


def main() -> None:
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    options = DemoOptions(**job | {"pipeline": PipelineOptions(**job["pipeline"])})
    plugin.enable()  # before the first group, so that all groups of a CPU share one event loop
    dist.init_process_group("gloo", timeout=timedelta(seconds=options.pipeline.timeout_s))
    if options.make_model is not None and dist.get_rank() == 0:
        from sf_xfuser.bench.tiny_models import save_tiny_model

        save_tiny_model("flux", options.pipeline.model, **options.make_model)
    dist.barrier()
    results = Demo(options).run()
    if dist.get_rank() == 0:
        path.with_suffix(".result").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
