"""``--sp-backend auto``: an autotuner over a few ways to run attention, by the first calls of each call shape.

The *candidates* take the same tensors and give the same result, so any of them may run any call:

    xDiT's own USP           in the degrees that it was launched with
    xDiT's flat Ulysses      all heads split over all ranks, where that is legal and something else
    Torus Attention          in the layout of ``--sp-plan``, in the next one with as few bytes, and without overlap

The first calls of a shape are its *trial*: candidates run them in turns, each after one warm-up call whose result
nobody uses. After ten timed calls at most, or thirty where two are near to each other, the one with the least median is
*selected* for that shape; among equals xDiT's own, else the plan's layout in stages.

Everything that decides is the same on all ranks: the time of a call is that of the slowest rank.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from fractions import Fraction
from functools import partial
from math import gcd, inf
from typing import Any, NamedTuple

import torch

from sf_xfuser.autotune.trials import OWN, Contest
from sf_xfuser.config import TorusArgs
from sf_xfuser.layout.plan import UNEVEN, Layout, legal_layouts, make_plan
from sf_xfuser.layout.usp_layouts import XditConfig, egress
from sf_xfuser.torus.mesh import Mesh

_SHAPES_KEPT = 64


# -- which candidates: pure --------------------------------------------------------------------------------------------


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


def flat_ulysses(own: XditConfig, heads: int | None, kv_heads: int | None) -> list[XditConfig]:
    """xDiT's flat Ulysses over the ranks of ``own``; none where it is ``own`` or heads do not divide. ``heads`` None:
    not known, and calls may turn out not to suit it. No ring: those of xDiT count padded keys wrongly. Pure."""
    world_size = own.ulysses_degree * own.ring_degree
    if own.ring_degree == 1 or (heads is not None and gcd(heads, kv_heads or heads) % world_size):
        return []
    return [XditConfig(ulysses_degree=world_size, ring_degree=1)]


def torus_first(layout: Layout, own: XditConfig, kv_ratio: Fraction) -> bool:
    """Whether torus is to be preferred where nothing is timed: it has something to hide, and moves no more bytes
    between machines than xDiT's own. Pure."""
    grid = layout.num_machines, layout.ranks_per_machine
    return grid[0] > 1 and float(layout.egress(kv_ratio)) <= egress(own, *grid, float(kv_ratio)) * (1 + 1e-9)


# -- all ranks of a group ---------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """Torus Attention on ``mesh``; ``overlap=False``: unstaged."""

    mesh: Mesh
    overlap: bool = True


