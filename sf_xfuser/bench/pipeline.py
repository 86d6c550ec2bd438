"""``sf-xfuser bench --pipeline``: denoising steps of real pipelines, alternating between variants.

Each rank loads one pipeline under ``--sp-backend torus``, as xDiT's runner does, and every variant runs that pipeline
in the same process group. A variant selects the attention behind xDiT's ``USP`` (the plugin's or xDiT's own) and, for
xDiT's own, the layout. Weights, prompt, noise, local attention and the gathering of the result are the same for all
variants.

Plain diffusers on rank 0 runs first. The result of every call is compared with its latents. ``--against diffusers``
adds diffusers' own context parallelism, on a pipeline of its own.

Importing this module needs no xfuser and no diffusers.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sf_xfuser.bench import peers
from sf_xfuser.bench.case import Case
from sf_xfuser.bench.progress import Progress
from sf_xfuser.bench.usp_variants import attention_timer, make_groups
from sf_xfuser.config import TorusArgs
from sf_xfuser.files import read_json
from sf_xfuser.integrations.xdit import plugin, session
from sf_xfuser.integrations.xdit.degrees import read_model_facts
from sf_xfuser.integrations.xdit.usp_groups import XditGroups
from sf_xfuser.layout.plan import UNEVEN, make_plan
from sf_xfuser.layout.topology import MachineGrid
from sf_xfuser.layout.usp_layouts import XditConfig, legal_configs
from sf_xfuser.torus.build import build_mesh, gather_topology
from sf_xfuser.transport.rendezvous import StoreGroup

# Longer than any text length in every tokenizer, so pipelines truncate it to the requested length.
_PROMPT = " ".join(["A small cat sits on a red chair near the window while the rain falls over the old city."] * 40)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOptions:
    """One measurement; the same on every rank.

    ``model``: a diffusers folder (Flux, HunyuanVideo, CogVideoX or Wan). ``size``: arguments of the pipeline's call,
    such as height, width and num_frames; empty: those of the model's ``small_input.json``, if any. ``topology``,
    ``plan``: ``--sp-topology`` and ``--sp-plan`` of the torus variant. ``compress``: formats of ``--sp-compress``, one
    more variant each. ``against``: names of peers; those of diffusers without a flat ring are measured. Each variant
    makes one untimed call, then ``rounds`` timed calls of ``steps`` denoising steps. ``output_type``: what a call
    returns, ``"latent"`` or ``"pt"`` (decoded).
    """

    model: str
    topology: str = "auto"
    plan: str = "auto"
    compress: Sequence[str] = ()
    against: Sequence[str] = ()
    size: Mapping[str, Any] = field(default_factory=dict)
    text_length: int = 256
    steps: int = 3
    rounds: int = 2
    dtype: str = "float32"
    seed: int = 42
    timeout_s: float = 300.0
    prompt: str = _PROMPT
    output_type: str = "latent"


class Opened(NamedTuple):
    """``single``: the record of plain diffusers; ``expected``: its result. ``pipeline``: xDiT's, on this rank, with
    attention on torus. ``grid``: machines and ranks. ``heads``: the head counts, as arguments of ``make_plan``."""

    flags: TorusArgs
    single: dict[str, Any]
    expected: torch.Tensor
    pipeline: Any
    grid: MachineGrid
    heads: dict[str, Any]


class TinyModel(NamedTuple):
    """A model with random weights, the heads of a published model and few of its blocks, and the input to measure.

    ``arguments``: keyword arguments of ``tiny_models.save_tiny_model``.
    """

    arguments: Mapping[str, int]
    size: Mapping[str, Any]
    text_length: int = 256


#: About 4k tokens each. CogVideoX has 24 heads of size 64, as in the paper; Wan has those of Wan 2.1 1.3B.
MODELS: Mapping[str, TinyModel] = {
    "flux": TinyModel(
        {"heads": 24, "head_dim": 128, "layers": 0, "single_layers": 2},
        {"height": 1024, "width": 1024, "guidance_scale": 3.5},
    ),
    "hunyuanvideo": TinyModel(
        {"heads": 24, "head_dim": 128, "layers": 0, "single_layers": 1},
        {"height": 256, "width": 512, "num_frames": 29, "guidance_scale": 6.0},
    ),
    "cogvideox": TinyModel(
        {"heads": 24, "head_dim": 64, "layers": 1},
        {"height": 512, "width": 704, "num_frames": 9, "guidance_scale": 6.0},
        text_length=224,
    ),
    "wan": TinyModel(
        {"heads": 12, "head_dim": 128, "layers": 1},
        {"height": 512, "width": 512, "num_frames": 13, "guidance_scale": 1.0},
    ),
}


def measure(options: PipelineOptions, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Run every variant and return one record for each, the same on every rank. Collective over the world.

    ``progress`` counts the calls of the pipeline.

    A record: ``variant`` (``"single"``, ``"torus"``, ``"torus-FORMAT"``, a peer or the text of an ``XditConfig``),
    ``layout``, ``reason`` (why a peer cannot run; it has no times then),
    ``times_s`` (each timed step on the slowest rank), ``attention_s`` (the part of each step in local attention
    kernels), ``first_call_s`` (the untimed call, with text encoding), ``max_abs_error`` (largest difference of the
    final latents from ``"single"``) and ``psnr_db`` (of the final latents of a variant that compresses against
    ``"torus"``; None if they are equal). ``"single"`` makes one timed call.

    Initializes xDiT in this process. Raises ValueError for an unknown model. Raises RuntimeError if torus
    cannot run the attention, because the times would then be xDiT's.
    """
    progress = progress or Progress("", visible=False)
    flags, single, expected, pipeline, grid, heads = open_pipeline(options, progress)
    records = [single]
    shape = grid.num_machines, grid.ranks_per_machine
    world_size = dist.get_world_size()
    own = make_plan(*shape, **heads, rule="usp").layout
    torus = make_plan(*shape, **heads, rule=flags.rule, explicit=flags.explicit_plan(), max_imbalance=UNEVEN)
    configs = [config for config in legal_configs(world_size, grid.ranks_per_machine, **heads)
               if config.ulysses_degree == own.ulysses_degree]  # fmt: skip
    variants = [_Variant("torus", str(torus.layout), nullcontext, pipeline)]
    groups = make_groups(configs, ranks_per_machine=shape[1], members=grid.members)
    variants += [
        _Variant(str(config), str(config), functools.partial(_xdit, groups, config), pipeline) for config in configs
    ]
    for name in options.compress:
        args = replace(flags, compress=name)
        mesh = build_mesh([range(world_size)], args, **heads, max_imbalance=UNEVEN)
        selected = functools.partial(session.torus_on, mesh)
        variants.append(_Variant(f"torus-{name}", str(mesh.layout), selected, pipeline, compresses=True))

    def call(variant: _Variant, *, timed: bool) -> torch.Tensor | None:
        progress.doing(f"{variant.name}: {'timed' if timed else 'first'} call")
        latents = variant.call(options, expected, timed=timed)
        progress.advance()
        return latents

    progress.total = 1 + len(variants) * (1 + options.rounds)
    first = [call(variant, timed=False) for variant in variants]
    for variant, latents in zip(variants, first, strict=True):
        if variant.compresses:
            variant.psnr_db = _psnr_db(latents, first[0])
    handled = re.search(r"by torus: (\d+)", session.explain())
    if handled is None or handled[1] == "0":
        raise RuntimeError(f"no attention call of this pipeline ran on torus:\n{session.explain()}")
    case = Case(num_machines=shape[0], ranks_per_machine=shape[1], seq_len=world_size, **heads)
    variants += _diffusers_variants(options, case, expected)
    runnable = [variant for variant in variants if not variant.reason]
    progress.total = 1 + len(first) + len(runnable) * options.rounds
    for number in range(options.rounds):
        for variant in runnable if number % 2 == 0 else reversed(runnable):
            call(variant, timed=True)
    return [*records, *(variant.record() for variant in variants)]


