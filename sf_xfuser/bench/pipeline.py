"""Whole denoising steps through real pipelines, as variants of an A/B run: ``sf-xfuser bench --pipeline``.

Each rank loads one pipeline, as xDiT's runner does, under ``--sp-backend torus``, and every variant runs that pipeline in
the same process group. A variant is two settings around a call: which attention xDiT's models reach under the name
``USP`` (what the plugin put there, or xDiT's own), and for xDiT's own, the layout (``XditVariant.selected``). Nothing else
differs: weights, prompt, noise, local attention, gathering of the result.

The reference is plain diffusers on rank 0 alone, before the others start. Every call of every variant is compared with it.

Importing this module needs no xfuser and no diffusers.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.bench.usp_variants import attention_timer, open_variants
from sf_xfuser.config import TorusArgs
from sf_xfuser.files import read_json
from sf_xfuser.integrations.xdit import plugin, session
from sf_xfuser.integrations.xdit.degrees import read_model_facts
from sf_xfuser.layout.plan import UNEVEN, make_plan
from sf_xfuser.layout.usp_layouts import legal_configs
from sf_xfuser.torus.build import build_mesh, gather_topology
from sf_xfuser.transport.rendezvous import Agreement

# Longer than any text length in every tokenizer, so that the text has exactly the length that is asked for.
_PROMPT = " ".join(["A small cat sits on a red chair near the window while the rain falls over the old city."] * 40)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOptions:
    """One measurement. The same on every rank.

    ``model``: a diffusers folder (Flux, HunyuanVideo, CogVideoX or Wan). ``size``: what its pipeline is asked for
    (height, width, num_frames, guidance_scale); the model's ``small_input.json`` or its own defaults where empty.
    ``topology`` and ``plan`` are ``--sp-topology`` and ``--sp-plan`` of the torus variant. xDiT's variants are its own
    layout with both rotations. ``compress``: formats of ``--sp-compress``, a variant each.
    ``rounds`` calls of ``steps`` steps are timed per variant, after one that is not. ``dtype`` names a torch dtype.
    """

    model: str
    topology: str = "auto"
    plan: str = "auto"
    compress: tuple[str, ...] = ()
    size: Mapping[str, Any] = field(default_factory=dict)
    text_length: int = 256
    steps: int = 3
    rounds: int = 2
    dtype: str = "float32"
    seed: int = 42
    timeout: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model with random weights that has a published model's attention and few of its blocks, and its input."""

    heads: int
    head_dim: int
    layers: int
    single_layers: int | None = None
    size: Mapping[str, Any]
    text_length: int


#: About 4k tokens each, with the heads of the published models (CogVideoX as the paper ran it: 24 x 64).
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "flux": Shape(
            heads=24,
            head_dim=128,
            layers=0,
            single_layers=2,
            size={"height": 1024, "width": 1024, "guidance_scale": 3.5},
            text_length=256,
        ),
        "hunyuanvideo": Shape(
            heads=24,
            head_dim=128,
            layers=0,
            single_layers=1,
            size={"height": 256, "width": 512, "num_frames": 29, "guidance_scale": 6.0},
            text_length=256,
        ),
        "cogvideox": Shape(
            heads=24,
            head_dim=64,
            layers=1,
            size={"height": 512, "width": 704, "num_frames": 9, "guidance_scale": 1.0},
            text_length=224,
        ),
    }
)


def make_model(name: str, folder: str | Path) -> Path:
    """Save the model of ``SHAPES[name]`` under ``folder``. Needs diffusers; local, deterministic."""
    from sf_xfuser.bench.tiny_models import save_tiny_model

    shape = SHAPES[name]
    return save_tiny_model(
        name,
        folder,
        heads=shape.heads,
        head_dim=shape.head_dim,
        layers=shape.layers,
        single_layers=shape.single_layers,
    )


