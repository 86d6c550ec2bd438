"""A cluster for the simulator: the compute rates of a rank, and the links inside and between machines. Pure.

Link rates are Gbit/s per direction (links are full duplex), memory rates GB/s, overheads microseconds.
``Cluster.sources`` names the source of each figure that we did not measure. ``presets`` contains available hardware.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sf_xfuser.files import read_json

PATTERNS = ("put", "message", "exchange", "allgather", "alltoall")
"""Traffic patterns: one-sided puts, matched sends and receives, the all-to-all of a Ulysses group, the all-gather and
the hop of a ring."""

_RENAMED = {"ways": "costs", "takes": "compute_share", "queues": "needs_sms", "units": "num_sms"}
"""Old -> new keys of cluster files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternCost:
    """The cost of one traffic pattern on a link.

    ``efficiency``: fraction of the link's rate that large transfers reach. ``start_us``: delay before a round or
    collective moves data (launch and rendezvous). ``message_us``: idle time of the sender's link per message.
    ``host_us``: time per message on the compute thread. ``compute_share``: fraction of the rank's compute that an
    active transfer uses. ``needs_sms``: the transfer is a kernel, which starts only while an SM is free.
    """

    efficiency: float
    start_us: float = 0.0
    message_us: float = 0.0
    host_us: float = 0.0
    compute_share: float = 0.0
    needs_sms: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.efficiency <= 1.5:
            raise ValueError(f"efficiency must be above 0 and at most 1.5 (1: the link's rate), got {self.efficiency}")
        if not 0 <= self.compute_share < 1:
            raise ValueError(f"compute_share must be at least 0 and below 1, got {self.compute_share}")
        for name in ("start_us", "message_us", "host_us"):
            _require_non_negative(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """``rank_gbps``: the maximum rate of one rank. ``machine_gbps``: the maximum rate of all ranks of a machine (None:
    unlimited), through ``nics`` network cards that the ranks share evenly. ``costs``: (pattern, group size, cost). A
    group uses the entry with the largest size up to its own, else the smallest entry."""

    rank_gbps: float
    machine_gbps: float | None = None
    nics: int = 1
    latency_us: float = 0.0
    costs: tuple[tuple[str, int, PatternCost], ...]

    def __post_init__(self) -> None:
        for name in ("rank_gbps", "machine_gbps"):
            _require_positive(name, getattr(self, name))
        _require_non_negative("latency_us", self.latency_us)
        require_count("nics", self.nics)
        wrong = sorted({pattern for pattern, _, _ in self.costs} ^ set(PATTERNS))
        if wrong:
            raise ValueError(f"costs must have each of {', '.join(PATTERNS)}; missing or unknown: {', '.join(wrong)}")

    def cost(self, pattern: str, group_size: int = 2) -> PatternCost:
        known = sorted(((size, cost) for name, size, cost in self.costs if name == pattern), key=lambda entry: entry[0])
        return next((cost for size, cost in reversed(known) if size <= group_size), known[0][1])

    def transfer_s(self, sent: Sequence[float], ranks_per_machine: int, cost: PatternCost) -> float:
        """Seconds in which every rank ``w`` sends ``sent[w]`` bytes; the busiest rank, card or machine is the limit."""
        busiest = max(sent) / self.rank_gbps
        for first in range(0, len(sent), ranks_per_machine) if self.machine_gbps else ():
            of_machine = sent[first : first + ranks_per_machine]
            cards = [0.0] * self.nics
            for m, nbytes in enumerate(of_machine):
                cards[m * self.nics // ranks_per_machine] += nbytes
            assert self.machine_gbps is not None
            busiest = max(busiest, sum(of_machine) / self.machine_gbps, max(cards) * self.nics / self.machine_gbps)
        return busiest * 8e-9 / cost.efficiency


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """The compute rates of one rank. ``attention_tflops``: (dtype, head size, TFLOP/s of a large attention call); other
    head sizes use the nearest entry. ``linear_tflops``: matrix products. ``memory_gbs``: reads or writes.

    ``num_sms``: each SM processes ``tile_rows`` query rows of one head at a time, so a call takes whole *waves* of
    ``num_sms`` tiles (0: calls of any size run at the full rate). ``attend_us``: overhead of an attention call and its
    merge. ``launch_us``: host time to start one operation (0 for a call that is replayed as a CUDA graph). ``slots``:
    the number of ranks that can compute at the same time (None: all)."""

    attention_tflops: tuple[tuple[str, int, float], ...]
    linear_tflops: float
    memory_gbs: float
    attend_us: float
    launch_us: float = 0.0
    num_sms: int = 0
    tile_rows: int = 128
    slots: float | None = None

    def __post_init__(self) -> None:
        if not self.attention_tflops:
            raise ValueError("attention_tflops needs at least one (dtype, head size, TFLOP/s)")
        for _, head_dim, rate in self.attention_tflops:
            _require_positive("a head size of attention_tflops", head_dim)
            _require_positive("a rate of attention_tflops", rate)
        for name in ("linear_tflops", "memory_gbs", "tile_rows", "slots"):
            _require_positive(name, getattr(self, name))
        for name in ("attend_us", "launch_us", "num_sms"):
            _require_non_negative(name, getattr(self, name))

    def attention_rate(self, dtype: str, head_dim: int) -> float:
        """FLOP/s of a large call."""
        same = [entry for entry in self.attention_tflops if entry[0] == dtype] or self.attention_tflops
        return min(same, key=lambda entry: abs(math.log2(entry[1] / head_dim)))[2] * 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """``num_machines`` x ``ranks_per_machine`` equal ranks. The schedule cuts chunks for ``device``, ``"cuda"`` or
    ``"cpu"``. ``sources``: where the figures come from, one line each."""

    name: str
    num_machines: int
    ranks_per_machine: int
    compute: Compute
    inside: LinkSpec
    across: LinkSpec
    device: str = "cuda"
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_machines", "ranks_per_machine"):
            require_count(name, getattr(self, name))
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f'device must be "cuda" or "cpu", got {self.device!r}')

    @property
    def world_size(self) -> int:
        return self.num_machines * self.ranks_per_machine

    def with_size(self, num_machines: int, ranks_per_machine: int) -> Cluster:
        """A copy with this number of machines, and of ranks that share a machine's network cards."""
        return replace(self, num_machines=num_machines, ranks_per_machine=ranks_per_machine)

    def with_rates(self, *, across_gbps: float | None = None, inside_gbps: float | None = None) -> Cluster:
        """A copy in which a machine sends ``across_gbps`` to others, and a rank ``inside_gbps`` inside its machine."""
        across, inside = self.across, self.inside
        if across_gbps is not None:
            _require_positive("the rate between machines", across_gbps)
            share = across.rank_gbps / across.machine_gbps if across.machine_gbps else 1.0
            across = replace(across, machine_gbps=across_gbps, rank_gbps=across_gbps * share)
        if inside_gbps is not None:
            _require_positive("the rate inside machines", inside_gbps)
            scale = inside_gbps / inside.rank_gbps
            limit = inside.machine_gbps and inside.machine_gbps * scale
            inside = replace(inside, rank_gbps=inside_gbps, machine_gbps=limit)
        return replace(self, across=across, inside=inside)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> Cluster:
        """Raises ValueError naming the field that is missing, unknown or out of range. Accepts old names of fields."""
        values = _checked_fields(cls, values, "a cluster")
        links = {}
        for name in ("inside", "across"):
            link = _checked_fields(LinkSpec, values[name], name)
            try:
                costs = tuple(
                    (str(pattern), int(size), PatternCost(**_checked_fields(PatternCost, cost, f"a cost of {name}")))
                    for pattern, size, cost in link["costs"]
                )
                links[name] = LinkSpec(**{**link, "costs": costs})
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{name}: {error}") from None
        compute = _checked_fields(Compute, values["compute"], "compute")
        try:
            rates = tuple((str(dtype), int(size), float(rate)) for dtype, size, rate in compute["attention_tflops"])
            parsed = Compute(**{**compute, "attention_tflops": rates})
        except (TypeError, ValueError) as error:
            raise ValueError(f"compute: {error}") from None
        return cls(**{**values, **links, "compute": parsed, "sources": tuple(values.get("sources", ()))})

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a JSON file with the output of ``to_json`` or ``sf-xfuser plan --json``. Raises ValueError naming it."""
        try:
            values = read_json(path)
            return cls.from_json(values["cluster"] if isinstance(values, dict) and "cluster" in values else values)
        except (OSError, ValueError) as error:
            cause = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"cannot read a cluster from {path}: {cause}") from None


def _checked_fields(kind: Any, values: Any, what: str) -> dict[str, Any]:
    known = {field.name: field for field in fields(kind)}
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be an object with the fields {', '.join(known)}, got {values!r}")
    renamed = {_RENAMED.get(str(name), str(name)): value for name, value in values.items()}
    required = {name for name, field in known.items() if field.default is field.default_factory}  # both MISSING
    if unknown := sorted(set(renamed) - set(known)):
        raise ValueError(f"{what} has unknown field {', '.join(unknown)}; allowed: {', '.join(known)}")
    if missing := sorted(required - set(renamed)):
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    return renamed


def _require_positive(name: str, value: float | None) -> None:
    if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def _require_non_negative(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def require_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
