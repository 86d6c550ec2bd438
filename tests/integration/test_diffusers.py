"""Diffusers models parallelized over 2 x 2 ranks by ``sf_xfuser.parallelize``, against the same model on one rank."""

from __future__ import annotations

import re

import pytest
import torch

from sf_xfuser.bench.tiny_models import save_tiny_model
from sf_xfuser.integrations.diffusers.inputs import require_same, summarize
from tests.launch import check, reports, torchrun

CANNOT = "ValueError: torus cannot run this attention call exactly: "
LOCAL = r"RuntimeError: {} attended to the tokens of this rank only: its processor {} does not pass .*"

# case -> regex of what every rank prints
CASES = {
    "flux": "equal; 8 on torus, 0 fell back",
    "flux_ring": "equal; 8 on torus, 0 fell back",
    "flux_uneven": "equal; 8 on torus, 0 fell back",
    "wan": "equal; 8 on torus, 0 fell back",
    "flux2": "equal; 3 on torus, 0 fell back",
    "flux2_with_a_plan": "equal; 3 on torus, 0 fell back",
    "flux2_compiled": "equal; 3 on torus",
    "two_models_on_one_mesh": r"equal; \[3, 2\] on torus",
    "two_groups": "equal; 3 on torus, 0 fell back",
    "device_mesh": "equal; 3 on torus, 0 fell back",
    "device_mesh_of_a_group": "equal; 3 on torus, 0 fell back",
    # masks
    "qwen_masked": "equal; 2 on torus, 0 fell back",
    "qwen_masked_ring": "equal; 2 on torus, 0 fell back",
    "qwen_masked_uneven": "equal; 2 on torus, 0 fell back",
    "qwen_strict": "equal; 2 on torus, 0 fell back",
    "flux_masked": "equal; 2 on torus, 0 fell back",
    "flux_masked_alike": "equal; 2 on torus, 0 fell back",
    "flux2_masked": "equal; 3 on torus, 0 fell back",
    "ltx_masked": "equal; 2 on torus, 0 fell back",
    "mask_of_queries": r"ValueError: attention_mask of shape \(62, 62\) cannot be split: .*13 \+ 49 keys .*",
    "mask_of_weights": CANNOT + "the mask has values between -1000 and 0, .*",
    "mask_of_all_keys": CANNOT + "the mask leaves a sample without keys; .*",
    "causal": CANNOT + "causal attention needs keys in order, .*",
    # processors that attend on one rank only
    "processor_set_afterwards": "equal; 4 on torus, 0 fell back",
    "block_set_afterwards": "equal; 4 on torus, 0 fell back",
    "local_processor": LOCAL.format(r"single_transformer_blocks\.0\.attn", "LocalProcessor"),
    "function_as_processor": r"ValueError: single_transformer_blocks\.0\.attn has a function as .*",
    "ip_adapter": "equal; 3 on torus, 0 fell back",
    "trace_names": r"(transformer_blocks\.0\.attn, single_transformer_blocks\.0\.attn, ){2}proj_out",
    "wan_with_split_text": LOCAL.format(r"blocks\.0\.attn2", "WanAttnProcessor"),
    "forward_by_itself": r"RuntimeError: attention of a parallelized model ran outside the model's forward, .*",
    # caches
    "cache_before_parallelize": LOCAL.format(r"single_transformer_blocks\.0\.attn", "LocalProcessor"),
    # fewer tokens than ranks
    "qwen_one_text_token": "equal; 2 on torus, 0 fell back",
    "qwen_three_text_tokens": "equal; 2 on torus, 0 fell back",
    "qwen_three_text_tokens_masked": "equal; 2 on torus, 0 fell back",
    "ltx_three_text_tokens": "equal; 2 on torus, 0 fell back",
    "flux_three_text_tokens": r"ValueError: encoder_hidden_states of shape \(2, 3, 24\) has fewer tokens than the 4 .*",
    # replaced modules
    "adapter_added": "equal; 4 on torus, 0 fell back",
    "adapter_fused": "equal; 4 on torus, 0 fell back",
    "adapter_removed": "equal; 4 on torus, 0 fell back",
    "adapter_added_before_and_removed": "equal; 4 on torus, 0 fell back",
    "compiled_before": "equal; 2 on torus, 0 fell back",
    "compiled_blocks": "equal; 12 on torus, 0 fell back",
    "compiled_blocks_wrapped": "equal; 2 on torus, 0 fell back",
    "compiled_full_graph": "Unsupported: .*compile without fullgraph=True.*",
    # inputs
    "controlnet_samples": "equal; 2 on torus, 0 fell back",
    "controlnet_itself": "equal; 2 on torus, 0 fell back",
    "ltx2": "ValueError: LTX2VideoTransformer3DModel._cp_plan does not work: .*cross_attn_rope.*",
    "ltx2_with_a_plan": "equal; 6 on torus, 0 fell back",
    "ltx2_split_rope": "equal; 6 on torus, 0 fell back",
    "ltx2_split_rope_with_another_plan": r"ValueError: output 0 of rope of shape \(1, 4, 32, 8\) cannot be split .*",
    "flux_ids_with_a_batch": r"ValueError: img_ids of shape \(1, 49, 3\) .* the plan expects 2 dimensions, .*",
    "flux2_ids_without_a_batch": r"ValueError: img_ids of shape \(20, 4\) .* the plan expects 3 dimensions, .*",
    "flux2_with_a_kv_cache": "ValueError: .* cannot take kv_cache_mode across ranks: .*",
    "different_seeds": r"ranks were called with different inputs: hidden_states .*\[1, 2, 3\].*; equal; 2 on .*; again",
    "a_hook_raises_on_one_rank": "(named|'expected'); equal; .*",
    "different_shapes": r"RuntimeError: ranks were called with different inputs: encoder_hidden_states .*\[2\] from .*",
    "with_gradients": r"ValueError: a parallelized model computes no gradients: call it under torch\.no_grad\(\)",
    "other_models_are_unchanged": "equal",
    "operators_with_log_sum_exp": "equal",
    "twice": "ValueError: Flux2Transformer2DModel is parallelized already; .*",
    "no_plan": "ValueError: Flux2Transformer2DModel has no _cp_plan, .*: give cp_plan=.*",
    "no_processor": "ValueError: SD3Transformer2DModel has no attention processor that takes .*",
    "unknown_argument": r"ValueError: Flux2Transformer2DModel has no input \['tokens'\], which its plan splits; .*",
    "unknown_module": r"ValueError: Flux2Transformer2DModel has no module 'blocks\.\*', which its plan names",
    "backend_without_context_parallelism": "ValueError: attention backend '_native_math' does not support .*'native'.*",
    "backend_changed_afterwards": "ValueError: attention backend '_native_math' does not support .*'native'.*",
    "heads_that_no_plan_splits": "ValueError: .*torus=2.*",
    "fused": "ValueError: the fused kernel does not support this call: its head sizes are .*, got 32; .*",
    "another_backend": r"ValueError: parallelize\(\) runs Torus Attention: .*'usp'.*",
}


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("models")
    for family in ("flux", "wan"):
        save_tiny_model(family, folder / family)
    return reports(torchrun("parallelize.py", folder, *CASES, nproc=4, timeout=300).output, CASES)


