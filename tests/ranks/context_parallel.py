"""Rank side of test_context_parallel.py: plain diffusers models, whole in this process and then over 2 x 2 ranks.

torchrun --nproc-per-node 4 context_parallel.py FOLDER CASE...     # FOLDER holds the tiny models flux and wan
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from cases import run_cases
from diffusers import (
    DiffusionPipeline,
    Flux2Transformer2DModel,
    LTXVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.attention_dispatch import attention_backend
from run_pipeline import PROMPT, SEED, STEPS, small_input  # the directory of a script is on its path

import sf_xfuser
from sf_xfuser.context_parallel import as_attend_function
from sf_xfuser.kernels import sdpa_attend

FOLDER = Path(sys.argv[1])
HEADS, HEAD_SIZE = 4, 32
RING, ULYSSES = "torus=2,ulysses=1,ring=2", "torus=2,ulysses=2"


def args(plan: str = RING, **options: object) -> sf_xfuser.TorusArgs:
    return sf_xfuser.TorusArgs(**{"backend": "torus", "topology": "2x2", "plan": plan, "timeout": 30} | options)


def compare(model: torch.nn.Module, call: Callable[[], torch.Tensor], plan: str = "auto", **options: object) -> str:
    """Whether ``call()`` gives the same with the model whole and parallelized, and who computed the attention."""
    wanted = call()
    torus = sf_xfuser.parallelize(model, args=args(plan), **options)
    found = call()
    torus.mesh.close()
    assert found.shape == wanted.shape and wanted.abs().max() > 0.01
    error = (found - wanted).abs().max().item()
    counted = f"{torus.served} served, {sum(torus.handed_back.values())} handed back {'; '.join(torus.handed_back)}"
    return f"{'equal' if error < 1e-4 else error}; {counted.strip()}"


# -- pipelines -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def denoise(pipe: DiffusionPipeline, text_length: int, **size: int) -> torch.Tensor:
    return pipe(
        prompt=PROMPT,
        max_sequence_length=text_length,
        num_inference_steps=STEPS,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="latent",
        return_dict=False,
        **size,
    )[0]


def pipeline(family: str, text_length: int, plan: str, **size: int) -> str:
    pipe = DiffusionPipeline.from_pretrained(FOLDER / family, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    size = {**small_input(FOLDER / family), **size}
    return compare(pipe.transformer, partial(denoise, pipe, text_length, **size), plan)


def case_flux(rank: int) -> str:
    return pipeline("flux", 16, "auto")


def case_flux_ring(rank: int) -> str:
    return pipeline("flux", 16, RING)


def case_flux_uneven(rank: int) -> str:
    """13 text tokens and 7 x 7 of the image."""
    return pipeline("flux", 13, RING, height=112, width=112)


def case_wan(rank: int) -> str:
    return pipeline("wan", 13, RING)


# -- transformers ----------------------------------------------------------------------------------------------------


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def flux2() -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=HEAD_SIZE, num_attention_heads=HEADS,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(8, 8, 8, 8),
    ).eval()  # fmt: skip
    ids = [torch.arange(4 * n).reshape(1, n, 4) for n in (20, 12)]
    return model, partial(
        lambda *given, **named: torch.no_grad()(model)(*given, **named)[0],
        random(1, 20, 16), random(1, 12, 24), timestep=torch.tensor([0.5]), img_ids=ids[0], txt_ids=ids[1],
        guidance=torch.tensor([1.0]), return_dict=False,
    )  # fmt: skip


def qwen(mask: bool) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=HEAD_SIZE, num_attention_heads=HEADS,
        joint_attention_dim=24, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    ones = torch.ones(2, 12, dtype=torch.bool)
    ones[1, 7:] = False
    return model, partial(
        lambda *given, **named: torch.no_grad()(model)(*given, **named)[0],
        random(2, 16, 16), random(2, 12, 24), timestep=torch.tensor([0.5, 0.5]), img_shapes=[(1, 4, 4)] * 2,
        encoder_hidden_states_mask=ones if mask else None, return_dict=False,
    )  # fmt: skip


def case_flux2(rank: int) -> str:
    return compare(*flux2(), RING)


def case_flux2_with_a_plan(rank: int) -> str:
    """A plan of the caller's, here the model's own."""
    return compare(*flux2(), cp_plan=dict(Flux2Transformer2DModel._cp_plan))


def case_flux2_compiled(rank: int) -> str:
    model, call = flux2()
    wanted = call()
    torus = sf_xfuser.parallelize(model, args=args())
    model.compile(backend="aot_eager")
    error = (call() - wanted).abs().max().item()
    return f"{'equal' if error < 1e-4 else error}; {torus.served} served"


def case_two_models_on_one_mesh(rank: int) -> str:
    first, second = flux2(), qwen(mask=False)
    wanted = first[1](), second[1]()
    torus = [sf_xfuser.parallelize(first[0], args=args())]
    torus.append(sf_xfuser.parallelize(second[0], torus[0].mesh))
    errors = [(call() - one).abs().max().item() for (_, call), one in zip((first, second), wanted, strict=True)]
    return f"{'equal' if max(errors) < 1e-4 else errors}; {[one.served for one in torus]} served"


def case_two_groups(rank: int) -> str:
    """Data parallel 2: ranks 0, 1 and ranks 2, 3 have pictures of their own, on a mesh of the caller's."""
    model, call = flux2()
    call = partial(call.func, call.args[0].flip(1) if rank >= 2 else call.args[0], *call.args[1:], **call.keywords)
    mesh = sf_xfuser.build_mesh([[0, 1], [2, 3]], args("torus=1,ulysses=1,ring=2"))
    return compare(model, call, mesh=mesh)


