"""The packing kernel in Triton's interpreter, against its reference; the compressed layout."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sf_xfuser.kernels import (
    CompressedLayout,
    pack,
    pack_compressed,
    pack_unchecked,
    packing,
    unpack,
    unpack_compressed,
    unpack_unchecked,
)
from sf_xfuser.transport.base import Parcel
from tests.kernel_cases import mutated, padded, padding_is_intact

triton_packing = pytest.importorskip("sf_xfuser.kernels.triton_packing", reason="Triton is not installed")

B, S = 2, 37
FORMATS = ("none", "fp8", "int8")
TRUNCATION = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 2**-7}
"""Relative error of a conversion from float32: the interpreter truncates to bf16, a GPU rounds."""


@pytest.fixture(params=["reference", "kernel"])
def implementation(request, monkeypatch):
    """Runs the public functions with the reference and with the kernel."""
    if request.param == "kernel":
        monkeypatch.setattr(packing, "convert_reference", lambda *arguments: triton_packing.launch(*arguments))


def head_slice(layout, low, high, D, dtype=torch.float32, H=7, first=3, S=S):
    """A part [S, B, H, D]: heads low..high and tokens first..first+S of a tensor in this layout."""
    shape = (B, H, S + first, D) if layout == "BHSD" else (B, S + first, H, D)
    (x,) = padded(torch.randn(shape).to(dtype))
    return x[:, low:high, first:].permute(2, 0, 1, 3) if layout == "BHSD" else x[:, first:, low:high].transpose(0, 1)


@pytest.mark.parametrize("D", [16, 64, 72])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("heads", [(0, 3), (3, 5), (5, 7)])  # 7 heads over 3 ranks
def test_kv_is_packed_side_by_side(implementation, D, layout, heads):
    k, v = head_slice(layout, *heads, D), head_slice("BSHD", *heads, D)
    (chunk,) = padded(torch.zeros(S, 2, B, heads[1] - heads[0], D))
    pack((k, v), chunk)
    assert torch.equal(chunk, torch.stack((k, v), dim=1)) and padding_is_intact(chunk)
    back = padded(torch.zeros_like(k), torch.zeros_like(v))
    unpack(chunk, back)
    assert all(map(torch.equal, back, (k, v))) and padding_is_intact(*back)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_o_is_converted_and_unpacked_into_its_heads(implementation, dtype):
    o_SBHD = torch.randn(S, B, 3, 64)
    (chunk,) = padded(torch.zeros(S, B, 3, 64, dtype=dtype))
    pack((o_SBHD,), chunk)
    torch.testing.assert_close(chunk, o_SBHD.to(dtype), rtol=TRUNCATION[dtype], atol=0)
    (out_BSHD,) = padded(torch.full((B, S + 5, 7, 64), 7.0, dtype=dtype))
    unpack(chunk, (out_BSHD[:, 2 : S + 2, 3:6].transpose(0, 1),))
    assert torch.equal(out_BSHD[:, 2 : S + 2, 3:6], chunk.transpose(0, 1)) and padding_is_intact(out_BSHD)
    assert (out_BSHD[:, :2] == 7).all() and (out_BSHD[:, S + 2 :] == 7).all()
    assert (out_BSHD[:, :, :3] == 7).all() and (out_BSHD[:, :, 6:] == 7).all()


@pytest.mark.parametrize(
    "formats", [("fp8",), ("int8",), ("none",), ("none", "int8"), ("fp8", "none"), ("int8", "fp8")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compression_matches_the_reference(formats, dtype):
    """The chunk is bitwise equal, since the interpreter uses the same CPU, and unpacks within the rounding error."""
    D = 72
    parts = [head_slice("BHSD", 2, 5, D, dtype) * 10.0 ** torch.randint(-6, 6, (S, B, 3, 1)) for _ in formats]
    parts = padded(*(x.to(dtype) for x in parts))
    parts[0][0, 0, 0], parts[0][1, 0, 0, 3], parts[0][2, 0, 0, 4] = 0.0, float("inf"), float("nan")
    parts[-1][3, 0, 0] = 1e-38
    layout = CompressedLayout(shape=(S, B, 3, D), dtype=dtype, formats=formats)
    expected, got = (padded(torch.full((layout.nbytes,), 7, dtype=torch.uint8))[0] for _ in range(2))
    pack_compressed(parts, expected, formats)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "convert_reference", lambda *arguments: triton_packing.launch(*arguments))
        pack_compressed(parts, got, formats)
        back = padded(*(torch.full_like(x, 7.0) for x in parts))
        unpack_compressed(got, back, formats)
    assert torch.equal(got, expected) and padding_is_intact(got, *back)
    again = [torch.full_like(x, 7.0) for x in parts]
    unpack_compressed(expected, again, formats)
    torch.testing.assert_close(back, again, rtol=TRUNCATION[dtype], atol=0, equal_nan=True)
    for x, y, format in zip(parts, again, formats, strict=True):
        finite = x.isfinite().all(-1, keepdim=True)
        if format == "none":
            torch.testing.assert_close(y, x, equal_nan=True, rtol=0, atol=0)
            continue
        assert y[~finite.expand_as(y)].isnan().all(), "a non-finite block must unpack to NaN"
        magnitude = x.float().abs().amax(-1, keepdim=True).clamp(min=packing.MIN_MAGNITUDE)
        step = magnitude / 254 if format == "int8" else (x.float().abs() / 16).clamp(min=magnitude / 448 / 1024)
        allowed = step * 1.01 + torch.finfo(dtype).eps * x.float().abs()
        assert ((y.float() - x.float()).abs() <= allowed)[finite.expand_as(y)].all()


def test_fp8_rounds_as_pytorch():
    """All 254 finite codes, the ties between neighbours, and the values next to the ties."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    ties = (codes[1:] + codes[:-1]) / 2
    near_ties = [torch.nextafter(ties, torch.tensor(direction)) for direction in (1e9, -1e9)]
    values = torch.cat([codes, ties, *near_ties])
    x = torch.cat([values, torch.zeros(-len(values) % 15)]).view(-1, 15)
    x = torch.cat([x, torch.full((len(x), 1), 448.0)], dim=1)[:, None, None].contiguous()  # [S, 1, 1, 16], scale 1
    x, back, scale, stored = padded(x, x, torch.zeros(x.shape[:3]), x.byte())
    stored = stored.view(torch.float8_e4m3fn)
    triton_packing.launch([x], [stored], [scale], ["to fp8"])
    assert (scale == 1).all()
    assert torch.equal(stored.view(torch.uint8) & 0x7F, x.to(torch.float8_e4m3fn).view(torch.uint8) & 0x7F)
    assert torch.equal(stored.float(), x.to(torch.float8_e4m3fn).float())
    triton_packing.launch([stored], [back], [scale], ["from fp8"])
    assert torch.equal(back, stored.float())


