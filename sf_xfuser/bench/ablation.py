"""Compares the simulator with the paper's ablation (arXiv 2601.20273): ``python -m sf_xfuser.bench.ablation``.

All workloads use the parameters of the preset ``p4de``, and Torus Attention block by block, as in the paper. The paper
measured whole denoising steps, so a predicted step is the simulated attention plus the matrix products of the blocks:
24 h^2 FLOP per token and block with h = heads x head size (4 h^2 weights for Q, K, V and output, 8 h^2 for the MLP), at
the preset's rate. ``--fit`` searches for the
six parameters that no data sheet contains, within plausible bounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from sf_xfuser.layout.plan import paper_layout
from sf_xfuser.layout.usp_layouts import XditConfig
from sf_xfuser.simulator import CallShape, TorusVariant, predict
from sf_xfuser.simulator.cluster import Cluster, LinkSpec, PatternCost
from sf_xfuser.simulator.presets import preset

VARIANTS = ("mapping alone", "+ Torus (NCCL)", "+ one-sided")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """``paper``: measured speedup over USP of each of ``VARIANTS``."""

    name: str
    num_machines: int
    shape: CallShape
    paper: tuple[float, float, float]


def _flux(pixels: int) -> CallShape:
    """One token per 16 x 16 pixels, and 512 text tokens."""
    return CallShape(seq_len=(pixels // 16) ** 2 + 512, heads=24, kv_heads=24, head_dim=128)


def _cogvideox(seconds: int) -> CallShape:
    """768 x 1360: 48 x 85 tokens for each of 2 * seconds + 1 latent frames (8 frames per second, 4 per latent frame),
    and 226 text tokens; 24 heads of 64, as in the paper."""
    return CallShape(seq_len=48 * 85 * (2 * seconds + 1) + 226, heads=24, kv_heads=24, head_dim=64)


WORKLOADS = (
    Workload(name="Flux 3072 px, 3 machines", num_machines=3, shape=_flux(3072), paper=(1.11, 1.01, 1.11)),
    Workload(name="Flux 3072 px, 4 machines", num_machines=4, shape=_flux(3072), paper=(1.64, 1.06, 1.77)),
    Workload(name="Flux 4096 px, 4 machines", num_machines=4, shape=_flux(4096), paper=(1.62, 1.49, 1.61)),
    Workload(name="CogVideoX 20 s, 3 machines", num_machines=3, shape=_cogvideox(20), paper=(1.08, 1.26, 1.22)),
    Workload(name="CogVideoX 40 s, 3 machines", num_machines=3, shape=_cogvideox(40), paper=(1.06, 1.16, 1.17)),
)

# Fitted parameters and their bounds: the fraction of 400 Gbit/s that NCCL and NVSHMEM reach over EFA, microseconds to
# start an NCCL round or collective and per message of it, microseconds per one-sided message (EFA keeps no order, so
# the signal waits for the data), and the fraction of multiprocessors that NCCL uses.
BOUNDS = {
    "nccl_efficiency": (0.4, 0.95),
    "nccl_start_us": (10.0, 200.0),
    "nccl_message_us": (2.0, 80.0),
    "nccl_compute_share": (0.05, 0.35),
    "put_efficiency": (0.3, 0.95),
    "put_message_us": (2.0, 100.0),
}


def ratios(cluster: Cluster, workload: Workload) -> tuple[float, ...]:
    """Predicted speedup of each of ``VARIANTS`` over USP with Ulysses inside machines and Ring across."""
    n, m, shape = workload.num_machines, cluster.ranks_per_machine, workload.shape
    sized = cluster.with_size(n, m)
    layout = paper_layout(n, m, shape.heads)
    hidden = shape.heads * shape.head_dim
    linear_s = 24.0 * hidden**2 * shape.seq_len / sized.world_size / (cluster.compute.linear_tflops * 1e12)
    usp, *ours = (
        predict(sized, shape, variant).seconds + linear_s
        for variant in (
            XditConfig(ulysses_degree=m, ring_degree=n),
            XditConfig(
                ulysses_degree=layout.ulysses_degree, ring_degree=layout.ring_degree, placement="machines-first"
            ),
            TorusVariant(layout=layout, pattern="message", granularity="block"),
            TorusVariant(layout=layout, pattern="put", granularity="block"),
        )
    )
    return tuple(usp / seconds for seconds in ours)


def mean_error(predicted: Sequence[Sequence[float]]) -> float:
    """Mean absolute error of all ratios."""
    pairs = zip(predicted, WORKLOADS, strict=True)
    return statistics.fmean(abs(p - q) for speedups, work in pairs for p, q in zip(speedups, work.paper, strict=True))


def wrong_directions(predicted: Sequence[Sequence[float]]) -> int:
    """The number of ratios on the wrong side of 1."""
    pairs = zip(predicted, WORKLOADS, strict=True)
    return sum((p > 1) != (q > 1) for speedups, work in pairs for p, q in zip(speedups, work.paper, strict=True))


def with_parameters(cluster: Cluster, parameters: Mapping[str, float]) -> Cluster:
    """A copy of ``cluster`` with these values of the parameters in ``BOUNDS``."""
    costs = []
    for pattern, members, cost in cluster.across.costs:
        kind = "put" if pattern == "put" else "nccl"
        named: dict[str, Any] = {
            f: parameters[f"{kind}_{f}"] for f in PatternCost.__slots__ if f"{kind}_{f}" in parameters
        }
        costs.append((pattern, members, replace(cost, **named)))
    link: LinkSpec = replace(cluster.across, costs=tuple(costs))
    return replace(cluster, across=link)


def fit(cluster: Cluster, seed: int, tries: int = 1000) -> dict[str, float]:
    """The parameters with the lowest mean error in a random search; a wrong direction costs 0.1."""
    draw = random.Random(seed)

    def cost(parameters: Mapping[str, float]) -> float:
        predicted = [ratios(with_parameters(cluster, parameters), workload) for workload in WORKLOADS]
        return mean_error(predicted) + 0.1 * wrong_directions(predicted)

    best = min(({name: draw.uniform(*bounds) for name, bounds in BOUNDS.items()} for _ in range(tries // 5)), key=cost)
    best_cost, step = cost(best), 0.25
    for number in range(tries):
        tried = dict(best)
        for name in draw.sample(list(BOUNDS), draw.choice((1, 1, 2, 3))):
            low, high = BOUNDS[name]
            tried[name] = min(high, max(low, tried[name] + draw.gauss(0, step * (high - low))))
        if (tried_cost := cost(tried)) < best_cost:
            best, best_cost = tried, tried_cost
        if number % (tries // 5) == tries // 5 - 1:
            step *= 0.6
    return best


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sf_xfuser.bench.ablation", description=__doc__)
    parser.add_argument("--fit", type=int, metavar="SEED", help="search for the parameters first, and use them")
    options = parser.parse_args(argv)
    cluster = preset("p4de")
    if options.fit is not None:
        parameters = fit(cluster, options.fit)
        cluster = with_parameters(cluster, parameters)
        print("fitted:", ", ".join(f"{name} {value:.3g}" for name, value in parameters.items()))
    predicted = [ratios(cluster, workload) for workload in WORKLOADS]
    table = Table(Column("workload"), *(Column(name, justify="right") for name in VARIANTS), title="predicted (paper)")
    for workload, speedups in zip(WORKLOADS, predicted, strict=True):
        table.add_row(workload.name, *(f"{p:.2f}x ({q:.2f}x)" for p, q in zip(speedups, workload.paper, strict=True)))
    Console(width=100).print(table)
    print(f"mean absolute error {mean_error(predicted):.3f}, wrong directions {wrong_directions(predicted)} of 15")
    return 0


if __name__ == "__main__":
    sys.exit(main())
