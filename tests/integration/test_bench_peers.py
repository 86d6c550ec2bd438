"""``bench --against``: each peer gives the result of one process, or says why it cannot run the case."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

from sf_xfuser.bench import peers
from sf_xfuser.bench.case import make_case
from tests.launch import records, torchrun

TOKENS = "needs equal token counts; 61 tokens cannot be split over 4 ranks"
FLASH = "UlyssesAttention needs flash-attn on a GPU"
KV = "needs as many key heads as query heads"
RING = "ParaAttention's ring calls CUDA kernels only"
NCCL = "needs NVIDIA GPUs and NCCL 2.30.7 or newer, found no GPU"
#: Why each peer cannot run 8 heads and 64 tokens, and 7 heads and 61 tokens; None if it can.
EXPECTED = {
    "diffusers-ulysses": (None, TOKENS), "diffusers-ulysses-anything": (None, None), "diffusers-ring": (None, TOKENS),
    "diffusers-unified": (None, "with ulysses=1 it equals diffusers-ring"), "diffusers-ring-anything": (None, None),
    "yunchang-ulysses": (None, TOKENS), "yunchang-unified": (None, "with ulysses=1 it equals yunchang-ring"),
    "yunchang-ring": (None, TOKENS), "yunchang-ulysses-attention": (FLASH, FLASH),
    "para-attn-ulysses": (None, TOKENS), "para-attn-unified": (RING, RING),
    "para-attn-ring": (RING, RING), "torch-allgather": (None, TOKENS), "torch-alltoall": (None, TOKENS),
    "nccl-zero-sm": (NCCL, NCCL),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks compute on CPUs")
def test_peers_equal_one_process_or_say_why_not():
    found = records(torchrun("bench_peers.py", nproc=4).output)
    assert len(found) == 4 * (3 * len(peers.PEERS) + 2)
    by_name = {(name, rank): result for name, rank, result in found}
    for peer in peers.PEERS:
        missing = importlib.util.find_spec(peers.PACKAGES[peer.package]) is None
        for number, reason in enumerate((*EXPECTED[peer.name], EXPECTED[peer.name][0] or KV)):
            reason = f"{peer.package} is not installed" if missing else reason
            for rank in "0123":
                result = by_name[f"{number} {peer.name}", rank]
                if reason is None:
                    assert isinstance(result, float) and result < 2e-6, (peer.name, number, result)
                else:
                    assert isinstance(result, str) and result.startswith(reason), (peer.name, number, result)
    assert all(by_name["exchanges of nccl-zero-sm", rank] < 2e-6 for rank in "0123")
    assert by_name["UlyssesAttention on PyTorch's attention", "0"] > 0.1, "yunchang is repaired: run it on CPUs too"


def test_reasons_need_no_ranks():
    """Degrees are those of the case; counts that do not divide are refused before anything is opened."""
    reasons = {
        case["cluster"]: {peer.name: peers.reason(peer, make_case(case)) for peer in peers.PEERS}
        for case in ({"cluster": "5x1", "heads": 24, "seq_len": 2560}, {"cluster": "3x2", "seq_len": 3072},
                     {"cluster": "1x1"})
    }  # fmt: skip
    assert reasons["5x1"]["diffusers-ulysses"] == "24 heads cannot be split over 5 ranks"
    assert reasons["5x1"]["diffusers-ulysses-anything"] is None, "one head of padding"
    assert re.match("8 heads on 6 ranks: 4 heads of padding", reasons["3x2"]["diffusers-ulysses-anything"] or "")
    assert reasons["3x2"]["diffusers-unified"] is None
    assert set(reasons["1x1"].values()) >= {"needs at least 2 ranks"}


def test_a_package_that_is_missing_or_raises_gives_a_reason():
    case = make_case({"cluster": "2x1"})
    absent = peers.Peer(name="x", description="", package="para-attn", split="ring", open=lambda *_: None)

    def fails(*_):
        raise AttributeError("no such function in this version")

    raising = peers.Peer(name="y", description="", package="torch", split="ring", open=fails)
    assert peers.open_peer(raising, case) == (None, "AttributeError: no such function in this version")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(peers.PACKAGES, "para-attn", "not_a_module")
        assert peers.open_peer(absent, case) == (None, "para-attn is not installed")
