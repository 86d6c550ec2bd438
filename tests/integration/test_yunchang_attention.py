"""LongContextAttention: without yunchang against float64 in one process, with yunchang against its own class."""

from __future__ import annotations

import pytest

from tests.launch import check, reports, torchrun

NOT_INSTALLED = "; pip install yunchang for this call"

# case -> regex of what every rank prints if only PyTorch and NumPy can be imported
WITHOUT = {
    "before_set_up": r"RuntimeError: call sf_xfuser\.set_seq_parallel_pg on all ranks",
    "ulysses": "equal; 1 on torus, 0 fell back",
    "unified": "equal; 1 on torus, 0 fell back",
    "ring": "equal; 1 on torus, 0 fell back",
    "scale": "equal; 1 on torus, 0 fell back",
    "grouped_queries": "equal; 1 on torus, 0 fell back",
    "attention_type": "equal; 1 on torus, 0 fell back",
    "two_groups": "equal; 1 on torus, 0 fell back",
    "causal": f"ValueError: torus cannot run .*: causal attention needs keys in order{NOT_INSTALLED}",
    "fused": "ValueError: the fused kernel does not support this call: its head sizes are .*, got 32; use --sp-kernel",
    "fused_scale": r"ValueError: the fused kernel .*: its scale is 1/sqrt\(32\), got 0.3; use --sp-kernel library",
    "dropout": f"ValueError: .*: attention dropout{NOT_INSTALLED}",
    "window": rf"ValueError: .*: a window of \(8, 0\) needs keys in order{NOT_INSTALLED}",
    "softcap": f"ValueError: .*: softcap=30.0{NOT_INSTALLED}",
    "alibi": f"ValueError: .*: ALiBi needs keys in order{NOT_INSTALLED}",
    "quantized": f"ValueError: .*: attention of type SAGE_FP8 is not dense attention.*{NOT_INSTALLED}",
    "other_exchange": rf"ValueError: .*: scatter_idx and gather_idx \(1, 2\) are not Ulysses' .*{NOT_INSTALLED}",
    "gradient": f"ValueError: .*: autograd records this call, and Torus Attention has no backward pass{NOT_INSTALLED}",
    "gradient_of_torus_attention": "ValueError: autograd records this call.*: call it under torch.no_grad",
    "degrees": r"ValueError: sp_ulysses_degree=3 x sp_ring_degree=1 = 3: the product must be above 1 and divide the 4",
    "wrong_rank": r"ValueError: got rank \d of 4, but torch\.distributed has rank \d of 4",
    "another_backend": r"ValueError: these layers run Torus Attention: .* got 'usp'",
}


@pytest.fixture(scope="module")
def printed() -> dict[str, dict[str, str]]:
    return reports(
        torchrun("yunchang_attention.py", "--without-yunchang", *WITHOUT, nproc=4, warm=False).output, WITHOUT
    )


@pytest.mark.parametrize("case", WITHOUT)
def test_without_yunchang_or_xdit(case, printed):
    check(case, printed, [WITHOUT[case]] * 4)


def test_with_yunchang():
    """Calls on torus agree with yunchang's own class; causal calls fall back to it, in its own groups."""
    finished = torchrun("yunchang_attention.py", "yunchangs_own", nproc=4)
    causal = "equal; 0 on torus, 1 fell back causal attention needs keys in order"
    wanted = " | ".join(["equal; 1 on torus, 0 fell back"] * 3 + [causal] * 2)
    assert set(reports(finished.output, ["yunchangs_own"])["yunchangs_own"].values()) == {wanted}, finished.output
    assert finished.output.count("falls back to yunchang's own LongContextAttention: causal attention") == 2
