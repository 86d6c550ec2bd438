"""The host's side of calls, on one rank without the others: ``python -m sf_xfuser.bench.host``, and how programs are
kept from call to call."""

from __future__ import annotations

import gc
import json
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

from sf_xfuser.bench import host
from sf_xfuser.bench.loopback import Loopback, OneRank
from sf_xfuser.layout.plan import Layout
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.call import Tokens
from tests.launch import run

CPU = torch.device("cpu")
LAUNCHES = {"T4U2R4": 63, "T4U8R1": 50, "T4U1R1": 43, "T8U1R8": 104, "unstaged": 24, "nccl_put": 63}


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    command = [sys.executable, "-m", "sf_xfuser.bench.host", "--calls", "2", "--json", "-"]
    document = json.loads(run(command).output)
    assert document["command"] == "python -m sf_xfuser.bench.host --calls 2 --json -"
    return {row["layout"]: row for row in document["rows"]}


def test_every_layout_has_a_row(rows):
    assert list(rows) == list(host.LAYOUTS)
    assert {name: row["launches"] for name, row in rows.items()} == LAUNCHES
    assert LAUNCHES["T4U2R4"] <= 90 and LAUNCHES["T4U8R1"] <= 110
    for name, row in rows.items():
        assert row["host_us"] > 0 and sum(row["launches_by_kind"].values()) == row["launches"]
        # 7 rounds with 3 peers each: a group of their chunks, then a group of their flags
        assert (row["puts"], row["launches_by_kind"].get("groups", 0)) == ((42, 14) if name == "nccl_put" else (0, 0))
        assert row["granularity"] == ("unstaged" if name == "unstaged" else "slab")


@pytest.mark.parametrize("name", host.LAYOUTS)
def test_launches_are_those_of_the_program(name, rows):
    layout, granularity = host.parse_layout(name)
    ranks = layout.world_size
    with host.no_gpu() as launches:
        x = torch.zeros(1, 3 * layout.ulysses_degree, ranks * 16, 64, dtype=torch.bfloat16)
        rank = OneRank(layout, x, x, x, host.open_link(name, layout, launches), granularity)
        attend(rank, rank.own, attention=lambda q, k, v: (q, q.new_zeros(q.shape[:3])), granularity=granularity)
        (bound,) = programs(rank)
        assert bound.program.launches == rows[name]["launches"]
        rank.mesh.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layout", "T4"], "a layout is TxUyRz, for instance T4U2R4, unstaged or nccl_put; got 'T4'"),
        (["--layout", "T0U1R1"], "a layout is TxUyRz, for instance T4U2R4, unstaged or nccl_put; got 'T0U1R1'"),
        (
            ["--json", "/no/such/folder/rows.json"],
            "--json /no/such/folder/rows.json: there is no folder /no/such/folder",
        ),
        (["--json", "/"], "--json / is a folder; use the path of a file"),
        (["--calls", "0"], "--calls must be at least 1, got 0"),
    ],
)
def test_an_invalid_request_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        host.main(arguments)
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m sf_xfuser.bench.host: error: {words}"


# -- programs from call to call ---------------------------------------------------------------------------------------


def attend(rank: OneRank, tensors, **options) -> torch.Tensor:
    counts = tuple((x.shape[2],) * rank.mesh.layout.world_size for x in tensors[:2])
    return torus_attention(*tensors, mesh=rank.mesh, tokens=Tokens(*counts), **options)


def programs(rank: OneRank) -> list:
    return [program for call in rank.mesh.calls.values() for program in call.programs.values()]


def pitched(tensors, pad: int) -> list[torch.Tensor]:
    """Copies whose rows are ``pad`` elements apart."""
    return [F.pad(x, (0, pad))[..., : x.shape[3]] for x in tensors]


@pytest.fixture(params=[(1, 1, 1), (1, 2, 1), (2, 2, 2)], ids=["T1U1R1", "T1U2R1", "T2U2R2"])
def filled(request):
    """A rank with the chunks of its peers in its window, and the result of its calls."""
    torus, ulysses, inside = request.param
    layout = Layout(torus=torus, ulysses=ulysses, ring_across=1, ring_inside=inside)
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 8 * layout.world_size, 16, generator=make) for _ in range(3))
    rank = OneRank(layout, q, k, v, Loopback(CPU))
    wanted = F.scaled_dot_product_attention(q[:, :, : rank.tokens], k, v)
    attend(rank, rank.own, granularity="block")  # reserves the window
    rank.fill(wanted)
    yield rank, wanted
    rank.mesh.close()


