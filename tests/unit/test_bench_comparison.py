"""The table of torus against xDiT and every peer."""

from __future__ import annotations

from rich.console import Console

from sf_xfuser.bench import comparison
from tests.unit.test_bench_report import a_case, a_row


def rows():
    refused = {"status": "skipped", "reason": "needs equal token counts", "median_s": None}
    no_gpu = {"status": "skipped", "reason": "needs NVIDIA GPUs", "median_s": None}
    even, uneven = a_case("A 2x2"), a_case("B 2x2")
    return [
        a_row(even, "usp-allgather", 0.9), a_row(even, "ulysses", 0.6), a_row(even, "torus", 0.5, "ours"),
        a_row(even, "diffusers-ulysses", 0.8, "peer"), a_row(even, "diffusers-ring", 1.0, "peer"),
        a_row(even, "torch-allgather", 0.4, "peer"), a_row(even, "nccl-zero-sm", 1.0, "peer", **no_gpu),
        a_row(uneven, "usp-allgather", 1.0, **refused), a_row(uneven, "torus", 0.5, "ours"),
        a_row(uneven, "diffusers-ulysses", 1.0, "peer", **refused), a_row(uneven, "diffusers-ring", 0.7, "peer"),
        a_row(uneven, "torch-allgather", 1.0, "peer", **refused), a_row(uneven, "nccl-zero-sm", 1.0, "peer", **no_gpu),
    ]  # fmt: skip


def test_a_cell_is_the_fastest_of_a_package_over_torus():
    header, cells = comparison.lines(rows())
    assert header == ["case", "torus ms", "xDiT's USP", "best xDiT", "diffusers", "torch"]
    assert cells == [
        ["A 2x2", "500", "1.80x", "1.20x", "1.60x", "0.80x"],
        ["B 2x2", "500", "cannot run", "cannot run", "1.40x", "cannot run"],
    ]


def test_reasons_name_variants_and_cases():
    assert comparison.refusals(rows()) == [
        "nccl-zero-sm: needs NVIDIA GPUs (in all cases)",
        "usp-allgather, diffusers-ulysses, torch-allgather: needs equal token counts (B 2x2)",
    ]
    text = comparison.markdown(rows())
    assert "| A 2x2 | 500 | 1.80x | 1.20x | 1.60x | 0.80x |\n" in text and "\n- nccl-zero-sm: needs" in text


def test_without_torus_nothing_is_compared():
    """No other variant takes its place, and nobody else is said to fail."""
    wrong = {"status": "failed", "reason": "wrong result", "median_s": None}
    slower = [row | wrong if row["variant"] == "torus" else row for row in rows()]
    assert comparison.lines(slower)[1][0] == ["A 2x2", "–", *["–"] * 4]


def test_the_table_fits_80_columns():
    case = a_case("4x2 100mbit 0.2ms L4096 H24 D64")
    names = ["diffusers-ring", "yunchang-ring", "para-attn-ring", "torch-allgather", "nccl-zero-sm"]
    all_of_them = [a_row(case, name, 10.0, "peer") for name in names]
    all_of_them += [a_row(case, "usp-allgather", 11.0), a_row(case, "torus", 1.0, "ours")]
    lines = [row | {"case": {**row["case"], "id": "5x1 200mbit L2561 H24 D64"}} for row in rows()]
    console = Console(width=80, record=True)
    console.print(comparison.table([*all_of_them, *lines]))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert text.count("cannot") == 3 and text.count("10.00x") == 5 and "L4096 H24" in text


def test_rows_without_peers_have_no_comparison():
    assert comparison.has_peers(rows())
    assert not comparison.has_peers([row for row in rows() if row["family"] != "peer"])
