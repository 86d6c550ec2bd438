"""Refuses flags of xDiT that exclude a ``--sp-*`` flag, before the model is loaded; the error names both.

``config.TorusArgs`` checks the ``--sp-*`` flags against each other, and ``degrees`` checks the degrees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser import config
from sf_xfuser.config import XDIT_BACKENDS, LaunchEnvironment, TorusArgs
from sf_xfuser.integrations.xdit.attention_backends import LSE_BACKENDS, no_fallback_reason
from sf_xfuser.integrations.xdit.degrees import ModelFacts
from sf_xfuser.torus import links

# Their attention processors pass the layer to USP, which caches its keys for PipeFusion after the all-to-all.
_CACHED_INSIDE_USP = ("SD3Transformer2DModel", "PixArtTransformer2DModel", "HunyuanDiT2DModel")


def refuse(xfuser_args: Any, args: TorusArgs, model: ModelFacts | None) -> None:
    """Raise ValueError if ``xfuser_args`` and ``args`` exclude each other, or if this machine cannot do what they ask
    for. Local; ranks with the same flags on equal machines raise the same error."""
    problem = next(_problems(xfuser_args, args, model), None)
    if problem is not None:
        raise ValueError(problem)


def _problems(xfuser_args: Any, args: TorusArgs, model: ModelFacts | None) -> Iterator[str]:
    def flag(name: str) -> Any:
        return getattr(xfuser_args, name, None)  # xDiT before 0.7 does not have all of them

    if not flag("use_ray"):  # the ranks run elsewhere
        # A program that has started torch.distributed itself may let ranks share a GPU.
        launched = LaunchEnvironment() if dist.is_initialized() else config.launch_environment()
        if problem := missing_gpus(launched, torch.cuda.device_count()):
            yield problem
        if args.transport != "auto" and (problem := links.refused_here(args, _distributed_backend())):
            yield problem
    backend = f"--sp-backend {args.backend}"
    if flag("use_fast_attn"):
        yield (
            f"{backend} with --use_fast_attn: DiTFastAttn uses all ranks for data parallelism, which leaves none for "
            f"sequence parallelism; remove one of the two flags"
        )
    if args.backend in XDIT_BACKENDS:
        return
    if args.compress != "none" and flag("use_fp8_comms"):
        yield (
            f"--sp-compress {args.compress} with --use_fp8_comms: with FP8 communication every attention call "
            f"falls back to xDiT's own USP, where --sp-compress has no effect; remove one of the two flags"
        )
    if args.check != "off" and flag("use_torch_compile"):
        yield (
            f"--sp-check {args.check} with --use_torch_compile: calls of a compiled model are not checked; remove one "
            f"of the two flags"
        )
    if args.backend == "auto":
        return  # calls that torus cannot run are run by xDiT's own USP
    for name in ("attention_backend", "hybrid_attn_low_precision_backend", "hybrid_attn_high_precision_backend"):
        named = flag(name)
        if named and named.upper() not in LSE_BACKENDS:
            why = no_fallback_reason(named.upper(), flag("ring_degree") or 1, args.strict)
            if why is not None:
                yield f"{backend} with --{name} {named}: it returns no log-sum-exp, {why}"
    if args.strict and flag("use_fp8_comms"):
        yield (
            "--sp-strict with --use_fp8_comms: with FP8 communication every attention call falls back to xDiT's own "
            "USP; remove one of the two flags"
        )
    stages = flag("pipefusion_parallel_degree") or 1
    if args.strict and stages > 1 and model is not None and model.transformer in _CACHED_INSIDE_USP:
        yield (
            f"--sp-strict with --pipefusion_parallel_degree {stages}: xDiT's own USP keeps PipeFusion's KV cache of "
            f"{model.transformer}, so its attention calls fall back; remove one of the two flags"
        )


def missing_gpus(launched: LaunchEnvironment, num_gpus: int) -> str | None:
    """Why the rank has no GPU of its own on a machine with GPUs, or None. Pure."""
    if launched.local_rank is None or not 0 < num_gpus <= launched.local_rank:
        return None
    ranks = launched.local_world_size or launched.local_rank + 1
    return f"{ranks} ranks were started on a machine with {num_gpus} GPU(s): use --nproc-per-node {num_gpus}"


def _distributed_backend() -> str:
    """The backend that torch.distributed has, or gets from xDiT."""
    if dist.is_initialized():
        return dist.get_backend()
    from xfuser import envs

    return str(envs.get_torch_distributed_backend())
