"""Availability of ``nccl_put`` without a GPU, and nccl4py's interface, read from the installed package.
``test_device.py`` tests the protocol."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from sf_xfuser.transport.gpu import nccl_put

GOOD = nccl_put.Facts(
    cuda="13.0",
    gpus=8,
    bindings="0.6.0",
    library=23007,
    driver=13000,
    stream_operations=True,
    host="a",
    gpu="GPU-0",
    product="p5.48xlarge",
)
CHANGES = {
    "no CUDA": ({"cuda": None}, "this PyTorch is built without CUDA"),
    "no GPU": ({"gpus": 0}, "no NVIDIA GPU is visible"),
    "no bindings": ({"bindings": ""}, r"nccl4py is not installed: pip install 'sf-xfuser\[nccl\]'"),
    "old bindings": ({"bindings": "0.2.0"}, "nccl4py 0.2.0 is too old"),
    "problem": ({"problem": "OSError: no libnccl"}, "NCCL cannot be used: OSError: no libnccl"),
    "old NCCL": ({"library": 22803}, "NCCL 2.28.3 is loaded, one-sided operations need 2.29: .*two_sided"),
    "old driver": ({"driver": 12040}, "the driver supports CUDA 12.4"),
    "no words": ({"stream_operations": False}, "the GPU has no 64-bit stream memory operations"),
    "no cuMem": ({"environment": {"NCCL_CUMEM_ENABLE": "0"}}, "NCCL_CUMEM_ENABLE=0 turns off .*unset it"),
    "no windows": ({"environment": {"NCCL_WIN_ENABLE": "0"}}, "NCCL_WIN_ENABLE=0 turns off"),
    "no RMA": ({"environment": {"NCCL_RMA_DISABLE": "1"}}, "NCCL_RMA_DISABLE=1 turns off"),
}


@pytest.mark.parametrize("names", [*itertools.combinations(CHANGES, 1), *itertools.combinations(CHANGES, 2)], ids=str)
def test_each_trap_has_a_reason(names):
    """Alone and in pairs: the first one of them is named."""
    changes = [CHANGES[name] for name in names]
    facts = replace(GOOD, **{key: value for change, _ in reversed(changes) for key, value in change.items()})
    assert re.match(changes[0][1], nccl_put.unsupported_reason(facts) or "")


def test_good_facts_have_no_reason():
    oldest = replace(GOOD, library=22900, bindings="0.3.1", driver=12050, environment={"NCCL_CUMEM_ENABLE": "1"})
    assert nccl_put.unsupported_reason(GOOD) is None and nccl_put.unsupported_reason(oldest) is None


def group(*changes):
    return [replace(GOOD, **{"gpu": f"GPU-{n}"} | change) for n, change in enumerate(changes)]


P4D = {"product": "p4de.24xlarge", "efa": True}
SHARED = {"gpu": "GPU-0", "environment": {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}}


@pytest.mark.parametrize(
    ("ranks", "reasons"),
    [
        (group({}, {}), [None, None]),
        (group({}, {"host": "b"}), [None, None]),
        (group({}, {"gpus": 0}), [None, "no NVIDIA GPU"]),
        (group({}, {"library": 23103}), ["has NCCL 23007, but other ranks", "has NCCL 23103"]),
        (group({}, {"gpu": "GPU-0"}), ["shares its GPU .* NCCL_MULTI_RANK_GPU_ENABLE=1 only"] * 2),
        (group(SHARED, SHARED), [None, None]),
        (group({}, {"gpu": "GPU-0", "host": "b"}), [None, None]),
        (group(P4D, P4D), [None, None]),
        (group(P4D, P4D | {"host": "b"}), ["no one-sided operations on p4de.24xlarge: use two_sided or nvshmem"] * 2),
        (group(P4D | {"efa": False}, {"host": "b"}), [None, None]),
    ],
)
def test_unsupported_groups(ranks, reasons):
    for found, expected in zip(nccl_put.group_unsupported_reasons(ranks), reasons, strict=True):
        assert found is None if expected is None else re.search(expected, found or ""), found


def test_facts_survive_json():
    facts = replace(GOOD, missing=[], environment={"NCCL_WIN_ENABLE": "1"})
    assert nccl_put.Facts(**json.loads(json.dumps(asdict(facts)))) == facts
    assert nccl_put.probe().cuda == torch.version.cuda


def test_nothing_imports_nccl4py_before_it_is_tried():
    code = "import sys, sf_xfuser.torus.links as links; assert 'nccl' not in sys.modules; print(links.nccl_put.probe())"
    code = code.replace("links.nccl_put", "sys.modules['sf_xfuser.transport.gpu.nccl_put']")
    code += "; assert 'nccl' not in sys.modules or sys.modules['torch'].cuda.device_count()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


# -- nccl4py's interface ----------------------------------------------------------------------------------------------

nccl = pytest.importorskip("nccl.bindings.nccl", reason="nccl4py is not installed")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("put_signal", "localbuff count datatype peer peer_win peer_win_offset sig_idx ctx flags comm stream"),
        ("group_start", ""),
        ("group_end", ""),
        ("get_version", ""),
        ("get_unique_id", ""),
        ("comm_init_rank", "nranks comm_id rank"),
        ("comm_query_properties", "comm"),
        ("comm_window_register", "comm buff size win_flags"),
        ("comm_window_deregister", "comm win"),
        ("get_peer_device_pointer", "window offset peer"),
        ("comm_abort", "comm"),
        ("comm_destroy", "comm"),
        ("mem_alloc", "size"),
        ("mem_free", "ptr"),
    ],
)
def test_the_bindings_take_our_arguments(name, parameters):
    signature = getattr(nccl, name).__doc__.splitlines()[0]
    found = re.match(rf"{name}\((.*?)\)", signature)
    assert found and [each.split()[-1] for each in found[1].split(", ") if each] == parameters.split()


def test_the_types_of_the_bindings():
    assert nccl.DataType.Uint8 == nccl_put._UINT8
    assert hasattr(nccl.CommProperties(), "host_rma_support")
    unique_id = nccl.UniqueId.from_buffer(bytes(range(128)))
    assert bytes(unique_id) == bytes(range(128))
    assert not nccl.Window()


def test_a_put_reaches_the_library():
    """The bindings accept the arguments of a put; what is missing is libnccl."""
    if nccl_put.probe().library:
        pytest.skip("libnccl is here: the tests of a GPU run it")
    with pytest.raises(Exception, match="libnccl"):
        nccl.put_signal(0, 8, nccl_put._UINT8, 1, nccl.Window(), 0, 0, 0, 0, nccl.Comm(), 0)