def open_pipeline(options: PipelineOptions, progress: Progress | None = None) -> Opened:
    """Run plain diffusers on rank 0, then load xDiT's pipeline under ``--sp-backend torus``. Collective over the world.

    Initializes xDiT in this process. Raises ValueError for an unknown model.
    """
    progress = progress or Progress("", visible=False)
    family = _family(options.model)
    facts = read_model_facts(options.model)
    if facts is None:
        raise ValueError(f"{options.model} has no transformer/config.json with a head count")
    flags = TorusArgs(
        backend="torus", plan=options.plan, topology=options.topology, timeout=options.timeout_s, strict=True
    )
    plugin.enable(flags)
    engine_config = _start(options)
    progress.doing("one process, plain diffusers")
    single = _single(options)
    progress.advance()
    expected: torch.Tensor = single.pop("latents")
    pipeline = _load(family, options, engine_config)
    world_size = dist.get_world_size()
    grid = gather_topology(flags, StoreGroup.world(options.timeout_s), world_size).fold(range(world_size))
    return Opened(flags, single, expected, pipeline, grid, {"heads": facts.heads, "kv_heads": facts.kv_heads})


# ---- variants --------------------------------------------------------------------------------------------------------


@contextmanager
def _xdit(groups: XditGroups, config: XditConfig) -> Iterator[None]:
    """Inside the block, attention runs on xDiT's own USP in the layout ``config``."""
    with session.without_torus(), groups.use(config):
        yield


