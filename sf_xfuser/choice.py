"""``--sp-backend auto``: which arm serves attention calls. By prediction, and by the first calls themselves.

An *arm* runs a call: xDiT's own USP, the same in the best of its other degrees, or Torus Attention in a layout, in
stages or without. All take the same tensors and give the same result, so any of them may serve any call, and measuring
needs no call besides those that the model makes, but for one of each arm that makes it warm:

    order    by what the simulator predicts on this cluster, whose rates a short probe measures once; it also says which
             other degrees are the best
    try      the first calls of a call shape go to the arms in turn, but for those whose prediction is hopeless: there
             are five at most, a few slow calls are soon made up for, and so little rests on a prediction alone
    settle   after ten calls at most, or thirty where two are near to each other and take turns, the one whose median is
             the least serves that shape; of those that are as fast xDiT's own, else the plan's layout in stages

Everything that decides is the same on all ranks: what rank 0 of the group predicts, and the time of the slowest rank.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from math import gcd, inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sf_xfuser import __version__, probe, topology
from sf_xfuser.args import TorusArgs
from sf_xfuser.cluster import Cluster
from sf_xfuser.contest import OWN, Contest
from sf_xfuser.files import read_json
from sf_xfuser.kernels import AttendFunction
from sf_xfuser.mesh import Mesh
from sf_xfuser.plan import UNEVEN, Layout, legal_layouts, make_plan
from sf_xfuser.simulate import CallShape, TorusArm, predict
from sf_xfuser.xdit_groups import XditGroups
from sf_xfuser.xdit_layouts import XditConfig, egress, legal_configs

_SHAPES_KEPT = 64
_TRANSFER_S, _TRY_S = 0.03, 0.03  # of the probe: a call waits for it


# -- which arms: pure --------------------------------------------------------------------------------------------------


def layouts(
    num_machines: int, ranks_per_machine: int, heads: int | None, kv_heads: int | None, degree: int, args: TorusArgs
) -> list[Layout]:
    """Torus Attention's layouts worth trying: the one that ``--sp-plan`` takes, and where it is ``auto`` and there are
    machines to cross, the next one with as few bytes (10 % more at most). ``degree``: xDiT's Ulysses degree, which says
    how heads can be split where their number is not known. Pure; raises ValueError as ``make_plan``."""
    plan = make_plan(
        num_machines,
        ranks_per_machine,
        heads=heads,
        kv_heads=kv_heads,
        rule=args.rule,
        explicit=args.explicit_plan(),
        ulysses_degree=degree if heads is None and args.plan == "auto" else None,
        max_imbalance=UNEVEN,
    )
    if args.plan != "auto" or heads is None or num_machines == 1:
        return [plan.layout]
    ratio = Fraction(kv_heads or heads, heads)
    legal = legal_layouts(num_machines, ranks_per_machine, gcd(heads, kv_heads or heads), UNEVEN)
    others = [x for x in legal if x != plan.layout and x.egress(ratio) <= Fraction(11, 10) * plan.layout.egress(ratio)]
    others.sort(key=lambda layout: (layout.egress(ratio), -layout.ulysses_degree))
    return [plan.layout, *others[:1]]


def other_degrees(
    own: XditConfig, num_machines: int, ranks_per_machine: int, heads: int | None, kv_heads: int | None
) -> list[XditConfig]:
    """xDiT's other degrees worth predicting: those that move no more bytes between machines than ``own``. Their rings
    pass KV on hop by hop, which holds no more of it at once than ``own`` does. ``heads`` None: not known, and calls may
    turn out not to suit all of them. Pure."""
    world_size = num_machines * ranks_per_machine
    kv_ratio = (kv_heads or heads or 1) / (heads or 1)

    def moved(config: XditConfig) -> float:
        return egress(config, num_machines, ranks_per_machine, kv_ratio)

    legal = legal_configs(world_size, ranks_per_machine, heads or world_size, kv_heads)
    hop_by_hop = [config for config in legal if config.ring_degree == 1 or config.rotation == "alltoall"]
    return [config for config in hop_by_hop if config != own and moved(config) <= moved(own) * (1 + 1e-9)]


def torus_first(layout: Layout, own: XditConfig, kv_ratio: Fraction) -> bool:
    """Whether torus is to be preferred where nothing is predicted or measured: it has something to hide, and moves no
    more bytes between machines than xDiT's own. Pure."""
    grid = layout.num_machines, layout.ranks_per_machine
    return grid[0] > 1 and float(layout.egress(kv_ratio)) <= egress(own, *grid, float(kv_ratio)) * (1 + 1e-9)


