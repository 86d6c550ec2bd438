"""What computes a piece of attention: the library and the merge kernel, or the fused kernel, by which was measured to
be faster.

``measured.json`` holds the rows, which ``python -m sf_xfuser.bench.gpu --write-table`` writes on a GPU. Where there is
no row near a piece the library computes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from sf_xfuser.files import read_json
from sf_xfuser.kernels.fused import DTYPES, HEAD_SIZES

Kernel = Literal["auto", "library", "fused"]
KERNELS: tuple[Kernel, ...] = ("auto", "library", "fused")

TABLE = Path(__file__).parent / "measured.json"
_NEAR = 2.0  # a row serves pieces of up to this many times its tokens, and down to one part in as many
_US = ("library_us", "fused_us")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One piece, attended and merged into an accumulator in both ways, on one GPU: medians in microseconds. ``library``
    is xDiT's name of its attention backend, ``dtype`` PyTorch's without ``torch.``."""

    architecture: str
    library: str
    dtype: str
    D: int
    q_tokens: int
    kv_tokens: int
    library_us: float
    fused_us: float

    def __post_init__(self) -> None:
        wrong = [name for name in _US if not (math.isfinite(x := getattr(self, name)) and x > 0)]
        if wrong or min(self.q_tokens, self.kv_tokens) < 1:
            raise ValueError(f"{self} is no measured row: times must be above 0 and finite, tokens at least 1")

    @property
    def piece(self) -> tuple[str, str, str, int]:
        return self.architecture, self.library, self.dtype, self.D


@dataclass(frozen=True, slots=True)
class Verdict:
    """``fused``: whether the fused kernel computes a piece."""

    fused: bool
    reason: str

    def __str__(self) -> str:
        return f"{'the fused kernel' if self.fused else 'the library, and the merge kernel'}: {self.reason}"


def choose_from(rows: Sequence[Measured], piece: tuple[str, str, str, int], q_tokens: int, kv_tokens: int) -> Verdict:
    """By the row nearest to ``q_tokens`` x ``kv_tokens`` among those of ``piece``: architecture, library, dtype, D.
    Pure."""
    architecture, library, dtype, D = piece
    what = f"{architecture} {dtype} D={D} against {library}"

    def times(row: Measured) -> float:
        """How many times larger or smaller its worse side is."""
        ratios = (row.q_tokens / max(q_tokens, 1), row.kv_tokens / max(kv_tokens, 1))
        return max(max(ratio, 1 / ratio) for ratio in ratios)

    near = [row for row in rows if row.piece == piece and times(row) <= _NEAR]
    if not near:
        some = any(row.piece == piece for row in rows)
        return Verdict(False, f"no measured row for {what}{' near a piece of this size' if some else ''}")
    row = min(near, key=times)
    said = f"{row.fused_us:.4g} us fused, {row.library_us:.4g} us by the library, at {row.q_tokens} x {row.kv_tokens}"
    return Verdict(row.fused_us < row.library_us, f"{said} tokens, {what}")


@cache
def choose(
    device: torch.device, library: str | None, dtype: torch.dtype, D: int, q_tokens: int, kv_tokens: int
) -> Verdict:
    """What computes a piece of ``q_tokens`` x ``kv_tokens`` on ``device``, where ``library``, xDiT's name of it, is the
    attention library; None: one that no row can name."""
    if device.type != "cuda":
        return Verdict(False, f"on a {device.type} there is the plain path alone")
    if library is None:
        return Verdict(False, "what computes attention has no name to look up")
    return choose_from(shipped_rows(), (architecture(device), library, _name(dtype), D), q_tokens, kv_tokens)


def why_not_fused(dtype: torch.dtype, D: int) -> str | None:
    """Why the fused kernel serves no such call; None where it does."""
    if dtype not in DTYPES:
        return f"it computes {', '.join(map(_name, DTYPES))}, and the call is {_name(dtype)}"
    return None if D in HEAD_SIZES else f"it has head sizes {HEAD_SIZES}, and the call's is {D}"


def architecture(device: torch.device) -> str:
    """``"sm_90"``"""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- the file --------------------------------------------------------------------------------------------------------


def may_fuse() -> bool:
    """Whether ``choose`` may ever say so."""
    return bool(shipped_rows())


@cache
def shipped_rows() -> tuple[Measured, ...]:
    return tuple(read_table(TABLE))


def read_table(path: Path) -> list[Measured]:
    """Raises ValueError where the file holds anything else."""
    try:
        return [Measured(**row) for row in read_json(path)["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of measured pieces: {error}") from error


def write_table(path: Path, rows: Sequence[Measured], measured: Mapping[str, object]) -> None:
    """Add ``rows`` to those in the file, in place of those that it has of the same pieces. ``measured``: on what, for
    the reader: kept by architecture."""
    document = read_json(path) if path.exists() else {"measured": {}, "rows": []}
    of = {_key(row): row for row in (read_table(path) if path.exists() else [])}
    of.update({_key(row): row for row in rows})
    document["measured"].update({row.architecture: dict(measured) for row in rows})
    lines = ",\n".join(f"  {json.dumps(asdict(of[key]))}" for key in sorted(of))
    text = f'{{\n "measured": {json.dumps(document["measured"], sort_keys=True)},\n "rows": [\n{lines}\n ]\n}}\n'
    path.write_text(text.replace("[\n\n ]", "[]"))


def _key(row: Measured) -> tuple[object, ...]:
    return tuple(getattr(row, field.name) for field in fields(row) if field.name not in _US)