def forms_of(tensors) -> list[list[torch.Tensor]]:
    """New tensors with these values in many layouts."""
    return [
        [x.clone() for x in tensors],
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors],
        [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors],  # stride(3) != 1
        [torch.cat([-x, x], 1)[:, 4:] for x in tensors],  # a storage offset
        list(torch.cat(list(tensors), 3).split(16, 3)),  # slices of one tensor
        pitched(tensors, 8),
    ]


def test_inputs_may_move_and_change_strides(filled):
    """A program is bound to strides, not to addresses: every call reads the tensors that it gets."""
    rank, wanted = filled
    for _ in range(3):
        for tensors in forms_of(rank.own):
            assert torch.allclose(attend(rank, tensors, granularity="block"), wanted, atol=1e-6)
            for x in tensors:
                x.fill_(torch.nan)  # a later call must not read it
    with torch.inference_mode():
        assert torch.allclose(attend(rank, [x.clone() for x in rank.own], granularity="block"), wanted, atol=1e-6)
    assert torch.allclose(attend(rank, rank.own, granularity="block"), wanted, atol=1e-6)


def test_a_tensor_that_was_written_in_place_is_read_again(filled):
    """Also one with which the last calls were made."""
    rank, wanted = filled
    tensors = [torch.zeros_like(x) for x in rank.own]
    for _ in range(3):
        attend(rank, tensors, granularity="block")
    for x, own in zip(tensors, rank.own, strict=True):
        x.copy_(own)
    assert torch.allclose(attend(rank, tensors, granularity="block"), wanted, atol=1e-6)


def test_a_kept_result_is_not_overwritten(filled):
    rank, wanted = filled
    tensors = [x.contiguous() for x in rank.own]
    kept = [attend(rank, tensors, granularity="block") for _ in range(2)]
    for scale in (2.0, 3.0, 4.0):
        attend(rank, [scale * x for x in tensors], granularity="block")
    assert all(torch.allclose(result, wanted, atol=1e-6) for result in kept)


def test_dtypes_alternate():
    """The same mesh, with scratch memory of any dtype."""
    make = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 24, 16, generator=make)
    rank = OneRank(Layout(torus=1, ulysses=1, ring_across=1, ring_inside=1), x, x, x, Loopback(CPU))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.bfloat16):
        tensors = [x.to(dtype)] * 3
        result = attend(rank, tensors)
        wanted = F.scaled_dot_product_attention(*(t.double() for t in tensors))
        assert result.dtype == dtype
        assert torch.allclose(result.double(), wanted, atol=4 * torch.finfo(dtype).eps + 1e-12)
    assert len(rank.mesh.calls) == 4


def test_calls_and_programs_are_bounded(filled):
    """100 shapes, then 20 strides. Older calls and programs are freed with their views, and all memory is reused."""
    rank, wanted = filled
    mesh = rank.mesh
    attend(rank, [torch.zeros(2, 4, 120, 16)] * 3)  # the largest call
    scratch, window, made = mesh.scratch.data_ptr(), rank.link.window_bytes, []
    gc.disable()
    try:
        for tokens in range(1, 101):
            attend(rank, [torch.zeros(2, 4, tokens, 16)] * 3)
            made += map(weakref.ref, next(reversed(mesh.calls.values())).programs.values())
            assert len(mesh.calls) <= 64
        assert len(mesh.calls) == 64 and len(made) == 100
        for pad in range(20):
            attend(rank, pitched(rank.own, pad), granularity="block")
            assert max(len(call.programs) for call in mesh.calls.values()) <= 8
        alive = [program for ref in made if (program := ref()) is not None]
        assert set(alive) <= set(programs(rank)) and len(programs(rank)) <= 64 + 8
    finally:
        gc.enable()
    assert mesh.scratch.data_ptr() == scratch and rank.link.window_bytes == window
    rank.fill(wanted)
    assert torch.allclose(attend(rank, rank.own, granularity="block"), wanted, atol=1e-6)