def test_the_compressed_layout():
    """Offsets computed by hand."""
    layout = CompressedLayout(shape=(3, 1, 5, 9), dtype=torch.bfloat16, formats=("none", "int8"))
    assert (layout.values_offset(0), layout.scales_offset(0)) == (0, 272)  # 3*5*9*2 = 270
    assert (layout.values_offset(1), layout.scales_offset(1)) == (272, 272 + 144)  # 135 bytes
    assert layout.nbytes == 272 + 144 + 64  # 15 scales of 4 bytes
    half = CompressedLayout(shape=(64, 1, 6, 128), dtype=torch.bfloat16, formats=("fp8", "fp8")).nbytes
    assert half / (2 * 64 * 6 * 128 * 2) == 0.5 + 4 / 256  # a scale for each 128 values


@given(st.tuples(*(st.integers(1, 9) for _ in range(4))), st.lists(st.sampled_from(FORMATS), min_size=1, max_size=2))
def test_regions_do_not_overlap(shape, formats):
    layout = CompressedLayout(shape=shape, dtype=torch.bfloat16, formats=tuple(formats))
    chunk = torch.zeros(layout.nbytes, dtype=torch.uint8)
    regions = [layout.values(chunk, part).view(torch.uint8) for part in range(len(formats))]
    regions += [x.view(torch.uint8) for part in range(len(formats)) if (x := layout.scales(chunk, part)) is not None]
    for x in regions:
        x += 1
    assert chunk.max() == 1 and int(chunk.sum()) == sum(x.numel() for x in regions)