@dataclass
class _Variant:
    name: str
    layout: str
    selected: Callable[[], AbstractContextManager[None]]
    pipeline: Any
    compresses: bool = False
    reason: str = ""
    first_call_s: float = 0.0
    max_abs_error: float = 0.0
    psnr_db: float | None = None
    times_s: list[float] = field(default_factory=list)
    attention_s: list[float] = field(default_factory=list)

    def call(self, options: PipelineOptions, expected: torch.Tensor, *, timed: bool) -> torch.Tensor | None:
        """Call the pipeline. Collective. Returns the final latents, or None on ranks without a result."""
        attention = [0.0]

        def add_attention_time(start_s: float, end_s: float) -> None:
            attention[0] += end_s - start_s

        dist.barrier(_cpu_group())
        with self.selected(), attention_timer(add_attention_time):
            latents, call_s, steps = denoise(self.pipeline, options, lambda: attention[0])
        # Some pipelines return the result on some ranks only.
        error = -1.0 if latents is None else (latents.cpu().float() - expected).abs().max().item()
        times, parts = [step[0] for step in steps], [step[1] for step in steps]
        error, call_s, *rest = _largest([math.inf if math.isnan(error) else error, call_s, *times, *parts])
        if error < 0:
            raise RuntimeError(f"{self.name}: the pipeline returned latents on no rank")
        self.max_abs_error = max(self.max_abs_error, error)
        if timed:
            self.times_s += rest[: len(times)]
            self.attention_s += rest[len(times) :]
        else:
            self.first_call_s = call_s
        return latents

    def record(self) -> dict[str, Any]:
        names = ("layout", "reason", "times_s", "attention_s", "first_call_s", "max_abs_error", "psnr_db")
        return {"variant": self.name, **{name: getattr(self, name) for name in names}}


def _single(options: PipelineOptions) -> dict[str, Any]:
    """Run plain diffusers on rank 0 while the other ranks wait. Returns its record and ``latents`` on every rank."""
    record: list[Any] = [None]
    if dist.get_rank() == 0:
        pipeline = _plain_diffusers(options)
        latents, call_s, steps = denoise(pipeline, options, lambda: 0.0)
        assert latents is not None, "plain diffusers returns its latents"
        variant = _Variant("single", "one process, diffusers", nullcontext, pipeline, first_call_s=call_s)
        variant.times_s += [step[0] for step in steps]
        record = [{**variant.record(), "latents": latents.cpu().float()}]
    dist.broadcast_object_list(record, src=0, group=_cpu_group())
    single: dict[str, Any] = record[0]
    return single


def _plain_diffusers(options: PipelineOptions) -> Any:
    import diffusers

    loader: Any = diffusers.DiffusionPipeline
    return loader.from_pretrained(options.model, torch_dtype=getattr(torch, options.dtype)).to(_device())


def _diffusers_variants(options: PipelineOptions, case: Case, expected: torch.Tensor) -> list[_Variant]:
    """diffusers' context parallelism after its first call, or with the reason why it cannot run. Collective."""
    measured = [peer for peer in peers.PEERS
                if peer.name in options.against and peer.package == "diffusers" and peer.split != "ring"]  # fmt: skip
    if not measured:
        return []
    plain = _plain_diffusers(options)
    variants = []
    for peer in measured:
        config = peers.degrees(peer, case)
        layout = f"ulysses={config.ulysses_degree} ring={config.ring_degree}"
        variant = _Variant(peer.name, layout, nullcontext, plain, reason=peers.reason(peer, case) or "")
        variants.append(variant)
        if peer.uneven and not variants[0].reason:
            variant.reason = f"equals {variants[0].name} where counts divide"
        if variant.reason:
            continue
        try:
            transformer = peers.parallelize(plain.transformer, peer, config)
            variant.pipeline = type(plain)(**{**plain.components, "transformer": transformer})
            variant.call(options, expected, timed=False)
        except Exception as error:  # code of another package
            variant.reason = f"{type(error).__name__}: {error}"
    return variants