def measure(options: PipelineOptions) -> list[dict[str, Any]]:
    """Run every variant: one record each, the same on every rank. Collective over the world.

    A record: ``variant`` (``"single"``, ``"torus"``, ``"torus-FORMAT"`` or the text of an ``XditConfig``), ``layout``,
    ``times_s`` (every timed step, as long as it took on the slowest rank), ``attention_s`` (the part of each spent in
    local attention kernels, likewise), ``first_call_s`` (the untimed first call, text encoding included),
    ``max_abs_error`` (of the final latents against ``"single"``, the largest of all calls and ranks) and ``psnr_db``
    (peak signal-to-noise ratio of the final latents against ``"torus"``, for variants that compress; None where they are
    the same bits). ``"single"`` is timed in one call, alone.

    Sets xDiT up for this process, so it wants a process in which xDiT is not set up. Raises ValueError for a model
    that it does not know and RuntimeError where torus serves no attention call; attention that torus would hand back
    to xDiT raises, too, since its times would be xDiT's.
    """
    family = _family(options.model)
    facts = read_model_facts(options.model)
    if facts is None:
        raise ValueError(f"{options.model} has no transformer/config.json with a head count")
    flags = TorusArgs(
        backend="torus", plan=options.plan, topology=options.topology, timeout=options.timeout, strict=True
    )
    plugin.enable(flags)
    engine_config = _start(options)
    records = [_single(options)]
    wanted: torch.Tensor = records[0].pop("latents")
    pipeline = _load(family, options, engine_config)

    world_size = dist.get_world_size()
    grid = gather_topology(flags, Agreement.of_world(options.timeout), world_size).fold(range(world_size))
    shape = grid.num_machines, grid.ranks_per_machine
    own = make_plan(*shape, heads=facts.heads, kv_heads=facts.kv_heads, rule="usp").layout
    legal = legal_configs(world_size, grid.ranks_per_machine, facts.heads, facts.kv_heads)
    configs = [config for config in legal if config.ulysses_degree == own.ulysses_degree]
    torus = make_plan(
        *shape,
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        rule=flags.rule,
        explicit=flags.explicit_plan(),
        max_imbalance=UNEVEN,
    )
    variants = [_Variant("torus", str(torus.layout), nullcontext)]
    for config, xdit in open_variants(configs, ranks_per_machine=shape[1], members=grid.members).items():
        variants.append(_Variant(str(config), str(config), functools.partial(_xdit, xdit.selected)))
    for name in options.compress:
        mesh = build_mesh(
            [range(world_size)],
            replace(flags, compress=name),
            heads=facts.heads,
            kv_heads=facts.kv_heads,
            max_imbalance=UNEVEN,
        )
        variants.append(
            _Variant(f"torus-{name}", str(mesh.layout), functools.partial(session.torus_over, mesh), compresses=True)
        )
    uncompressed, *others = [(variant, variant.call(pipeline, options, wanted, timed=False)) for variant in variants]
    for variant, latents in others:
        if variant.compresses:
            variant.psnr_db = _psnr_db(latents, uncompressed[1])
    if _served_by_torus() == 0:
        raise RuntimeError(f"torus has served no attention call of this pipeline:\n{session.explain()}")
    for number in range(options.rounds):
        for variant in variants if number % 2 == 0 else reversed(variants):
            variant.call(pipeline, options, wanted, timed=True)
    return [*records, *(variant.record() for variant in variants)]


# ---- variants --------------------------------------------------------------------------------------------------------


