"""The packing kernel in Triton's interpreter, against its twin; the compressed format."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sf_xfuser.kernels import Compressed, pack, pack_compressed, packing, place, take, unpack, unpack_compressed
from sf_xfuser.transport.base import Parcel
from tests.kernel_cases import mutated, room_is_untouched, with_room

triton_packing = pytest.importorskip("sf_xfuser.kernels.triton_packing", reason="Triton is not installed")

B, S = 2, 37
FORMATS = ("none", "fp8", "int8")
CUT = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 2**-7}
"""Relative error of a conversion from float32: the interpreter cuts bf16 off, where a GPU rounds."""


@pytest.fixture(params=["twin", "kernel"])
def moved_by(request, monkeypatch):
    """The public functions with either side below them."""
    if request.param == "kernel":
        monkeypatch.setattr(packing, "move_twin", lambda *arguments: triton_packing.launch(*arguments))


def head_slice(layout, low, high, D, dtype=torch.float32, H=7, first=3, S=S):
    """Heads low..high of tokens first..first+S of a tensor in this layout, as a part [S, B, H, D]."""
    shape = (B, H, S + first, D) if layout == "BHSD" else (B, S + first, H, D)
    (x,) = with_room(torch.randn(shape).to(dtype))
    return x[:, low:high, first:].permute(2, 0, 1, 3) if layout == "BHSD" else x[:, first:, low:high].transpose(0, 1)


@pytest.mark.parametrize("D", [16, 64, 72])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("heads", [(0, 3), (3, 5), (5, 7)])  # 7 heads over 3 ranks
def test_kv_lies_as_a_parcel_lays_it(moved_by, D, layout, heads):
    k, v = head_slice(layout, *heads, D), head_slice("BSHD", *heads, D)
    (into,) = with_room(torch.zeros(S, 2, B, heads[1] - heads[0], D))
    pack((k, v), into)
    assert torch.equal(into, torch.stack((k, v), dim=1)) and room_is_untouched(into)
    back = with_room(torch.zeros_like(k), torch.zeros_like(v))
    unpack(into, back)
    assert all(map(torch.equal, back, (k, v))) and room_is_untouched(*back)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_o_is_converted_and_returns_to_its_heads(moved_by, dtype):
    o_SBHD = torch.randn(S, B, 3, 64)
    (into,) = with_room(torch.zeros(S, B, 3, 64, dtype=dtype))
    pack((o_SBHD,), into)
    torch.testing.assert_close(into, o_SBHD.to(dtype), rtol=CUT[dtype], atol=0)
    (out_BSHD,) = with_room(torch.full((B, S + 5, 7, 64), 7.0, dtype=dtype))
    unpack(into, (out_BSHD[:, 2 : S + 2, 3:6].transpose(0, 1),))
    assert torch.equal(out_BSHD[:, 2 : S + 2, 3:6], into.transpose(0, 1)) and room_is_untouched(out_BSHD)
    assert (out_BSHD[:, :2] == 7).all() and (out_BSHD[:, S + 2 :] == 7).all()
    assert (out_BSHD[:, :, :3] == 7).all() and (out_BSHD[:, :, 6:] == 7).all()


@pytest.mark.parametrize(
    "formats", [("fp8",), ("int8",), ("none",), ("none", "int8"), ("fp8", "none"), ("int8", "fp8")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compressed_as_the_twin_does(formats, dtype):
    """The chunk bit for bit, since an interpreter computes on the same CPU; and what comes back is near enough."""
    D = 72
    parts = [head_slice("BHSD", 2, 5, D, dtype) * 10.0 ** torch.randint(-6, 6, (S, B, 3, 1)) for _ in formats]
    parts = with_room(*(x.to(dtype) for x in parts))
    parts[0][0, 0, 0], parts[0][1, 0, 0, 3], parts[0][2, 0, 0, 4] = 0.0, float("inf"), float("nan")
    parts[-1][3, 0, 0] = 1e-38
    layout = Compressed(shape=(S, B, 3, D), dtype=dtype, formats=formats)
    expected, got = (with_room(torch.full((layout.nbytes,), 7, dtype=torch.uint8))[0] for _ in range(2))
    pack_compressed(parts, expected, formats)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "move_twin", lambda *arguments: triton_packing.launch(*arguments))
        pack_compressed(parts, got, formats)
        back = with_room(*(torch.full_like(x, 7.0) for x in parts))
        unpack_compressed(got, back, formats)
    assert torch.equal(got, expected) and room_is_untouched(got, *back)
    again = [torch.full_like(x, 7.0) for x in parts]
    unpack_compressed(expected, again, formats)
    torch.testing.assert_close(back, again, rtol=CUT[dtype], atol=0, equal_nan=True)
    for x, y, format in zip(parts, again, formats, strict=True):
        finite = x.isfinite().all(-1, keepdim=True)
        if format == "none":
            torch.testing.assert_close(y, x, equal_nan=True, rtol=0, atol=0)
            continue
        assert y[~finite.expand_as(y)].isnan().all(), "a block that is not finite must not come back as numbers"
        largest = x.float().abs().amax(-1, keepdim=True).clamp(min=packing.SMALLEST)
        step = largest / 254 if format == "int8" else (x.float().abs() / 16).clamp(min=largest / 448 / 1024)
        allowed = step * 1.01 + torch.finfo(dtype).eps * x.float().abs()
        assert ((y.float() - x.float()).abs() <= allowed)[finite.expand_as(y)].all()


def test_every_value_of_fp8_survives():
    """All 254 finite codes, and the ties between neighbours, as PyTorch rounds them."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    ties = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(ties, torch.tensor(towards)) for towards in (1e9, -1e9)]
    values = torch.cat([codes, ties, *beside])
    x = torch.cat([values, torch.zeros(-len(values) % 15)]).view(-1, 15)
    x = torch.cat([x, torch.full((len(x), 1), 448.0)], dim=1)[:, None, None].contiguous()  # [S, 1, 1, 16], scale 1
    x, back, scale, stored = with_room(x, x, torch.zeros(x.shape[:3]), x.byte())
    stored = stored.view(torch.float8_e4m3fn)
    triton_packing.launch([x], [stored], [scale], ["to fp8"])
    assert (scale == 1).all()
    assert torch.equal(stored.view(torch.uint8) & 0x7F, x.to(torch.float8_e4m3fn).view(torch.uint8) & 0x7F)
    assert torch.equal(stored.float(), x.to(torch.float8_e4m3fn).float())
    triton_packing.launch([stored], [back], [scale], ["from fp8"])
    assert torch.equal(back, stored.float())


