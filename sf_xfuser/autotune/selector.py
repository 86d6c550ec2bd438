"""``--sp-backend auto``: times the candidates on the first calls of each call shape, then uses the fastest.

The candidates take the same tensors and give the same result:

    xDiT's own USP        in the degrees of the launch
    xDiT's USP            as flat Ulysses (heads split over all ranks), where the head count allows it
    Torus Attention       in the layout of ``--sp-plan``, in each of ``granularities_to_try``, and in the layout with
                          the next fewest bytes

A *trial* runs the first calls of a shape on the candidates in turn, each after one warm-up call. It selects the lowest
median after at most ten timed calls, or thirty where two candidates are within 4 %. On a tie xDiT's own USP is
selected, else the first layout of Torus Attention.

The time of a call is that of the slowest rank, so all ranks select the same candidate.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from fractions import Fraction
from math import gcd, inf
from typing import Any, NamedTuple

import torch

from sf_xfuser.autotune.trials import OWN, Trial
from sf_xfuser.config import TorusArgs
from sf_xfuser.layout.chunking import granularities_to_try
from sf_xfuser.layout.plan import UNEVEN, Layout, legal_layouts
from sf_xfuser.layout.schedule import Granularity
from sf_xfuser.layout.usp_layouts import XditConfig, egress
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.torus.mesh import Mesh

_MAX_TRIALS = 64


# -- candidates: pure functions ----------------------------------------------------------------------------------------


def second_layout(first: Layout, heads: int, kv_heads: int) -> Layout | None:
    """The layout other than ``first`` with the fewest bytes between machines, if at most 10 % more; else None."""
    if first.num_machines == 1:
        return None
    ratio = Fraction(kv_heads, heads)
    legal = legal_layouts(first.num_machines, first.ranks_per_machine, gcd(heads, kv_heads), UNEVEN)
    others = [x for x in legal if x != first and x.egress(ratio) <= Fraction(11, 10) * first.egress(ratio)]
    return min(others, key=lambda layout: (layout.egress(ratio), -layout.ulysses_degree), default=None)


def flat_ulysses(own: XditConfig, heads: int | None, kv_heads: int | None) -> list[XditConfig]:
    """xDiT's flat Ulysses over the ranks of ``own``; empty if it equals ``own`` or cannot split the heads. If ``heads``
    is None, ``Selector`` checks the heads of each call shape. xDiT's ring is not a candidate: it counts padded keys
    wrongly."""
    world_size = own.ulysses_degree * own.ring_degree
    if own.ring_degree == 1 or (heads is not None and gcd(heads, kv_heads or heads) % world_size):
        return []
    return [XditConfig(ulysses_degree=world_size, ring_degree=1)]


def torus_first(layout: Layout, own: XditConfig, kv_ratio: Fraction) -> bool:
    """Whether torus is preferred without a trial: ``layout`` spans machines and sends no more bytes between them."""
    grid = layout.num_machines, layout.ranks_per_machine
    return grid[0] > 1 and float(layout.egress(kv_ratio)) <= egress(own, *grid, float(kv_ratio)) * (1 + 1e-9)


# -- trials: collective ------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """Torus Attention on ``mesh`` in ``granularity`` (None: chosen by the call); or xDiT's USP in ``degrees`` (None:
    the launch's)."""

    mesh: Mesh | None = None
    granularity: Granularity | None = None
    degrees: XditConfig | None = None


