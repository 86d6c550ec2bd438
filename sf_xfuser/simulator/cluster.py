"""A cluster as the cost model sees it: what a rank computes with, and the links inside and between machines. Pure.

Rates of links are Gbit/s per direction (links are full duplex), of memory GB/s, costs microseconds. Figures that are
not measured carry their source in ``Cluster.sources``; ``presets`` has clusters that can be rented or bought.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sf_xfuser.files import read_json

PATTERNS = ("put", "message", "exchange", "allgather", "alltoall")
"""How bytes move: one-sided puts, matched sends and receives of the schedule, an all-to-all of a group (Ulysses), the
all-gather and the hop of a ring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What one pattern makes of a link. ``efficiency``: the fraction of the link's rate that it reaches on large
    transfers; ``start_us``: before a round or collective moves anything (launch, and both ends finding each other);
    ``message_us``: for each message, during which the sender's link carries nothing; ``host_us``: for each message, of
    the thread that computes; ``takes``: the fraction of a rank's compute that is gone while it is under way;
    ``queues``: it is a kernel that needs multiprocessors, and gets none before an attention call that fills them ends.
    """

    efficiency: float
    start_us: float = 0.0
    message_us: float = 0.0
    host_us: float = 0.0
    takes: float = 0.0
    queues: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.efficiency <= 1.5:
            raise ValueError(f"efficiency must be above 0 and at most 1.5 (1: the link's rate), got {self.efficiency}")
        if not 0 <= self.takes < 1:
            raise ValueError(f"takes must be at least 0 and below 1, got {self.takes}")
        for name in ("start_us", "message_us", "host_us"):
            _at_least_zero(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """``rank_gbps``: the most that one rank sends; ``machine_gbps``: the most that all ranks of a machine send together
    (None: no limit of their own), through ``nics`` network cards that the ranks share evenly. ``ways``: (pattern,
    members, way); of a group's size the largest ``members`` not above it counts, else the smallest there is."""

    rank_gbps: float
    machine_gbps: float | None = None
    nics: int = 1
    latency_us: float = 0.0
    ways: tuple[tuple[str, int, Way], ...]

    def __post_init__(self) -> None:
        for name in ("rank_gbps", "machine_gbps"):
            _positive(name, getattr(self, name))
        _at_least_zero("latency_us", self.latency_us)
        if not isinstance(self.nics, int) or self.nics < 1:
            raise ValueError(f"nics must be a whole number from 1 on, got {self.nics!r}")
        missing = sorted(set(PATTERNS) - {pattern for pattern, _, _ in self.ways})
        unknown = sorted({pattern for pattern, _, _ in self.ways} - set(PATTERNS))
        if missing or unknown:
            wrong = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}"
            raise ValueError(f"a link needs a way for each of {', '.join(PATTERNS)}; this one {wrong}")

    def way(self, pattern: str, members: int = 2) -> Way:
        known = sorted(((size, way) for name, size, way in self.ways if name == pattern), key=lambda at: at[0])
        return next((way for size, way in reversed(known) if size <= members), known[0][1])

    def seconds(self, sent: Sequence[float], ranks_per_machine: int, way: Way) -> float:
        """Until all bytes are out, where rank ``w`` sends ``sent[w]``: the busiest rank, card or machine says."""
        busiest = max(sent) / self.rank_gbps
        for first in range(0, len(sent), ranks_per_machine) if self.machine_gbps else ():
            of_machine = sent[first : first + ranks_per_machine]
            cards = [0.0] * self.nics
            for m, nbytes in enumerate(of_machine):
                cards[m * self.nics // ranks_per_machine] += nbytes
            assert self.machine_gbps is not None
            busiest = max(busiest, sum(of_machine) / self.machine_gbps, max(cards) * self.nics / self.machine_gbps)
        return busiest * 8e-9 / way.efficiency

    def share_gbps(self, ranks_per_machine: int) -> float:
        """Of one rank while all of its machine send."""
        if self.machine_gbps is None:
            return self.rank_gbps
        on_a_card = math.ceil(ranks_per_machine / self.nics)
        return min(self.rank_gbps, self.machine_gbps / ranks_per_machine, self.machine_gbps / self.nics / on_a_card)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """What one rank computes with. ``attention_tflops``: (dtype, head size, TFLOP/s of a large attention call; the
    nearest entry serves others); ``linear_tflops``: of matrix products; ``memory_gbs``: of reading or writing.

    ``units``: multiprocessors, each of which takes ``tile_rows`` query rows of one head at a time, so that a call of
    fewer pieces leaves some idle (0: calls of any size run at the full rate). ``attend_us``: each attention call and
    its merge, besides. ``slots``: how many ranks of the cluster can compute at once (None: all of them)."""

    attention_tflops: tuple[tuple[str, int, float], ...]
    linear_tflops: float
    memory_gbs: float
    attend_us: float
    units: int = 0
    tile_rows: int = 128
    slots: float | None = None

    def __post_init__(self) -> None:
        if not self.attention_tflops:
            raise ValueError("attention_tflops needs at least one (dtype, head size, TFLOP/s)")
        for _, head_dim, rate in self.attention_tflops:
            _positive("a head size of attention_tflops", head_dim)
            _positive("a rate of attention_tflops", rate)
        for name in ("linear_tflops", "memory_gbs", "tile_rows", "slots"):
            _positive(name, getattr(self, name))
        for name in ("attend_us", "units"):
            _at_least_zero(name, getattr(self, name))

    def attention_rate(self, dtype: str, head_dim: int) -> float:
        """FLOP/s of a large call."""
        same = [entry for entry in self.attention_tflops if entry[0] == dtype] or self.attention_tflops
        return min(same, key=lambda entry: abs(math.log2(entry[1] / head_dim)))[2] * 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """``num_machines`` x ``ranks_per_machine`` ranks, all alike. ``device``: ``"cuda"`` or ``"cpu"``, which says how
    the schedule cuts chunks. ``sources``: where the figures come from, one line each."""

    name: str
    num_machines: int
    ranks_per_machine: int
    compute: Compute
    inside: Link
    across: Link
    device: str = "cuda"
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_machines", "ranks_per_machine"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f'device must be "cuda" or "cpu", got {self.device!r}')

    @property
    def world_size(self) -> int:
        return self.num_machines * self.ranks_per_machine

    def sized(self, num_machines: int, ranks_per_machine: int) -> Cluster:
        """The same machines, others in number; with fewer or more ranks each, sharing the same cards."""
        return replace(self, num_machines=num_machines, ranks_per_machine=ranks_per_machine)

    def linked(self, *, across_gbps: float | None = None, inside_gbps: float | None = None) -> Cluster:
        """With other rates: ``across_gbps`` out of a machine, ``inside_gbps`` out of a rank inside its machine."""
        across, inside = self.across, self.inside
        if across_gbps is not None:
            _positive("the rate between machines", across_gbps)
            share = across.rank_gbps / across.machine_gbps if across.machine_gbps else 1.0
            across = replace(across, machine_gbps=across_gbps, rank_gbps=across_gbps * share)
        if inside_gbps is not None:
            _positive("the rate inside machines", inside_gbps)
            scale = inside_gbps / inside.rank_gbps
            limit = inside.machine_gbps and inside.machine_gbps * scale
            inside = replace(inside, rank_gbps=inside_gbps, machine_gbps=limit)
        return replace(self, across=across, inside=inside)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> Cluster:
        """Raises ValueError naming the field that is missing, unknown or makes no sense."""
        values = _fields_of(cls, values, "a cluster")
        links = {}
        for name in ("inside", "across"):
            link = _fields_of(Link, values[name], name)
            try:
                ways = tuple(
                    (str(p), int(n), Way(**_fields_of(Way, w, f"a way of {name}"))) for p, n, w in link["ways"]
                )
                links[name] = Link(**{**link, "ways": ways})
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{name}: {error}") from None
        compute = _fields_of(Compute, values["compute"], "compute")
        try:
            compute["attention_tflops"] = tuple((str(t), int(d), float(r)) for t, d, r in compute["attention_tflops"])
            made = Compute(**compute)
        except (TypeError, ValueError) as error:
            raise ValueError(f"compute: {error}") from None
        return cls(**{**values, **links, "compute": made, "sources": tuple(values.get("sources", ()))})

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """From a JSON file, as ``to_json`` gives it or ``sf-xfuser plan --json``. Raises ValueError naming the file."""
        try:
            values = read_json(path)
            return cls.from_json(values["cluster"] if isinstance(values, dict) and "cluster" in values else values)
        except (OSError, ValueError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{path} describes no cluster: {said}") from None


def _fields_of(kind: Any, values: Any, what: str) -> dict[str, Any]:
    known = {field.name: field for field in fields(kind)}
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a table of {', '.join(known)}, got {values!r}")
    required = {name for name, field in known.items() if field.default is field.default_factory}  # both MISSING
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{what} has no field {', '.join(unknown)}; there are {', '.join(known)}")
    if missing := sorted(required - set(values)):
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    return dict(values)


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def _at_least_zero(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number from 0 on, got {value!r}")