def test_the_compressed_layout():
    """Offsets by hand, as the interface states them."""
    layout = Compressed(shape=(3, 1, 5, 9), dtype=torch.bfloat16, formats=("none", "int8"))
    assert (layout.values_at(0), layout.scales_at(0)) == (0, 272)  # 3*5*9*2 = 270
    assert (layout.values_at(1), layout.scales_at(1)) == (272, 272 + 144)  # 135 bytes
    assert layout.nbytes == 272 + 144 + 64  # 15 scales of 4 bytes
    half = Compressed(shape=(64, 1, 6, 128), dtype=torch.bfloat16, formats=("fp8", "fp8")).nbytes
    assert half / (2 * 64 * 6 * 128 * 2) == 0.5 + 4 / 256  # a scale for each 128 values


@given(st.tuples(*(st.integers(1, 9) for _ in range(4))), st.lists(st.sampled_from(FORMATS), min_size=1, max_size=2))
def test_regions_do_not_overlap(shape, formats):
    layout = Compressed(shape=shape, dtype=torch.bfloat16, formats=tuple(formats))
    chunk = torch.zeros(layout.nbytes, dtype=torch.uint8)
    regions = [layout.values(chunk, part).view(torch.uint8) for part in range(len(formats))]
    regions += [x.view(torch.uint8) for part in range(len(formats)) if (x := layout.scales(chunk, part)) is not None]
    for x in regions:
        x += 1
    assert chunk.max() == 1 and int(chunk.sum()) == sum(x.numel() for x in regions)


