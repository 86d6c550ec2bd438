"""What computes a piece: the table of measured rows, how it is written, and what it says."""

from __future__ import annotations

import json

import pytest
import torch

from sf_xfuser.kernels import choose
from sf_xfuser.kernels.choice import TABLE, Measured, choose_from, read_table, why_not_fused, write_table

PIECE = ("sm_90", "CUDNN", "bfloat16", 128)


def row(q_tokens=4096, kv_tokens=4096, library_us=100.0, fused_us=80.0, piece=PIECE):
    architecture, library, dtype, D = piece
    return Measured(
        architecture=architecture,
        library=library,
        dtype=dtype,
        D=D,
        q_tokens=q_tokens,
        kv_tokens=kv_tokens,
        library_us=library_us,
        fused_us=fused_us,
    )


def test_the_shipped_table_can_be_read():
    assert isinstance(read_table(TABLE), list)


def test_without_rows_the_library_computes():
    choice = choose_from([], PIECE, 4096, 4096)
    assert not choice.fused
    assert str(choice) == ("the library, and the merge kernel: no measured row for sm_90 bfloat16 D=128 against CUDNN")


@pytest.mark.parametrize(
    "other", [("sm_100", *PIECE[1:]), ("sm_90", "FLASH_3", *PIECE[2:]), (*PIECE[:2], "float16", 128), (*PIECE[:3], 64)]
)
def test_rows_of_other_pieces_say_nothing(other):
    assert choose_from([row()], other, 4096, 4096).reason.startswith("no measured row")


def test_the_faster_one_is_taken():
    assert choose_from([row()], PIECE, 4096, 4096).fused
    slower = choose_from([row(fused_us=100.0)], PIECE, 4096, 4096)
    assert not slower.fused  # as fast is not faster
    assert (
        slower.reason
        == "100 us fused, 100 us by the library, at 4096 x 4096 tokens, sm_90 bfloat16 D=128 against CUDNN"
    )


@pytest.mark.parametrize(
    ("q_tokens", "kv_tokens", "fused"),
    [(4096, 4096, True), (2048, 8192, True), (8193, 4096, None), (4096, 2047, None), (1024, 1100, False), (1, 1, None)],
)
def test_a_row_serves_pieces_within_a_factor_of_two(q_tokens, kv_tokens, fused):
    rows = [row(), row(1024, 1024, fused_us=200.0)]
    choice = choose_from(rows, PIECE, q_tokens, kv_tokens)
    assert choice.fused == bool(fused)
    assert choice.reason.endswith("near a piece of this size") == (fused is None)


def test_the_nearest_row_decides():
    rows = [row(2048, 2048, fused_us=200.0), row(4096, 4096)]
    assert [choose_from(rows, PIECE, n, n).fused for n in (2200, 2800, 3000, 3800)] == [False, False, True, True]


def test_a_table_is_added_to(tmp_path):
    path = tmp_path / "measured.json"
    other = row(piece=("sm_80", "SDPA_FLASH", "float16", 64))
    write_table(path, [row(fused_us=1.0), other], {"gpu": "one"})
    write_table(path, [row(fused_us=2.0), row(1024, 1024)], {"gpu": "two"})
    assert read_table(path) == [other, row(1024, 1024), row(fused_us=2.0)]
    assert json.loads(path.read_text())["measured"] == {"sm_80": {"gpu": "one"}, "sm_90": {"gpu": "two"}}


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{}]}', '{"rows": [{"architecture": 1}]}'])
def test_another_file_is_named(text, tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"measured\.json is no table of measured pieces"):
        read_table(path)


@pytest.mark.parametrize("changed", [{"fused_us": 0.0}, {"library_us": float("nan")}, {"kv_tokens": 0}])
def test_what_cannot_have_been_measured_is_no_row(changed):
    with pytest.raises(ValueError, match="is no measured row"):
        row(**changed)


def test_on_a_cpu_there_is_nothing_to_choose():
    choice = choose(torch.device("cpu"), "SDPA_FLASH", torch.bfloat16, 128, 4096, 4096)
    assert (choice.fused, choice.reason) == (False, "on a cpu there is the plain path alone")


def test_an_attention_function_without_a_name_computes_itself(monkeypatch):
    choice = choose(torch.device("cuda"), None, torch.bfloat16, 128, 4096, 4096)
    assert (choice.fused, choice.reason) == (False, "what computes attention has no name to look up")


def test_what_the_fused_kernel_cannot_serve():
    assert why_not_fused(torch.bfloat16, 128) is None
    assert "the call is float64" in why_not_fused(torch.float64, 128)
    assert "the call's is 80" in why_not_fused(torch.bfloat16, 80)
