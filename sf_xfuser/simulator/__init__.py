"""What one attention call takes on a cluster: the steps that the ranks run, replayed against its rates. Pure.

Torus Attention (``torus``) is replayed from ``schedule.build_schedule``, step by step, as ``attention._Run`` runs it;
xDiT's USP, flat Ulysses and Ring (``xdit``) as xDiT 0.7 and PyTorch's ring template run them. A rank's rounds leave at
its share of the link while all of its machine send; ``replay``: when each may leave, and what slows computing down.

Where all ranks hold as many tokens and heads, a rotation of the mesh takes any rank to any other and the schedule with
it: all run in step, and what comes in a round comes when this rank's own has left. Then one rank is replayed for all.
``Replay`` of every rank gives the same times (a test holds it) and serves uneven calls and timelines.
"""

from __future__ import annotations

from sf_xfuser.layout.usp_layouts import XditConfig
from sf_xfuser.simulator.cluster import Cluster
from sf_xfuser.simulator.torus import MERGE_BYTES, Torus, TorusVariant
from sf_xfuser.simulator.usp import Usp
from sf_xfuser.simulator.variant import ITEMSIZE, CallShape, Prediction

__all__ = ["ITEMSIZE", "MERGE_BYTES", "CallShape", "Prediction", "TorusVariant", "bound", "predict"]


def predict(
    cluster: Cluster, shape: CallShape, variant: TorusVariant | XditConfig, *, every_rank: bool = False
) -> Prediction:
    """What ``variant`` takes for one call of ``shape``. ``every_rank`` replays them all and keeps their timeline; without
    it one stands for all where they are alike. Raises ValueError where the variant does not fit the cluster."""
    if isinstance(variant, XditConfig):
        return Usp(cluster, shape, variant).predict(every_rank)
    if (variant.layout.num_machines, variant.layout.ranks_per_machine) != (
        cluster.num_machines,
        cluster.ranks_per_machine,
    ):
        raise ValueError(f"{variant.layout} does not fit {cluster.num_machines} x {cluster.ranks_per_machine} ranks")
    return Torus(cluster, shape, variant).predict(every_rank)


def bound(cluster: Cluster, shape: CallShape, variant: TorusVariant | XditConfig) -> float:
    """Seconds that no order of ``variant``'s steps could beat: all that it computes, or all that a link carries."""
    if isinstance(variant, XditConfig):
        usp = Usp(cluster, shape, variant)
        return max(usp.work.alone_s, usp.wire_s)
    return Torus(cluster, shape, variant).bound_s
