"""One-sided transfers on GPUs: virtual ranks of one process, then processes, which share GPUs if there are too few.
Not yet run on a GPU (see README)."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from sf_xfuser.transport.gpu import nvshmem, symm_mem
from tests.launch import RANKS, check, reports, run, torchrun

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(not GPUS, reason="needs a GPU")

ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "CUDA_MODULE_LOADING": "EAGER",
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NVSHMEM_DISABLE_NCCL": "1",
    "NVSHMEM_REMOTE_TRANSPORT": "none",
}
CASES = {
    "bitwise_equal_to_gloo": "equal",
    "attention": "0 differ",
    "all_to_all": "equal",
    "graph_capture_is_rejected": "ValueError: .*cannot be captured in a CUDA graph",
    "rows": "measured",
}
UNAVAILABLE = {"symm_mem": symm_mem.unavailable(), "nvshmem": nvshmem.unavailable()}
TRANSPORTS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
    for name, reason in UNAVAILABLE.items()
]


@pytest.mark.parametrize("size", ["2x1", "1x2", "2x2"])
def test_virtual_ranks_of_one_process(size):
    command = [sys.executable, str(RANKS / "virtual_gpu.py"), "2000", size]
    finished = run(command, timeout=900, env={**ENVIRONMENT, "PYTHONPATH": str(RANKS.parents[1])})
    assert "2000 calls equal" in finished.output


@pytest.mark.parametrize("nproc", [2, 4, 8])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_processes(transport, nproc, capsys):
    output = torchrun("one_sided_gpu.py", transport, *CASES, nproc=nproc, timeout=900, env=ENVIRONMENT).output
    with capsys.disabled():
        print("", *re.findall(r"row: .*", output), sep="\n")
    outcomes = reports(output, CASES)
    for case, expected in CASES.items():
        check(case, outcomes, [expected] * nproc)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_lost_peer_is_named_and_poisons_the_result(transport):
    output = torchrun("one_sided_gpu.py", transport, "a_lost_peer", nproc=2, timeout=300, env=ENVIRONMENT).output
    lost = r"TransportError: rank 1 on .*: no data from rank 0 in round 4: waited 3"
    check("a_lost_peer", reports(output), ["silent", lost])
