"""Predicted times of three workloads on three clusters: ``python -m sf_xfuser.bench.predicted``.

Prints the tables of docs/predicted.md: Torus Attention over NCCL against xDiT's USP. Nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar, get_args

from sf_xfuser import __version__
from sf_xfuser.bench.document import commit
from sf_xfuser.layout.chunking import granularities_to_try
from sf_xfuser.layout.plan import UNEVEN, Layout, legal_layouts, make_plan
from sf_xfuser.layout.schedule import Granularity
from sf_xfuser.layout.usp_layouts import XditConfig, legal_configs
from sf_xfuser.simulator import Prediction, TorusVariant, predict, simulated_call
from sf_xfuser.simulator.cluster import Cluster
from sf_xfuser.simulator.models import find_model
from sf_xfuser.simulator.presets import preset

WORKLOADS: dict[str, tuple[str, int, int, int | None]] = {  # model, height, width, frames
    "Flux 2048 px": ("flux", 2048, 2048, None),
    "Flux 4096 px": ("flux", 4096, 4096, None),
    "HunyuanVideo 720p": ("hunyuanvideo", 720, 1280, 129),
}
PRESETS = ("p4de", "p5en", "dgx-h100")
MACHINES = (2, 4, 8)

_HEADER = "| workload | machines | torus | ms | xDiT | ms | torus / xDiT | default / xDiT | compute | launches |"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """``torus``: in the fastest layout and granularity. ``default``: with ``--sp-backend torus`` and no other flag.
    ``tried``: the fastest granularity that ``--sp-backend auto`` tries in that layout. ``xdit``: the fastest degrees
    and rotation. ``compute_ratio``: compute of ``torus`` over that of one attention call of the same work."""

    torus: tuple[TorusVariant, Prediction]
    default: Prediction
    tried: tuple[TorusVariant, Prediction]
    xdit: tuple[XditConfig, Prediction]
    compute_ratio: float


def compare(cluster: Cluster, workload: str) -> Comparison:
    """Predict one of ``WORKLOADS`` on a cluster. Pure."""
    model, height, width, frames = WORKLOADS[workload]
    shape = find_model(model).call(cluster.world_size, height, width, frames)
    n, m = cluster.num_machines, cluster.ranks_per_machine

    def torus(layout: Layout, granularity: Granularity | None) -> tuple[TorusVariant, Prediction]:
        variant = TorusVariant(layout=layout, pattern="message", granularity=granularity)
        return variant, predict(cluster, shape, variant)

    def fastest(predicted: Iterable[tuple[_T, Prediction]]) -> tuple[_T, Prediction]:
        return min(predicted, key=lambda entry: entry[1].seconds)

    legal = legal_layouts(n, m, shape.heads, UNEVEN)
    best, call = fastest(torus(layout, granularity) for layout in legal for granularity in get_args(Granularity))
    plan = make_plan(n, m, heads=shape.heads, max_imbalance=UNEVEN).layout
    degree, tokens = best.layout.ulysses_degree, -(-shape.seq_len // cluster.world_size)
    one_call_s = simulated_call(cluster, shape, best).times.attention_s(
        tokens * degree, tokens * cluster.world_size + shape.joint_tokens, -(-shape.heads // degree), 0
    )
    return Comparison(
        torus=(best, call),
        default=torus(plan, None)[1],
        tried=fastest(torus(plan, granularity) for granularity in granularities_to_try("cuda", one_host=False)),
        xdit=fastest((config, predict(cluster, shape, config)) for config in legal_configs(n * m, m, shape.heads)),
        compute_ratio=(call.seconds - call.exposed_s) / one_call_s,
    )


def markdown() -> Iterator[str]:
    """The lines of the tables, one table for each cluster."""
    for name in PRESETS:
        yield from (f"### {name}", "", _HEADER, "| :-- | --: | :-- | --: | :-- | --: | --: | --: | --: | --: |")
        for workload in WORKLOADS:
            for num_machines in MACHINES:
                compared = compare(preset(name).with_size(num_machines, 8), workload)
                yield f"| {workload} | {num_machines} | {' | '.join(_cells(compared))} |"
        yield ""


def _cells(compared: Comparison) -> list[str]:
    (torus, call), (xdit, xdit_call) = compared.torus, compared.xdit
    layout = torus.layout
    return [
        f"T{layout.torus} U{layout.ulysses} R{layout.ring_degree}, {torus.granularity}",
        f"{call.seconds * 1e3:.2f}",
        f"U{xdit.ulysses_degree} R{xdit.ring_degree}",
        f"{xdit_call.seconds * 1e3:.2f}",
        _ratio(call, compared),
        _ratio(compared.default, compared),
        f"{compared.compute_ratio:.2f}",
        str(call.launches),
    ]


def _ratio(torus: Prediction, compared: Comparison) -> str:
    """The time of torus over that of xDiT; where xDiT is faster, with the reason and what ``auto`` selects."""
    _, xdit = compared.xdit
    text = f"{torus.seconds / xdit.seconds:.2f}"
    if float(text) <= 1:
        return text
    exposed = torus.exposed_s - xdit.exposed_s > (torus.seconds - xdit.seconds) / 2
    variant, tried = compared.tried
    selected = variant.granularity if tried.seconds < xdit.seconds else "xDiT's own"
    return f"{text} ({'exposed transfers' if exposed else 'more compute'}; `auto` selects {selected})"


if __name__ == "__main__":
    print("\n".join(markdown()))
    print(f"sf-xfuser {__version__}, commit {commit() or 'unknown'}")
