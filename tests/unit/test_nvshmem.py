"""Availability of the GPU transports, without a GPU: when NVSHMEM and symmetric memory are unsupported and why, and
the ids of PEs. ``test_device.py`` tests the protocol, ``distributed/test_nvshmem.py`` the ranks."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import pytest
import torch

from sf_xfuser.layout.plan import Layout
from sf_xfuser.torus.links import Group, MemoryDomain, RankInfo, candidates, needs_process_groups, shared_links
from sf_xfuser.transport.gpu import nvshmem, symm_mem


def assert_reason(found, expected):
    assert found is None if expected is None else re.search(expected, found or ""), found


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
    ("change", "reason"),
    [
        ({}, None),
        ({"bindings": {"cu13": "0.3.1"}, "library": "3.3.20", "driver": 12050}, None),
        ({"world": [0, 1], "status": 3}, None),
        ({"cuda": None}, "this PyTorch is built without CUDA"),
        ({"gpus": 0}, "no NVIDIA GPU is visible"),
        ({"bindings": {}}, "nvshmem4py is not installed: pip install 'nvshmem4py-cu13>=0.3.1'"),
        ({"bindings": {}, "cuda": "12.8"}, "pip install 'nvshmem4py-cu12>=0.3.1'"),
        ({"bindings": {"cu12": "0.4.1"}}, "installed for cu12, but PyTorch is built for CUDA 13.0: pip install"),
        ({"bindings": {"cu12": "0.4.1", "cu13": "0.4.1"}}, "installed for cu12 and cu13: keep only the one for cu13"),
        ({"bindings": {"cu13": "0.2.2"}}, "nvshmem4py 0.2.2 is too old"),
        ({"problem": "DynamicLibNotFoundError: no libnvshmem_host"}, "cannot be used: DynamicLibNotFoundError"),
        ({"library": "3.2.5"}, "libnvshmem 3.2.5 may crash .*update nvidia-nvshmem-cu13"),
        ({"driver": 12040}, "the driver supports CUDA 12.4, stream memory operations on peer memory need 12.5"),
        ({"missing": ["cuStreamWaitValue64_v2"]}, "operations on peer memory need 12.5"),
        ({"stream_operations": False}, "no 64-bit stream memory operations"),
        ({"status": 1}, "an earlier start of NVSHMEM in this process has failed"),
        ({"status": 2}, "something else in this process has started NVSHMEM"),
        ({"environment": {"NVSHMEM_LIBFABRIC_PROVIDER": "EFA"}}, "LIBFABRIC_PROVIDER=EFA: write it in lower case"),
        ({"environment": {"NVSHMEM_LIBFABRIC_PROVIDER": "efa"}}, None),
    ],
)
def test_unsupported_processes(change, reason):
    assert_reason(nvshmem.unsupported_reason(replace(GOOD, **change)), reason)


def group(*changes):
    return [replace(GOOD, gpu=f"GPU-{n}", **change) for n, change in enumerate(changes)]


NVLS_OFF = {"environment": {"NVSHMEM_DISABLE_NVLS": "1"}}


@pytest.mark.parametrize(
    ("ranks", "reasons"),
    [
        (group({}, {}), [None, None]),
        (group({}, {"host": "b"}), [None, None]),
        (group({}, {"gpus": 0}), [None, "no NVIDIA GPU"]),
        (group({}, {"library": "3.6.5"}), ["has libnvshmem 3.4.5, but other ranks", "has libnvshmem 3.6.5"]),
        (group({}, {"world": [4, 5], "status": 2}), ["in an NVSHMEM world of ranks None, .*4, 5", None]),
        (
            group(*[{"world": [4, 6], "status": 2}] * 2),
            [r"world of ranks \[4, 6\], but this group needs one of ranks \[4, 5\]"] * 2,
        ),
        (group({"environment": {"NVSHMEM_REMOTE_TRANSPORT": "None"}}, {"host": "b"}), ["on 2 hosts", None]),
        ([replace(GOOD, **NVLS_OFF)] * 2, [None, None]),
        ([GOOD] * 2, ["which needs NVSHMEM_DISABLE_NVLS=1"] * 2),
    ],
)
def test_unsupported_groups(ranks, reasons):
    for found, expected in zip(nvshmem.group_unsupported_reasons(ranks, [4, 5], 2), reasons, strict=True):
        assert_reason(found, expected)


def test_one_group_per_job_may_share_gpus():
    found = nvshmem.group_unsupported_reasons([replace(GOOD, **NVLS_OFF)] * 2, [4, 5], 8)
    assert all("supports for one sequence-parallel group per job" in each for each in found)


def test_facts_survive_json():
    facts = replace(GOOD, world=[0, 1], missing=[])
    assert nvshmem.Facts(**json.loads(json.dumps(asdict(facts)))) == facts
    assert nvshmem.probe().cuda == torch.version.cuda


@pytest.mark.parametrize(
    ("variables", "efa", "names"),
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
def test_environment_warnings(variables, efa, names):
    assert set(variables) <= set(nvshmem.VARIABLES)
    assert list(nvshmem.environment_warnings(variables, efa)) == names


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"cuda": None}, "built without CUDA"),
        ({"gpus": 0}, "no NVIDIA GPU"),
        ({"problem": "PyTorch's symmetric memory has no rendezvous"}, "has no rendezvous"),
        ({"driver": 12040}, "the driver supports CUDA 12.4, stream memory operations on peer memory need 12.5"),
        ({"backend": "NVSHMEM"}, "uses its NVSHMEM backend; unset TORCH_SYMMMEM"),
        ({"stream_operations": False}, "no 64-bit stream memory operations"),
    ],
)
def test_requirements_of_symmetric_memory(change, reason):
    good = symm_mem.Facts(cuda="13.0", gpus=1, driver=12050, stream_operations=True, backend="CUDA")
    assert_reason(symm_mem.unsupported_reason(replace(good, **change)), reason)


def test_a_world_with_an_open_window_is_not_ended(monkeypatch):
    """Two meshes of the same ranks may use different transports."""
    monkeypatch.setattr(nvshmem, "_world", [0, 1])
    monkeypatch.setattr(nvshmem, "_open_windows", [object()])
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
        with pytest.raises(ValueError, match="symm_mem needs several ranks per machine on GPUs of one NVLink domain"):
            shared_links("symm_mem", found, layout)
    alone = Layout(torus=4, ulysses=1, ring_across=1, ring_inside=1)
    assert shared_links("nvshmem", [MemoryDomain(name) for name in "abcd"], alone) == []  # one rank per machine


def test_auto_tries_every_gpu_transport():
    layout = Layout(torus=2, ulysses=2, ring_across=1, ring_inside=1)
    rank_info = RankInfo(layout, range(4), 0, 1.0)
    group = Group("across", range(4), dict(enumerate(range(4))), "nccl", 1.0)
    groups = {"inside": group, "across": group}
    assert needs_process_groups("auto", "nccl") and needs_process_groups("two_sided", "gloo")
    assert not any(needs_process_groups(*x) for x in (("auto", "gloo"), ("nvshmem", "nccl"), (None, "nccl")))

    def names(requested, shared, groups=groups):
        return list(candidates(requested, rank_info, shared, groups))

    everywhere, mixed = ["inside", "across"], "symm_mem inside, two_sided across"
    assert names("auto", everywhere) == ["two_sided", "symm_mem", "nccl_put", "nvshmem"]
    assert names("auto", ["inside"]) == ["two_sided", mixed, "nccl_put", "nvshmem"]
    assert names("auto", []) == ["two_sided", "nccl_put", "nvshmem"] and names("nccl_put", [], {}) == ["nccl_put"]
    assert names("two_sided", everywhere) == ["two_sided"] and names("nvshmem", everywhere, {}) == ["nvshmem"]
    assert names("symm_mem", everywhere) == ["symm_mem"] and names("symm_mem", ["inside"]) == [mixed]