class Choice:
    """The candidates of one sequence-parallel group, and the trials of its call shapes. All ranks make the same calls.

    ``own``: xDiT's own layout. ``others``: its other degrees, run inside ``selected``. ``meshes``: of Torus
    Attention in each layout, the plan's first. ``ways``: the mesh of each of torus's candidates.
    """

    def __init__(
        self,
        own: XditConfig,
        others: Sequence[XditConfig],
        selected: Callable[[XditConfig], AbstractContextManager[None]],
        meshes: Sequence[Mesh],
        *,
        kv_ratio: Fraction,
        log: Callable[[str], object],
    ) -> None:
        self.own, self.selected, self.meshes, self.log = own, selected, tuple(meshes), log
        self.others = {f"xDiT's USP ({config})": config for config in others}
        self.ways = {f"torus ({mesh.layout})": Way(mesh) for mesh in meshes}
        if torch.cuda.is_available() or not self.mesh.one_host:  # else torus is unstaged in any case
            self.ways[f"torus unstaged ({self.mesh.layout})"] = Way(self.mesh, overlap=False)
        self.torus_first = torus_first(self.mesh.layout, own, kv_ratio)
        self.candidates = [*self.ways, OWN] if self.torus_first else [OWN, *self.ways]
        self.candidates += self.others
        self.contests: dict[Hashable, Contest] = {}
        self.calls: Counter[str] = Counter()
        self._session = self.mesh.control.session

    @property
    def mesh(self) -> Mesh:
        return self.meshes[0]

    def unavailable_reason(self) -> str | None:
        return next((reason for mesh in self.meshes if (reason := mesh.unavailable_reason()) is not None), None)

    def serve(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        joint_key: torch.Tensor | None,
        kind: Hashable,
        torus: Callable[[Mesh, bool], torch.Tensor],
        xdits: Callable[[], torch.Tensor],
    ) -> tuple[str, torch.Tensor]:
        """(the candidate that ran the call, its result). ``torus`` makes the call on a mesh, with ``overlap`` or not,
        ``xdits`` as xDiT does. ``kind``: whatever else than shapes and dtype tells calls apart. Collective; waits for
        the device during a trial, then never again."""
        joint_tokens = 0 if joint_key is None else joint_key.shape[2]
        known = (tuple(query.shape), tuple(key.shape), joint_tokens, query.dtype, kind)
        call = partial(self._call, torus=torus, xdits=xdits)
        contest = self.contests.get(known)
        if query.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph keeps what it captures: no trial
            name = (contest and contest.chosen) or self.candidates[0]
            return self._count(name), call(name)
        if self.mesh.failed or self._session != self.mesh.control.session:
            self._forget_what_differs()
            contest = self.contests.get(known)
        contest = contest or self._start(known)
        while contest.chosen is None:
            name = contest.turn
            timed = len(contest.times[name])
            self._synchronize(query.device)
            turns = set(self._gather(f"{name} {timed}", "turn"))
            if len(turns) > 1:  # ranks that failed at different points start over
                contest = self._start(known)
                continue
            out, seconds = None, inf
            for _ in range(1 if timed else 2):  # the first makes connections, buffers and kernels
                out, seconds, failure = self._tried(name, call, query.device)
                if failure:
                    self.log(f"--sp-backend auto: {name} is left out: {failure}")
                    break
            self._took(known, seconds)
            if out is not None:
                return self._count(name), out
        return self._count(contest.chosen), call(contest.chosen)

    def _call(
        self, name: str, torus: Callable[[Mesh, bool], torch.Tensor], xdits: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        if name in self.ways:
            return torus(*self.ways[name])
        if name == OWN:
            return xdits()
        with self.selected(self.others[name]):
            return xdits()

    def _start(self, known: Any) -> Contest:
        """A trial of the candidates that suit the heads of these calls, from the beginning."""
        self.contests.pop(known, None)
        if len(self.contests) == _SHAPES_KEPT:
            del self.contests[next(iter(self.contests))]
        heads = gcd(known[0][1], known[1][1])
        unfit = {name for name, config in self.others.items() if heads % config.ulysses_degree}
        self.contests[known] = Contest([name for name in self.candidates if name not in unfit])
        return self.contests[known]

    def _took(self, known: Hashable, seconds: float) -> None:
        contest = self.contests[known]
        contest.took(seconds)
        if contest.chosen is not None:
            self.log(f"--sp-backend auto: {_spelled(known)}: {contest}")

    def _tried(
        self, name: str, call: Callable[[str], torch.Tensor], device: torch.device
    ) -> tuple[torch.Tensor | None, float, str]:
        """(The result, seconds on the slowest rank, why the call failed on any rank): None and infinity where it did,
        in xDiT's degrees that nobody asked for, which an attention backend may not support. Where xDiT's own fails on
        one rank this raises on all; torus itself tells all ranks. Collective."""
        started = time.perf_counter()
        found: torch.Tensor | None = None
        failed: Exception | None = None
        try:
            found = call(name)
            self._synchronize(device)
        except Exception as error:
            if name in self.ways:
                raise
            failed = error
        words = failed and f"{type(failed).__name__}: {failed}"
        said = self._gather([time.perf_counter() - started, words], "a timed call")
        reasons = [f"rank {rank}: {text}" for rank, (_, text) in zip(self.mesh.members, said, strict=True) if text]
        if reasons and name not in self.others:
            raise failed or RuntimeError(f"--sp-backend auto: {name} failed: {'; '.join(reasons)}")
        if reasons:
            return None, inf, "; ".join(reasons)
        return found, max(seconds for seconds, _ in said), ""

    def _forget_what_differs(self) -> None:
        """After a failure that ranks may have met at different points. Collective."""
        mine = {str(known): contest.state() for known, contest in self.contests.items()}
        told = self._gather(mine, "what is selected")
        self._session = self.mesh.control.session
        same = {name for name, state in mine.items() if all(each.get(name) == state for each in told)}
        self.contests = {known: contest for known, contest in self.contests.items() if str(known) in same}

    @property
    def settled(self) -> bool:
        """Whether no trial is running."""
        return bool(self.contests) and all(contest.chosen is not None for contest in self.contests.values())

    def lines(self) -> list[str]:
        """The candidates, trials and calls, as text."""
        why = "torus crosses machines with no more bytes" if self.torus_first else "torus has nothing to save"
        text = [
            f"--sp-backend auto: candidates {', '.join(self.candidates)} ({self.own}); "
            f"without a trial: {self.candidates[0]}, since {why}"
        ]
        text += [f"{_spelled(known)}: {contest}" for known, contest in self.contests.items()]
        return text + [f"attention calls handled by {name}: {n}" for name, n in self.calls.items()]

    def close(self) -> None:
        for mesh in self.meshes:
            mesh.close()

    def _count(self, name: str) -> str:
        self.calls[name] += 1
        return name

    def _gather(self, value: Any, step: str) -> list[Any]:
        """By position. ``step``: so that none is taken for another. Collective."""
        with self.mesh.call():
            return self.mesh.control.gather(f"--sp-backend auto: {step}", value)

    def _synchronize(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _spelled(known: Any) -> str:
    query, key, joint_tokens, dtype, kind = known
    keys = "" if query == key else f", keys {list(key)}"
    joint = f", {joint_tokens} joint tokens" if joint_tokens else ""
    return f"calls of {list(query)}{keys}{joint} in {str(dtype).removeprefix('torch.')}, {kind}"
