"""What one attention call takes on a cluster: the steps that the ranks run, replayed against its rates. Pure.

Torus Attention (``torus``) is replayed from ``schedule.build_schedule``, step by step, as ``attention._Run`` runs it;
xDiT's USP, flat Ulysses and Ring (``xdit``) as xDiT 0.7 and PyTorch's ring template run them. A rank's rounds leave at
its share of the link while all of its machine send; ``replay``: when each may leave, and what slows computing down.

Where all ranks hold as many tokens and heads, a rotation of the mesh takes any rank to any other and the schedule with
it: all run in step, and what comes in a round comes when this rank's own has left. Then one rank is replayed for all.
``Replay`` of every rank gives the same times (a test holds it) and serves uneven calls and timelines.
"""

from __future__ import annotations

from sf_xfuser.cluster import Cluster
from sf_xfuser.simulate.arm import ITEMSIZE, CallShape, Prediction
from sf_xfuser.simulate.torus import MERGE_BYTES, Torus, TorusArm
from sf_xfuser.simulate.xdit import Usp
from sf_xfuser.xdit_layouts import XditConfig

__all__ = ["ITEMSIZE", "MERGE_BYTES", "CallShape", "Prediction", "TorusArm", "bound", "predict"]


def predict(cluster: Cluster, shape: CallShape, arm: TorusArm | XditConfig, *, every_rank: bool = False) -> Prediction:
    """What ``arm`` takes for one call of ``shape``. ``every_rank`` replays them all and keeps their timeline; without
    it one stands for all where they are alike. Raises ValueError where the arm does not fit the cluster."""
    if isinstance(arm, XditConfig):
        return Usp(cluster, shape, arm).predict(every_rank)
    if (arm.layout.num_machines, arm.layout.ranks_per_machine) != (cluster.num_machines, cluster.ranks_per_machine):
        raise ValueError(f"{arm.layout} does not fit {cluster.num_machines} x {cluster.ranks_per_machine} ranks")
    return Torus(cluster, shape, arm).predict(every_rank)


def bound(cluster: Cluster, shape: CallShape, arm: TorusArm | XditConfig) -> float:
    """Seconds that no order of ``arm``'s steps could beat: all that it computes, or all that a lane carries."""
    if isinstance(arm, XditConfig):
        usp = Usp(cluster, shape, arm)
        return max(usp.work.alone_s, usp.wire_s)
    return Torus(cluster, shape, arm).bound_s
