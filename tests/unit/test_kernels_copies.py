"""Strided copies: the kernel in Triton's interpreter and the copies of a CPU, against a loop over rows."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from itertools import product

import pytest
import torch

from sf_xfuser.kernels.copies import Copies, Copy, Side
from tests.kernel_cases import mutated

triton_copies = pytest.importorskip("sf_xfuser.kernels.triton_copies", reason="Triton is not installed")

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PADDING = 1 << 17  # elements around each tensor: more than a faulty kernel touches
SHAPES = ((37, 2, 3), (1, 1, 5), (70, 1, 1), (5, 3, 2), (0, 1, 2))  # S, B, H: uneven heads, blocks of several sizes


def cpu_run(copies, dtype):
    return Copies(copies, dtype, CPU).run


def kernel_run(copies, dtype):
    return triton_copies.record([copy for copy in copies if copy.shape[0]], dtype, CPU)


IMPLEMENTATIONS = {"cpu": cpu_run, "kernel": kernel_run}


def round_of_copies(D, dtype, step=1, seed=0):
    """(copies, tensors): from two tensors to three others, in random layouts with gaps, all multiples of ``step``."""
    draw = random.Random(seed)
    copies, ends = [], [0] * 5

    def side(base, S, B, H):
        gap = step * draw.randrange(3)
        offset, ends[base] = ends[base] + gap, ends[base] + gap + B * H * S * (D + step)
        row = D + step * (base % 2)
        strides = draw.choice([(B * H * row, H * row, row), (H * row, S * H * row, row), (row, H * S * row, S * row)])
        return Side(base, offset, strides)

    for S, B, H in SHAPES:
        copies.append(Copy(side(draw.randrange(2), S, B, H), side(draw.choice((2, 3, 4)), S, B, H), (S, B, H, D)))
    tensors = []
    for base, end in enumerate(ends):
        values = torch.arange(end).remainder(251) + 1 if base < 2 else torch.full((end,), 7)
        tensors.append(torch.nn.functional.pad(values.to(dtype), (PADDING, PADDING), value=7.0)[PADDING:-PADDING])
    return copies, tensors


def copied(copies, tensors):
    """The tensors after the copies, row by row."""
    found = [x.clone() for x in tensors]
    for source, target, (S, B, H, D) in copies:
        for index in product(range(S), range(B), range(H)):
            start, end = (x.offset + sum(map(int.__mul__, index, x.strides)) for x in (source, target))
            found[target.tensor][end : end + D] = tensors[source.tensor][start : start + D]
    return found


@pytest.mark.parametrize("D", [64, 72, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_matches_a_loop_over_rows(name, dtype, D):
    for seed, step in enumerate((1, 4, 8)):
        copies, tensors = round_of_copies(D, dtype, step, seed)
        expected = copied(copies, tensors)
        IMPLEMENTATIONS[name](copies, dtype)(tensors)
        assert all(map(torch.equal, tensors, expected))
        for x in tensors:
            assert (x._base[:PADDING] == 7.0).all() and (x._base[-PADDING:] == 7.0).all()


def test_head_sizes_may_differ():
    copies = [Copy(Side(0, 5, (9, 9, 9)), Side(1, 0, (9, 9, 9)), (1, 1, 1, 9))]
    copies.append(Copy(Side(0, 20, (40, 40, 40)), Side(1, 9, (40, 40, 40)), (2, 1, 1, 40)))
    for run in IMPLEMENTATIONS.values():
        tensors = [torch.randn(100), torch.zeros(100)]
        expected = copied(copies, tensors)
        run(copies, torch.float32)(tensors)
        assert torch.equal(tensors[1], expected[1])


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_the_kernel_follows_the_alignment_of_the_tensors(shift, monkeypatch):
    """Loads are as wide as offsets, strides and addresses allow."""
    steps, kernel = [], triton_copies.copy_kernel

    class Recorded:
        def __getitem__(self, grid):
            return lambda *arguments: steps.append(arguments[10]) or kernel[grid](*arguments)

    monkeypatch.setattr(triton_copies, "copy_kernel", Recorded())
    copies = [Copy(Side(0, 64, (64, 64, 64)), Side(1, 0, (64, 64, 64)), (3, 1, 1, 64))]
    source, target = torch.randn(300).bfloat16()[shift:], torch.zeros(192).bfloat16()
    kernel_run(copies, torch.bfloat16)([source, target])
    assert torch.equal(target, source[64:256]) and steps == [{0: 8, 1: 1, 4: 4}[shift]]


def test_launches(monkeypatch):
    copies, tensors = round_of_copies(64, torch.bfloat16)
    assert Copies(copies, torch.bfloat16, CPU).launches == 4  # one has no tokens
    monkeypatch.setattr(sys.modules["sf_xfuser.kernels.copies"], "uses_triton", lambda x: True)
    on_gpu, expected = Copies(copies, torch.bfloat16, CPU), copied(copies, tensors)
    assert on_gpu.launches == 1
    on_gpu.run(tensors)
    assert all(map(torch.equal, tensors, expected))
    nothing = Copies(copies[-1:], torch.bfloat16, CPU)
    nothing.run([])
    assert nothing.launches == 0


def test_a_tensor_may_change_from_run_to_run():
    """Views of a tensor that stays are reused; the others are not kept."""
    copies = [Copy(Side(0, 0, (8, 8, 8)), Side(1, 8 * i, (8, 8, 8)), (1, 1, 1, 8)) for i in range(2)]
    run = Copies(copies, torch.float32, CPU).run
    window, views = torch.zeros(16), []
    for value in range(4):
        source = torch.full((8,), float(value))
        gone = weakref.ref(source)
        run((source, window))
        assert (window == value).all()
        del source
        gc.collect()
        assert gone() is None, "an input must not stay alive"
        views.append(tuple(map(id, run.__self__._views[0])))
    assert views[2] == views[3]
    other = torch.zeros(16)
    run((torch.ones(8), other))
    assert (other == 1).all() and (window == 3).all()


def test_at_most_eight_tensors_on_a_gpu(monkeypatch):
    copies = [Copy(Side(0, 0, (1, 1, 1)), Side(i, 0, (1, 1, 1)), (1, 1, 1, 1)) for i in range(1, 9)]
    tensors = [torch.full((1,), float(i == 0)) for i in range(9)]
    Copies(copies, torch.float32, CPU).run(tensors)
    assert all(x == 1 for x in tensors)
    monkeypatch.setattr(sys.modules["sf_xfuser.kernels.copies"], "uses_triton", lambda x: True)
    with pytest.raises(ValueError, match="copies between 9 tensors: use at most 8"):
        Copies(copies, torch.float32, CPU)


def test_all_eight_tensors_are_found():
    copies = [Copy(Side(i, 0, (4, 4, 4)), Side(7 - i, 4, (4, 4, 4)), (1, 1, 1, 4)) for i in range(8)]
    tensors = [torch.full((8,), float(i)) for i in range(8)]
    kernel_run(copies, torch.float32)(tensors)
    assert [x[0].item() for x in tensors] == list(range(8)) and [x[4].item() for x in tensors] == list(range(7, -1, -1))


FAULTS = {
    "dropped tail": ("s < num_tokens - first", "s < num_tokens - first - 1"),
    "no bounds check": ("s < num_tokens - first", "s < BLOCK_S"),
    "dropped end of D": ("(d < D)", "(d < D - 1)"),
    "heads mixed up": ("h = sequence % num_heads", "h = sequence // num_heads"),
    "batch mixed up": ("b = sequence // num_heads", "b = sequence % num_heads"),
    "token stride of the source": ("source + s * source_s + d", "source + s * target_s + d"),
    "one copy only": ("table + tl.program_id(1) * _FIELDS", "table"),
    "second tensor missing": ("tensor == 3, base3", "tensor == 3, base2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mutated_kernel_fails(fault, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "triton_copies", mutated(triton_copies, *FAULTS[fault]))
    with pytest.raises(AssertionError):
        test_matches_a_loop_over_rows("kernel", torch.float32, 72)