@torch.no_grad()
def denoise(
    pipeline: Any, options: PipelineOptions, attention_s: Callable[[], float]
) -> tuple[torch.Tensor | None, float, list[tuple[float, float]]]:
    """Call the pipeline. Returns the latents (or None), the seconds of the call, and for each step its
    seconds and those in attention.

    The first step starts at the transformer's first forward, every other step at the end of the previous one.
    """
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        _synchronize()
        marks.append((time.perf_counter(), attention_s()))

    def first_forward(*_: Any) -> None:
        hook.remove()
        mark()

    def step_ended(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        mark()
        return tensors

    hook = pipeline.transformer.register_forward_pre_hook(first_forward)
    pipeline.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    result = pipeline(
        prompt=options.prompt,
        max_sequence_length=options.text_length,
        num_inference_steps=options.steps,
        generator=torch.Generator("cpu").manual_seed(options.seed),
        callback_on_step_end=step_ended,
        output_type=options.output_type,
        return_dict=False,
        **_size(options),
    )
    _synchronize()
    call_s = time.perf_counter() - started
    latents = result[0] if result else None  # CogVideoX: a list of None
    steps = [(end - begin, kernels - before) for (begin, before), (end, kernels) in pairwise(marks)]
    return latents if isinstance(latents, torch.Tensor) else None, call_s, steps


def _psnr_db(latents: torch.Tensor | None, uncompressed: torch.Tensor | None) -> float | None:
    """The lowest PSNR of ``latents`` over the ranks; None if they are equal. Collective."""
    lowest = math.inf
    if latents is not None and uncompressed is not None:
        latents, uncompressed = latents.double(), uncompressed.double()
        noise = (latents - uncompressed).square().mean().sqrt().item()
        if noise:
            lowest = 20 * math.log10((uncompressed.max() - uncompressed.min()).item() / noise)
    lowest = -_largest([-lowest])[0]
    return None if math.isinf(lowest) else lowest


def _largest(values: list[float]) -> list[float]:
    """The maximum of each value over the ranks. Collective."""
    reduced = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=_cpu_group())
    maxima: list[float] = reduced.tolist()
    return maxima


# ---- xDiT --------------------------------------------------------------------------------------------------------


def _start(options: PipelineOptions) -> Any:
    """Initialize xDiT's world group and return xDiT's engine configuration with the degrees of the plan."""
    from xfuser import xFuserArgs
    from xfuser.core.distributed import init_distributed_environment, runtime_state

    if runtime_state.runtime_state_is_initialized():
        raise RuntimeError("xDiT is already initialized in this process; measure pipelines in a new process")
    init_distributed_environment()
    xfuser_args = xFuserArgs(model=options.model)
    engine_config, _ = xfuser_args.create_config()
    engine_config.runtime_config.dtype = getattr(torch, options.dtype)
    return engine_config


# Class in model_index.json -> transformer of xDiT's runner; None where xDiT wraps the whole pipeline.
_TRANSFORMERS: Mapping[str, tuple[str, str] | None] = {
    "FluxPipeline": ("transformer_flux", "xFuserFlux1Transformer2DWrapper"),
    "HunyuanVideoPipeline": ("transformer_hunyuan_video", "xFuserHunyuanVideoTransformer3DWrapper"),
    "WanPipeline": ("transformer_wan", "xFuserWanTransformer3DWrapper"),
    "CogVideoXPipeline": None,
}


def _family(model: str) -> str:
    path = Path(model, "model_index.json")
    try:
        name = str(read_json(path)["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        name = "not a diffusers folder"
    if name not in _TRANSFORMERS:
        raise ValueError(f"{model} is {name}; bench --pipeline supports {', '.join(_TRANSFORMERS)}")
    return name


def _load(family: str, options: PipelineOptions, engine_config: Any) -> Any:
    """Load the pipeline as xDiT does, which also builds xDiT's groups and the mesh."""
    import diffusers
    from xfuser import xFuserCogVideoXPipeline
    from xfuser.core.distributed import get_runtime_state, initialize_runtime_state

    dtype = getattr(torch, options.dtype)
    wrapper = _TRANSFORMERS[family]
    if wrapper is None:
        pipeline = xFuserCogVideoXPipeline.from_pretrained(
            options.model, engine_config=engine_config, torch_dtype=dtype
        )
        return pipeline.to(_device())
    module = importlib.import_module(f"xfuser.model_executor.models.transformers.{wrapper[0]}")
    transformer = getattr(module, wrapper[1]).from_pretrained(options.model, subfolder="transformer", torch_dtype=dtype)
    pipeline = getattr(diffusers, family).from_pretrained(options.model, transformer=transformer, torch_dtype=dtype)
    initialize_runtime_state(pipeline, engine_config)
    if family == "FluxPipeline":
        get_runtime_state().set_input_parameters(
            batch_size=1,
            num_inference_steps=options.steps,
            max_condition_sequence_length=options.text_length,
            split_text_embed_in_sp=True,
        )
    return pipeline.to(_device())


def _size(options: PipelineOptions) -> dict[str, Any]:
    small = Path(options.model, "small_input.json")
    if not options.size and small.is_file():
        return dict(read_json(small))
    return dict(options.size)


def _cpu_group() -> Any:
    from xfuser.core.distributed import get_world_group

    return get_world_group().cpu_group


def _device() -> Any:
    from xfuser.core.distributed import get_world_group

    return get_world_group().device


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
