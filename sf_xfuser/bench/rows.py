"""Turns measurements (seconds, bytes) into the rows of a bench document. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sf_xfuser.bench.case import Case
from sf_xfuser.bench.report import best_xdit_row, usp_row
from sf_xfuser.bench.variants import ALONE, SINGLE, Variant

#: Largest allowed absolute difference from a single process.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}
_LATENT_FACTOR = 10  # larger tolerance for latents, which accumulate the error of several denoising steps
#: Lowest allowed PSNR of latents against those of the uncompressed run.
PSNR_DB = 40.0


@dataclass
class Sample:
    """The measurements of one variant, on rank 0. ``times_s``, ``attention_s``, ``exposed_s`` and ``wire`` (bytes from
    machine to machine) have one entry per timed call. ``failure``: what is wrong with the result. ``refusal``: the
    error of a peer that cannot run the case. ``predicted_s`` and ``cluster`` are set with ``--predict``."""

    times_s: list[float] = field(default_factory=list)
    attention_s: list[float] = field(default_factory=list)
    exposed_s: list[float] = field(default_factory=list)
    wire: list[list[list[int]]] = field(default_factory=list)
    first_call_s: float | None = None
    peak_bytes: list[int] | None = None
    max_abs_error: float | None = None
    rms_error: float | None = None
    failure: str = ""
    refusal: str = ""
    timeline: dict[str, Any] | None = None
    predicted_s: float | None = None
    cluster: dict[str, Any] | None = None


def attention_rows(
    case: Case, variants: Sequence[Variant], samples: Mapping[str, Sample], *, on_gpu: bool
) -> list[dict[str, Any]]:
    """One row per variant.

    ``on_gpu``: the host's clock measures only kernel launches, so ``attention_s`` is the time of ``attention-alone``
    and ``exposed_s`` is the rest of the call.
    """
    alone = samples[ALONE].times_s if ALONE in samples else []
    compute_s = statistics.median(alone) if alone else None
    rows = []
    for variant in variants:
        sample = samples[variant.name]
        description, layout = variant.described()
        timed = _times(sample.times_s)
        median_s = timed["median_s"]
        measured = any(sample.attention_s)  # kernels of peers are not timed
        attention_s = statistics.median(sample.attention_s) if measured else None
        exposed_s = statistics.median(sample.exposed_s) if measured else None
        if on_gpu and median_s is not None and compute_s is not None:
            attention_s, exposed_s = compute_s, median_s - compute_s
        wire_s = bound_s = None
        if variant.formula_bytes is not None and case.inter_rate_bps is not None:
            wire_s = variant.formula_bytes * 8 / case.inter_rate_bps
        if compute_s is not None and median_s is not None and variant.name not in (SINGLE, ALONE):
            bound_s = max(compute_s, wire_s or 0.0)
        status = "failed" if sample.failure else "ok" if sample.times_s else "skipped"
        copied = ("first_call_s", "peak_bytes", "max_abs_error", "rms_error", "predicted_s", "cluster")
        rows.append(_row(
            kind="attention", case=case.to_json(), variant=variant.name, description=description,
            family=variant.family, status=status, layout=layout, **timed,
            reason=sample.failure or sample.refusal or variant.reason, attention_s=attention_s, exposed_s=exposed_s,
            wire_bytes=_mean(sample.wire),
            formula_bytes=variant.formula_bytes, bound_s=bound_s, bound_compute_s=compute_s, bound_wire_s=wire_s,
            efficiency=bound_s / median_s if bound_s is not None and median_s else None,
            **{name: getattr(sample, name) for name in copied},
        ))  # fmt: skip
    return _with_ratios(rows)


def pipeline_rows(case: Mapping[str, Any], dtype: str, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per record of ``pipeline.measure``: seconds per denoising step."""
    rows = []
    for record in records:
        name = SINGLE if record["variant"] == "single" else record["variant"]
        ours, peer = name.startswith("torus"), name.startswith("diffusers")
        if name != SINGLE and not ours and not peer:
            name = "usp-" + next((r for r in ("allgather", "alltoall") if r in record["variant"]), "ulysses")
        psnr_db = record.get("psnr_db")
        wrong, refused = "", record["reason"]
        if psnr_db is not None:
            if psnr_db < PSNR_DB:
                wrong = f"PSNR of the latents against the uncompressed run is {psnr_db:.1f} dB, required {PSNR_DB:g} dB"
        elif not refused and not record["max_abs_error"] <= TOLERANCE[dtype] * _LATENT_FACTOR:
            wrong = f"wrong latents: error {record['max_abs_error']:.2e} against one process"
        rows.append(_row(
            kind="pipeline", case=dict(case), variant=name, description="seconds per denoising step",
            family="reference" if name == SINGLE else "ours" if ours else "peer" if peer else "xdit",
            status="skipped" if refused else "failed" if wrong else "ok", reason=refused or wrong,
            layout=record["layout"], **_times(record["times_s"]),
            first_call_s=record["first_call_s"],
            attention_s=statistics.median(record["attention_s"]) if any(record["attention_s"]) else None,
            max_abs_error=None if name == SINGLE else record["max_abs_error"], psnr_db=psnr_db,
        ))  # fmt: skip
    return _with_ratios(rows)


# The fields of every row, in this order; None if not measured.
_FIELDS = (
    *("kind", "case", "variant", "description", "family", "status", "reason", "layout"),
    *("times_s", "median_s", "min_s", "max_s", "q1_s", "q3_s", "first_call_s", "attention_s", "exposed_s"),
    *("peak_bytes", "wire_bytes", "formula_bytes", "max_abs_error", "rms_error", "psnr_db"),
    *("bound_s", "bound_compute_s", "bound_wire_s", "efficiency", "predicted_s", "cluster"),
)


def _row(**known: Any) -> dict[str, Any]:
    return dict.fromkeys(_FIELDS) | known


def _times(measured: Sequence[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(measured, n=4, method="inclusive") if len(measured) > 1 else [None, None, None]
    return {
        "times_s": list(measured),
        "median_s": statistics.median(measured) if measured else None,
        "min_s": min(measured, default=None),
        "max_s": max(measured, default=None),
        "q1_s": quartiles[0],
        "q3_s": quartiles[2],
    }


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add ``ratio_to_usp`` and ``ratio_to_best_xdit``, the speedups over these rows; None for reference rows."""
    for key, reference in (("ratio_to_usp", usp_row(rows)), ("ratio_to_best_xdit", best_xdit_row(rows))):
        for row in rows:
            comparable = row["median_s"] is not None and reference is not None and row["family"] != "reference"
            row[key] = reference["median_s"] / row["median_s"] if comparable and reference is not None else None
    return rows


def _mean(matrices: Sequence[Sequence[Sequence[int]]]) -> list[list[int]] | None:
    if not matrices:
        return None
    size = range(len(matrices[0]))
    return [[round(statistics.fmean(m[i][j] for m in matrices)) for j in size] for i in size]
