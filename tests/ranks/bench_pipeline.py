"""Rank side of test_bench_pipeline.py. Usage: bench_pipeline.py MODEL_FOLDER TEXT_LENGTH.

Reports ``records``, ``rings`` and ``torus_calls``: ``rings`` lists the ring calls of xDiT's own USP in their order,
``[ranks of the ring, rotation]``; ``torus_calls`` counts the calls of Torus Attention.
"""

from __future__ import annotations

import re
import sys

import torch.distributed as dist
from cases import report

import sf_xfuser
from sf_xfuser.bench import peers
from sf_xfuser.bench.pipeline import PipelineOptions, measure


def main() -> None:
    sf_xfuser.enable()
    from torch.distributed.tensor.experimental._attention import _cp_options
    from xfuser.model_executor.layers import usp

    rings = []
    templated = usp._templated_ring_attention

    def recorded(group, *args, **kwargs):
        rings.append([dist.get_process_group_ranks(group), _cp_options.rotate_method.name])
        return templated(group, *args, **kwargs)

    usp._templated_ring_attention = recorded
    model, text_length = sys.argv[1], int(sys.argv[2])
    options = PipelineOptions(
        model=model, topology="2x2", text_length=text_length, steps=2, rounds=1, compress=("fp8", "int8"),
        against=peers.names_of(["diffusers"]),
    )  # fmt: skip
    records = measure(options)
    torus_calls = int(re.search(r"by torus: (\d+)", sf_xfuser.explain())[1])
    report("variants", {"records": records, "rings": rings, "torus_calls": torus_calls})
    try:
        measure(PipelineOptions(model=model, topology="2x2"))
    except RuntimeError as error:
        assert "already initialized in this process" in str(error), error
    else:
        raise AssertionError("a second measurement used the groups of the first")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