FAULTS = {
    "dropped tail": ("here = s < num_tokens\n", "here = s < num_tokens - 1\n"),
    "no end": ("here = s < num_tokens\n", "here = s < BLOCK_S\n"),
    "dropped end of D": ("(d < D)", "(d < D - 1)"),
    "heads mixed up": ("h = (sequence % num_heads)", "h = (sequence // num_heads)"),
    "parts mixed up": ("target1 += (first * target1_s", "target1 = target0 + (first * target1_s"),
    "wrong scale": ('_LARGEST_INT8 if how == "to int8" else _LARGEST_FP8', "_LARGEST_FP8"),
    "scale of another block": ("block = first * num_sequences + sequence", "block = first + sequence"),
    "rounds down": ("magnitude + 0x7FFFF + ((magnitude >> 20) & 1)", "magnitude"),
    "ties away from zero": ("0x7FFFF + ((magnitude >> 20) & 1)", "0x80000"),
    "no subnormals": ("magnitude < 0x3C800000, subnormal", "magnitude < 0, subnormal"),
    "infinity as a number": ("tl.where(finite, scale, float", "tl.where(finite | True, scale, float"),
    "no sign": ("(bits >> 24) & 0x80", "(bits >> 24) & 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "triton_packing", mutated(triton_packing, *FAULTS[fault]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises((AssertionError, ValueError)):
        test_every_value_of_fp8_survives()
        test_compressed_as_the_twin_does(("int8", "fp8"), torch.bfloat16)
        patch.setattr(packing, "move_twin", lambda *arguments: triton_packing.launch(*arguments))
        test_kv_lies_as_a_parcel_lays_it(None, 72, "BHSD", (3, 5))


def good():
    return [torch.zeros(4, 1, 2, 8, dtype=torch.bfloat16) for _ in range(2)]


BAD = {
    "no parts": (lambda: pack([], torch.zeros(1)), "0 parts"),
    "three parts": (lambda: pack([*good(), good()[0]], torch.zeros(1)), "3 parts"),
    "head sizes": (lambda: pack([good()[0], good()[0][..., :4]], torch.zeros(1)), r"parts\[1\] is \(4, 1, 2, 4\)"),
    "dtype mix": (lambda: pack([good()[0], good()[0].float()], torch.zeros(1)), r"parts\[1\] is .* torch.float32"),
    "target": (lambda: pack(good(), torch.zeros(4, 1, 2, 8)), r"into has shape \(4, 1, 2, 8\), but 2 part\(s\)"),
    "strided D": (
        lambda: pack([x[..., ::2] for x in good()], torch.zeros(4, 2, 1, 2, 4)),
        r"parts\[0\] .* has strides",
    ),
    "strided target": (lambda: pack(good(), torch.zeros(4, 2, 1, 2, 16)[..., ::2]), r"into is .* with strides"),
    "integers": (lambda: pack([x.int() for x in good()], torch.zeros(1)), r"parts\[0\] is .* torch.int32"),
    "aliasing": (lambda: pack((x := good())[:1], x[0]), r"into \(4, 1, 2, 8\) is written, but parts\[0\]"),
    "format": (lambda: pack_compressed(good(), torch.zeros(1), ("fp4", "none")), r"formats \('fp4', 'none'\)"),
    "a format too few": (lambda: pack_compressed(good(), torch.zeros(1), ("fp8",)), r"give one for each of 2 parts"),
    "bytes": (
        lambda: pack_compressed(good(), torch.zeros(9, dtype=torch.uint8), ("fp8", "fp8")),
        r"into has shape \(9,\), but \('fp8', 'fp8'\) for \(4, 1, 2, 8\) torch.bfloat16 needs \(192,\)",
    ),
    "no bytes": (lambda: unpack_compressed(torch.zeros(192), good(), ("fp8", "fp8")), r"packed is .* torch.float32"),
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
def test_a_parcel_is_packed_in_one_launch_on_a_gpu(parts, monkeypatch):
    """Here in the interpreter, as if the CPU were one; what the kernel does not serve PyTorch copies."""
    launched, launch = [], triton_packing.launch
    monkeypatch.setattr(packing, "runs_kernel", lambda x: True)
    monkeypatch.setattr(triton_packing, "launch", lambda *given: launched.append(given) or launch(*given))
    views = tuple(torch.randn(2, 7, 5, 64)[:, :, 1:3].transpose(0, 1) for _ in range(parts))
    parcel = Parcel(views, torch.bfloat16, peer=1, slot=0)
    chunk = parcel.packed()
    assert len(launched) == 1
    torch.testing.assert_close(chunk, torch.stack(views, 1).squeeze(1).bfloat16(), rtol=2**-7, atol=0)
    back = [torch.zeros_like(x, dtype=torch.bfloat16) for x in views]
    take(chunk, back)
    assert len(launched) == 2 and torch.equal(torch.stack(back, 1).squeeze(1), chunk)
    for other in (views[0][..., ::2], views[0][0], views[0].int()):
        into = torch.zeros_like(other, memory_format=torch.contiguous_format)
        place((other,), into)
        assert torch.equal(into, other) and len(launched) == 2


def test_torch_compile_sees_operators():
    parts = [torch.randn(5, 1, 2, 16) for _ in range(2)]

    def there_and_back(k, v):
        plain, small = k.new_empty(5, 2, 1, 2, 16), k.new_empty(416, dtype=torch.uint8)
        pack((k, v), plain)
        back = [torch.empty_like(x) for x in (k, v)]
        unpack(plain, back)
        pack_compressed(back, small, ("int8", "fp8"))
        rough = [torch.empty_like(x) for x in (k, v)]
        unpack_compressed(small, rough, ("int8", "fp8"))
        return rough

    assert Compressed(shape=(5, 1, 2, 16), dtype=torch.float32, formats=("int8", "fp8")).nbytes == 416
    got = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)(*parts)
    assert all(map(torch.equal, got, there_and_back(*parts)))
