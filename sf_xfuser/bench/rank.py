"""The rank side of ``sf-xfuser bench``: runs cases on the ranks of this job.

Every rank of an emulated cluster runs ``python -m sf_xfuser.bench.rank JOB.json``. Under torchrun the ``bench``
command calls :func:`run` or :func:`run_pipeline` itself.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.bench import usp_variants
from sf_xfuser.bench.case import AttentionOptions, Case
from sf_xfuser.bench.measurement import Measurement
from sf_xfuser.bench.pipeline import MODELS, PipelineOptions, measure
from sf_xfuser.bench.progress import Progress
from sf_xfuser.bench.rows import pipeline_rows
from sf_xfuser.config import launch_environment
from sf_xfuser.integrations.xdit import plugin


def run(options: AttentionOptions, on_results: Callable[[list[dict[str, Any]], list[dict[str, Any]]], None]) -> None:
    """Measure every case. Collective. Rank 0 calls ``on_results(rows, timelines)`` after each case.

    Starts and destroys torch.distributed's default group.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device((launch_environment().local_rank or 0) % torch.cuda.device_count())
    if usp_variants.unavailable() is None:
        plugin.enable()  # before the first group, so that all groups of a CPU share one event loop
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=options.timeout_s))
    try:
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=options.timeout_s))
        for number, case in enumerate(options.cases, 1):
            if dist.get_world_size() != case.world_size:
                raise ValueError(f"case {case.id} needs {case.world_size} ranks, the job has {dist.get_world_size()}")
            title = f"{case.id} (case {number} of {len(options.cases)})" if len(options.cases) > 1 else case.id
            with Progress(title, visible=dist.get_rank() == 0) as progress:
                progress.doing("opening the variants")
                measurement = Measurement(options, case, control, cuda)
                rows, timelines = measurement.run(progress)
                measurement.close()
            if dist.get_rank() == 0:
                on_results(rows, timelines)
        dist.barrier(control)
    finally:
        dist.destroy_process_group()


def run_pipeline(options: PipelineOptions, case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of whole denoising steps, on rank 0. Collective. Creates the model if its name is in ``MODELS``."""
    if (missing := usp_variants.unavailable()) is not None:
        raise ValueError(f"--pipeline needs xDiT: {missing}")
    with ExitStack() as stack:
        visible = launch_environment().rank in (None, 0)
        progress = stack.enter_context(Progress(str(case["id"]), visible=visible))
        if (tiny := MODELS.get(options.model)) is not None:
            from sf_xfuser.bench.tiny_models import save_tiny_model

            progress.doing("making the model")
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            model = str(save_tiny_model(options.model, folder, **tiny.arguments))
            options = replace(options, model=model, size=tiny.size, text_length=tiny.text_length)
        records = measure(options, progress)
        rank = dist.get_rank()
        dist.barrier()
        dist.destroy_process_group()
    return pipeline_rows(case, options.dtype, records) if rank == 0 else []


def main() -> None:
    """Rank 0 rewrites ``JOB.rows`` after each case, so a failure does not lose earlier results."""
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    rows: list[dict[str, Any]] = []
    timelines: list[dict[str, Any]] = []

    def add_results(new_rows: list[dict[str, Any]], new_timelines: list[dict[str, Any]]) -> None:
        rows.extend(new_rows)
        timelines.extend(new_timelines)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps({"rows": rows, "timelines": timelines}))
        partial.replace(path.with_suffix(".rows"))

    if "pipeline" in job:
        if results := run_pipeline(PipelineOptions(**job["pipeline"]), job["case"]):
            add_results(results, [])
    else:
        run(AttentionOptions(**job | {"cases": tuple(Case(**case) for case in job["cases"])}), add_results)


if __name__ == "__main__":
    main()
