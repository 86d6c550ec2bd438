"""The check of flags and the poisoning of a result: both implementations, and the kernels in Triton's interpreter."""

from __future__ import annotations

import sys

import pytest
import torch

from sf_xfuser.kernels import check_flags, flags, poison_result
from tests.kernel_cases import mutated

triton_flags = pytest.importorskip("sf_xfuser.kernels.triton_flags", reason="Triton is not installed")

NAN = float("nan")


@pytest.fixture(params=["reference", "kernel"], autouse=True)
def implementation(request, monkeypatch):
    """The kernel runs in the interpreter, with the CPU treated as a GPU."""
    monkeypatch.setattr(flags, "uses_triton", lambda x: request.param == "kernel")


def checked(index, changed=None, poison=1.0):
    """(flags, poison, ended) after a check of ``index`` in 600 flags that are 5, except ``changed``."""
    words = torch.full((600,), 5)
    if changed is not None:
        words[changed] = 0
    factor, ended = torch.tensor([7.0, poison, 7.0]), torch.tensor([7, 41, 7])
    check_flags(words, torch.tensor(index, dtype=torch.int64), torch.tensor(5), factor[1], ended[1])
    assert factor[0] == factor[2] == 7.0 and ended[0] == ended[2] == 7
    return words, factor[1].item(), ended[1].item()


# None, fewer, as many and more than the kernel checks at a time.
INDICES = ([], [3], [599, 0, 7], list(range(100, 228)), list(range(1, 600, 2)))


@pytest.mark.parametrize("index", INDICES, ids=len)
def test_flags_are_reset(index):
    words, poison, ended = checked(index)
    assert poison == 1.0 and ended == 42
    assert (words[index] == 0).all() and words.sum() == 5 * (600 - len(index))


@pytest.mark.parametrize("index", INDICES[1:], ids=len)
def test_each_flag_is_checked(index):
    for changed in {index[0], index[len(index) // 2], index[-1]}:
        words, poison, ended = checked(index, changed)
        assert poison != poison and ended == 42 and (words[index] == 0).all()
    assert checked(index, 598)[1] == 1.0, "other flags do not matter"


def test_poison_of_a_peer_remains():
    assert checked([1, 2], poison=NAN)[1] != 1.0


def test_all_64_bits_are_compared():
    words, poison = torch.tensor([(3 << 32) + 9]), torch.tensor(1.0)
    check_flags(words.clone(), torch.tensor([0]), words[0], poison, torch.tensor(0))
    assert poison == 1.0
    check_flags(words, torch.tensor([0]), torch.tensor((4 << 32) + 9), poison, torch.tensor(0))
    assert poison.isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 0, 2)])
def test_an_invalid_result_is_filled(dtype, order):
    memory = torch.randn(16 + 2 * 5 * 7 * 72 + 16).to(dtype)
    result = memory[16:-16].view(2, 5, 7, 72).permute(order)
    before = memory.clone()
    poison_result(result, torch.tensor(1.0))
    assert torch.equal(memory, before)
    poison_result(result, torch.tensor(NAN))
    assert result.isnan().all()
    assert torch.equal(memory[:16], before[:16]) and torch.equal(memory[-16:], before[-16:])


def test_large_and_empty_results(monkeypatch):
    """A program may fill several blocks."""
    monkeypatch.setattr(triton_flags, "_MAX_PROGRAMS", 3)
    result = torch.zeros(8 * 4096 + 5)
    poison_result(result, torch.tensor(NAN))
    assert result.isnan().all()
    for shape in ((0, 4), (4, 0)):
        poison_result(torch.zeros(shape), torch.tensor(NAN))


def test_gaps_are_refused():
    with pytest.raises(ValueError, match=r"result is \(4, 3\) .* with strides \(8, 1\): it must have no gaps"):
        poison_result(torch.zeros(4, 8)[:, :3], torch.tensor(1.0))


FAULTS = {
    "no reset": ("tl.zeros([BLOCK], tl.int64)", "tl.zeros([BLOCK], tl.int64) + value"),
    "first flags only": ("while first < num_checked:", "while first < 1:"),
    "last flags only": ("wrong |= (valid", "wrong = (valid"),
    "never wrong": ("tl.max(wrong, 0) != 0", "tl.max(wrong, 0) != 1"),
    "not counted": ("tl.atomic_add(ended, 1", "tl.atomic_add(ended, 0"),
    "always poisoned": ("volatile=True) != 1.0", "volatile=True) == 1.0"),
    "no end": ("mask=element < num_elements", "mask=element < num_elements + 1"),
    "blocks left out": ("tl.num_programs(0) * BLOCK", "tl.num_programs(0) * BLOCK * 2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mutated_kernel_fails(fault, monkeypatch):
    monkeypatch.setattr(flags, "uses_triton", lambda x: True)
    faulty = mutated(triton_flags, *FAULTS[fault])
    monkeypatch.setitem(sys.modules, "sf_xfuser.kernels.triton_flags", faulty)
    monkeypatch.setattr(sys.modules[__name__], "triton_flags", faulty)
    with pytest.raises(AssertionError):
        for index in INDICES[1:]:
            test_flags_are_reset(index)
            test_each_flag_is_checked(index)
        test_an_invalid_result_is_filled(torch.float32, (0, 1, 2, 3))
        test_large_and_empty_results(monkeypatch)
