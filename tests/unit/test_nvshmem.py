"""The GPU transports without a GPU: when NVSHMEM and symmetric memory are refused, the reason, and the ids of PEs.

``test_device.py`` tests the protocol, ``distributed/test_nvshmem.py`` the ranks, ``gpu/test_one_sided.py`` transfers.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import pytest
import torch

from sf_xfuser.layout.plan import Layout
from sf_xfuser.torus.links import Group, MemoryDomain, RankInfo, need_groups, shared_links, ways
from sf_xfuser.transport.gpu import nvshmem, symm_mem

GOOD = nvshmem.Facts(
    cuda="13.0",
    gpus=8,
    bindings={"cu13": "0.4.1"},
    library="3.4.5",
    driver=13000,
    stream_operations=True,
    host="a",
    gpu="GPU-0",
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"bindings": {"cu13": "0.3.1"}, "library": "3.3.20", "driver": 12050}, None),
        ({"world": [0, 1], "status": 3}, None),
        ({"cuda": None}, "this PyTorch is built without CUDA"),
        ({"gpus": 0}, "no NVIDIA GPU is visible"),
        ({"bindings": {}}, "nvshmem4py is not installed: pip install 'nvshmem4py-cu13>=0.3.1'"),
        ({"bindings": {}, "cuda": "12.8"}, "pip install 'nvshmem4py-cu12>=0.3.1'"),
        ({"bindings": {"cu12": "0.4.1"}}, "installed for cu12, but PyTorch is built for CUDA 13.0: pip install"),
        ({"bindings": {"cu12": "0.4.1", "cu13": "0.4.1"}}, "installed for cu12 and cu13: keep that for cu13 only"),
        ({"bindings": {"cu13": "0.2.2"}}, "nvshmem4py 0.2.2 is too old"),
        ({"problem": "DynamicLibNotFoundError: no libnvshmem_host"}, "cannot be used: DynamicLibNotFoundError"),
        ({"library": "3.2.5"}, "libnvshmem 3.2.5 may crash .*update nvidia-nvshmem-cu13"),
        ({"driver": 12040}, "the driver supports CUDA 12.4, NVSHMEM's flags need 12.5"),
        ({"missing": ["cuStreamWaitValue64_v2"]}, "flags need 12.5"),
        ({"stream_operations": False}, "no 64-bit stream memory operations"),
        ({"status": 1}, "an earlier start of NVSHMEM in this process has failed"),
        ({"status": 2}, "something else in this process has started NVSHMEM"),
        ({"environment": {"NVSHMEM_LIBFABRIC_PROVIDER": "EFA"}}, "LIBFABRIC_PROVIDER=EFA .*lower case"),
        ({"environment": {"NVSHMEM_LIBFABRIC_PROVIDER": "efa"}}, None),
    ],
)
def test_what_ends_a_process_is_refused_first(change, said):
    found = nvshmem.refusal(replace(GOOD, **change))
    assert found is None if said is None else re.search(said, found or ""), found


def group(*changes):
    return [replace(GOOD, gpu=f"GPU-{n}", **change) for n, change in enumerate(changes)]


SHARED = {"gpu": "GPU-0"}
NVLS_OFF = {"environment": {"NVSHMEM_DISABLE_NVLS": "1"}}


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (group({}, {}), [None, None]),
        (group({}, {"host": "b"}), [None, None]),
        (group({}, {"gpus": 0}), [None, "no NVIDIA GPU"]),
        (group({}, {"library": "3.6.5"}), ["has libnvshmem 3.4.5, others have not", "has libnvshmem 3.6.5"]),
        (group({}, {"world": [4, 5], "status": 2}), ["in an NVSHMEM world of ranks None, .*4, 5", None]),
        (group(*[{"world": [4, 6], "status": 2}] * 2), [r"world of ranks \[4, 6\], this would be one of \[4, 5\]"] * 2),
        (group({"environment": {"NVSHMEM_REMOTE_TRANSPORT": "None"}}, {"host": "b"}), ["on 2 hosts", None]),
        ([replace(GOOD, **NVLS_OFF)] * 2, [None, None]),
        ([GOOD] * 2, ["which needs NVSHMEM_DISABLE_NVLS=1"] * 2),
    ],
)
def test_a_group_is_judged_together(ranks, said):
    for found, expected in zip(nvshmem.refusals(ranks, [4, 5], 2), said, strict=True):
        assert found is None if expected is None else re.search(expected, found or ""), found


def test_shared_gpus_are_for_one_group_of_a_job():
    found = nvshmem.refusals([replace(GOOD, **NVLS_OFF)] * 2, [4, 5], 8)
    assert all("one sequence-parallel group of a job only" in each for each in found)


def test_facts_travel_as_json():
    facts = replace(GOOD, world=[0, 1], missing=[])
    told = json.loads(json.dumps(asdict(facts)))
    assert nvshmem.Facts(**told) == facts
    assert nvshmem.look().cuda == torch.version.cuda


@pytest.mark.parametrize(
    ("variables", "efa", "named"),
    [
        ({}, False, []),
        ({}, True, ["NVSHMEM_REMOTE_TRANSPORT"]),
        ({"NVSHMEM_REMOTE_TRANSPORT": "libfabric"}, True, ["NVSHMEM_LIBFABRIC_PROVIDER"]),
        ({"NVSHMEM_REMOTE_TRANSPORT": "libfabric", "NVSHMEM_LIBFABRIC_PROVIDER": "cxi"}, False, []),
        (
            {"NVSHMEM_REMOTE_TRANSPORT": "LibFabric", "NVSHMEM_LIBFABRIC_PROVIDER": "EFA"},
            False,
            ["NVSHMEM_LIBFABRIC_PROVIDER"],
        ),
        (
            {"NVSHMEM_REMOTE_TRANSPORT": "libfabric", "NVSHMEM_LIBFABRIC_PROVIDER": "efa"},
            True,
            ["FI_EFA_ENABLE_SHM_TRANSFER"],
        ),
        (
            {
                "NVSHMEM_REMOTE_TRANSPORT": "libfabric",
                "NVSHMEM_LIBFABRIC_PROVIDER": "efa",
                "FI_EFA_ENABLE_SHM_TRANSFER": "0",
            },
            True,
            [],
        ),
        ({"NCCL_SOCKET_IFNAME": "eth0"}, False, ["NCCL_SOCKET_IFNAME"]),
        ({"NCCL_SOCKET_IFNAME": "eth0", "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "eth0"}, False, []),
        ({"NCCL_IB_HCA": "mlx5", "NCCL_IB_GID_INDEX": "3"}, False, ["NCCL_IB_HCA", "NCCL_IB_GID_INDEX"]),
        ({"NCCL_IB_HCA": "mlx5", "NVSHMEM_HCA_PE_MAPPING": "mlx5_0:1:1"}, False, []),
        ({"NVSHMEM_DISABLE_CUDA_VMM": "1"}, False, ["NVSHMEM_SYMMETRIC_SIZE"]),
        ({"NVSHMEM_BYPASS_FLUSH": "1"}, False, ["NVSHMEM_BYPASS_FLUSH"]),
    ],
)
def test_traps_of_the_environment(variables, efa, named):
    assert set(variables) <= set(nvshmem.VARIABLES)
    assert list(nvshmem.cautions(variables, efa)) == named


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"cuda": None}, "built without CUDA"),
        ({"gpus": 0}, "no NVIDIA GPU"),
        ({"missing": ("PyTorch's symmetric memory has no rendezvous",)}, "has no rendezvous"),
        ({"driver": 12040}, "the driver supports CUDA 12.4, flags need 12.5"),
        ({"backend": "NVSHMEM"}, "uses its NVSHMEM backend; unset TORCH_SYMMMEM"),
        ({"stream_operations": False}, "no 64-bit stream memory operations"),
    ],
)
def test_what_symmetric_memory_needs(change, said):
    found = symm_mem.refusal(replace(symm_mem.Facts(cuda="13.0", gpus=1), **change))
    assert found is None if said is None else re.search(said, found or ""), found


def test_a_world_with_an_open_window_is_not_ended(monkeypatch):
    """Two meshes of the same ranks may have chosen differently."""
    monkeypatch.setattr(nvshmem, "_world", [0, 1])
    monkeypatch.setattr(nvshmem, "_open", [object()])
    nvshmem.finalize()
    assert nvshmem._world == [0, 1]


@pytest.mark.parametrize(
    ("domains", "links"),
    [
        ("aaaa", ["inside", "across"]),
        ("aabb", ["inside"]),
        ("abab", []),
        ("aab-", []),
        ("----", []),
    ],
)
def test_links_whose_ranks_have_one_domain(domains, links):
    layout = Layout(torus=2, ulysses=2, ring_across=1, ring_inside=1)
    found = [MemoryDomain(name, "no NVLink" if name == "-" else None) for name in domains]
    assert shared_links("nvshmem", found, layout) == links
    if links:
        assert shared_links("symm_mem", found, layout) == links
    else:
        with pytest.raises(
            ValueError, match="symm_mem needs several ranks of each machine on GPUs of one NVLink domain"
        ):
            shared_links("symm_mem", found, layout)
    alone = Layout(torus=4, ulysses=1, ring_across=1, ring_inside=1)
    assert shared_links("nvshmem", [MemoryDomain(name) for name in "abcd"], alone) == []  # nobody is inside


def test_auto_tries_all_that_may_serve_gpus():
    layout = Layout(torus=2, ulysses=2, ring_across=1, ring_inside=1)
    rank_info = RankInfo(layout, range(4), 0, 1.0)
    everyone = Group("across", range(4), dict(enumerate(range(4))), "nccl", 1.0)
    groups = {"inside": everyone, "across": everyone}
    assert need_groups("auto", "nccl") and need_groups("two_sided", "gloo")
    assert not need_groups("auto", "gloo") and not need_groups("nvshmem", "nccl") and not need_groups(None, "nccl")

    def of(wanted, shared, groups=groups):
        return list(ways(wanted, rank_info, shared, groups))

    everywhere, mixed = ["inside", "across"], "symm_mem inside, two_sided across"
    assert of("auto", everywhere) == ["two_sided", "symm_mem", "nvshmem"]
    assert of("auto", ["inside"]) == ["two_sided", mixed, "nvshmem"] and of("auto", []) == ["two_sided", "nvshmem"]
    assert of("two_sided", everywhere) == ["two_sided"] and of("nvshmem", everywhere, {}) == ["nvshmem"]
    assert of("symm_mem", everywhere) == ["symm_mem"] and of("symm_mem", ["inside"]) == [mixed]
