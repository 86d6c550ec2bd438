"""One case of a benchmark: a cluster and the shape of an attention call. Reads grids of cases from TOML files."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sf_xfuser.bench.emulate import ClusterSpec
from sf_xfuser.config import TorusArgs
from sf_xfuser.files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DTYPES = ("float32", "bfloat16", "float16")
_CLUSTER_KEYS = ("cluster", "inter_rate", "inter_delay")
_SHAPE_KEYS = ("seq_len", "heads", "kv_heads", "head_dim", "batch", "dtype", "plan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case(ClusterSpec):
    """An attention call on a cluster; the cluster need not be emulated.

    ``seq_len``: tokens of the whole sequence. ``kv_heads``: None for as many as ``heads``. ``plan``: as ``--sp-plan``.
    Raises ValueError for an invalid shape.
    """

    seq_len: int = 4096
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int = 64
    batch: int = 1
    dtype: str = "float32"
    plan: str = "auto"

    def __post_init__(self) -> None:
        ClusterSpec.__post_init__(self)
        for name in ("seq_len", "heads", "head_dim", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        if not isinstance(kv_heads, int) or isinstance(kv_heads, bool) or kv_heads < 1 or self.heads % kv_heads:
            raise ValueError(f"kv_heads must divide {self.heads} heads, got {kv_heads!r}")
        TorusArgs(plan=self.plan)  # raises ValueError for an invalid plan
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.seq_len < self.world_size:
            raise ValueError(f"seq_len must be at least the number of ranks, {self.world_size}, got {self.seq_len}")

    @property
    def spec(self) -> ClusterSpec:
        return ClusterSpec(**{field.name: getattr(self, field.name) for field in fields(ClusterSpec)})

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        w = self.world_size
        return tuple(self.seq_len // w + (rank < self.seq_len % w) for rank in range(w))

    @property
    def id(self) -> str:
        """A unique name, such as ``2x2 100mbit L4096 H8 D64``."""
        rate = "" if self.inter_rate_bps is None else f" {self.inter_rate_bps / 1e6:g}mbit"
        delay = f" {self.inter_delay_s * 1e3:g}ms" if self.inter_delay_s else ""
        kv = "" if self.kv_heads in (None, self.heads) else f"/{self.kv_heads}"
        batch = "" if self.batch == 1 else f" B{self.batch}"
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        plan = "" if self.plan == "auto" else f" {self.plan}"
        cluster = f"{self.num_machines}x{self.ranks_per_machine}{rate}{delay}"
        return f"{cluster} L{self.seq_len} H{self.heads}{kv} D{self.head_dim}{batch}{dtype}{plan}"

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "cluster": f"{self.num_machines}x{self.ranks_per_machine}",
            **asdict(self),
            "kv_heads": self.kv_heads or self.heads,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """The attention calls to measure.

    ``variants``: names; None for the default variants. ``against``: peers in addition to these. Each variant makes
    ``warmup`` untimed calls, then ``repeat`` timed ones.
    ``emulated``: the cluster is emulated, so ranks set the rate of links and count bytes. ``predict``: also calibrate
    the simulator and predict each variant's time.
    """

    cases: tuple[Case, ...]
    variants: tuple[str, ...] | None = None
    against: tuple[str, ...] = ()
    repeat: int = 7
    warmup: int = 2
    seed: int = 0
    topology: str = "auto"
    timeout_s: float = 300.0
    emulated: bool = False
    predict: bool = False


def make_case(values: Mapping[str, Any]) -> Case:
    """A case from fields of ``Case`` and the texts ``cluster``, ``inter_rate`` and ``inter_delay``."""
    unknown = sorted(set(values) - {*_CLUSTER_KEYS, *_SHAPE_KEYS})
    if unknown:
        raise ValueError(f"unknown field(s) {', '.join(unknown)}; allowed: {', '.join((*_CLUSTER_KEYS, *_SHAPE_KEYS))}")
    if "cluster" not in values:
        raise ValueError('a case needs cluster = "NxM" (machines x ranks per machine)')
    texts = (None if values.get(key) is None else str(values[key]) for key in _CLUSTER_KEYS)
    spec = ClusterSpec.parse(*texts)  # type: ignore[arg-type]
    shape = {key: values[key] for key in _SHAPE_KEYS if values.get(key) is not None}
    return Case(**asdict(spec), **shape)


def read_grid(path: str | Path) -> list[Case]:
    """The cases of a TOML file of ``[[case]]`` tables, which inherit ``[defaults]``.

    Lists in a table expand to every combination of their values. Raises ValueError that names file and table.
    """
    try:
        document = tomllib.loads(read_text(path))
    except OSError as error:
        raise ValueError(f"--grid {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--grid {path} is not TOML: {error}") from None
    unknown = sorted(set(document) - {"defaults", "case"})
    tables = document.get("case", [])
    if unknown or not isinstance(tables, list) or not tables:
        raise ValueError(
            f"--grid {path} must have [[case]] tables and may have [defaults]; "
            + (f"it has {', '.join(unknown)}" if unknown else "it has no [[case]]")
        )
    defaults = document.get("defaults", {})
    if not isinstance(defaults, dict):
        raise ValueError(f"--grid {path}: [defaults] must be a table, got {defaults!r}")
    cases: list[Case] = []
    for number, table in enumerate(tables, 1):
        try:
            values = {**defaults, **table}
            empty = [key for key, value in values.items() if value == []]
            if empty:
                raise ValueError(f"{empty[0]} is an empty list; list at least one value")
            choices = [[(k, x) for x in v] if isinstance(v, list) else [(k, v)] for k, v in values.items()]
            cases += [make_case(dict(combination)) for combination in itertools.product(*choices)]
        except (TypeError, ValueError) as error:
            raise ValueError(f"--grid {path}, [[case]] {number}: {error}") from None
    repeated = sorted({case.id for case in cases if cases.count(case) > 1})
    if repeated:
        raise ValueError(f"--grid {path} lists some cases more than once: {'; '.join(repeated)}")
    return cases


def launches(cases: list[Case]) -> list[list[Case]]:
    """Group the cases that can share one launch of ranks: equal cluster size and delay, links shaped or unshaped.

    Ranks can change the rate of shaped links. Cases keep their order.
    """
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        shaped = case.inter_rate_bps is not None
        groups.setdefault((case.num_machines, case.ranks_per_machine, case.inter_delay_s, shaped), []).append(case)
    return list(groups.values())
