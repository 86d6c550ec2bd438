"""The packing kernel in Triton's interpreter, against its reference; the compressed layout."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sf_xfuser.kernels import CompressedLayout, pack_compressed, packing, unpack_compressed
from tests.kernel_cases import mutated, padded, padding_is_intact

triton_packing = pytest.importorskip("sf_xfuser.kernels.triton_packing", reason="Triton is not installed")

B, S = 2, 37
FORMATS = ("none", "fp8", "int8")
TRUNCATION = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 2**-7}
"""Relative error of a conversion from float32: the interpreter truncates to bf16, a GPU rounds."""


def head_slice(layout, low, high, D, dtype=torch.float32, H=7, first=3, S=S):
    """A part [S, B, H, D]: heads low..high and tokens first..first+S of a tensor in this layout."""
    shape = (B, H, S + first, D) if layout == "BHSD" else (B, S + first, H, D)
    (x,) = padded(torch.randn(shape).to(dtype))
    return x[:, low:high, first:].permute(2, 0, 1, 3) if layout == "BHSD" else x[:, first:, low:high].transpose(0, 1)


@pytest.mark.parametrize(
    "formats", [("fp8",), ("int8",), ("none",), ("none", "int8"), ("fp8", "none"), ("int8", "fp8")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compression_matches_the_reference(formats, dtype):
    """The chunk is bitwise equal, since the interpreter uses the same CPU, and unpacks within the rounding error."""
    D = 72
    layouts = ("BHSD", "BSHD")[: len(formats)]
    parts = [head_slice(x, 2, 5, D, dtype) * 10.0 ** torch.randint(-6, 6, (S, B, 3, 1)) for x in layouts]
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
    with pytest.raises((AssertionError, ValueError)):
        test_fp8_rounds_as_pytorch()
        test_compression_matches_the_reference(("int8", "fp8"), torch.bfloat16)


def good():
    return [torch.zeros(4, 1, 2, 8, dtype=torch.bfloat16) for _ in range(2)]


def pack(parts, nbytes=192, formats=("fp8", "fp8")):
    pack_compressed(parts, torch.zeros(nbytes, dtype=torch.uint8), formats)


BAD = {
    "no parts": (lambda: pack([]), "0 parts"),
    "three parts": (lambda: pack([*good(), good()[0]]), "3 parts"),
    "head sizes": (lambda: pack([good()[0], good()[0][..., :4]]), r"parts\[1\] is \(4, 1, 2, 4\)"),
    "dtype mix": (lambda: pack([good()[0], good()[0].float()]), r"parts\[1\] is .* torch.float32"),
    "strided D": (lambda: pack([x[..., ::2] for x in good()]), r"parts\[0\] .* has strides"),
    "strided chunk": (
        lambda: pack_compressed(good(), torch.zeros(384, dtype=torch.uint8)[::2], ("fp8", "fp8")),
        "chunk is .*: it must be contiguous",
    ),
    "integers": (lambda: pack([x.int() for x in good()]), r"parts\[0\] is .* torch.int32"),
    "aliasing": (
        lambda: pack_compressed((x := good())[:1], x[0].view(torch.uint8).view(-1), ("none",)),
        r"chunk \(128,\) is written, but parts\[0\]",
    ),
    "format": (lambda: pack(good(), formats=("fp4", "none")), r"formats \('fp4', 'none'\)"),
    "too few formats": (lambda: pack(good(), formats=("fp8",)), r"pass one for each of 2 parts"),
    "number of bytes": (
        lambda: pack(good(), 9),
        r"chunk has shape \(9,\), but \('fp8', 'fp8'\) for \(4, 1, 2, 8\) torch.bfloat16 needs \(192,\)",
    ),
    "not bytes": (lambda: unpack_compressed(torch.zeros(192), good(), ("fp8", "fp8")), r"chunk is .* torch.float32"),
    "float64": (lambda: pack([x.double() for x in good()]), "torch.float64 cannot be compressed"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        call()


def test_torch_compile():
    parts = [torch.randn(5, 1, 2, 16) for _ in range(2)]

    def round_trip(k, v):
        compressed = k.new_empty(416, dtype=torch.uint8)
        pack_compressed((k, v), compressed, ("int8", "fp8"))
        rounded = [torch.empty_like(x) for x in (k, v)]
        unpack_compressed(compressed, rounded, ("int8", "fp8"))
        return rounded

    assert CompressedLayout(shape=(5, 1, 2, 16), dtype=torch.float32, formats=("int8", "fp8")).nbytes == 416
    got = torch.compile(round_trip, backend="aot_eager", fullgraph=True)(*parts)
    assert all(map(torch.equal, got, round_trip(*parts)))
