"""Torus Attention through xDiT's ``USP``, against xDiT's own function at the same degrees."""

from __future__ import annotations

import math
import re
from importlib.metadata import version

import pytest

from tests.launch import reports, torchrun

HANDLED = ("plain", "longer keys", "shorter keys", "joint front", "joint rear", "repeated kv heads",
          "repeated kv heads combined", "combined", "backend named", "attn_layer", "head balancing", "kwargs of None",
          "cache entry without PipeFusion", "scheduled FLASH", "scheduled SDPA_FLASH")  # fmt: skip
PADDED = ("valid_kv_len", "valid_kv_len of one rank", "valid_kv_len and joint")  # handled without a ring
FALLBACKS = {
    "indices_k": "attention_kwargs['indices_k'] needs keys in order",
    "extra Ulysses inputs": "attention_kwargs['ulysses_extra_inputs'] needs keys in order",
    "gradient": "autograd records this call, and Torus Attention has no backward pass",
    "causal": "causal attention needs keys in order",
    "backend without lse": "attention backend SDPA returns no log-sum-exp",
    "mask": "attention_kwargs['attn_mask'] needs keys in order",
    "cache of PipeFusion": "USP keeps PipeFusion's KV cache",
    "fp8 communication": "FP8 communication (--use_fp8_comms) compresses xDiT's own all-to-all",
}
WITH_A_RING = {"valid_kv_len of one rank": "attention_kwargs['valid_kv_len'] counts keys of all ranks"}
SHAPES = 10  # that --sp-check compares in the handled cases
if version("xfuser") < "0.7":
    HANDLED = tuple(name for name in HANDLED if name not in ("attn_layer", "head balancing") and "repeated" not in name)
    PADDED, WITH_A_RING, SHAPES = (), {}, 6
    del FALLBACKS["fp8 communication"]
# xDiT's own ring does not support these
RING_REFUSES = {"causal", "backend without lse", "mask", "indices_k", "extra Ulysses inputs"}


def calls(*flags: str) -> dict[str, list[tuple[float, str]]]:
    """case -> (difference, text) by rank."""
    output = torchrun("usp_calls.py", *flags, nproc=4).output
    return {case: list(ranks.values()) for case, ranks in reports(output).items()}


@pytest.mark.parametrize(
    ("topology", "ulysses", "ring"),
    [("2x2", 4, 1), ("2x2", 2, 2), *(pytest.param(*x, marks=pytest.mark.slow) for x in [("4x1", 2, 2), ("1x4", 1, 4)])],
)
def test_equals_xdits_own(topology, ulysses, ring):
    found = calls("--sp-backend", "torus", "--sp-topology", topology, "--ulysses_degree", str(ulysses),
                  "--ring_degree", str(ring))  # fmt: skip
    fallbacks = FALLBACKS | (WITH_A_RING if ring > 1 else {})
    handled = {*HANDLED, *(() if ring > 1 else PADDED)}
    assert set(found) == {*handled, *fallbacks} - (RING_REFUSES if ring > 1 else set())
    for name, ranks in found.items():
        assert len(ranks) == 4, name
        for difference, how in ranks:
            if name in handled:
                assert how == "handled", f"{name}: {how}"
                assert difference <= 2e-6, f"{name}: {difference}"
            else:
                assert fallbacks[name] in how, f"{name}: {how}"
                assert difference == 0.0, f"{name}: {difference}"


def test_strict_raises_on_every_rank_and_before_any_communication():
    found = calls("--sp-backend", "torus", "--sp-topology", "2x2", "--ulysses_degree", "4", "--sp-strict")
    for name in FALLBACKS:
        assert len(found[name]) == 4
        for difference, how in found[name]:
            assert math.isnan(difference) and "--sp-strict: torus cannot run" in how and FALLBACKS[name] in how
    assert all(how == "handled" for name in (*HANDLED, *PADDED) for _, how in found[name])


def test_the_first_call_of_each_shape_is_checked():
    flags = ("--sp-backend", "torus", "--sp-topology", "2x2", "--ulysses_degree", "4", "--sp-check", "first")
    found = calls(*flags, "--apart")
    assert all(how == "handled" for name in (*HANDLED, *PADDED) for _, how in found[name])
    assert all(difference <= 2e-6 for name in (*HANDLED, *PADDED) for difference, _ in found[name])
    checks = [re.search(r"first: (\d+) shape\(s\), at most (\S+) times", how) for _, how in found["checks"]]
    assert len(checks) == 4 and all(line and int(line[1]) == SHAPES and 0 < float(line[2]) < 0.1 for line in checks)


def test_all_ranks_fall_back_after_a_wrong_result_on_one():
    flags = ("--sp-backend", "torus", "--sp-topology", "2x2", "--ulysses_degree", "4", "--sp-check", "first", "--wrong")
    found = calls(*flags)
    for name in HANDLED:
        assert len(found[name]) == 4
        for difference, how in found[name]:
            assert "--sp-check first: a call of" in how and "differs from xDiT's own USP" in how
            assert difference == 0.0
    strict = calls(*flags, "--sp-strict")
    for name in HANDLED:
        assert len(strict[name]) == 4
        assert all(math.isnan(difference) and "differs from xDiT's own USP" in how for difference, how in strict[name])


def test_the_fused_kernel_runs_or_raises():
    """Head size 16, which it does not support."""
    flags = ("--sp-backend", "torus", "--ulysses_degree", "4", "--sp-kernel", "fused")
    finished = torchrun("usp_calls.py", *flags, nproc=4, expect_failure=True)
    assert "ValueError: the fused kernel does not support this call: its head sizes are" in finished.output
