"""Invalid xDiT launch lines: one clear error, the same on every rank, and no hang."""

from __future__ import annotations

import json
import shutil

import pytest

from sf_xfuser.bench.tiny_models import save_tiny_model
from tests.launch import check, reports, torchrun

TORUS = ["--sp-backend", "torus", "--sp-topology", "2x2"]
REFUSED = {
    "backend without lse in a ring": (
        [*TORUS, "--sp-plan", "torus=2,ulysses=1,ring=2", "--attention_backend", "NVTE_FP8"],
        "ValueError: --sp-backend torus with --attention_backend NVTE_FP8: it returns no log-sum-exp, which xDiT's own "
        r"USP needs as well, .* \(ring_degree 2\); use one of AITER, CUDNN.*, or a --sp-plan with ring=1",
    ),
    "strict backend without lse": (
        [*TORUS, "--sp-strict", "--attention_backend", "SDPA"],
        "ValueError: --sp-backend torus with --attention_backend SDPA: .* --sp-strict does not allow; use one of AITER",
    ),
    "heads": (
        [*TORUS, "--sp-plan", "torus=2,ulysses=2,ring=1"],
        "ValueError: --sp-backend torus: 6 heads cannot be split over torus=2 x ulysses=2 = 4 ranks; legal for 4",
    ),
    "product": ([*TORUS, "--ulysses_degree", "3"], "ValueError: ulysses_degree=3 x ring_degree=1 = 3, but 4 processes"),
    "topology": (["--sp-backend", "torus", "--sp-topology", "3x2"], "ValueError: --sp-topology 3x2 describes 6 ranks"),
    "layout": ([*TORUS, "--sp-plan", "torus=1,ulysses=4,ring=1"], "ValueError: .*ulysses must divide 2; legal: torus="),
    "flags differ": (
        [*TORUS, "1:--sp-strict"],
        "ValueError: ranks were started with different flags: --sp-strict by rank",
    ),
    "degrees differ": (
        [*TORUS, "--ulysses_degree", "0:4", "1:2", "2:4", "3:4", "--ring_degree", "0:1", "1:2", "2:1", "3:1"],
        r"ValueError: ranks were started with different flags: ulysses_degree by rank: \{0: 4, 1: 2, 2: 4",
    ),
    "plan and degrees": (
        [*TORUS, "--sp-plan", "ring=4", "--ulysses_degree", "4"],
        "ValueError: --sp-plan ring=4 means ulysses_degree=1 and ring_degree=4, but ulysses_degree=4 and ring_degree=1",
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Flux with 8 heads, and a copy with 6 heads in its configuration (no weights are loaded)."""
    good = save_tiny_model("flux", tmp_path_factory.mktemp("refusals") / "flux")
    odd = good.with_name("six-heads")
    shutil.copytree(good, odd)
    config = odd / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 6}))
    return good, odd


@pytest.fixture(scope="module")
def refusals(folders, tmp_path_factory):
    good, odd = folders
    folder = tmp_path_factory.mktemp("out")
    argv = {
        name: [
            "--family",
            "flux",
            "--model",
            str(odd if name == "heads" else good),
            "--out",
            str(folder / "x.pt"),
            *flags,
        ]
        for name, (flags, _) in REFUSED.items()
    }
    (folder / "cases.json").write_text(json.dumps(argv))
    output = torchrun("run_pipelines.py", folder / "cases.json", nproc=4, timeout=200).output
    found = reports(output, REFUSED)
    return {name: {rank: outcome for rank, (outcome, _) in ranks.items()} for name, ranks in found.items()}


@pytest.mark.parametrize("case", REFUSED)
def test_same_error_on_every_rank(case, refusals):
    assert set(refusals[case]) == {"0", "1", "2", "3"}
    assert len(set(refusals[case].values())) == 1, refusals[case]
    check(case, refusals, [REFUSED[case][1]])


def test_the_job_ends_soon_with_an_error_status(folders, tmp_path):
    flags = [
        "--family",
        "flux",
        "--model",
        folders[0],
        "--out",
        tmp_path / "x.pt",
        *TORUS,
        "--sp-strict",
        "--attention_backend",
        "SDPA",
    ]
    finished = torchrun("run_pipeline.py", *flags, nproc=4, timeout=100, expect_failure=True)
    assert "returns no log-sum-exp" in finished.output