@pytest.mark.parametrize("case", CASES)
def test_over_four_ranks(case, printed):
    check(case, printed, [rf"({CASES[case]})\Z"] * 4)


# -- inputs ----------------------------------------------------------------------------------------------------------


def inputs(seed: int = 0, **changed: object) -> dict[str, object]:
    noise = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(seed))
    given = {"hidden_states": noise, "text": noise.bfloat16(), "timestep": torch.tensor([500.0, 500.0]), "scale": 1.0,
             "ids": torch.arange(192).reshape(64, 3), "options": {"masks": [None, torch.ones(4) == 1]}}  # fmt: skip
    return given | changed


def compare_inputs(*by_rank: dict[str, object]) -> None:
    require_same(
        {
            3 - rank: {name: (text, values.tolist()) for name, (text, values) in summarize(given).items()}
            for rank, given in enumerate(by_rank)
        }
    )


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"text": inputs()["text"] + 0.01},  # another GPU model, in low precision
        {"timestep": torch.tensor([500.0, 500.0001])},
    ],
)
def test_equal_inputs(changed):
    compare_inputs(inputs(), inputs(**changed))


def test_inputs_with_nan_on_all_ranks():
    compare_inputs(*[inputs(hidden_states=torch.full((1, 64, 16), float("nan")), empty=torch.empty(0, 3))] * 2)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("hidden_states", {"hidden_states": inputs(1)["hidden_states"]}),
        ("hidden_states", {"hidden_states": inputs()["hidden_states"].flip(1)}),
        ("hidden_states", {"hidden_states": inputs()["hidden_states"].double()}),
        ("hidden_states", {"hidden_states": None}),
        ("timestep", {"timestep": torch.tensor([500.0, 501.0])}),
        ("scale", {"scale": 1.01}),
        ("ids", {"ids": torch.arange(1, 193).reshape(64, 3)}),
        ("options.masks[1]", {"options": {"masks": [None, torch.arange(4) > 0]}}),
        ("options.masks[1]", {"options": {"masks": [None]}}),
        ("more", {"more": "text"}),
    ],
)
def test_different_inputs(name, changed):
    with pytest.raises(RuntimeError, match=re.escape(f"different inputs: {name} differs on rank(s) [2] from rank 3 (")):
        compare_inputs(inputs(), inputs(**changed), inputs())
