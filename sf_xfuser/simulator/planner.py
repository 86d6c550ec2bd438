"""Ranks every legal layout, in each granularity, by its predicted time, with a reason for each. Pure.

Up to 64 ranks every layout is replayed. Above, a replay takes milliseconds: all of xDiT's layouts are replayed, and a
torus layout only if its lower bound (``SimulatedCall.bound_s``) is more than 2 % below the fastest replay so far, or
10 % after two replays. The skipped layouts can be faster by no more than that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import gcd
from typing import Any, get_args

from sf_xfuser.layout.plan import UNEVEN, Layout, legal_layouts, paper_layout, unsplit
from sf_xfuser.layout.schedule import Granularity
from sf_xfuser.layout.usp_layouts import XditConfig, legal_configs, variant_name
from sf_xfuser.simulator import CallShape, Prediction, TorusVariant, simulated_call
from sf_xfuser.simulator.call import SimulatedCall
from sf_xfuser.simulator.cluster import Cluster
from sf_xfuser.simulator.torus import TorusCall

PATTERN_OF = {"two_sided": "message", "one_sided": "put"}
"""The traffic pattern (``cluster.PATTERNS``) of each kind of transport."""

_NEAR = 1.02  # ratios of times or bytes below this count as equal
_REPLAY_ALL_RANKS, _FIRST_REPLAYS, _LATER_MARGIN = 64, 2, 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedLayout:
    """``granularity``: of torus. ``flags`` launch it. ``predicted`` is None without a replay, ``bound_s`` and
    ``across_bytes`` (of the busiest machine, per call) if the layout is illegal. ``paper``: the paper's rule selects
    it. ``reason``: why it is or is not the best layout."""

    name: str
    layout: str
    granularity: Granularity | None = None
    flags: str = ""
    paper: bool = False
    bound_s: float | None = None
    across_bytes: float | None = None
    predicted: Prediction | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """``layouts``: the replayed ones by time, then the others by bound, then the illegal ones. ``calls``: attention
    calls of one denoising step."""

    cluster: Cluster
    shape: CallShape
    calls: int
    layouts: tuple[RankedLayout, ...]

    @property
    def best(self) -> RankedLayout:
        return self.layouts[0]

    def to_json(self) -> dict[str, Any]:
        """JSON data in seconds and bytes. ``step_s`` is the attention time of one denoising step."""
        layouts = []
        for ranked in self.layouts:
            values = asdict(ranked)
            values["verdict"] = values["reason"]  # the old key, for one release
            predicted = values.pop("predicted")
            if predicted is not None:
                del predicted["timeline"]
                values |= predicted | {"step_s": self.calls * predicted["seconds"]}
            layouts.append(values)
        return {
            "cluster": self.cluster.to_json(),
            "shape": asdict(self.shape),
            "calls_per_step": self.calls,
            "candidates": layouts,
        }


def rank(cluster: Cluster, shape: CallShape, *, calls: int = 1, transport: str = "two_sided") -> Ranking:
    """Torus Attention in every layout and granularity over a kind of transport (``PATTERN_OF``), and xDiT's USP with
    every pair of degrees and its default rotation (all-gather). Raises ValueError if there are more ranks than tokens.
    """
    n, m = cluster.num_machines, cluster.ranks_per_machine
    if shape.seq_len < cluster.world_size:
        raise ValueError(
            f"{shape.seq_len} tokens cannot be split over {cluster.world_size} ranks; use at least "
            f"{cluster.world_size} tokens, or fewer ranks"
        )
    divisible = gcd(shape.heads, shape.kv_heads)
    paper = paper_layout(n, m, divisible)
    legal = list(legal_layouts(n, m, divisible, UNEVEN))
    variants: list[tuple[str, TorusVariant | XditConfig]] = [
        ("torus", TorusVariant(layout=layout, pattern=PATTERN_OF[transport], granularity=granularity))
        for layout in legal
        for granularity in get_args(Granularity)
    ]
    variants += [
        (variant_name(config, gcd(m, divisible)), config)
        for config in legal_configs(cluster.world_size, m, shape.heads, shape.kv_heads)
        if config.rotation == "allgather"
    ]
    calls_by_bound = sorted(
        ((name, variant, simulated_call(cluster, shape, variant)) for name, variant in variants),
        key=lambda entry: entry[2].bound_s,
    )
    replayed: list[RankedLayout] = []
    skipped: list[RankedLayout] = []
    fastest = float("inf")
    for name, variant, call in calls_by_bound:
        ranked = RankedLayout(
            name=name,
            layout=str(variant),
            granularity=variant.granularity if isinstance(variant, TorusVariant) else None,
            flags=_flags(call, variant, transport),
            paper=isinstance(variant, TorusVariant) and variant.layout == paper,
            bound_s=call.bound_s,
            across_bytes=call.egress_bytes,
        )
        always = cluster.world_size <= _REPLAY_ALL_RANKS or isinstance(variant, XditConfig)
        if always or call.bound_s * (_NEAR if len(replayed) < _FIRST_REPLAYS else _LATER_MARGIN) < fastest:
            predicted = call.predict()
            fastest = min(fastest, predicted.seconds)
            replayed.append(replace(ranked, predicted=predicted))
        else:
            skipped.append(ranked)
    replayed.sort(key=lambda ranked: ranked.predicted.seconds if ranked.predicted else 0.0)
    best = replayed[0]
    layouts = [
        replace(ranked, reason="chosen: the fastest" if ranked is best else _why_not(ranked, best))
        for ranked in (*replayed, *skipped)
    ]
    layouts += [_illegal(layout, divisible, shape) for layout in legal_layouts(n, m, None) if layout not in legal]
    return Ranking(cluster=cluster, shape=shape, calls=calls, layouts=tuple(layouts))


def _flags(call: SimulatedCall, variant: TorusVariant | XditConfig, transport: str) -> str:
    """``auto`` where ``torus`` would choose another granularity."""
    if isinstance(variant, XditConfig):
        return f"--ulysses_degree {variant.ulysses_degree} --ring_degree {variant.ring_degree}"
    assert isinstance(call, TorusCall)
    backend = "torus" if call.chosen_granularity == variant.granularity else "auto"
    suffix = "" if transport == "two_sided" else " --sp-transport nvshmem"
    return f"--sp-backend {backend} --sp-plan {variant.layout.flag}{suffix}"


def _illegal(layout: Layout, divisible: int, shape: CallShape) -> RankedLayout:
    heads = f"{shape.heads} heads" if divisible == shape.heads else f"{shape.heads} heads ({shape.kv_heads} of KV)"
    reason = f"illegal: {unsplit(divisible, layout.ulysses_degree, heads)}"
    return RankedLayout(name="torus", layout=str(layout), reason=reason)


def _why_not(ranked: RankedLayout, best: RankedLayout) -> str:
    """The difference from the best layout: bytes, exposed transfer time, or compute."""
    assert best.predicted is not None and ranked.across_bytes is not None and best.across_bytes is not None
    reasons = []
    if ranked.across_bytes > best.across_bytes * _NEAR:
        ratio = f"{ranked.across_bytes / best.across_bytes:.2f}x the" if best.across_bytes else "sends"
        reasons.append(f"{ratio} bytes between machines")
    elif ranked.across_bytes * _NEAR < best.across_bytes:
        reasons.append(f"fewer bytes between machines ({ranked.across_bytes / best.across_bytes:.2f}x)")
    if ranked.predicted is None:
        assert ranked.bound_s is not None
        reasons.append(f"at least {ranked.bound_s * 1e3:.2f} ms even with perfect overlap")
        return "; ".join(reasons)
    exposed = ranked.predicted.exposed_s - best.predicted.exposed_s
    computed = ranked.predicted.seconds - best.predicted.seconds - exposed
    if ranked.predicted.seconds == ranked.predicted.host_s:
        reasons.append(f"its host starts {ranked.predicted.launches} operations")
    elif exposed >= computed:
        reasons.append(f"waits {exposed * 1e3:.2f} ms longer for transfers")
        if computed < 0:
            reasons[-1] += f", computes {-computed * 1e3:.2f} ms less"
    else:
        reasons.append(f"computes {computed * 1e3:.2f} ms longer (smaller calls, merges, copies)")
    return f"{ranked.predicted.seconds / best.predicted.seconds:.2f}x the time: " + "; ".join(reasons)