@contextmanager
def _xdit(layout: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, attention is xDiT's own USP, in ``layout``."""
    with session.xdits_own(), layout():
        yield


@dataclass
class _Variant:
    name: str
    layout: str
    settings: Callable[[], AbstractContextManager[None]]
    compresses: bool = False
    first_call_s: float = 0.0
    max_abs_error: float = 0.0
    psnr_db: float | None = None
    times_s: list[float] = field(default_factory=list)
    attention_s: list[float] = field(default_factory=list)

    def call(
        self, pipeline: Any, options: PipelineOptions, wanted: torch.Tensor, *, timed: bool
    ) -> torch.Tensor | None:
        """One call of the pipeline on all ranks together. The final latents, where this rank gets them."""
        attention = [0.0]

        def spent(start_s: float, end_s: float) -> None:
            attention[0] += end_s - start_s

        dist.barrier(_cpu_group())
        with self.settings(), attention_timer(spent):
            latents, call_s, steps = _denoise(pipeline, options, lambda: attention[0])
        # Some pipelines give the result to some ranks only.
        error = -1.0 if latents is None else (latents.cpu().float() - wanted).abs().max().item()
        times, parts = [step[0] for step in steps], [step[1] for step in steps]
        error, call_s, *rest = _largest([math.inf if math.isnan(error) else error, call_s, *times, *parts])
        if error < 0:
            raise RuntimeError(f"{self.name}: the pipeline gave its latents to no rank")
        self.max_abs_error = max(self.max_abs_error, error)
        if timed:
            self.times_s += rest[: len(times)]
            self.attention_s += rest[len(times) :]
        else:
            self.first_call_s = call_s
        return latents

    def record(self) -> dict[str, Any]:
        return {
            "variant": self.name,
            "layout": self.layout,
            "times_s": self.times_s,
            "attention_s": self.attention_s,
            "first_call_s": self.first_call_s,
            "max_abs_error": self.max_abs_error,
            "psnr_db": self.psnr_db,
        }


def _single(options: PipelineOptions) -> dict[str, Any]:
    """Plain diffusers on rank 0 while the others wait. Its record, with the ``latents``, on every rank."""
    record: list[Any] = [None]
    if dist.get_rank() == 0:
        import diffusers

        loader: Any = diffusers.DiffusionPipeline
        pipeline = loader.from_pretrained(options.model, torch_dtype=getattr(torch, options.dtype))
        latents, call_s, steps = _denoise(pipeline.to(_device()), options, lambda: 0.0)
        assert latents is not None, "plain diffusers returns its latents"
        times_s = [step[0] for step in steps]
        variant = _Variant("single", "one process, diffusers", nullcontext, first_call_s=call_s, times_s=times_s)
        record = [{**variant.record(), "latents": latents.cpu().float()}]
    dist.broadcast_object_list(record, src=0, group=_cpu_group())
    found: dict[str, Any] = record[0]
    return found


@torch.no_grad()
def _denoise(
    pipeline: Any, options: PipelineOptions, attention_s: Callable[[], float]
) -> tuple[torch.Tensor | None, float, list[tuple[float, float]]]:
    """(latents, where this rank gets them; seconds of the call; for each step its seconds and those in attention).

    The first step begins where the transformer is first called, each other one where the one before ended.
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
        prompt=_PROMPT,
        max_sequence_length=options.text_length,
        num_inference_steps=options.steps,
        generator=torch.Generator("cpu").manual_seed(options.seed),
        callback_on_step_end=step_ended,
        output_type="latent",
        return_dict=False,
        **_size(options),
    )
    _synchronize()
    call_s = time.perf_counter() - started
    latents = result[0] if result else None  # CogVideoX: a list of None
    steps = [(end - begin, kernels - before) for (begin, before), (end, kernels) in pairwise(marks)]
    return latents if isinstance(latents, torch.Tensor) else None, call_s, steps


def _psnr_db(latents: torch.Tensor | None, uncompressed: torch.Tensor | None) -> float | None:
    """Of ``latents``, on the rank where it is lowest; None where nothing differs. Collective."""
    lowest = math.inf
    if latents is not None and uncompressed is not None:
        latents, uncompressed = latents.double(), uncompressed.double()
        noise = (latents - uncompressed).square().mean().sqrt().item()
        if noise:
            lowest = 20 * math.log10((uncompressed.max() - uncompressed.min()).item() / noise)
    lowest = -_largest([-lowest])[0]
    return None if math.isinf(lowest) else lowest


def _largest(values: list[float]) -> list[float]:
    """Each of ``values``, on the rank where it is largest. Collective."""
    reduced = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=_cpu_group())
    found: list[float] = reduced.tolist()
    return found


def _served_by_torus() -> int:
    found = re.search(r"served by torus: (\d+)", session.explain())
    return int(found[1]) if found else 0


# ---- xDiT --------------------------------------------------------------------------------------------------------


def _start(options: PipelineOptions) -> Any:
    """torch.distributed, xDiT's world group, and its engine configuration with the degrees of the plan."""
    from xfuser import xFuserArgs
    from xfuser.core.distributed import init_distributed_environment, runtime_state

    if runtime_state.runtime_state_is_initialized():
        raise RuntimeError("xDiT is set up in this process already; measure pipelines in a process of their own")
    init_distributed_environment()
    xfuser_args = xFuserArgs(model=options.model)
    engine_config, _ = xfuser_args.create_config()
    engine_config.runtime_config.dtype = getattr(torch, options.dtype)
    return engine_config


# By the class in model_index.json: the transformer of xDiT's runner, or None for a pipeline class of xDiT's.
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
        name = "no diffusers folder"
    if name not in _TRANSFORMERS:
        raise ValueError(f"{model} is {name}; bench --pipeline measures folders of {', '.join(_TRANSFORMERS)}")
    return name


def _load(family: str, options: PipelineOptions, engine_config: Any) -> Any:
    """The pipeline as xDiT builds it; sets up xDiT's groups and with them the mesh."""
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
