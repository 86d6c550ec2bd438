"""Torus Attention over NCCL. Needs one GPU per rank. Not yet run on a GPU (see README)."""

from __future__ import annotations

import pytest
import torch

from tests.launch import torchrun

GPUS = torch.cuda.device_count()


@pytest.mark.parametrize(
    ("nproc", "sizes"),
    [
        pytest.param(n, sizes, marks=pytest.mark.skipif(n > GPUS, reason=f"needs {n} GPUs, found {GPUS}"))
        for n, sizes in ((2, "1,2"), (4, "4"), (8, "8"))
    ],
)
def test_error_is_within_twice_single_process_sdpa(nproc, sizes):
    """As test_attention.py on CPU ranks: every layout, uneven heads and tokens, GQA, joint tokens, fp32 and bf16."""
    finished = torchrun("attention_accuracy.py", sizes, "cuda", nproc=nproc)
    assert "worst error" in finished.output