# -- the cluster, kept in a file --------------------------------------------------------------------------------------


def cluster_file(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Where the rates of the cluster that ``identity`` describes are kept."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"cluster-{digest}.json"


def read_cluster(path: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """(the cluster as ``Cluster.to_json`` gave it, or None; what is to be said of the file). Never raises."""
    try:
        values = read_json(path)
        kept = values["identity"]
        differing = sorted(name for name in {*kept, *identity} if kept.get(name) != identity.get(name))
        if differing:
            return None, f"{path} is ignored: it was measured on another cluster ({', '.join(differing)} differ)"
        Cluster.from_json(values["cluster"])
        return dict(values["cluster"]), f"as measured before, from {path}"
    except FileNotFoundError:
        return None, ""
    except Exception as error:  # whatever another program left there: the file saves seconds, no more
        return None, f"{path} is ignored: it holds no cluster ({type(error).__name__}: {error})"


def write_cluster(path: Path, identity: Mapping[str, Any], cluster: Cluster) -> str:
    """Keep it, whole or not at all; what is to be said of that. Never raises: the file saves seconds, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
        with os.fdopen(handle, "w") as file:
            json.dump({"identity": dict(identity), "cluster": cluster.to_json()}, file, indent=1)
        os.replace(name, path)
        return f"kept in {path}"
    except OSError as error:
        return f"not kept: {path}: {error.strerror or error}"


# -- all ranks of a group ---------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """Torus Attention on ``mesh``; ``together``: without stages."""

    mesh: Mesh
    together: bool = False


class Choice:
    """The arms of one sequence-parallel group, and what is known of them. All ranks make the same calls.

    ``own``: xDiT's own layout, ``others``: its other degrees, of which those predicted to be the best serve a call in
    ``groups``. ``meshes``: of Torus Attention in each layout, the plan's first. ``ways``: what torus runs on, by arm.
    ``folder``: where clusters are kept; None: nowhere.
    """

    def __init__(
        self,
        own: XditConfig,
        others: Sequence[XditConfig],
        groups: XditGroups,
        meshes: Sequence[Mesh],
        *,
        kv_ratio: Fraction,
        folder: Path | None,
        log: Callable[[str], object],
    ) -> None:
        self.own, self.folder, self.log = own, folder, log
        self.others = {f"xDiT's USP ({config})": config for config in others}
        self.groups = groups
        facts = topology.probe()
        self.meshes = tuple(meshes)
        self.ways = {f"torus ({mesh.layout})": Way(mesh) for mesh in meshes}
        if not (self.mesh.one_host and facts.accelerator == "cpu"):  # where torus has no stages in any case
            self.ways[f"torus together ({self.mesh.layout})"] = Way(self.mesh, together=True)
        self.torus_first = torus_first(meshes[0].layout, own, kv_ratio)
        self.arms = [*self.ways, OWN] if self.torus_first else [OWN, *self.ways]
        self.contests: dict[Hashable, Contest] = {}
        self.served: Counter[str] = Counter()
        self.clusters: dict[Hashable, tuple[Cluster | None, str]] = {}
        self._session = self.mesh.control.session
        places = [meshes[0].position, facts.host.partition("/")[0], facts.machine, facts.accelerator]
        said = self._gather(places, "places")
        self._places = [entry[1:] for entry in sorted(said)]
        self._groups = dist.get_world_size() // len(said)

    @property
    def mesh(self) -> Mesh:
        return self.meshes[0]

    def why_not_now(self) -> str | None:
        return next((reason for mesh in self.meshes if (reason := mesh.why_not_now()) is not None), None)

    def serve(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        joint_key: torch.Tensor | None,
        kind: Hashable,
        attend: AttendFunction,
        torus: Callable[[Mesh, bool], torch.Tensor],
        xdits: Callable[[], torch.Tensor],
        *,
        any_degrees: bool = True,
    ) -> tuple[str, torch.Tensor]:
        """(the arm that served, its result). ``torus`` makes the call on a mesh, ``together`` or not, ``xdits`` as xDiT
        does, which may be in ``any_degrees``. ``kind``: whatever else than shapes and dtype tells calls apart.
        Collective; waits for the device until the shape is settled, then never again."""
        joint_tokens = 0 if joint_key is None else joint_key.shape[2]
        known = (tuple(query.shape), tuple(key.shape), joint_tokens, query.dtype, kind, any_degrees)

        call = partial(self._call, torus=torus, xdits=xdits)
        capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing and (self.mesh.failed or self._session != self.mesh.control.session):
            self._forget_what_differs()
        contest = self.contests.get(known)
        if capturing:  # a graph keeps what it captures: no trial
            arm = self.arms[0]
            if contest is not None:
                arm = contest.chosen or next(arm for arm in contest.arms if arm in self.arms)
            return self._count(arm), call(arm)
        if contest is None:
            contest = self._opened(known, query, key, joint_tokens, kind, attend, any_degrees)
        while contest.chosen is None:
            arm = contest.turn
            if not contest.times[arm] and (failure := self._tried(arm, call, query.device)[1]):
                self._left_out(known, contest, arm, failure)
                continue
            self._synchronize(query.device)
            turns = self._gather(arm, "turn")
            if len(set(turns)) > 1:  # ranks that failed at different points of a trial start over
                del self.contests[known]
                contest = self._opened(known, query, key, joint_tokens, kind, attend, any_degrees)
                continue
            started = time.perf_counter()
            out, failure = self._tried(arm, call, query.device)
            seconds = self._gather(time.perf_counter() - started, "seconds")
            if failure:
                self._left_out(known, contest, arm, failure)
                continue
            self._took(known, contest, max(seconds))
            return self._count(arm), out
        return self._count(contest.chosen), call(contest.chosen)

    def _call(
        self, arm: str, torus: Callable[[Mesh, bool], torch.Tensor], xdits: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        if arm in self.ways:
            return torus(*self.ways[arm])
        if arm == OWN:
            return xdits()
        with self.groups.selected(self.others[arm]):
            return xdits()

    def _took(self, known: Hashable, contest: Contest, seconds: float) -> None:
        contest.took(seconds)
        if contest.chosen is not None:
            self.log(f"--sp-backend auto: {_spelled(known)}: {contest}")

    def _left_out(self, known: Hashable, contest: Contest, arm: str, failure: str) -> None:
        self.log(f"--sp-backend auto: {arm} is left out: {failure}")
        self._took(known, contest, inf)

    def _tried(self, arm: str, call: Callable[[str], Any], device: torch.device) -> tuple[Any, str]:
        """(Its result, why it failed on any rank, where that may be: xDiT in degrees that nobody asked for, since a
        backend may not merge what its ring passes on). Torus itself tells all ranks of a failure. Collective."""
        if arm in self.ways:
            out = call(arm)
            self._synchronize(device)
            return out, ""
        failed: Exception | None = None
        out = None
        try:
            out = call(arm)
            self._synchronize(device)
        except Exception as error:
            failed = error
        said = self._gather(failed and f"{type(failed).__name__}: {failed}", "a call of xDiT's")
        reasons = [f"rank {rank}: {text}" for rank, text in zip(self.mesh.members, said, strict=True) if text]
        if reasons and arm not in self.others:
            raise failed or RuntimeError(f"--sp-backend auto: {arm} failed: {'; '.join(reasons)}")
        return out, "; ".join(reasons)

    def _forget_what_differs(self) -> None:
        """After a failure that ranks may have met at different points. Collective."""
        mine = {str(known): contest.state() for known, contest in self.contests.items()}
        mine |= {str(at): said for at, (_, said) in self.clusters.items()}
        told = self._gather(mine, "what is known")
        self._session = self.mesh.control.session
        same = {name for name, state in mine.items() if all(each.get(name) == state for each in told)}
        self.contests = {known: contest for known, contest in self.contests.items() if str(known) in same}
        self.clusters = {at: found for at, found in self.clusters.items() if str(at) in same}

    @property
    def settled(self) -> bool:
        """Whether nothing is being measured."""
        return bool(self.contests) and all(contest.chosen is not None for contest in self.contests.values())

    def lines(self) -> list[str]:
        """What is known and was decided, as text."""
        preferred = "torus crosses machines with no more bytes" if self.torus_first else "torus has nothing to save"
        others = f", and the best of {', '.join(self.others)}" if self.others else ""
        text = [
            f"--sp-backend auto: arms {', '.join(self.arms)} ({self.own}){others}; without a prediction: {preferred}"
        ]
        text += [f"cluster for {_joined(kind)}: {said}" for kind, (_, said) in self.clusters.items()]
        text += [f"{_spelled(known)}: {contest}" for known, contest in self.contests.items()]
        return text + [f"attention calls served by {arm}: {n}" for arm, n in self.served.items()]

    def close(self) -> None:
        for mesh in self.meshes:
            mesh.close()

    def _count(self, arm: str) -> str:
        self.served[arm] += 1
        return arm

    def _opened(
        self,
        known: Hashable,
        query: torch.Tensor,
        key: torch.Tensor,
        joint_tokens: int,
        kind: Hashable,
        attend: AttendFunction,
        any_degrees: bool,
    ) -> Contest:
        predicted: dict[str, float] = {}
        try:
            shape = CallShape(
                seq_len=key.shape[2] * self.mesh.layout.world_size,
                heads=query.shape[1],
                kv_heads=key.shape[1],
                head_dim=query.shape[3],
                batch=query.shape[0],
                dtype=str(query.dtype).removeprefix("torch."),
                joint_tokens=joint_tokens,
            )
        except ValueError:  # a dtype or a shape that the simulator does not know: the calls themselves will tell
            pass
        else:
            cluster = self._cluster(shape, kind, attend, query.device)
            if cluster is not None:
                predicted = self._from_first(partial(self._predicted, cluster, shape, any_degrees))
        if len(self.contests) == _SHAPES_KEPT:
            del self.contests[next(iter(self.contests))]
        self.contests[known] = Contest(list(predicted) or self.arms, predicted)
        return self.contests[known]

    def _predicted(self, cluster: Cluster, shape: CallShape, any_degrees: bool) -> dict[str, float]:
        """Seconds of each arm, and of the best other degrees."""
        found = {}
        for name in self.arms:
            replayed: TorusArm | XditConfig = self.own
            if name in self.ways:
                mesh, together = self.ways[name]
                replayed = TorusArm(layout=mesh.layout, pattern=_pattern(mesh), together=together)
            found[name] = predict(cluster, shape, replayed).seconds
        heads = gcd(shape.heads, shape.kv_heads)
        suit = {name: config for name, config in self.others.items() if heads % config.ulysses_degree == 0}
        if any_degrees and suit:
            others = {name: predict(cluster, shape, config).seconds for name, config in suit.items()}
            best = min(others, key=others.__getitem__)
            found[best] = others[best]
        return found

    def _cluster(
        self, shape: CallShape, kind: Hashable, attend: AttendFunction, device: torch.device
    ) -> Cluster | None:
        """From the file, else from the probe; None where neither can be had. Collective."""
        at = (shape.dtype, shape.head_dim, kind)
        if at not in self.clusters:
            self.clusters[at] = self._found_cluster(shape, str(kind), attend, device)
            self.log(f"--sp-backend auto: cluster for {_joined(at)}: {self.clusters[at][1]}")
        return self.clusters[at][0]

    def _found_cluster(
        self, shape: CallShape, kind: str, attend: AttendFunction, device: torch.device
    ) -> tuple[Cluster | None, str]:
        identity = {
            "ranks": self._places,  # by position: host, machine, accelerator
            "machines": self.mesh.layout.num_machines,
            "groups": self._groups,  # of the job, which share its links
            "transport": sorted(self.mesh.transports),
            "attention": kind,
            "dtype": shape.dtype,
            "head_dim": shape.head_dim,
            "xdit": [str(self.own), *map(str, self.others.values())],  # whose collectives were measured
            "torch": torch.__version__,
            "sf_xfuser": __version__,
        }
        path = cluster_file(self.folder, identity) if self.folder is not None else None
        kept, said = self._from_first(partial(read_cluster, path, identity)) if path is not None else (None, "")
        if kept is not None:
            return Cluster.from_json(kept), said
        if said:
            self.log(f"--sp-backend auto: {said}")
        self.log("--sp-backend auto: measuring the rates of this cluster; some seconds, once")
        order = probe.Order(
            attend=attend,
            heads=shape.heads,
            head_dim=shape.head_dim,
            dtype=getattr(torch, shape.dtype),
            device=device,
            transfer_s=_TRANSFER_S,
            try_s=_TRY_S,
            configs=(self.own, *self.others.values()),
        )
        started = time.perf_counter()

        step = itertools.count()

        def gather(value: Any, failed: str = "") -> list[Any]:
            said = self._gather([failed, value], f"probe {next(step)}")
            reasons = [f"rank {rank}: {text}" for rank, (text, _) in zip(self.mesh.members, said, strict=True) if text]
            if reasons:
                raise _ProbeFailed("; ".join(reasons))
            return [value for _, value in said]

        try:
            try:
                cluster = probe.measure(self.mesh, order, gather)
                gather(None)
            except _ProbeFailed:
                raise
            except Exception as error:
                gather(None, f"{type(error).__name__}: {error}")  # the others are at a gather, or come to one
                raise
        except _ProbeFailed as failure:
            return None, f"not known: the probe failed ({failure})"
        took = f"measured in {time.perf_counter() - started:.1f} s"
        if path is None:
            return cluster, took
        return cluster, f"{took}, {self._from_first(partial(write_cluster, path, identity, cluster))}"

    def _from_first(self, make: Callable[[], Any]) -> Any:
        """What the rank at position 0 makes of it. Collective."""
        return self._gather(make() if self.mesh.position == 0 else None, "rank 0's")[0]

    def _gather(self, value: Any, what: str) -> list[Any]:
        """By position. Collective. ``what``: ranks that are at another one are not taken for this."""
        with self.mesh.call():
            return self.mesh.control.gather(f"--sp-backend auto: {what}", value)

    def _synchronize(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class _ProbeFailed(RuntimeError):
    """On some rank; raised on all."""


def _pattern(mesh: Mesh) -> str:
    return "message" if mesh.transport == "two_sided" else "put"


def _joined(kind: Any) -> str:
    return ", ".join(map(str, kind))


def _spelled(known: Any) -> str:
    query, key, joint_tokens, dtype, kind, _ = known
    keys = "" if query == key else f", keys {list(key)}"
    joint = f", {joint_tokens} joint tokens" if joint_tokens else ""
    return f"calls of {list(query)}{keys}{joint} in {str(dtype).removeprefix('torch.')}, {kind}"
