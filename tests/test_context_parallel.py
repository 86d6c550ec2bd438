"""Plain diffusers models over 2 x 2 ranks by ``sf_xfuser.parallelize``, against the same model in one process."""

from __future__ import annotations

import re

import pytest

from sf_xfuser.tiny_models import save_tiny_model
from tests.launch import reports, torchrun

CANNOT = r"ValueError: torus cannot serve .*: an attention mask needs keys in order; diffusers' own .* can only "

# case -> what every rank says
CASES = {
    "flux": "equal; 8 served, 0 handed back",
    "flux_ring": "equal; 8 served, 0 handed back",
    "flux_uneven": "equal; 8 served, 0 handed back",
    "wan": "equal; 8 served, 0 handed back",
    "flux2": "equal; 3 served, 0 handed back",
    "flux2_with_a_plan": "equal; 3 served, 0 handed back",
    "flux2_compiled": "equal; 3 served",
    "two_models_on_one_mesh": r"equal; \[3, 2\] served",
    "two_groups": "equal; 3 served, 0 handed back",
    "qwen_masked": "equal; 0 served, 2 handed back an attention mask needs keys in order",
    "qwen_masked_ring": CANNOT + r"without a ring, and this mesh has ring_degree=2: give args=.*",
    "qwen_masked_uneven": CANNOT + r"where sequences divide by the 4 ranks: .*",
    "ltx_mask_per_head": CANNOT + r"with a mask that all heads share, and this one has 4: .*",
    "qwen_strict": "RuntimeError: --sp-strict: torus cannot serve .*: an attention mask .*",
    "with_gradients": r"ValueError: a parallelized model computes no gradients: call it under torch\.no_grad\(\)",
    "other_models_are_untouched": "equal",
    "operators_of_other_backends": "equal",
    "twice": "ValueError: Flux2Transformer2DModel is parallelized already; .*",
    "no_plan": "ValueError: SD3Transformer2DModel has no _cp_plan, .*: give cp_plan=.*",
    "no_processor": "ValueError: SD3Transformer2DModel has no attention processor that takes .*",
    "unknown_module": r"ValueError: Flux2Transformer2DModel has no module 'blocks\.\*', which its plan names",
    "backend_without_context_parallelism": "ValueError: attention backend '_native_math' knows no context .*'native'.*",
    "backend_changed_afterwards": "RuntimeError: no attention of this forward was computed across ranks: .*",
    "heads_that_no_plan_splits": "ValueError: .*torus=2.*",
    "another_backend": r"ValueError: parallelize\(\) runs Torus Attention: .*'usp'.*",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("models")
    for family in ("flux", "wan"):
        save_tiny_model(family, folder / family)
    return reports(torchrun("context_parallel.py", folder, *CASES, nproc=4).output, CASES)


@pytest.mark.parametrize("case", CASES)
def test_over_four_ranks(case, said):
    assert set(said[case]) == {"0", "1", "2", "3"}
    for text in said[case].values():
        assert re.fullmatch(CASES[case], text, re.DOTALL), said[case]
