"""One-sided transfers on GPUs: virtual ranks of one process, then processes, which share GPUs if there are too few.
``make gpu`` has attention over them, and CUDA graphs. Not yet run on a GPU (see README). Without a GPU, the programs
run with ``shm``."""

from __future__ import annotations

import sys

import pytest
import torch

from sf_xfuser.bench import gpu_ranks
from tests.launch import RANKS, check, reports, run, torchrun

ENVIRONMENT = {**gpu_ranks.ENVIRONMENT, "CUDA_MODULE_LOADING": "EAGER"}
CASES = {"gather": "equal", "attention": "0 differ", "all_to_all": "equal"}
GPUS = torch.cuda.device_count()
TRANSPORTS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
    for name, reason in ((name, probe()) for name, probe in gpu_ranks.UNAVAILABLE.items())
] + [pytest.param("shm", marks=pytest.mark.skipif(GPUS > 0, reason="there is a GPU"))]


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
@pytest.mark.parametrize(("machines", "ranks", "heads"), [(2, 1, 2), (1, 2, 2), (2, 2, 2), (2, 2, 4)])
def test_virtual_ranks_of_one_process(machines, ranks, heads):
    command = [sys.executable, str(RANKS / "virtual_gpu.py"), "500", *map(str, (machines, ranks, heads))]
    finished = run(command, timeout=400, env={**ENVIRONMENT, "PYTHONPATH": str(RANKS.parents[1])})
    assert "500 calls equal" in finished.output


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_processes(transport, nproc):
    calls = 500 if GPUS else 50
    output = torchrun("one_sided_gpu.py", transport, calls, *CASES, nproc=nproc, timeout=400, env=ENVIRONMENT).output
    outcomes = reports(output, CASES)
    for case, expected in CASES.items():
        check(case, outcomes, [expected] * nproc)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_lost_peer_is_named_and_poisons_the_result(transport):
    output = torchrun("one_sided_gpu.py", transport, 0, "a_lost_peer", nproc=2, timeout=300, env=ENVIRONMENT).output
    check("a_lost_peer", reports(output), ["silent", r"TransportError: .*rank 0.*waited"])
