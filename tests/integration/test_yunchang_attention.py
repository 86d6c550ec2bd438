"""The layer in place of yunchang's: without yunchang against float64 in one process, with it against its own class."""

from __future__ import annotations

import pytest

from tests.launch import check, reports, torchrun

NOT_INSTALLED = r"; yunchang's own class can \(pip install yunchang\)"

# case -> what every rank says where nothing but PyTorch and NumPy can be imported
WITHOUT = {
    "before_set_up": r"RuntimeError: call sf_xfuser\.set_seq_parallel_pg on all ranks",
    "ulysses": "equal; 1 served, 0 handed back",
    "unified": "equal; 1 served, 0 handed back",
    "ring": "equal; 1 served, 0 handed back",
    "scale": "equal; 1 served, 0 handed back",
    "grouped_queries": "equal; 1 served, 0 handed back",
    "attention_type": "equal; 1 served, 0 handed back",
    "two_groups": "equal; 1 served, 0 handed back",
    "fused": "ValueError: the fused kernel does not support this call: its head sizes are .*, got 32; use --sp-kernel",
    "fused_scale": r"ValueError: the fused kernel .*: its scale is 1/sqrt\(32\), got 0.3; use --sp-kernel library",
    "causal": f"ValueError: torus cannot serve .*: causal attention needs keys in order{NOT_INSTALLED}",
    "dropout": f"ValueError: .*: attention dropout{NOT_INSTALLED}",
    "window": rf"ValueError: .*: a window of \(8, 0\) needs keys in order{NOT_INSTALLED}",
    "softcap": f"ValueError: .*: softcap=30.0{NOT_INSTALLED}",
    "alibi": f"ValueError: .*: ALiBi needs keys in order{NOT_INSTALLED}",
    "quantised": f"ValueError: .*: attention of type SAGE_FP8 is not dense attention.*{NOT_INSTALLED}",
    "other_exchange": rf"ValueError: .*: scatter_idx and gather_idx \(1, 2\) are not Ulysses'.*{NOT_INSTALLED}",
    "gradient": f"ValueError: .*: a gradient is asked for, and Torus Attention computes none{NOT_INSTALLED}",
    "gradient_of_torus_attention": "ValueError: a gradient is asked for.*: call it under torch.no_grad",
    "degrees": r"ValueError: sp_ulysses_degree=3 x sp_ring_degree=1 = 3, but 4 ranks can be cut into groups",
    "wrong_rank": r"ValueError: rank \d of 4 is not what torch\.distributed says: \d of 4",
    "another_backend": r"ValueError: these layers run Torus Attention: .* got 'usp'",
}


@pytest.fixture(scope="module")
def said() -> dict[str, dict[str, str]]:
    finished = torchrun("yunchang_attention.py", "--without-yunchang", *WITHOUT, nproc=4, warm=False)
    return reports(finished.output, WITHOUT)


@pytest.mark.parametrize("case", WITHOUT)
def test_without_yunchang_or_xdit(case, said):
    check(case, said, [WITHOUT[case]] * 4)


def test_with_yunchang():
    """Served calls agree with yunchang's own class; causal ones are handed to it, in its own groups."""
    finished = torchrun("yunchang_attention.py", "yunchangs_own", nproc=4)
    causal = "equal; 0 served, 1 handed back causal attention needs keys in order"
    wanted = " | ".join(["equal; 1 served, 0 handed back"] * 3 + [causal] * 2)
    assert set(reports(finished.output, ["yunchangs_own"])["yunchangs_own"].values()) == {wanted}, finished.output
    assert finished.output.count("handed back to yunchang's own LongContextAttention: causal attention") == 2