FAULTS = {
    "dropped tail": ("valid = s < num_tokens\n", "valid = s < num_tokens - 1\n"),
    "no bounds check": ("valid = s < num_tokens\n", "valid = s < BLOCK_S\n"),
    "dropped end of D": ("(d < D)", "(d < D - 1)"),
    "heads mixed up": ("h = (sequence % num_heads)", "h = (sequence // num_heads)"),
    "parts mixed up": ("target1 += (first * target1_s", "target1 = target0 + (first * target1_s"),
    "wrong scale": ('_MAX_INT8 if conversion == "to int8" else _MAX_FP8', "_MAX_FP8"),
    "scale of another block": ("block = first * num_sequences + sequence", "block = first + sequence"),
    "rounds down": ("magnitude + 0x7FFFF + ((magnitude >> 20) & 1)", "magnitude"),
    "ties away from zero": ("0x7FFFF + ((magnitude >> 20) & 1)", "0x80000"),
    "no subnormals": ("magnitude < 0x3C800000, subnormal", "magnitude < 0, subnormal"),
    "infinity as a number": ("tl.where(finite, scale, float", "tl.where(finite | True, scale, float"),
    "no sign": ("(bits >> 24) & 0x80", "(bits >> 24) & 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mutated_kernel_fails(fault, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "triton_packing", mutated(triton_packing, *FAULTS[fault]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises((AssertionError, ValueError)):
        test_fp8_rounds_as_pytorch()
        test_compression_matches_the_reference(("int8", "fp8"), torch.bfloat16)
        patch.setattr(packing, "convert_reference", lambda *arguments: triton_packing.launch(*arguments))
        test_kv_is_packed_side_by_side(None, 72, "BHSD", (3, 5))


def good():
    return [torch.zeros(4, 1, 2, 8, dtype=torch.bfloat16) for _ in range(2)]


BAD = {
    "no parts": (lambda: pack([], torch.zeros(1)), "0 parts"),
    "three parts": (lambda: pack([*good(), good()[0]], torch.zeros(1)), "3 parts"),
    "head sizes": (lambda: pack([good()[0], good()[0][..., :4]], torch.zeros(1)), r"parts\[1\] is \(4, 1, 2, 4\)"),
    "dtype mix": (lambda: pack([good()[0], good()[0].float()], torch.zeros(1)), r"parts\[1\] is .* torch.float32"),
    "chunk shape": (lambda: pack(good(), torch.zeros(4, 1, 2, 8)), r"chunk has shape \(4, 1, 2, 8\), but 2 part\(s\)"),
    "strided D": (
        lambda: pack([x[..., ::2] for x in good()], torch.zeros(4, 2, 1, 2, 4)),
        r"parts\[0\] .* has strides",
    ),
    "strided chunk": (lambda: pack(good(), torch.zeros(4, 2, 1, 2, 16)[..., ::2]), r"chunk is .* with strides"),
    "integers": (lambda: pack([x.int() for x in good()], torch.zeros(1)), r"parts\[0\] is .* torch.int32"),
    "aliasing": (lambda: pack((x := good())[:1], x[0]), r"chunk \(4, 1, 2, 8\) is written, but parts\[0\]"),
    "format": (lambda: pack_compressed(good(), torch.zeros(1), ("fp4", "none")), r"formats \('fp4', 'none'\)"),
    "too few formats": (lambda: pack_compressed(good(), torch.zeros(1), ("fp8",)), r"pass one for each of 2 parts"),
    "number of bytes": (
        lambda: pack_compressed(good(), torch.zeros(9, dtype=torch.uint8), ("fp8", "fp8")),
        r"chunk has shape \(9,\), but \('fp8', 'fp8'\) for \(4, 1, 2, 8\) torch.bfloat16 needs \(192,\)",
    ),
    "not bytes": (lambda: unpack_compressed(torch.zeros(192), good(), ("fp8", "fp8")), r"chunk is .* torch.float32"),
    "float64": (
        lambda: pack_compressed([x.double() for x in good()], torch.zeros(1), ("fp8", "fp8")),
        "torch.float64 cannot be compressed",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_parcel_is_packed_in_one_launch(parts, monkeypatch):
    """In the interpreter, with the CPU treated as a GPU. PyTorch copies what the kernel does not support."""
    launched, launch = [], triton_packing.launch
    monkeypatch.setattr(packing, "uses_triton", lambda x: True)
    monkeypatch.setattr(triton_packing, "launch", lambda *arguments: launched.append(arguments) or launch(*arguments))
    views = tuple(torch.randn(2, 7, 5, 64)[:, :, 1:3].transpose(0, 1) for _ in range(parts))
    parcel = Parcel(views, torch.bfloat16, peer=1, slot=0)
    chunk = parcel.packed()
    assert len(launched) == 1
    torch.testing.assert_close(chunk, torch.stack(views, 1).squeeze(1).bfloat16(), rtol=2**-7, atol=0)
    back = [torch.zeros_like(x, dtype=torch.bfloat16) for x in views]
    unpack_unchecked(chunk, back)
    assert len(launched) == 2 and torch.equal(torch.stack(back, 1).squeeze(1), chunk)
    for other in (views[0][..., ::2], views[0][0], views[0].int()):
        chunk = torch.zeros_like(other, memory_format=torch.contiguous_format)
        pack_unchecked((other,), chunk)
        assert torch.equal(chunk, other) and len(launched) == 2


def test_torch_compile():
    parts = [torch.randn(5, 1, 2, 16) for _ in range(2)]

    def round_trip(k, v):
        plain, compressed = k.new_empty(5, 2, 1, 2, 16), k.new_empty(416, dtype=torch.uint8)
        pack((k, v), plain)
        back = [torch.empty_like(x) for x in (k, v)]
        unpack(plain, back)
        pack_compressed(back, compressed, ("int8", "fp8"))
        rounded = [torch.empty_like(x) for x in (k, v)]
        unpack_compressed(compressed, rounded, ("int8", "fp8"))
        return rounded

    assert CompressedLayout(shape=(5, 1, 2, 16), dtype=torch.float32, formats=("int8", "fp8")).nbytes == 416
    got = torch.compile(round_trip, backend="aot_eager", fullgraph=True)(*parts)
    assert all(map(torch.equal, got, round_trip(*parts)))
