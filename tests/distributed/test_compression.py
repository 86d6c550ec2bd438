"""Compressed chunks between machines: errors, bytes, and unsupported flags."""

from __future__ import annotations

import json
import re

import pytest

from sf_xfuser.config import TorusArgs
from tests.launch import reports, torchrun

# topology, plan, transport, format, dtype, heads, KV heads, joint
CASES = {
    "plain": ("2x2", "torus=2,ulysses=2,ring=1", "tcp", "int8", "float32", 8, 8, None),
    "matched": ("2x2", "torus=2,ulysses=2,ring=1", "two_sided", "fp8", "float32", 8, 8, None),
    "ring_inside": ("2x2", "torus=2,ulysses=1,ring=2", "auto", "int8", "bfloat16", 8, 4, "front"),
    "ring_across": ("4x1", "torus=2,ulysses=1,ring=2", "tcp", "fp8", "bfloat16", 8, 4, "rear"),
    "four_machines": ("4x1", "torus=4,ulysses=1,ring=1", "auto", "int8", "float32", 12, 4, "front"),
}
LARGEST = {"int8": 0.03, "fp8": 0.08}  # relative error of the result


@pytest.fixture(scope="module")
def said() -> dict[str, dict[str, dict]]:
    return reports(torchrun("compression.py", json.dumps(CASES), nproc=4).output, CASES)


@pytest.mark.parametrize("case", CASES)
def test_error_and_bytes(case, said):
    _, plan, _, format, dtype, heads, kv_heads, _ = CASES[case]
    itemsize, g = {"float32": 4, "bfloat16": 2}[dtype], kv_heads / heads
    packed = (64 + 4) / (64 * itemsize)  # a byte for each of 64 elements, and a scale of four
    forwarded = 2 * g if "ring=2" in plan and CASES[case][0] == "4x1" else 0.0  # KV of two ranks
    expected = ((2 + g + forwarded) * packed + g + forwarded) / (2 + 2 * g + 2 * forwarded)  # Q, V and O; K
    assert len(said[case]) == 4
    for rank in said[case].values():
        assert 1e-4 < rank["error"] < LARGEST[format]
        assert rank["share"] == pytest.approx(expected, rel=0.05), "chunks begin at multiples of 16 bytes"
        found = re.search(r"([\d.]+)% in the last of (\d+) measured, ([\d.]+)% in the worst", rank["chunks"])
        assert found and 0.1 < float(found[1]) <= float(found[3]) < 5 and int(found[2]) >= 1


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ({"backend": "torus", "compress": "int4"}, "--sp-compress must be one of none, fp8, int8, got 'int4'"),
        ({"backend": "usp", "compress": "int8"}, "--sp-backend usp runs xDiT's own code: use --sp-backend torus"),
        ({"backend": "torus", "transport": "shm", "compress": "fp8"}, "use two_sided, tcp (CPU ranks), symm_mem or"),
        ({"backend": "torus", "transport": "nvshmem", "compress": "fp8"}, "uncompressed chunks into remote memory"),
    ],
)
def test_unsupported_flags_raise(flags, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        TorusArgs(**flags)
