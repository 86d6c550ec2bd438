"""The merge kernel in Triton's interpreter, against its twin and against float64."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch

from sf_xfuser.kernels import merge_, merge_into, merge_part, sdpa_attend, without_weightless
from sf_xfuser.kernels.merge import merge_twin
from tests.kernel_cases import ADVERSARIAL, attention64, mutated, room_is_untouched, with_room

triton_merge = pytest.importorskip("sf_xfuser.kernels.triton_merge", reason="Triton is not installed")

B, H = 2, 3
NAN = float("nan")


def accumulator(B, H, S, D):
    """(out, lse) as sf_xfuser/torus/buffers.py keeps them: [S, B, H, D] and [B, H, S], seen as [B, H, S, D]."""
    return torch.randn(S, B, H, D).permute(1, 2, 0, 3), torch.randn(B, H, S)


def partial(B, H, S, D, dtype, layout, padding=0):
    """(out, lse) as a library returns them; what is beyond S must not be looked at."""
    out = torch.randn(B, H, S, D) if layout == "BHSD" else torch.randn(B, S, H, D).transpose(1, 2)
    lse = torch.full((B, H, S + padding), NAN)
    lse[..., :S] = torch.randn(B, H, S)
    return out.to(dtype), lse[..., :S]


@pytest.mark.parametrize("D", [16, 72, 96])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("layout", "padding"), [("BHSD", 0), ("BSHD", 27)])
def test_equals_the_twin(D, dtype, layout, padding):
    S = 37  # of no block size a multiple
    torch.manual_seed(D)
    out, lse = accumulator(B, H, S, D)
    new_out, new_lse = partial(B, H, S, D, dtype, layout, padding)
    lse[0, 0, 5], new_lse[1, 2, 6] = float("-inf"), float("-inf")
    lse[0, 1, 7] = new_lse[0, 1, 7] = float("-inf")
    out[0, 0, 5] = new_out[1, 2, 6] = NAN  # what a row without keys holds is of no consequence
    new_out, new_lse = with_room(new_out, new_lse)
    expected, got = with_room(out, lse), with_room(out, lse)
    merge_twin(*expected, new_out, new_lse, None)
    triton_merge.launch(*got, new_out, new_lse, None)
    assert expected[0].isfinite().all()
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
    assert room_is_untouched(*got)
    assert torch.equal(got[0][1, 2, 6], out[1, 2, 6]) and got[1][0, 1, 7] == float("-inf")

    # The last merge: heads of a larger result, nothing beside them touched, the accumulator only read.
    (whole,) = with_room(torch.full((B, S, H + 2, D), 7.0, dtype=dtype))
    result = whole[:, :, 1 : H + 1].transpose(1, 2)
    before = with_room(out, lse)
    triton_merge.launch(*before, new_out, new_lse, result)
    torch.testing.assert_close(result, expected[0].to(dtype), rtol=2e-6, atol=torch.finfo(dtype).eps * 4)
    assert torch.equal(whole[:, :, 0], torch.full_like(whole[:, :, 0], 7.0)) and (whole[:, :, -1] == 7.0).all()
    torch.testing.assert_close(before[0], out, rtol=0, atol=0, equal_nan=True)
    assert room_is_untouched(whole)


@pytest.mark.parametrize("shape", [(0, 2, 4, 16), (1, 2, 0, 16), (1, 1, 1, 1), (1, 2, 1, 64), (2, 1, 300, 8)])
def test_shapes_at_the_edge(shape):
    out, lse = accumulator(*shape)
    new_out, new_lse = partial(*shape, torch.float32, "BHSD")
    expected, got = with_room(out, lse), with_room(out, lse)
    merge_twin(*expected, new_out, new_lse, None)
    triton_merge.launch(*got, new_out, new_lse, None)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def merged(merge, q, k, v, cuts):
    """Attention to the keys between cuts, part by part, merged by ``merge``; as attention.py does it."""
    spans = [(a, b) for a, b in zip([0, *cuts], [*cuts, k.shape[2]], strict=True) if a < b]
    out = lse = None
    for at, (a, b) in enumerate(spans):
        new_out, new_lse = sdpa_attend(q, k[:, :, a:b], v[:, :, a:b])
        if out is None:
            out, lse = new_out.to(new_lse.dtype), new_lse.clone()
        elif at == len(spans) - 1:
            result = torch.full_like(new_out, NAN)
            merge(out, lse, new_out, new_lse, result)
            return result
        else:
            merge(out, lse, new_out, new_lse, None)
    return out.to(q.dtype)


MERGES = {
    "kernel": lambda *tensors: triton_merge.launch(*tensors),
    "twin": merge_twin,
}


def error_ratio(merge, name, dtype, S=19, keys=40, D=64):
    """Error of chunked attention against that of single-device SDPA in the same dtype, both against float64."""
    q, k, v = ADVERSARIAL[name](B, H, S, keys, D, dtype)
    exact = attention64(q, k, v)
    single = (torch.nn.functional.scaled_dot_product_attention(q, k, v).double() - exact).abs().max().item()
    floor = torch.finfo(dtype).eps * exact.abs().max().item() / 2  # half a unit in the last place of the result
    ours = merged(merge, q, k, v, [13, 13, 14, 31])  # one chunk of nothing, one of one key
    return (ours.double() - exact).abs().max().item() / max(single, floor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("merge", MERGES)
def test_error_is_within_twice_single_device_sdpa(merge, name, dtype):
    torch.manual_seed(1)
    assert error_ratio(MERGES[merge], name, dtype) <= 2
    assert error_ratio(MERGES[merge], name, dtype, S=1) <= 2


INF = float("inf")
# What an element and the log-sum-exp of its row hold, of the accumulator and of the part; what the merged ones are.
EXTREMES = {
    "infinite carried": ((INF, 0.0), (1.0, 30.0), (INF, 30.0)),
    "infinite part": ((1.0, 30.0), (-INF, 0.0), (-INF, 30.0)),
    "infinite part of a weight near the least number": ((1.0, 95.0), (INF, 0.0), (INF, 95.0)),
    "infinite with both signs": ((INF, 0.0), (-INF, 0.0), (NAN, math.log(2.0))),
    "difference beyond the largest number": ((3e38, 0.0), (-2e38, 0.0), (5e37, math.log(2.0))),
    "nothing carried": ((NAN, -INF), (2.0, 1.0), (2.0, 1.0)),
    "nothing in the part": ((2.0, 1.0), (NAN, -INF), (2.0, 1.0)),
    "nothing at all": ((2.0, -INF), (NAN, -INF), (2.0, -INF)),
    "NaN in the part": ((2.0, 1.0), (0.0, NAN), (NAN, NAN)),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("merge", MERGES)
def test_extreme_numbers_are_as_one_softmax_has_them(merge, name):
    (out, lse), (new_out, new_lse), expected = (
        [torch.full((1, 1, 1, 16), x), torch.full((1, 1, 1), y)] for x, y in EXTREMES[name]
    )
    result = torch.empty_like(out)
    MERGES[merge](*with_room(out, lse), new_out, new_lse, result)
    torch.testing.assert_close(result, expected[0], equal_nan=True)
    MERGES[merge](out, lse, new_out, new_lse, None)
    torch.testing.assert_close([out, lse], expected, equal_nan=True)


@pytest.mark.parametrize("merge", MERGES)
def test_float64_is_merged_in_float64(merge):
    q, k, v = (torch.randn(1, 2, n, 16, dtype=torch.float64) for n in (5, 40, 40))
    torch.testing.assert_close(merged(MERGES[merge], q, k, v, [13, 31]), attention64(q, k, v), rtol=0, atol=1e-14)


def test_rows_whose_keys_have_no_weight():
    q, k = torch.ones(1, 2, 3, 16), torch.ones(1, 2, 4, 16)
    out, lse = torch.ones(1, 2, 3, 16), torch.tensor([[[0.0, NAN, INF], [1.0, 0.0, NAN]]])
    assert torch.equal(without_weightless(q, k, out, lse).nan_to_num(7.0), lse.nan_to_num(7.0))  # scores are finite
    k[:, 0], q[:, 1, 1] = -INF, NAN
    found = without_weightless(q, k, out, lse)
    assert (found[0, 0] == -INF).all() and found[0, 1, 0] == 1.0 and found[0, 1, 1:].isnan().all()


def test_rows_that_flash_attention_marks_on_a_gpu(monkeypatch):
    """+inf where the weights sum to 0 (the output is 0) or to NaN (it is NaN)."""
    out, lse = torch.zeros(1, 1, 3, 16), torch.tensor([[[INF, INF, 1.0]]])
    out[0, 0, 1] = NAN
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 0))
    found = without_weightless(out, out, out, lse)[0, 0].tolist()
    assert found[0] == -INF and math.isnan(found[1]) and found[2] == 1.0


FAULTS = {
    "wrong maximum": ("larger = tl.maximum(old_lse, part_lse, propagate_nan=tl.PropagateNan.ALL)", "larger = old_lse"),
    "weight the wrong way round": ("heavier = part_lse > old_lse", "heavier = part_lse < old_lse"),
    "missing weight": ("+ weight[:, None] * part", "+ part"),
    "what is carried is not rescaled": ("rest[:, None] * old", "old"),
    "dropped tail": ("here = s < num_tokens - first", "here = s < num_tokens - first - 1"),
    "no end": ("here = s < num_tokens - first", "here = s < BLOCK_S"),
    "what an empty accumulator holds counts": ("here_rows & known[:, None]", "here_rows"),
    "rows without keys count": ('seen = part_lse != float("-inf")', "seen = part_lse == part_lse"),
    "heads mixed up": ("h = (sequence % num_heads)", "h = (sequence // num_heads)"),
    "last merge misplaced": ("result += b * result_b + h * result_h", "result += b * result_b"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    """What the tests above say of a kernel with one line changed."""
    faulty: ModuleType = mutated(triton_merge, *FAULTS[fault])
    monkeypatch.setattr(sys.modules[__name__], "triton_merge", faulty)
    with pytest.raises(AssertionError):
        for layout in (("BHSD", 0), ("BSHD", 27)):
            test_equals_the_twin(64, torch.float32, *layout)


BAD = {
    "head sizes": (lambda t: t | {"new_out": torch.zeros(1, 2, 4, 9)}, r"new_out has shape \(1, 2, 4, 9\)"),
    "batch": (lambda t: t | {"new_lse": torch.zeros(2, 2, 4)}, r"new_lse has shape \(2, 2, 4\)"),
    "layout of lse": (lambda t: t | {"new_lse": torch.zeros(1, 4, 2)}, r"new_lse has shape \(1, 4, 2\)"),
    "accumulator": (lambda t: t | {"out": t["out"].bfloat16()}, r"out is \(1, 2, 4, 8\) torch.bfloat16"),
    "dtype of lse": (lambda t: t | {"new_lse": t["new_lse"].half()}, r"new_lse is \(1, 2, 4\) torch.float16"),
    "integers": (lambda t: t | {"new_out": t["new_out"].int()}, r"new_out is .* torch.int32"),
    "strided D": (lambda t: t | {"new_out": torch.zeros(1, 2, 4, 16)[..., ::2]}, r"new_out \(1, 2, 4, 8\) has strides"),
    "aliasing": (lambda t: t | {"new_out": t["out"]}, r"out \(1, 2, 4, 8\) is written, but new_out"),
    "aliasing lse": (lambda t: t | {"new_lse": t["lse"]}, r"lse \(1, 2, 4\) is written, but new_lse"),
    "aliasing result": (lambda t: t | {"result": t["new_out"]}, r"result \(1, 2, 4, 8\) is written, but new_out"),
    "devices": (lambda t: t | {"new_out": t["new_out"].to("meta")}, r"new_out .* on meta and out .* on cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_anything_is_written(name):
    change, text = BAD[name]
    good = {"out": torch.ones(1, 2, 4, 8), "lse": torch.zeros(1, 2, 4), "new_out": torch.zeros(1, 2, 4, 8)}
    given = change(good | {"new_lse": torch.zeros(1, 2, 4)})
    with pytest.raises(ValueError, match=text):
        (merge_into if "result" in given else merge_)(**given)
    assert (good["out"] == 1).all()


def test_the_result_may_be_the_accumulator():
    out, lse = accumulator(B, H, 37, 64)
    new = partial(B, H, 37, 64, torch.float32, "BSHD")
    expected, last, kernel = with_room(out, lse), with_room(out, lse), with_room(out, lse)
    merge_(*expected, *new)
    merge_into(last[0], *last, *new)
    triton_merge.launch(*kernel, *new, kernel[0])
    assert torch.equal(last[0], expected[0])
    torch.testing.assert_close(kernel[0], expected[0], rtol=2e-6, atol=2e-6)
    with pytest.raises(ValueError, match=r"out .* is written, but result"):  # in the same memory, but not the same
        merge_into(out[:, :, :-1], out[:, :, 1:], lse[:, :, 1:], new[0][:, :, 1:], new[1][:, :, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_is_merged_as_by_the_checked_functions(dtype):
    out, lse = accumulator(B, H, 37, 64)
    new = partial(B, H, 37, 64, dtype, "BSHD")
    expected, got = with_room(out, lse), with_room(out, lse)
    merge_(*expected, *new)
    merge_part(*got, *new, None)
    assert all(map(torch.equal, got, expected))
    results = [torch.full((B, H, 37, 64), NAN, dtype=dtype) for _ in range(2)]
    merge_into(results[0], *with_room(out, lse), *new)
    merge_part(*with_room(out, lse), *new, results[1])
    assert torch.equal(*results) and results[0].isfinite().all()


@pytest.mark.parametrize("name", ["head sizes", "batch", "layout of lse", "dtype of lse", "strided D"])
def test_what_an_attention_function_returns_is_looked_at(name):
    change, text = BAD[name]
    good = {"out": torch.ones(1, 2, 4, 8), "lse": torch.zeros(1, 2, 4), "new_out": torch.zeros(1, 2, 4, 8)}
    with pytest.raises(ValueError, match=text):
        merge_part(**change(good | {"new_lse": torch.zeros(1, 2, 4)}), result=None)
    assert (good["out"] == 1).all()


def test_torch_compile_sees_operators():
    out, lse = accumulator(1, 2, 5, 8)
    new_out, new_lse = partial(1, 2, 5, 8, torch.bfloat16, "BHSD")
    result = torch.zeros(1, 2, 5, 8, dtype=torch.bfloat16)

    def twice(out, lse, new_out, new_lse, result):
        merge_(out, lse, new_out, new_lse)
        merge_into(result, out, lse, new_out, new_lse)
        return result + 1

    expected = twice(*(given := with_room(out, lse, new_out, new_lse, result)))
    compiled = with_room(out, lse, new_out, new_lse, result)
    got = torch.compile(twice, backend="aot_eager", fullgraph=True)(*compiled)
    assert torch.equal(got, expected) and all(map(torch.equal, compiled, given))
    torch.library.opcheck(torch.ops.sf_xfuser.merge.default, (out, lse, new_out, new_lse, result))


@pytest.mark.parametrize(
    ("dtype", "D", "format", "fused"),
    [(torch.float32, 64, "int8", True), (torch.bfloat16, 72, "none", False), (torch.float32, 80, "none", False)],
)
def test_the_kernels_of_a_call_run_before_it(dtype, D, format, fused, monkeypatch):
    """On a GPU; here in the interpreter, as if the CPU were one."""
    prepare = sys.modules["sf_xfuser.kernels.prepare"]
    launched, waited = [], []
    for name in ("prepare", "merge", "packing", "fused"):
        module = sys.modules[f"sf_xfuser.kernels.{name}"]
        monkeypatch.setattr(module, "runs_kernel", lambda x, name=name: launched.append(name) or True)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    prepare.prepare.__wrapped__(torch.device("cpu"), dtype, D, format, fused)
    assert {"merge", "packing"} <= set(launched) and ("fused" in launched) == fused
    # Per number of heads: one part and two, there and back; compressed Q, and K beside V.
    assert launched.count("packing") == 2 * (4 + 4 * (format != "none"))
    assert waited == [torch.device("cpu")]