def case_qwen_masked(rank: int) -> str:
    return compare(*qwen(mask=True), ULYSSES)


def case_qwen_masked_ring(rank: int) -> str:
    return compare(*qwen(mask=True), RING)


def case_qwen_masked_uneven(rank: int) -> str:
    model, call = qwen(mask=True)
    call = partial(call.func, *(x[:, :-1] for x in call.args[:1]), *call.args[1:], **call.keywords)
    call.keywords["img_shapes"] = [(1, 3, 5)] * 2
    return compare(model, call, ULYSSES)


def case_qwen_strict(rank: int) -> str:
    model, call = qwen(mask=True)
    sf_xfuser.parallelize(model, args=args(ULYSSES, strict=True))
    call()
    return "nothing was raised"


def case_ltx_mask_per_head(rank: int) -> str:
    """LTX repeats its text mask for each head."""
    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=HEADS, attention_head_dim=16, cross_attention_dim=64,
        num_layers=1, caption_channels=24,
    )  # fmt: skip
    given = (random(1, 32, 8), random(1, 16, 24), torch.tensor([500]), torch.ones(1, 16), 2, 4, 4)
    return compare(model, lambda: torch.no_grad()(model)(*given, return_dict=False)[0], ULYSSES)


def case_with_gradients(rank: int) -> None:
    model, call = flux2()
    sf_xfuser.parallelize(model, args=args())
    model(*call.args, **call.keywords)


def case_other_models_are_untouched(rank: int) -> str:
    """After all of that, a model that is not parallelized computes what it did."""
    call = flux2()[1]
    wanted = call()
    sf_xfuser.parallelize(flux2()[0], args=args())
    return "equal" if torch.equal(call(), wanted) else "DIFFERENT"


# -- bad input -------------------------------------------------------------------------------------------------------


def case_twice(rank: int) -> None:
    model = flux2()[0]
    sf_xfuser.parallelize(model, args=args())
    sf_xfuser.parallelize(model, args=args())


def case_no_plan(rank: int) -> None:
    sf_xfuser.parallelize(SD3Transformer2DModel(num_layers=1, num_attention_heads=HEADS), args=args())


def case_no_processor(rank: int) -> None:
    sf_xfuser.parallelize(SD3Transformer2DModel(num_layers=1, num_attention_heads=HEADS), args=args(), cp_plan={})


def case_unknown_module(rank: int) -> None:
    sf_xfuser.parallelize(flux2()[0], args=args(), cp_plan={"blocks.*": {}})


def case_backend_without_context_parallelism(rank: int) -> None:
    with attention_backend("_native_math"):
        sf_xfuser.parallelize(flux2()[0], args=args())


def case_backend_changed_afterwards(rank: int) -> None:
    model, call = flux2()
    sf_xfuser.parallelize(model, args=args())
    with attention_backend("_native_math"):
        call()


def case_heads_that_no_plan_splits(rank: int) -> None:
    sf_xfuser.parallelize(flux2()[0], args=args("torus=2,ulysses=2,ring=2"))


def case_another_backend(rank: int) -> None:
    sf_xfuser.parallelize(flux2()[0], args=sf_xfuser.TorusArgs(backend="usp"))


# -- backends other than the native one ------------------------------------------------------------------------------


def case_operators_of_other_backends(rank: int) -> str:
    """Operators that return a log-sum-exp, as diffusers' flash ones do: [B, S, H], or [B, S, H, 1] with cuDNN."""

    def flash(ctx, q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, return_lse, _save_ctx=True):
        assert (mask, dropout_p, is_causal, enable_gqa, return_lse, _save_ctx) == (None, 0.0, False, False, True, False)
        out, lse = sdpa_attend(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
        return out.transpose(1, 2), lse.transpose(1, 2)

    def cudnn(*given, **named):
        out, lse = flash(*given, **named)
        return out, lse[..., None]

    q, k, v = random(1, HEADS, 9, 16), random(1, HEADS, 10, 16), random(1, HEADS, 10, 16).flip(2)
    wanted = sdpa_attend(q, k, v, scale=0.3)
    for forward_op in (flash, cudnn):
        torch.testing.assert_close(as_attend_function(forward_op, 0.3)(q, k, v), wanted, rtol=0, atol=0)
    return "equal"


def main() -> None:
    dist.init_process_group("gloo")
    run_cases(globals(), sys.argv[2:], (ValueError, RuntimeError))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
