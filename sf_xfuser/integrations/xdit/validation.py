"""Flags of xDiT that nobody can serve together with ours: refused before anything is loaded, both of them named.

What one flag of ours means for another is ``args.TorusArgs``'s to say, and whether degrees multiply ``launch``'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sf_xfuser.config import XDIT_BACKENDS, TorusArgs
from sf_xfuser.integrations.xdit.degrees import ModelFacts
from sf_xfuser.integrations.xdit.usp import LSE_BACKENDS

# Their attention processors pass USP the layer whose keys PipeFusion caches after the exchange.
_CACHED_INSIDE_USP = ("SD3Transformer2DModel", "PixArtTransformer2DModel", "HunyuanDiT2DModel")


def refuse(xfuser_args: Any, given: TorusArgs, model: ModelFacts | None) -> None:
    """Raises ValueError where ``xfuser_args`` and ``given`` exclude each other. Local, and alike on all ranks that were
    given the same flags."""
    problem = next(_problems(xfuser_args, given, model), None)
    if problem is not None:
        raise ValueError(problem)


def _problems(xfuser_args: Any, given: TorusArgs, model: ModelFacts | None) -> Iterator[str]:
    def flag(name: str) -> Any:
        return getattr(xfuser_args, name, None)  # xDiT before 0.7 has not all of them

    backend = f"--sp-backend {given.backend}"
    if flag("use_fast_attn"):
        yield (
            f"{backend} with --use_fast_attn: DiTFastAttn wants all ranks in data parallelism, which leaves none for "
            f"sequence parallelism; leave one of them out"
        )
    if given.backend in XDIT_BACKENDS:
        return
    if given.compress != "none" and flag("use_fp8_comms"):
        yield (
            f"--sp-compress {given.compress} with --use_fp8_comms: FP8 communication takes every attention call to "
            f"xDiT's own USP, where --sp-compress does nothing; leave one of them out"
        )
    if given.check != "off" and flag("use_torch_compile"):
        yield (
            f"--sp-check {given.check} with --use_torch_compile: a compiled model's calls are not compared; leave one "
            f"of them out"
        )
    if given.backend == "auto":
        return  # may leave attention to xDiT
    for name in ("attention_backend", "hybrid_attn_low_precision_backend", "hybrid_attn_high_precision_backend"):
        named = flag(name)
        if named and named.upper() not in LSE_BACKENDS:
            yield (
                f"{backend} with --{name} {named}: it returns no log-sum-exp, which partial results are merged by; use "
                f"one of {', '.join(sorted(LSE_BACKENDS))}"
            )
    if given.strict and flag("use_fp8_comms"):
        yield (
            "--sp-strict with --use_fp8_comms: FP8 communication compresses xDiT's own all-to-all, so that every "
            "attention call is handed back to it; leave one of them out"
        )
    stages = flag("pipefusion_parallel_degree") or 1
    if given.strict and stages > 1 and model is not None and model.transformer in _CACHED_INSIDE_USP:
        yield (
            f"--sp-strict with --pipefusion_parallel_degree {stages}: PipeFusion keeps the keys of {model.transformer} "
            f"inside xDiT's own USP, so that its attention calls are handed back; leave one of them out"
        )
