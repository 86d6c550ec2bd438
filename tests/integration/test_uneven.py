"""Heads, text and video tokens that the ranks do not divide, through real pipelines on 4, 5 and 6 machines of one rank.

xDiT gets degrees that divide the heads (24 heads on 5 machines: ``ring_degree`` 5). Torus Attention still splits them
over 5 ranks, because that moves fewer bytes between machines. xDiT can split all heights.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch

from sf_xfuser.bench.tiny_models import save_tiny_model
from tests.launch import records, torchrun
from tests.ranks.run_pipeline import reference_latents

EXACT = 1e-4
TEXT = 13


@dataclass(frozen=True)
class Case:
    """``size``: xDiT itself can split it over the ranks."""

    family: str
    heads: int
    machines: int
    size: tuple[int, int]  # height, width
    layout: str
    flags: tuple[str, ...] = field(default=())
    equals: str = "single"


FIVE, SIX, FOUR = "torus=5 ulysses=1 ring=1", "torus=6 ulysses=1 ring=1", "torus=4 ulysses=1 ring=1"
CASES = {
    "flux-24-over-5": Case("flux", 24, 5, (160, 64), FIVE),
    "sd3-24-over-5": Case("sd3", 24, 5, (160, 64), FIVE),
    "hunyuanvideo-24-over-5": Case("hunyuanvideo", 24, 5, (80, 64), FIVE),
    "wan-24-over-5": Case("wan", 24, 5, (80, 64), FIVE),
    "flux-24-over-6": Case("flux", 24, 6, (192, 64), SIX),
    "wan-24-over-6": Case("wan", 24, 6, (96, 64), SIX),
    "flux-30-over-4": Case("flux", 30, 4, (128, 64), FOUR),
    "cogvideox-30-over-4": Case("cogvideox", 30, 4, (128, 64), FOUR),
    # 3 x 4 x 4 = 48 video tokens over 5: xDiT pads, and attends to its padding.
    "wan-odd-24-over-5": Case("wan", 24, 5, (64, 64), FIVE, equals="xdit"),
    "wan-odd-xdit": Case("wan", 24, 5, (64, 64), "", ("--ring_degree", "5")),
}


@cache
def folder_of(root, family, heads, size):
    folder = save_tiny_model(family, root / f"{family}-{heads}-{size[0]}x{size[1]}", heads=heads)
    path = folder / "small_input.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"height": size[0], "width": size[1]}))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """machines -> case -> (latents, explained), run once on first use."""
    root = tmp_path_factory.mktemp("uneven")

    @cache
    def run(machines):
        argv = {}
        for name, case in CASES.items():
            if case.machines == machines:
                torus = ["--sp-backend", "torus", "--sp-topology", f"{machines}x1"] if case.layout else []
                model = folder_of(root, case.family, case.heads, case.size)
                argv[name] = ["--family", case.family, "--model", str(model), "--out", str(root / f"{name}.pt"),
                              "--text-length", str(TEXT), *torus, *case.flags]  # fmt: skip
        (root / f"{machines}.json").write_text(json.dumps(argv))
        output = torchrun("run_pipelines.py", root / f"{machines}.json", nproc=machines, timeout=230).output
        found = {}
        for name, rank, (outcome, explained) in records(output):
            assert outcome == "ok", f"{name} on rank {rank}: {outcome}\n{output[-3000:]}"
            first, *others = torch.load(root / f"{name}.pt")["latents"].values()
            assert all(torch.equal(first, other) for other in others)
            found[name] = first, explained
        return found

    return run, lambda case: reference_latents(folder_of(root, case.family, case.heads, case.size), TEXT)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if case.machines == 6 else [])
        for name, case in CASES.items()
        if case.layout
    ],
)
def test_latents(finished, name):
    run, single = finished
    case = CASES[name]
    latents, explained = run(case.machines)[name]
    expected = run(case.machines)["wan-odd-xdit"][0] if case.equals == "xdit" else single(case)
    error = (latents - expected).abs().max().item()
    assert error <= EXACT, f"{error:.2e}\n{explained}"
    assert f"{case.machines} machine(s) x 1 rank(s): {case.layout}" in explained, explained
    assert ("heads split unevenly" in explained) == (case.heads % case.machines > 0)
    handled = re.search(r"handled by torus: (\d+)", explained)
    assert handled is not None and int(handled[1]) > 0
    assert "fell back" not in explained, explained
