"""The merge kernel in Triton's interpreter, against its reference and float64."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch

from sf_xfuser.kernels import fix_fully_masked_lse, merge_, merge_into, merge_partial, sdpa_attend
from sf_xfuser.kernels.merge import fix_flash_lse, merge_partial_reference, merge_reference
from tests.kernel_cases import ADVERSARIAL, attention64, mutated, padded, padding_is_intact, sdpa_error

triton_merge = pytest.importorskip("sf_xfuser.kernels.triton_merge", reason="Triton is not installed")

B, H = 2, 3
NAN = float("nan")


def accumulator(B, H, S, D):
    """(out, lse) as views [B, H, S, D] and [B, H, S], stored as in torus/buffers.py: [S, B, H, D] and [B, H, S]."""
    return torch.randn(S, B, H, D).permute(1, 2, 0, 3), torch.randn(B, H, S)


def partial(B, H, S, D, dtype, layout, padding=0):
    """(out, lse) as a library returns them. The kernel must not read lse beyond S."""
    out = torch.randn(B, H, S, D) if layout == "BHSD" else torch.randn(B, S, H, D).transpose(1, 2)
    lse = torch.full((B, H, S + padding), NAN)
    lse[..., :S] = torch.randn(B, H, S)
    return out.to(dtype), lse[..., :S]


@pytest.mark.parametrize("D", [16, 72, 96])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("layout", "padding"), [("BHSD", 0), ("BSHD", 27)])
def test_matches_the_reference(D, dtype, layout, padding):
    S = 37  # not a multiple of a block size
    torch.manual_seed(D)
    out, lse = accumulator(B, H, S, D)
    new_out, new_lse = partial(B, H, S, D, dtype, layout, padding)
    lse[0, 0, 5], new_lse[1, 2, 6] = float("-inf"), float("-inf")
    lse[0, 1, 7] = new_lse[0, 1, 7] = float("-inf")
    out[0, 0, 5] = new_out[1, 2, 6] = NAN  # the output of a row without keys is ignored
    new_out, new_lse = padded(new_out, new_lse)
    expected, got = padded(out, lse), padded(out, lse)
    merge_reference(*expected, new_out, new_lse, None)
    triton_merge.launch(*got, new_out, new_lse, None)
    assert expected[0].isfinite().all()
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
    assert padding_is_intact(*got)
    assert torch.equal(got[0][1, 2, 6], out[1, 2, 6]) and got[1][0, 1, 7] == float("-inf")

    # The last merge writes heads of a larger result and nothing else, and only reads the accumulator.
    (larger,) = padded(torch.full((B, S, H + 2, D), 7.0, dtype=dtype))
    result = larger[:, :, 1 : H + 1].transpose(1, 2)
    before = padded(out, lse)
    triton_merge.launch(*before, new_out, new_lse, result)
    torch.testing.assert_close(result, expected[0].to(dtype), rtol=2e-6, atol=torch.finfo(dtype).eps * 4)
    assert (larger[:, :, 0] == 7.0).all() and (larger[:, :, -1] == 7.0).all()
    torch.testing.assert_close(before[0], out, rtol=0, atol=0, equal_nan=True)
    assert padding_is_intact(larger)


@pytest.mark.parametrize("shape", [(0, 2, 4, 16), (1, 2, 0, 16), (1, 1, 1, 1), (1, 2, 1, 64), (2, 1, 300, 8)])
def test_edge_shapes(shape):
    out, lse = accumulator(*shape)
    new_out, new_lse = partial(*shape, torch.float32, "BHSD")
    expected, got = padded(out, lse), padded(out, lse)
    merge_reference(*expected, new_out, new_lse, None)
    triton_merge.launch(*got, new_out, new_lse, None)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def merged(merge, q, k, v, cuts):
    """Attention to the keys between cuts, chunk by chunk, merged as attention.py does."""
    spans = [(a, b) for a, b in zip([0, *cuts], [*cuts, k.shape[2]], strict=True) if a < b]
    out = lse = None
    for i, (a, b) in enumerate(spans):
        new_out, new_lse = sdpa_attend(q, k[:, :, a:b], v[:, :, a:b])
        if out is None:
            out, lse = new_out.to(new_lse.dtype), new_lse.clone()
        elif i == len(spans) - 1:
            result = torch.full_like(new_out, NAN)
            merge(out, lse, new_out, new_lse, result)
            return result
        else:
            merge(out, lse, new_out, new_lse, None)
    return out.to(q.dtype)


MERGES = {
    "kernel": lambda *tensors: triton_merge.launch(*tensors),
    "reference": merge_reference,
}


def error_ratio(merge, name, dtype, S=19, keys=40, D=64):
    """Error of chunked attention relative to the error of single-device SDPA in the same dtype. Both are measured
    against float64."""
    q, k, v = ADVERSARIAL[name](B, H, S, keys, D, dtype)
    exact = attention64(q, k, v)
    chunked = merged(merge, q, k, v, [13, 13, 14, 31])  # with an empty chunk and a chunk of one key
    return (chunked.double() - exact).abs().max().item() / sdpa_error(q, k, v, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("merge", MERGES)
def test_error_is_within_twice_single_device_sdpa(merge, name, dtype):
    torch.manual_seed(1)
    assert error_ratio(MERGES[merge], name, dtype) <= 2
    assert error_ratio(MERGES[merge], name, dtype, S=1) <= 2


INF = float("inf")
# (element, lse) of the accumulator, of the partial result, and merged.
EXTREMES = {
    "infinite accumulator": ((INF, 0.0), (1.0, 30.0), (INF, 30.0)),
    "infinite part": ((1.0, 30.0), (-INF, 0.0), (-INF, 30.0)),
    "infinite part with a weight near the smallest number": ((1.0, 95.0), (INF, 0.0), (INF, 95.0)),
    "infinite with both signs": ((INF, 0.0), (-INF, 0.0), (NAN, math.log(2.0))),
    "difference beyond the largest number": ((3e38, 0.0), (-2e38, 0.0), (5e37, math.log(2.0))),
    "empty accumulator": ((NAN, -INF), (2.0, 1.0), (2.0, 1.0)),
    "empty part": ((2.0, 1.0), (NAN, -INF), (2.0, 1.0)),
    "both empty": ((2.0, -INF), (NAN, -INF), (2.0, -INF)),
    "NaN in the part": ((2.0, 1.0), (0.0, NAN), (NAN, NAN)),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("merge", MERGES)
def test_extreme_values_merge_as_in_one_softmax(merge, name):
    (out, lse), (new_out, new_lse), expected = (
        [torch.full((1, 1, 1, 16), x), torch.full((1, 1, 1), y)] for x, y in EXTREMES[name]
    )
    result = torch.empty_like(out)
    MERGES[merge](*padded(out, lse), new_out, new_lse, result)
    torch.testing.assert_close(result, expected[0], equal_nan=True)
    MERGES[merge](out, lse, new_out, new_lse, None)
    torch.testing.assert_close([out, lse], expected, equal_nan=True)


@pytest.mark.parametrize("merge", MERGES)
def test_float64_is_merged_in_float64(merge):
    q, k, v = (torch.randn(1, 2, n, 16, dtype=torch.float64) for n in (5, 40, 40))
    torch.testing.assert_close(merged(MERGES[merge], q, k, v, [13, 31]), attention64(q, k, v), rtol=0, atol=1e-14)


def test_lse_of_fully_masked_rows():
    q, k = torch.ones(1, 2, 3, 16), torch.ones(1, 2, 4, 16)
    out, lse = torch.ones(1, 2, 3, 16), torch.tensor([[[0.0, NAN, INF], [1.0, 0.0, NAN]]])
    assert torch.equal(fix_fully_masked_lse(q, k, out, lse).nan_to_num(7.0), lse.nan_to_num(7.0))  # scores are finite
    k[:, 0], q[:, 1, 1] = -INF, NAN
    found = fix_fully_masked_lse(q, k, out, lse)
    assert (found[0, 0] == -INF).all() and found[0, 1, 0] == 1.0 and found[0, 1, 1:].isnan().all()


def test_lse_of_flash_attention():
    """It is +inf if the weights sum to 0 (output 0) or to NaN (output NaN)."""
    out, lse = torch.zeros(1, 1, 3, 16), torch.tensor([[[INF, INF, 1.0]]])
    out[0, 0, 1] = NAN
    found = fix_flash_lse(out, lse)[0, 0].tolist()
    assert found[0] == -INF and math.isnan(found[1]) and found[2] == 1.0


def test_only_a_cpu_inspects_the_scores_of_masked_rows(monkeypatch):
    lse = torch.tensor([[[INF]]])
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 0))
    assert fix_fully_masked_lse(lse, lse, lse, lse) is lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_one_launch_merges_what_flash_attention_returns(last, first, dtype, monkeypatch):
    """In the interpreter, with the CPU treated as a GPU. The first partial result starts the accumulator, whatever it
    holds. Rows 5 and 6 are fully masked and NaN."""
    launched, launch = [], triton_merge.launch
    monkeypatch.setattr(
        triton_merge, "launch", lambda *args, **kwargs: launched.append(args) or launch(*args, **kwargs)
    )
    S, D, total_dtype = 37, 72, torch.promote_types(dtype, torch.float32)
    out, lse = (x.to(total_dtype) for x in accumulator(B, H, S, D))
    if first:
        out, lse = torch.full_like(out, NAN), torch.full_like(lse, NAN)
    new_out, new_lse = partial(B, H, S, D, dtype, "BSHD", 27)
    new_lse = new_lse.to(total_dtype)
    new_lse[0, :, 5:7], new_out[0, :, 5], new_out[0, :, 6] = INF, 0.0, NAN
    expected, got = padded(out, lse), padded(out, lse)
    results = padded(*[torch.full((B, H, S, D), 7.0, dtype=dtype)] * 2) if last else [None, None]
    fixed = fix_flash_lse(new_out, new_lse)
    merge_partial_reference(*expected, new_out, fixed, results[0], first)
    monkeypatch.setattr(sys.modules["sf_xfuser.kernels.merge"], "uses_triton", lambda x: True)
    merge_partial(*got, new_out, new_lse, results[1], first)
    assert len(launched) == 1
    tolerance = {"rtol": 0, "atol": 0} if first else {"rtol": 2e-6, "atol": torch.finfo(dtype).eps * 4}
    if last:
        torch.testing.assert_close(results[1], results[0], equal_nan=True, **tolerance)
        torch.testing.assert_close(got, padded(out, lse), equal_nan=True, rtol=0, atol=0)
        written = results[1]
    else:
        torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)
        written = got[0]
        assert (got[1][0, :, 5] == -INF).all() if first else torch.equal(got[1][0, :, 5], lse[0, :, 5])
    assert written[0, :, 6].isnan().all() and padding_is_intact(written)
    assert (written[0, :, 5] == 0).all() if first else written[0, :, 5].isfinite().all()


FAULTS = {
    "wrong maximum": (
        "max_lse = tl.maximum(old_lse, part_lse, propagate_nan=tl.PropagateNan.ALL)",
        "max_lse = old_lse",
    ),
    "weights swapped": ("part_is_larger = part_lse > old_lse", "part_is_larger = part_lse < old_lse"),
    "missing weight": ("+ part_weight[:, None] * part", "+ part"),
    "accumulator is not rescaled": ("old_weight[:, None] * old", "old"),
    "dropped tail": ("valid = s < num_tokens - first", "valid = s < num_tokens - first - 1"),
    "no bounds check": ("valid = s < num_tokens - first", "valid = s < BLOCK_S"),
    "an empty accumulator counts": ("mask=mask & use_old[:, None]", "mask=mask"),
    "rows without keys count": ('use_part = part_lse != float("-inf")', "use_part = part_lse == part_lse"),
    "first merge reads the accumulator": ("    if starts:", "    if False:"),
    "first merge leaves the lse": ("merged_lse = part_lse", "merged_lse = tl.load(lse + s * lse_s, mask=valid)"),
    "masked rows count": ("element - float(", "element + float("),
    "NaN rows are masked": ('element - float("inf")', 'float("-inf")'),
    "heads mixed up": ("h = (sequence % num_heads)", "h = (sequence // num_heads)"),
    "last merge misplaced": ("result += b * result_b + h * result_h", "result += b * result_b"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mutated_kernel_fails(fault, monkeypatch):
    """The tests above fail for a kernel with one line changed."""
    faulty: ModuleType = mutated(triton_merge, *FAULTS[fault])
    monkeypatch.setattr(sys.modules[__name__], "triton_merge", faulty)
    with pytest.raises(AssertionError):
        for layout in (("BHSD", 0), ("BSHD", 27)):
            test_matches_the_reference(64, torch.float32, *layout)
        for first in (True, False):
            monkeypatch.setitem(sys.modules, "sf_xfuser.kernels.triton_merge", faulty)
            test_one_launch_merges_what_flash_attention_returns(False, first, torch.float32, monkeypatch)


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


def good():
    out, new_out, lse, new_lse = torch.ones(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), *torch.zeros(2, 1, 2, 4)
    return {"out": out, "lse": lse, "new_out": new_out, "new_lse": new_lse}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_any_write(name):
    change, text = BAD[name]
    tensors = good()
    arguments = change(tensors)
    with pytest.raises(ValueError, match=text):
        (merge_into if "result" in arguments else merge_)(**arguments)
    assert (tensors["out"] == 1).all()


def test_the_result_may_be_the_accumulator():
    out, lse = accumulator(B, H, 37, 64)
    new = partial(B, H, 37, 64, torch.float32, "BSHD")
    expected, last, kernel = padded(out, lse), padded(out, lse), padded(out, lse)
    merge_(*expected, *new)
    merge_into(last[0], *last, *new)
    triton_merge.launch(*kernel, *new, kernel[0])
    assert torch.equal(last[0], expected[0])
    torch.testing.assert_close(kernel[0], expected[0], rtol=2e-6, atol=2e-6)
    with pytest.raises(ValueError, match=r"out .* is written, but result"):  # overlapping, but not the same view
        merge_into(out[:, :, :-1], out[:, :, 1:], lse[:, :, 1:], new[0][:, :, 1:], new[1][:, :, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_partial_matches_the_checked_functions(dtype):
    out, lse = accumulator(B, H, 37, 64)
    new = partial(B, H, 37, 64, dtype, "BSHD")
    expected, got = padded(out, lse), padded(out, lse)
    merge_(*expected, *new)
    merge_partial(*got, *new, None)
    assert all(map(torch.equal, got, expected))
    results = [torch.full((B, H, 37, 64), NAN, dtype=dtype) for _ in range(2)]
    merge_into(results[0], *padded(out, lse), *new)
    merge_partial(*padded(out, lse), *new, results[1])
    assert torch.equal(*results) and results[0].isfinite().all()
    merge_partial(*got, *new, None, first=True)
    merge_partial(*padded(out, lse), *new, results[1], first=True)
    assert torch.equal(got[0], new[0].float()) and torch.equal(got[1], new[1]) and torch.equal(results[1], new[0])


@pytest.mark.parametrize("name", ["head sizes", "batch", "layout of lse", "dtype of lse", "strided D"])
def test_partial_results_are_checked(name):
    change, text = BAD[name]
    tensors = good()
    with pytest.raises(ValueError, match=text):
        merge_partial(**change(tensors), result=None)
    assert (tensors["out"] == 1).all()


def test_torch_compile():
    out, lse = accumulator(1, 2, 5, 8)
    new_out, new_lse = partial(1, 2, 5, 8, torch.bfloat16, "BHSD")
    result = torch.zeros(1, 2, 5, 8, dtype=torch.bfloat16)

    def twice(out, lse, new_out, new_lse, result):
        merge_(out, lse, new_out, new_lse)
        merge_into(result, out, lse, new_out, new_lse)
        return result + 1

    expected = twice(*(eager := padded(out, lse, new_out, new_lse, result)))
    compiled = padded(out, lse, new_out, new_lse, result)
    got = torch.compile(twice, backend="aot_eager", fullgraph=True)(*compiled)
    assert torch.equal(got, expected) and all(map(torch.equal, compiled, eager))
    torch.library.opcheck(torch.ops.sf_xfuser.merge.default, (out, lse, new_out, new_lse, result))


@pytest.mark.parametrize(
    ("dtype", "D", "format", "fused"),
    [(torch.float32, 64, "int8", True), (torch.bfloat16, 72, "none", False), (torch.float32, 80, "none", False)],
)
def test_prepare_runs_every_kernel(dtype, D, format, fused, monkeypatch):
    """In the interpreter, with the CPU treated as a GPU."""
    prepare = sys.modules["sf_xfuser.kernels.prepare"]
    launched, synchronized = [], []
    for name in ("prepare", "merge", "copies", "packing", "flags", "fused"):
        module = sys.modules[f"sf_xfuser.kernels.{name}"]
        monkeypatch.setattr(module, "uses_triton", lambda x, name=name: launched.append(name) or True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    prepare.prepare.__wrapped__(torch.device("cpu"), dtype, D, format, fused)
    assert {"merge", "copies", "flags"} <= set(launched) and ("fused" in launched) == fused
    # Per number of heads: compressed Q, and K with compressed V, in both directions.
    assert launched.count("packing") == 2 * 4 * (format != "none")
    assert synchronized == [torch.device("cpu")]