class Selector:
    """The candidates of one sequence-parallel group, by name and in order of preference, and a trial per call shape.

    ``own``: xDiT's degrees of the launch. ``meshes``: one per layout of Torus Attention, that of ``--sp-plan`` first.
    The context manager ``use_degrees`` runs xDiT's USP in one of ``other_degrees``. All ranks make the same calls.
    """

    def __init__(
        self,
        own: XditConfig,
        other_degrees: Sequence[XditConfig],
        use_degrees: Callable[[XditConfig], AbstractContextManager[None]],
        meshes: Sequence[Mesh],
        *,
        kv_ratio: Fraction,
        log: Callable[[str], object],
    ) -> None:
        self.own, self.use_degrees, self.meshes, self.log = own, use_degrees, tuple(meshes), log
        first, *rest = granularities_to_try("cuda" if torch.cuda.is_available() else "cpu", one_host=self.mesh.one_host)
        ours = [Candidate(self.mesh, first), *map(Candidate, meshes[1:]), *(Candidate(self.mesh, g) for g in rest)]
        torus = {" ".join(filter(None, ("torus", c.granularity, f"({c.mesh.layout})"))): c for c in ours if c.mesh}
        others = {f"xDiT's USP ({degrees})": Candidate(degrees=degrees) for degrees in other_degrees}
        self.torus_first = torus_first(self.mesh.layout, own, kv_ratio)
        usp = {OWN: Candidate()}
        self.candidates = {**torus, **usp, **others} if self.torus_first else {**usp, **torus, **others}
        self.trials: dict[Hashable, Trial] = {}
        self.calls: Counter[str] = Counter()
        self._session = self.mesh.control.session

    @property
    def mesh(self) -> Mesh:
        return self.meshes[0]

    def unavailable_reason(self) -> str | None:
        return next((reason for mesh in self.meshes if (reason := mesh.unavailable_reason()) is not None), None)

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        joint_key: torch.Tensor | None,
        kind: Hashable,
        torus: Callable[[Mesh, Granularity | None], torch.Tensor],
        usp: Callable[[], torch.Tensor],
    ) -> tuple[Candidate, torch.Tensor]:
        """Run one attention call: (the candidate that ran it, its result).

        ``torus`` runs it on a mesh, ``usp`` on xDiT's USP. ``kind`` is part of the call shape. Collective. Synchronizes
        with the device during a trial only.
        """
        joint_tokens = 0 if joint_key is None else joint_key.shape[2]
        shape = (tuple(query.shape), tuple(key.shape), joint_tokens, query.dtype, kind)

        def call(candidate: Candidate) -> torch.Tensor:
            if candidate.mesh is not None:
                return torus(candidate.mesh, candidate.granularity)
            if candidate.degrees is None:
                return usp()
            with self.use_degrees(candidate.degrees):
                return usp()

        trial = self.trials.get(shape)
        if query.is_cuda and torch.cuda.is_current_stream_capturing():  # a CUDA graph would record the trial
            if trial is not None and trial.selected is not None:
                return self._count(trial.selected, call)
            return self._count(next(iter(self.candidates)), lambda first: call(first._replace(granularity=None)))
        if self.mesh.failed or self._session != self.mesh.control.session:
            self._drop_trials_that_differ()
            trial = self.trials.get(shape)
        trial = trial or self._start(shape)
        while trial.selected is None:
            name = trial.next
            timed = len(trial.times[name])
            self._synchronize(query.device)
            if len(set(self._gather(f"{name} {timed}", "next candidate"))) > 1:  # ranks failed at different calls
                trial = self._start(shape)
                continue
            out, seconds = None, inf
            for _ in range(1 if timed else 2):  # the warm-up opens connections, buffers and kernels
                out, seconds, failure = self._time(name, call, query.device)
                if failure:
                    self.log(f"--sp-backend auto: {name} is left out: {failure}")
                    break
            self._record(shape, seconds)
            if out is not None:
                self.calls[name] += 1
                return self.candidates[name], out
        return self._count(trial.selected, call)

    def _count(self, name: str, call: Callable[[Candidate], torch.Tensor]) -> tuple[Candidate, torch.Tensor]:
        self.calls[name] += 1
        return self.candidates[name], call(self.candidates[name])

    def _start(self, shape: Any) -> Trial:
        """A new trial of the candidates that can split the heads of this shape."""
        self.trials.pop(shape, None)
        if len(self.trials) == _MAX_TRIALS:
            del self.trials[next(iter(self.trials))]
        heads = gcd(shape[0][1], shape[1][1])
        self.trials[shape] = Trial(
            [name for name, x in self.candidates.items() if x.degrees is None or heads % x.degrees.ulysses_degree == 0]
        )
        return self.trials[shape]

    def _record(self, shape: Hashable, seconds: float) -> None:
        trial = self.trials[shape]
        trial.record(seconds)
        if trial.selected is not None:
            self.log(f"--sp-backend auto: {_format(shape)}: {trial}")

    def _time(
        self, name: str, call: Callable[[Candidate], torch.Tensor], device: torch.device
    ) -> tuple[torch.Tensor | None, float, str]:
        """Time one call: (result, seconds on the slowest rank, failures by rank). Collective.

        If xDiT's USP fails on a rank in other degrees than the launch's, which an attention backend may not support,
        the result is None and the time infinite on all ranks. Any other failure raises on all ranks.
        """
        candidate, started = self.candidates[name], time.perf_counter()
        out: torch.Tensor | None = None
        failed: Exception | None = None
        try:
            out = call(candidate)
            self._synchronize(device)
        except Exception as error:
            if candidate.mesh is not None:
                raise
            failed = error
        error_text = failed and f"{type(failed).__name__}: {failed}"
        reports = self._gather([time.perf_counter() - started, error_text], "a timed call")
        failures = "; ".join(
            f"rank {rank}: {text}" for rank, (_, text) in zip(self.mesh.members, reports, strict=True) if text
        )
        if failures and candidate.degrees is None:
            raise failed or RuntimeError(f"--sp-backend auto: {name} failed: {failures}")
        if failures:
            return None, inf, failures
        return out, max(seconds for seconds, _ in reports), ""

    def _drop_trials_that_differ(self) -> None:
        """A failed call may have interrupted ranks at different points of a trial: repeat such trials. Collective."""
        states = {str(shape): trial.state() for shape, trial in self.trials.items()}
        rank_states = self._gather(states, "trials")
        self._session = self.mesh.control.session
        self.trials = {
            shape: trial
            for shape, trial in self.trials.items()
            if all(rank.get(str(shape)) == states[str(shape)] for rank in rank_states)
        }

    @property
    def finished(self) -> bool:
        """Whether there are trials, and all have selected a candidate."""
        return bool(self.trials) and all(trial.selected is not None for trial in self.trials.values())

    def xdit_calls(self) -> dict[str, int]:
        """Number of calls by candidate, of those that are xDiT's own USP."""
        return {name: n for name, n in self.calls.items() if self.candidates[name].mesh is None}

    def lines(self) -> list[str]:
        """The candidates, trials and calls, as text."""
        why = "torus sends no more bytes between machines" if self.torus_first else "torus saves no inter-machine bytes"
        return [
            f"--sp-backend auto: candidates {', '.join(self.candidates)}; {OWN} is {self.own}; "
            f"without a trial: {next(iter(self.candidates))}, because {why}",
            *(f"{_format(shape)}: {trial}" for shape, trial in self.trials.items()),
            *(f"attention calls handled by {name}: {n}" for name, n in self.calls.items()),
        ]

    def close(self) -> None:
        for mesh in self.meshes:
            mesh.close()

    def _gather(self, value: Any, step: str) -> list[Any]:
        """The ``value`` of each rank, in the order of ``mesh.members``. ``step`` names the exchange. Collective."""
        with self.mesh.call():
            return self.mesh.control.gather(f"--sp-backend auto: {step}", value)

    def _synchronize(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _format(shape: Any) -> str:
    query, key, joint_tokens, dtype, kind = shape
    keys = "" if query == key else f", keys {list(key)}"
    joint = f", {joint_tokens} joint tokens" if joint_tokens else ""
    return f"calls of {list(query)}{keys}{joint} in {str(dtype).removeprefix('torch.')}, {kind}"


def build_selector(
    group_ranks: Sequence[Sequence[int]],
    args: TorusArgs,
    own: XditConfig,
    use_degrees: Callable[[XditConfig], AbstractContextManager[None]],
    *,
    heads: int | None,
    kv_heads: int | None,
    log: Callable[[str], object],
    backend: str | None = None,
) -> Selector:
    """The selector of this rank's group, with meshes for the layouts of Torus Attention.

    Takes the parameters of ``build_mesh`` and ``Selector``. Collective over the world, with the same arguments.
    """

    def build(plan: str) -> Mesh:
        keep_degrees = heads is None and plan == "auto"  # the planner needs the head count
        return build_mesh(
            group_ranks,
            replace(args, backend="torus", plan=plan),
            heads=heads,
            kv_heads=kv_heads,
            ulysses_degree=own.ulysses_degree if keep_degrees else None,
            ring_degree=own.ring_degree if keep_degrees else None,
            backend=backend,
            max_imbalance=UNEVEN,
        )

    meshes = [build(args.plan)]
    grids = {(grid.num_machines, grid.ranks_per_machine) for grid in map(meshes[0].topology.fold, group_ranks)}
    if args.plan == "auto" and heads is not None and len(grids) == 1:  # else groups would build different layouts
        second = second_layout(meshes[0].layout, heads, kv_heads or heads)
        meshes += [build(second.flag)] if second else []
    return Selector(
        own,
        flat_ulysses(own, heads, kv_heads),
        use_degrees,
        meshes,
        kv_ratio=Fraction(kv_heads, heads) if heads and kv_heads else Fraction(1),
        log=log,
    )
