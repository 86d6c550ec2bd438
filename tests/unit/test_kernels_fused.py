"""The fused chunk attention kernel in Triton's interpreter, against its reference and float64."""

from __future__ import annotations

import math
import re
import sys
from types import ModuleType

import pytest
import torch

from sf_xfuser.kernels import (
    Chunks,
    FusedAttention,
    attend_chunks_,
    attend_chunks_into,
    fused,
    fused_unsupported_reason,
)
from sf_xfuser.kernels.fused import HEAD_SIZES
from tests.kernel_cases import (
    ADVERSARIAL,
    attention64,
    interpret_bf16,
    mutated,
    padded,
    padding_is_intact,
    sdpa_error,
)

triton_fused = pytest.importorskip("sf_xfuser.kernels.triton_fused", reason="Triton is not installed")

NAN = float("nan")
EMPTY = float("-inf")  # lse of a row without keys
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 4e-6}


@pytest.fixture(autouse=True)
def _bf16(monkeypatch):
    interpret_bf16(monkeypatch)


def record(*tensors, kernel=True, **options):
    """``FusedAttention.run`` of the current ``triton_fused``, which a test may replace by a mutated one, with the CPU
    treated as a GPU, or of the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "uses_triton", lambda x: kernel)
        patch.setitem(sys.modules, "sf_xfuser.kernels.triton_fused", triton_fused)
        return FusedAttention(Chunks(*tensors), **options).run


ATTENDS = {
    "kernel": lambda *tensors, **options: record(*tensors, **options)(),
    "reference": lambda *tensors, **options: record(*tensors, kernel=False, **options)(),
}
attend, attend_reference = ATTENDS.values()


@pytest.mark.parametrize(
    ("device", "dtype", "D", "reason"),
    [
        ("cuda", torch.bfloat16, 128, None),
        ("cpu", torch.float32, 72, None),
        ("cuda", torch.float64, 128, "its dtypes are .*, got torch.float64"),
        ("cuda", torch.bfloat16, 80, "its head sizes are .*, got 80"),
        ("xpu", torch.bfloat16, 64, "it needs a CUDA device and Triton, got xpu with Triton"),
    ],
)
def test_unsupported_calls_have_a_reason(device, dtype, D, reason):
    found = fused_unsupported_reason(torch.device(device), dtype, D)
    assert found is None if reason is None else re.fullmatch(reason, found)


def chunks(D, dtype, q_sizes, kv_sizes, B=2, H=2, H_kv=1):
    """(q, k, v, out, lse): Q and accumulators are slices of larger tensors, KV has the layout of a transport."""
    q = [padded(torch.randn(B, n, H + 1, D).to(dtype))[0][:, :, :H].transpose(1, 2) for n in q_sizes]
    kv = [padded(torch.randn(n, 2, B, H_kv, D).to(dtype))[0] for n in kv_sizes]
    k, v = ([x[:, part].permute(1, 2, 0, 3) for x in kv] for part in (0, 1))
    out = padded(*(torch.randn(n, B, H, D).permute(1, 2, 0, 3) for n in q_sizes))
    return q, k, v, out, padded(*(torch.randn(B, H, n) for n in q_sizes))


@pytest.mark.parametrize(
    ("D", "dtype"), [*((D, torch.bfloat16) for D in HEAD_SIZES), (96, torch.float16), (72, torch.float32)]
)
def test_matches_the_reference(D, dtype):
    torch.manual_seed(D)
    q, k, v, out, lse = chunks(D, dtype, (33, 0, 1), (40, 0, 33))  # not multiples of a block size
    lse[0][0, 1, 5:9], out[0][0, 1, 5:9] = EMPTY, NAN  # the output of a row without keys is ignored
    lse[0][1, 0, 3] = 60.0  # far above the scores
    expected, got = [padded(*out), padded(*lse)], [padded(*out), padded(*lse)]
    attend_reference(q, k, v, *expected, [])
    attend(q, k, v, *got, [])
    assert all(x.isfinite().all() for side in expected for x in side)
    torch.testing.assert_close(got, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert all(padding_is_intact(*side) for side in got)

    # The last call writes heads of larger results and nothing else, and only reads the accumulator.
    larger = padded(*(torch.full((2, x.shape[2], 4, D), 7.0, dtype=dtype) for x in q))
    results = [x[:, :, 1:3].transpose(1, 2) for x in larger]
    before = [padded(*out), padded(*lse)]
    attend(q, k, v, *before, results)
    rounding = ROUNDING[dtype] + torch.finfo(dtype).eps
    torch.testing.assert_close(results, [x.to(dtype) for x in expected[0]], rtol=rounding, atol=rounding)
    assert all((x[:, :, head] == 7).all() for x in larger for head in (0, 3)) and padding_is_intact(*larger)
    torch.testing.assert_close(before, [out, lse], rtol=0, atol=0, equal_nan=True)


def test_unaligned_strides():
    torch.manual_seed(2)
    q, k, v, out, lse = chunks(64, torch.float32, (5,), (7,))
    k = [torch.randn(2, 1, 7, 67)[..., 1:65]]
    expected = [padded(*out), padded(*lse)]
    attend_reference(q, k, v, *expected, [])
    attend(q, k, v, out, lse, [])
    torch.testing.assert_close([out, lse], expected, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("kv_sizes", [(), (0,), (0, 0)])
def test_without_keys_the_accumulator_is_unchanged(kv_sizes):
    q, k, v, out, lse = chunks(64, torch.float32, (5,), kv_sizes)
    lse[0][0, 0, 2], out[0][0, 0, 2] = EMPTY, NAN
    results = [torch.full_like(q[0], NAN)]
    attend(q, k, v, out, lse, results)
    out[0][0, 0, 2] = 0.0
    torch.testing.assert_close(results, out, rtol=1e-6, atol=1e-6)
    got = padded(*out), padded(*lse)
    attend(q, k, v, *got, [])
    torch.testing.assert_close(got, (out, lse), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_run_may_pass_tensors(kernel):
    """Queries, keys and values of two calls, at other addresses, and the result of some queries."""
    torch.manual_seed(3)
    B, H, D = 2, 2, 64
    shapes = {"q": (B, 45, H + 1, D), "k": (B, 70, 2, D), "v": (B, 70, 2, D), "result": (B, 9, 5, D)}
    q, k, v, result = (torch.empty(shape, device="meta").transpose(1, 2) for shape in shapes.values())
    q, k, v = [q[:, 1:, :9], q[:, 1:, 9:40]], k[:, 1:].split((33, 37), 2), v[:, :1].split((33, 37), 2)
    out, lse, fixed = ([torch.full((B, H, x.shape[2], *d), NAN) for x in q] for d in ((D,), (), (D,)))
    first = record(q, k[:1], v[:1], out, lse, [], kernel=kernel, first=True)
    last = record(q, k[1:], v[1:], out, lse, [result[:, 3:], fixed[1]], kernel=kernel)
    for shift in (0, 4, 1):  # the last address is not aligned
        passed = [torch.randn(math.prod(x) + shift)[shift:].view(x).transpose(1, 2) for x in shapes.values()]
        before = passed[3].clone()
        first(*passed)
        last(*passed)
        exact = attention64(passed[0][:, 1:, :40], passed[1][:, 1:], passed[2][:, :1]).float()
        got = torch.cat([passed[3][:, 3:], fixed[1]], 2)
        torch.testing.assert_close(got, exact, rtol=4e-6, atol=4e-6)
        assert torch.equal(passed[3][:, :3], before[:, :3])


@pytest.mark.parametrize("attend", ATTENDS)
def test_irregular_groups(attend):
    q, k, v, out, lse = chunks(64, torch.float32, (5,), (7,), H=3, H_kv=2)
    result, kv_of_q = torch.empty_like(q[0]), [1, 0, 1]
    ATTENDS[attend](q, k, v, out, lse, [result], first=True, kv_of_q=kv_of_q)
    exact = attention64(q[0], k[0][:, kv_of_q], v[0][:, kv_of_q]).float()
    torch.testing.assert_close(result, exact, rtol=4e-6, atol=4e-6)


def error_ratio(attend, name, dtype, S=19, keys=40, D=64):
    """Error of attention to short chunks in two calls, relative to the error of single-device SDPA in the same dtype.
    Both are measured against float64."""
    q, k, v = ADVERSARIAL[name](1, 2, S, keys, D, dtype)
    exact = attention64(q, k, v)
    allowed = sdpa_error(q, k, v, exact)
    if S == 1:  # for a single query SDPA may sum in a more accurate order than a kernel for many queries
        max_logit = (q @ k.transpose(-1, -2)).abs().max().item() / D**0.5
        allowed = max(
            allowed, torch.finfo(torch.float32).eps / 2 * max_logit * v.abs().max().item()
        )  # rounding of a logit
    pieces = [x.split((S - S // 3, S // 3), 2) for x in (q, q.new_empty(q.shape).fill_(NAN))]
    parts = [x.split((13, 0, 1, keys - 14), 2) for x in (k, v)]
    out = [torch.full(x.shape, NAN) for x in pieces[0]]
    lse = [torch.full(x.shape[:3], EMPTY) for x in pieces[0]]
    attend(pieces[0], *(x[:2] for x in parts), out, lse, [])
    attend(pieces[0], *(x[2:] for x in parts), out, lse, pieces[1])
    return (torch.cat(pieces[1], 2).double() - exact).abs().max().item() / allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("attend", ATTENDS)
def test_error_is_within_twice_single_device_sdpa(attend, name, dtype):
    torch.manual_seed(1)
    assert error_ratio(ATTENDS[attend], name, dtype) <= 2
    assert error_ratio(ATTENDS[attend], name, dtype, S=1) <= 2


@pytest.mark.parametrize("attend", ATTENDS)
def test_fully_masked_keys(attend):
    """Scores of -inf: in the first block of keys, in a whole call, and for all keys."""
    q, k, v, out, lse = chunks(64, torch.float32, (5,), (33, 40), H_kv=2)
    q, result = [q[0].abs()], torch.empty_like(q[0])
    lse[0].fill_(EMPTY)
    k[0].fill_(EMPTY)
    ATTENDS[attend](q, k[:1], v[:1], out, lse, [])
    assert (lse[0] == EMPTY).all()
    accumulator = padded(*out), padded(*lse)
    ATTENDS[attend](q, k[1:], v[1:], *accumulator, [result])
    exact = attention64(q[0], k[1], v[1]).float()
    torch.testing.assert_close(result, exact, rtol=4e-6, atol=4e-6)
    ATTENDS[attend](q, k, v, out, lse, [result])
    torch.testing.assert_close(result, exact, rtol=4e-6, atol=4e-6)


# -- faults and bad input --------------------------------------------------------------------------------------------

FAULTS = {
    "wrong maximum": ("new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)", "new_max = row_max * 1.0"),
    "fully masked so far": ('tl.where(new_max == float("-inf"), 0.0, new_max)', "new_max"),
    "missing rescale": ("acc = tl.dot(weights, _load(v, valid, MASKED, D1), acc * rescale[:, None]",
                        "acc = tl.dot(weights, _load(v, valid, MASKED, D1), acc"),
    "missing rescale of the second part of the head": ("acc2 * rescale[:, None]", "acc2"),
    "row sum is not rescaled": ("row_sum = row_sum * rescale + tl.sum", "row_sum = row_sum + tl.sum"),
    "dropped tail": ("if full < num_keys:", "if full > num_keys:"),
    "keys beyond the last": ("key < num_keys - full,", "key < KEYS,"),
    "rows beyond the last": ("valid_row = row < num_rows - first", "valid_row = row < ROWS"),
    "dropped rows": ("valid_row = row < num_rows - first", "valid_row = row < num_rows - first - 1"),
    "accumulator is dropped": ("row_sum = tl.where(has_keys, 1.0, 0.0)", "row_sum = tl.where(has_keys, 0.0, 0.0)"),
    "rows without keys count": ('has_keys = row_max != float("-inf")', "has_keys = row_max == row_max"),
    "base 2 as base e": ("(row_max + tl.log2(row_sum)) * _LN2", "row_max + tl.log2(row_sum)"),
    "KV heads mixed up": ("tl.load(kv_heads + h)", "tl.load(kv_heads)"),
    "accumulator of an earlier call": ("(num_rows - first) * has_accumulator", "num_rows - first"),
    "queries at another address": ("chunk + 4, q_base", "chunk + 4, k_base"),
    "keys at another address": ("keys + 1, k_base", "keys + 1, v_base"),
    "values at another address": ("keys + 5, v_base", "keys + 5, k_base"),
    "result at another address": ("result_base * tl.load", "q_base * tl.load"),
    "one chunk for all": ("keys = kv_chunks + kv * _ENTRY", "keys = kv_chunks"),
    "result misplaced": ("tl.store(pointer + (rows + d2)", "tl.store(pointer + (rows + d2 + 1)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mutated_kernel_fails(fault, monkeypatch):
    """The tests above fail for a kernel with one line changed."""
    faulty: ModuleType = mutated(triton_fused, *FAULTS[fault])
    monkeypatch.setattr(sys.modules[__name__], "triton_fused", faulty)
    with pytest.raises(AssertionError):
        test_matches_the_reference(72, torch.float32)
        test_fully_masked_keys("kernel")
        test_a_run_may_pass_tensors(True)
        test_irregular_groups("kernel")


def q_of(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


BAD = {
    "head size of one": ({"k": [q_of(1, 2, 5, 72)]}, r"k\[0\] is \(1, 2, 5, 72\).* but q\[0\] is \(1, 4, 4, 64\)"),
    "unsupported head size": ({"q": [q_of(1, 4, 4, 80)]}, r"q\[0\] is .*head size 80 is not in \(64, 72"),
    "v is not as k": ({"v": [q_of(1, 2, 6, 64)]}, r"v\[0\] has shape \(1, 2, 6, 64\), but k\[0\] \(1, 2, 5, 64\)"),
    "dtypes": ({"v": [q_of(1, 2, 5, 64, dtype=torch.half)]}, r"v\[0\] is .* torch.float16.* but q\[0\] is .*bfloat16"),
    "unsupported dtype": ({"q": [q_of(1, 4, 4, 64, dtype=torch.float64)]}, r"q\[0\] is .* torch.float64"),
    "batch": ({"k": [q_of(2, 2, 5, 64)]}, r"k\[0\] is \(2, 2, 5, 64\).* use one batch"),
    "heads": ({"k": [q_of(1, 3, 5, 64)], "v": [q_of(1, 3, 5, 64)]}, r"4 heads, not a multiple of the 3 of k\[0\]"),
    "strided D": ({"q": [q_of(1, 4, 4, 128)[..., ::2]]}, r"q\[0\] \(1, 4, 4, 64\) has strides"),
    "lists": ({"lse": []}, r"1 q, 1 out, 0 lse"),
    "accumulator": ({"out": [q_of(1, 4, 4, 64)]}, r"out\[0\] is .*bfloat16 on cpu: the accumulator must be"),
    "shape of out": ({"out": [torch.zeros(1, 4, 3, 64)]}, r"out\[0\] has shape \(1, 4, 3, 64\)"),
    "layout of lse": ({"lse": [torch.zeros(1, 4, 4, 1)]}, r"lse\[0\] has shape \(1, 4, 4, 1\)"),
    "dtype of lse": ({"lse": [torch.zeros(1, 4, 4).half()]}, r"lse\[0\] is \(1, 4, 4\) torch.float16"),
    "dtype of results": ({"results": [torch.zeros(1, 4, 4, 64)]}, r"results\[0\] is .*float32.* but q\[0\]"),
    "number of results": ({"results": []}, r"0 results for 1 chunks of q"),
    "devices": ({"k": [q_of(1, 2, 5, 64).to("meta")]}, r"k\[0\] .* on meta and q\[0\] .* on cpu"),
}  # fmt: skip


def good():
    return {
        "q": [q_of(1, 4, 4, 64)],
        "k": [q_of(1, 2, 5, 64)],
        "v": [q_of(1, 2, 5, 64)],
        "out": [torch.ones(1, 4, 4, 64)],
        "lse": [torch.zeros(1, 4, 4)],
    }


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_any_write(name):
    change, text = BAD[name]
    arguments = good() | change
    with pytest.raises(ValueError, match=text):
        (attend_chunks_into if "results" in arguments else attend_chunks_)(**arguments)
    assert all((x == 1).all() for x in arguments["out"] if x.shape == (1, 4, 4, 64) and x.dtype == torch.float32)


def test_an_accumulator_that_shares_memory_is_rejected():
    given = good()
    with pytest.raises(ValueError, match=r"out\[0\] .* is written, but out\[1\]"):
        attend_chunks_(**{name: given[name] * 2 if name in ("q", "out", "lse") else given[name] for name in given})
    with pytest.raises(ValueError, match=r"results\[0\] .* is written, but q\[0\]"):
        attend_chunks_into(given["q"], **given)
    # Interleaved slices of one tensor do not overlap.
    base = torch.zeros(2, 8, 4, 64)
    given = good() | {"q": [q_of(2, 4, 4, 64)] * 2, "k": [], "v": [], "lse": [torch.zeros(2, 4, 4) for _ in range(2)]}
    attend_chunks_(**given | {"out": [base[:, :4], base[:, 4:]]})
    with pytest.raises(ValueError, match=r"out\[0\] .* is written, but out\[1\]"):
        attend_chunks_(**given | {"out": [base[:, :4], base[:, 3:7]]})


def test_torch_compile():
    torch.manual_seed(5)
    q, k, v, out, lse = (list(map(torch.clone, x)) for x in chunks(64, torch.bfloat16, (5, 3), (7, 4)))
    results = [torch.zeros_like(x) for x in q]

    def twice(q, k, v, out, lse, results):
        attend_chunks_(q, k, v, out, lse)
        attend_chunks_into(results, q, k, v, out, lse)
        return results[0] + 1

    def copies():
        return [list(map(torch.clone, x)) for x in (q, k, v, out, lse, results)]

    expected = twice(*(given := copies()))
    got = torch.compile(twice, backend="aot_eager", fullgraph=True)(*(compiled := copies()))
    assert torch.equal(got, expected)
    assert all(torch.equal(x, y) for side in zip(compiled, given, strict=True) for x, y in zip(*side, strict=True))
    torch.library.opcheck(torch.ops.sf_xfuser.attend_chunks.default, (q, k, v, out, lse, results))
