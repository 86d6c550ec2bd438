"""Which layout to take: every legal one, ranked by what the simulator says, each with its reason in words. Pure.

Up to 64 ranks every layout is replayed. On more, where a replay takes milliseconds, xDiT's are, and of ours those that
could still win: their bound (all that they compute, or all that a link carries: ``simulate.bound``) is more than 2 %
below the fastest replay so far; from the third replay on, more than 10 %. The others could win by no more than that,
whatever the order of their steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from math import gcd
from typing import Any

from sf_xfuser.layout.plan import UNEVEN, Layout, legal_layouts, paper_layout
from sf_xfuser.layout.usp_layouts import XditConfig, egress, legal_configs, variant_name
from sf_xfuser.simulator import CallShape, Prediction, TorusVariant, bound, predict
from sf_xfuser.simulator.cluster import Cluster

PATTERN_OF = {"two_sided": "message", "one_sided": "put"}
"""Kinds of transport, and what the simulator calls them."""

_NEAR = 1.02  # times as long, or as many bytes: not worth a word
_ALL, _FEW, _CLEARLY = 64, 2, 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedLayout:
    """One way to run the call. ``predicted`` is None where it was not replayed, and ``bound_s`` where the layout is not
    legal. ``across_bytes`` leave the machine that sends most in one call. ``flags``: what to launch with."""

    name: str
    layout: str
    flags: str
    paper: bool
    bound_s: float | None
    across_bytes: float | None
    predicted: Prediction | None
    verdict: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """``candidates``: the fastest first, then those that were not replayed, by bound, then those that are not legal.
    ``calls``: attention calls of one denoising step."""

    cluster: Cluster
    shape: CallShape
    calls: int
    candidates: tuple[RankedLayout, ...]

    @property
    def best(self) -> RankedLayout:
        return self.candidates[0]

    def to_json(self) -> dict[str, Any]:
        """Plain data: seconds, bytes; ``step_s`` is the attention of one denoising step."""
        found = []
        for candidate in self.candidates:
            values = asdict(candidate)
            predicted = values.pop("predicted")
            if predicted is not None:
                del predicted["timeline"]
                values |= predicted | {"step_s": self.calls * predicted["seconds"]}
            found.append(values)
        return {
            "cluster": self.cluster.to_json(),
            "shape": asdict(self.shape),
            "calls_per_step": self.calls,
            "candidates": found,
        }


def rank(cluster: Cluster, shape: CallShape, *, calls: int = 1, transport: str = "two_sided") -> Ranking:
    """Torus Attention in every layout, over a kind of transport (``PATTERN_OF``), and xDiT's USP at every pair of
    degrees, with the rotation that it runs (all-gather). Raises ValueError where there are more ranks than tokens."""
    n, m = cluster.num_machines, cluster.ranks_per_machine
    if shape.seq_len < cluster.world_size:
        raise ValueError(
            f"{shape.seq_len} tokens leave some of {cluster.world_size} ranks without any; give at least "
            f"{cluster.world_size} tokens, or fewer ranks"
        )
    divisible = gcd(shape.heads, shape.kv_heads)
    ratio = Fraction(shape.kv_heads, shape.heads)
    paper = paper_layout(n, m, divisible)
    legal = list(legal_layouts(n, m, divisible, UNEVEN))
    variants: list[tuple[str, TorusVariant | XditConfig]] = [
        ("torus", TorusVariant(layout=layout, pattern=PATTERN_OF[transport])) for layout in legal
    ]
    own = gcd(m, divisible)
    variants += [
        (variant_name(config, own), config)
        for config in legal_configs(cluster.world_size, m, shape.heads, shape.kv_heads)
        if config.rotation == "allgather"
    ]
    bounds = [
        (bound(cluster, shape, variant), number, name, variant) for number, (name, variant) in enumerate(variants)
    ]
    replayed: list[RankedLayout] = []
    left: list[RankedLayout] = []
    fastest = float("inf")
    for bound_s, _, name, variant in sorted(bounds, key=lambda entry: entry[:2]):
        predicted = None
        worth = cluster.world_size <= _ALL or isinstance(variant, XditConfig)
        if worth or bound_s * (_NEAR if len(replayed) < _FEW else _CLEARLY) < fastest:
            predicted = predict(cluster, shape, variant)
            fastest = min(fastest, predicted.seconds)
        elements = (
            float(variant.layout.egress(ratio))
            if isinstance(variant, TorusVariant)
            else egress(variant, n, m, float(ratio))
        )
        candidate = RankedLayout(
            name=name,
            layout=str(variant),
            flags=_flags(variant, transport),
            paper=isinstance(variant, TorusVariant) and variant.layout == paper,
            bound_s=bound_s,
            across_bytes=elements * shape.nbytes,
            predicted=predicted,
        )
        (replayed if predicted else left).append(candidate)
    replayed.sort(key=lambda candidate: candidate.predicted.seconds if candidate.predicted else 0.0)
    illegal = [layout for layout in legal_layouts(n, m, None) if layout not in legal]
    explained = [*_explained(replayed, left), *(_illegal(layout, divisible, shape) for layout in illegal)]
    return Ranking(cluster=cluster, shape=shape, calls=calls, candidates=tuple(explained))


def _flags(variant: TorusVariant | XditConfig, transport: str) -> str:
    if isinstance(variant, XditConfig):
        return f"--ulysses_degree {variant.ulysses_degree} --ring_degree {variant.ring_degree}"
    over = "" if transport == "two_sided" else " --sp-transport nvshmem"
    return f"--sp-backend torus --sp-plan {variant.layout.flag}{over}"


def _illegal(layout: Layout, divisible: int, shape: CallShape) -> RankedLayout:
    heads = f"{shape.heads} heads" if divisible == shape.heads else f"{shape.heads} heads, {shape.kv_heads} of KV,"
    return RankedLayout(
        name="torus",
        layout=str(layout),
        flags="",
        paper=False,
        bound_s=None,
        across_bytes=None,
        predicted=None,
        verdict=f"not legal: {heads} do not split {layout.ulysses_degree} ways",
    )


def _explained(replayed: Sequence[RankedLayout], left: Sequence[RankedLayout]) -> Iterable[RankedLayout]:
    best = replayed[0]
    for candidate in (*replayed, *left):
        yield replace(candidate, verdict="taken: the fastest" if candidate is best else _why_not(candidate, best))


def _why_not(candidate: RankedLayout, best: RankedLayout) -> str:
    """What makes the difference to the best one: bytes, the wire's time that nothing covers, or compute."""
    assert best.predicted is not None and candidate.across_bytes is not None and best.across_bytes is not None
    words = []
    if candidate.across_bytes > best.across_bytes * _NEAR:
        times = f"{candidate.across_bytes / best.across_bytes:.2f}x" if best.across_bytes else "more than none of"
        words.append(f"{times} the bytes between machines")
    elif candidate.across_bytes * _NEAR < best.across_bytes:
        words.append(f"fewer bytes between machines ({candidate.across_bytes / best.across_bytes:.2f}x)")
    if candidate.predicted is None:
        assert candidate.bound_s is not None
        words.append(f"takes {candidate.bound_s * 1e3:.2f} ms even if all overlaps perfectly")
        return "; ".join(words)
    exposed = candidate.predicted.exposed_s - best.predicted.exposed_s
    computed = candidate.predicted.seconds - best.predicted.seconds - exposed
    if exposed >= computed:
        words.append(f"waits {exposed * 1e3:.2f} ms longer for the wire")
        if computed < 0:
            words[-1] += f", computes {-computed * 1e3:.2f} ms less"
    else:
        words.append(f"computes {computed * 1e3:.2f} ms longer (smaller calls, merges, copies)")
    return f"{candidate.predicted.seconds / best.predicted.seconds:.2f}x the time: " + "; ".join(words)
