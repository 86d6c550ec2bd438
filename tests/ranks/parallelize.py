"""Rank side of test_diffusers.py: diffusers models in one process and then parallelized over 2 x 2 ranks.

torchrun --nproc-per-node 4 parallelize.py FOLDER CASE...     # FOLDER has the tiny models flux and wan
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from cases import run_cases
from diffusers import (
    DiffusionPipeline,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    PyramidAttentionBroadcastConfig,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from peft import LoraConfig
from run_pipeline import PROMPT, SEED, STEPS, small_input  # the directory of a script is on its path
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import sf_xfuser
from sf_xfuser.integrations.diffusers.attention import TorusContextParallel, local_attention
from sf_xfuser.kernels import sdpa_attend

FOLDER = Path(sys.argv[1])
HEADS, HEAD_SIZE = 4, 32
RING, ULYSSES = "torus=2,ulysses=1,ring=2", "torus=2,ulysses=2"


def args(plan: str = RING, **options: object) -> sf_xfuser.TorusArgs:
    return sf_xfuser.TorusArgs(**{"backend": "torus", "topology": "2x2", "plan": plan, "timeout": 30} | options)


def compare(model: torch.nn.Module, call: Callable[[], torch.Tensor], plan: str = "auto", **options: object) -> str:
    """Compare ``call()`` before and after ``parallelize``, and report how many attention calls ran on torus."""
    wanted = call()
    torus = sf_xfuser.parallelize(model, **{"args": args(plan)} | options)
    return difference(call(), wanted, torus)


def difference(found: torch.Tensor, wanted: torch.Tensor, torus: TorusContextParallel) -> str:
    torus.mesh.close()
    assert found.shape == wanted.shape and wanted.abs().max() > 0.01
    error = (found - wanted).abs().max().item()
    counted = f"{torus.handled} on torus, {sum(torus.fallbacks.values())} fell back {'; '.join(torus.fallbacks)}"
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


def case_flux2_compiled(rank: int) -> str:
    model, call = flux2()
    wanted = call()
    torus = sf_xfuser.parallelize(model, args=args())
    model.compile(backend="aot_eager")
    error = (call() - wanted).abs().max().item()
    return f"{'equal' if error < 1e-4 else error}; {torus.handled} on torus"


def case_two_models_on_one_mesh(rank: int) -> str:
    first, second = flux2(), qwen(mask=False)
    wanted = first[1](), second[1]()
    torus = [sf_xfuser.parallelize(first[0], args=args())]
    torus.append(sf_xfuser.parallelize(second[0], torus[0].mesh))
    errors = [(call() - one).abs().max().item() for (_, call), one in zip((first, second), wanted, strict=True)]
    return f"{'equal' if max(errors) < 1e-4 else errors}; {[one.handled for one in torus]} on torus"


def case_two_groups(rank: int) -> str:
    """Data parallel 2: ranks 0, 1 and ranks 2, 3 have different inputs, on a mesh that the caller passes."""
    model, call = flux2()
    call = partial(call.func, call.args[0].flip(1) if rank >= 2 else call.args[0], *call.args[1:], **call.keywords)
    mesh = sf_xfuser.build_mesh([[0, 1], [2, 3]], args("torus=1,ulysses=1,ring=2"))
    return compare(model, call, mesh=mesh)


def case_qwen_masked_uneven(rank: int) -> str:
    model, call = qwen(mask=True)
    call = partial(call.func, *(x[:, :-1] for x in call.args[:1]), *call.args[1:], **call.keywords)
    call.keywords["img_shapes"] = [(1, 3, 5)] * 2
    return compare(model, call, ULYSSES)


def case_with_gradients(rank: int) -> None:
    model, call = flux2()
    sf_xfuser.parallelize(model, args=args())
    model(*call.args, **call.keywords)


def case_other_models_are_unchanged(rank: int) -> str:
    """A model that is not parallelized keeps its result."""
    call = flux2()[1]
    wanted = call()
    sf_xfuser.parallelize(flux2()[0], args=args())
    return "equal" if torch.equal(call(), wanted) else "DIFFERENT"


# -- masks -----------------------------------------------------------------------------------------------------------


def flux(
    text: int = 13, image: int = 49, layers: int = 1, batch: int = 2
) -> tuple[torch.nn.Module, Callable[..., torch.Tensor]]:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=layers, num_single_layers=layers, attention_head_dim=16, num_attention_heads=HEADS,
        joint_attention_dim=24, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    ids = [torch.arange(3 * n).reshape(n, 3) for n in (image, text)]
    return model, partial(
        lambda **named: torch.no_grad()(model)(**named)[0],
        hidden_states=random(batch, image, 16), encoder_hidden_states=random(batch, text, 24),
        pooled_projections=random(batch, 8), timestep=torch.full((batch,), 0.5), img_ids=ids[0], txt_ids=ids[1],
        return_dict=False,
    )  # fmt: skip


def masked(mask: torch.Tensor, **sizes: int) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """Flux with a mask that changes its result."""
    model, call = flux(**sizes)
    with_mask = partial(call, joint_attention_kwargs={"attention_mask": mask})
    assert mask.is_floating_point() or (call() - with_mask()).abs().max() > 1e-3
    return model, with_mask


def padded(*lengths: int, text: int = 13, keys: int = 62) -> torch.Tensor:
    """Mask [batch, keys] for text of these lengths; it also drops some keys of the image."""
    mask = torch.ones(len(lengths), keys, dtype=torch.bool)
    for n, length in enumerate(lengths):
        mask[n, length:text] = False
        mask[n, keys - 3 * n :] = False
    return mask


def ltx(text: int) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """LTX turns its text mask into an additive mask and repeats it for each head."""
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=HEADS, attention_head_dim=16, cross_attention_dim=64,
        num_layers=1, caption_channels=24,
    ).eval()  # fmt: skip
    mask = torch.ones(1, text)
    mask[:, text - text // 3 :] = 0
    given = (random(1, 32, 8), random(1, text, 24), torch.tensor([500]), mask, 2, 4, 4)
    return model, lambda: torch.no_grad()(model)(*given, return_dict=False)[0]


def case_flux_masked_alike(rank: int) -> str:
    """One mask for both samples; even sequence lengths."""
    return compare(*masked(padded(10, text=16, keys=64)[:, None, None], text=16, image=48), ULYSSES)


def case_flux2_masked(rank: int) -> str:
    model, call = flux2()
    mask = padded(5, text=12, keys=32)
    return compare(model, partial(call, joint_attention_kwargs={"attention_mask": mask}))


def case_mask_of_weights(rank: int) -> str:
    """Only the last rank has a key with such a value."""
    mask = torch.zeros(1, 1, 1, 62)
    mask[..., -1] = -1.5
    return compare(*masked(mask))


def case_mask_of_all_keys(rank: int) -> str:
    mask = padded(13, 13)
    mask[1] = False
    return compare(*masked(mask[:, None, None]))


class CausalProcessor(FluxAttnProcessor):
    """A subclass that computes causal attention."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        return dispatch_attention_fn(q, q, q, is_causal=True, parallel_config=self._parallel_config).flatten(2)


def case_causal(rank: int) -> None:
    model, call = flux()
    model.single_transformer_blocks[0].attn.set_processor(CausalProcessor())
    sf_xfuser.parallelize(model, args=args())
    call()


# -- processors that attend on one rank only --------------------------------------------------------------------------


class LocalProcessor(FluxAttnProcessor):
    """Accepts the configuration and does not use it."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        return dispatch_attention_fn(q, q, q).flatten(2)


def case_processor_set_afterwards(rank: int) -> str:
    model, call = flux()
    wanted = call()
    torus = sf_xfuser.parallelize(model, args=args())
    call()
    model.single_transformer_blocks[0].attn.set_processor(FluxAttnProcessor())
    return difference(call(), wanted, torus)


def case_block_set_afterwards(rank: int) -> str:
    model, call = qwen(mask=False)
    other = qwen(mask=False)[0]
    wanted = call()
    torus = sf_xfuser.parallelize(model, args=args())
    call()
    model.transformer_blocks[0] = other.transformer_blocks[0]
    return difference(call(), wanted, torus)


def case_local_processor(rank: int) -> None:
    model, call = flux()
    sf_xfuser.parallelize(model, args=args())
    call()
    model.single_transformer_blocks[0].attn.set_processor(LocalProcessor())
    call()


def case_function_as_processor(rank: int) -> None:
    model, call = flux()
    model.single_transformer_blocks[0].attn.set_processor(lambda attn, hidden_states, *args, **kwargs: hidden_states)
    sf_xfuser.parallelize(model, args=args())
    call()


def case_ip_adapter(rank: int) -> str:
    """Its processor attends a second time, to image tokens that every rank has."""
    model, call = flux()
    model.transformer_blocks[0].attn.set_processor(FluxIPAdapterAttnProcessor(64, 24))
    return compare(model, partial(call, joint_attention_kwargs={"ip_hidden_states": [random(2, 5, 24)]}), RING)


def case_trace_names(rank: int) -> str:
    """The mesh knows the current forward, and the module of the next call."""
    requests, names = [], []

    class Processor(FluxAttnProcessor):
        def __call__(self, *args, **kwargs):
            names.append(torus.mesh.layer)
            return super().__call__(*args, **kwargs)

    model, call = flux()
    torus = sf_xfuser.parallelize(model, args=args())
    torus.mesh.begin_request = requests.append
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.set_processor(Processor())
    call(), call()
    assert requests == requests[:1] * 2 and "FluxTransformer2DModel: hidden_states [2, 49, 16] float32" in requests[0]
    return f"{', '.join([*names, torus.mesh.layer])}"


def case_wan_with_split_text(rank: int) -> None:
    """Wan's cross-attention is local, because every rank has the whole text, unless a plan splits the text."""
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24, freq_dim=32,
        ffn_dim=64, num_layers=1,
    ).eval()  # fmt: skip
    text = {"encoder_hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)}
    plan = model._cp_plan
    sf_xfuser.parallelize(model, args=args(), cp_plan={**plan, "": {**plan[""], **text}})
    torch.no_grad()(model)(random(1, 4, 1, 8, 8), torch.tensor([500]), random(1, 16, 24))


def case_forward_by_itself(rank: int) -> None:
    model, call = flux()
    sf_xfuser.parallelize(model, args=args())
    call()
    torch.no_grad()(model.forward)(**call.keywords)


# -- caches ----------------------------------------------------------------------------------------------------------


PYRAMID = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=3, current_timestep_callback=lambda: 500)


def case_cache_before_parallelize(rank: int) -> str:
    """A cache that replaces the forward of attention, and a processor that attends on one rank only."""
    model, call = flux()
    model.enable_cache(PYRAMID)
    sf_xfuser.parallelize(model, args=args())
    model.single_transformer_blocks[0].attn.set_processor(LocalProcessor())
    call()
    return "nothing was raised"


# -- fewer tokens than ranks -----------------------------------------------------------------------------------------


def short(text: int, mask: bool = False) -> str:
    model, call = qwen(mask)
    options = (
        {"encoder_hidden_states_mask": torch.tensor([[True] * text, [True] + [False] * (text - 1)])} if mask else {}
    )
    return compare(model, partial(call.func, call.args[0], call.args[1][:, :text], **call.keywords | options), RING)


# -- replaced modules ------------------------------------------------------------------------------------------------


def add_adapter(model: torch.nn.Module) -> None:
    torch.manual_seed(5)
    targets = ["proj_out", "to_q", "x_embedder"]
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), adapter_name="a")


def adapted(whole: Callable[[torch.nn.Module], object], split: Callable[[torch.nn.Module], object]) -> str:
    """Apply ``whole`` to a model in one process and ``split`` to a parallelized one after a forward; compare both."""
    model, call = flux()
    whole(model)
    wanted = call()
    model, call = flux()
    torus = sf_xfuser.parallelize(model, args=args())
    call()
    split(model)
    return difference(call(), wanted, torus)


def case_adapter_fused(rank: int) -> str:
    def fused(model: torch.nn.Module) -> None:
        add_adapter(model)
        model.fuse_lora()

    return adapted(add_adapter, fused)


def case_adapter_removed(rank: int) -> str:
    def removed(model: torch.nn.Module) -> None:
        add_adapter(model)
        model.unload_lora()

    return adapted(lambda model: None, removed)


def case_adapter_added_before_and_removed(rank: int) -> str:
    model, call = flux()
    wanted = call()
    add_adapter(model)
    torus = sf_xfuser.parallelize(model, args=args())
    call()
    model.unload_lora()
    return difference(call(), wanted, torus)


def case_compiled_before(rank: int) -> str:
    model, call = flux()
    wanted = call()
    compiled = torch.compile(model, backend="eager")
    torus = sf_xfuser.parallelize(compiled, args=args())
    return difference(torch.no_grad()(compiled)(**call.keywords)[0], wanted, torus)


def case_compiled_blocks(rank: int) -> str:
    """Uneven text and image; the blocks are compiled once."""
    model, call = flux(layers=3)
    wanted = call()
    model.compile_repeated_blocks(backend="eager")
    torus = sf_xfuser.parallelize(model, args=args())
    call()
    return difference(call(), wanted, torus)


def case_compiled_blocks_wrapped(rank: int) -> str:
    model, call = qwen(mask=True)
    wanted = call()
    torus = sf_xfuser.parallelize(model, args=args())
    for n, block in enumerate(model.transformer_blocks):
        model.transformer_blocks[n] = torch.compile(block, backend="eager")
    return difference(call(), wanted, torus)


def case_compiled_full_graph(rank: int) -> None:
    torch._dynamo.reset()  # drop the code that other cases compiled
    model, call = flux()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    sf_xfuser.parallelize(model, args=args())
    call()


# -- inputs ----------------------------------------------------------------------------------------------------------

SAMPLE = ContextParallelInput(split_dim=1, expected_dims=3)


def case_controlnet_samples(rank: int) -> str:
    """The samples of a ControlNet."""
    model, call = flux()
    samples = [random(2, 49, model.inner_dim)]
    return compare(model, partial(call, controlnet_block_samples=samples, controlnet_single_block_samples=samples))


def case_controlnet_itself(rank: int) -> str:
    torch.manual_seed(0)
    model = FluxControlNetModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=HEADS,
        joint_attention_dim=24, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    for block in (*model.controlnet_blocks, *model.controlnet_single_blocks, model.controlnet_x_embedder):
        torch.nn.init.normal_(block.weight)
    given = flux()[1].keywords | {"controlnet_cond": random(2, 49, 16)}
    plan = {
        "": {**FluxTransformer2DModel._cp_plan[""], "controlnet_cond": SAMPLE},
        "controlnet_blocks.*": ContextParallelOutput(gather_dim=1, expected_dims=3),
        "controlnet_single_blocks.*": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    return compare(model, lambda: torch.cat([*chain(*torch.no_grad()(model)(**given))]), cp_plan=plan)


def ltx2(**options: object) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    torch.manual_seed(0)
    model = LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=HEADS, attention_head_dim=16, cross_attention_dim=64,
        audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=HEADS, audio_attention_head_dim=8,
        audio_cross_attention_dim=32, num_layers=1, caption_channels=24, **options,
    ).eval()  # fmt: skip
    given = {
        "hidden_states": random(1, 32, 8), "audio_hidden_states": random(1, 10, 8),
        "encoder_hidden_states": random(1, 16, 24), "audio_encoder_hidden_states": random(1, 16, 24),
        "timestep": torch.tensor([500.0]), "num_frames": 2, "height": 4, "width": 4, "audio_num_frames": 10,
        "return_dict": False,
    }  # fmt: skip
    return model, lambda: torch.cat([x.flatten() for x in torch.no_grad()(model)(**given)])


def case_ltx2_with_a_plan(rank: int) -> str:
    model, call = ltx2()
    plan = model._cp_plan
    return compare(model, call, cp_plan={**plan, "cross_attn_rope": plan["rope"]})


def case_ltx2_split_rope(rank: int) -> str:
    """Its rotary embeddings have a head dimension."""
    model, call = ltx2(rope_type="split")
    parts = dict.fromkeys(range(2), ContextParallelInput(split_dim=2, expected_dims=4, split_output=True))
    return compare(model, call, cp_plan={**model._cp_plan, "rope": parts, "cross_attn_rope": parts})


def case_ltx2_split_rope_with_another_plan(rank: int) -> str:
    model, call = ltx2(rope_type="split")
    plan = model._cp_plan
    return compare(model, call, cp_plan={**plan, "cross_attn_rope": plan["rope"]})


def case_flux_ids_with_a_batch(rank: int) -> str:
    model, call = flux()
    return compare(model, partial(call, img_ids=call.keywords["img_ids"][None]))


def case_flux2_ids_without_a_batch(rank: int) -> str:
    model, call = flux2()
    return compare(model, partial(call, img_ids=call.keywords["img_ids"][0]))


def case_flux2_with_a_kv_cache(rank: int) -> str:
    model, call = flux2()
    return compare(model, partial(call, kv_cache_mode="extract", num_ref_tokens=4))


def case_different_seeds(rank: int) -> str:
    """Different noise on each rank; then the same."""
    model, call = flux()
    wanted = call()
    torus = sf_xfuser.parallelize(model, args=args())
    try:
        call(hidden_states=torch.randn(2, 49, 16, generator=torch.Generator().manual_seed(rank)))
    except RuntimeError as error:
        message = str(error)
    found = call()
    try:  # shapes that were compared before
        call(hidden_states=torch.randn(2, 49, 16, generator=torch.Generator().manual_seed(rank)))
    except RuntimeError as error:
        again = "again" if "different inputs" in str(error) else str(error)
    return f"{message}; {difference(found, wanted, torus)}; {again}"


def case_a_hook_raises_on_one_rank(rank: int) -> str:
    """In the middle of a forward, which fails on all ranks. The next one works."""
    model, call = flux()
    wanted = call()
    torus = sf_xfuser.parallelize(model, args=args())
    call()

    def raise_once(*_):
        hook.remove()
        raise KeyError("expected")

    if rank == 1:
        hook = model.single_transformer_blocks[0].register_forward_pre_hook(raise_once)
    try:
        call()
    except (RuntimeError, KeyError) as error:
        return f"{'named' if 'rank 1 on' in str(error) else error}; {difference(call(), wanted, torus)}"


def case_different_shapes(rank: int) -> None:
    model, call = flux()
    sf_xfuser.parallelize(model, args=args())
    call(encoder_hidden_states=random(2, 14 if rank == 2 else 13, 24))


# -- bad input -------------------------------------------------------------------------------------------------------


def case_twice(rank: int) -> None:
    model = flux2()[0]
    sf_xfuser.parallelize(model, args=args())
    sf_xfuser.parallelize(model, args=args())


def case_no_plan(rank: int) -> None:
    model = flux2()[0]
    model._cp_plan = None
    sf_xfuser.parallelize(model, args=args())


def case_backend_without_context_parallelism(rank: int) -> None:
    with attention_backend("_native_math"):
        sf_xfuser.parallelize(flux2()[0], args=args())


def case_backend_changed_afterwards(rank: int) -> None:
    model, call = flux2()
    sf_xfuser.parallelize(model, args=args())
    with attention_backend("_native_math"):
        call()


# -- backends other than native --------------------------------------------------------------------------------------


def case_operators_with_log_sum_exp(rank: int) -> str:
    """Flash operators return a log-sum-exp [B, S, H]; cuDNN's is [B, S, H, 1]."""

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
        torch.testing.assert_close(local_attention(forward_op, 0.3)(q, k, v), wanted, rtol=0, atol=0)
    return "equal"


def sd3() -> torch.nn.Module:
    return SD3Transformer2DModel(num_layers=1, num_attention_heads=HEADS)


def device_mesh(*names: str) -> DeviceMesh:
    """2 x 2 ranks; without names the dimensions that diffusers makes."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names or ("ring", "ulysses"))


CASES = {
    "flux": lambda: pipeline("flux", 16, "auto"),
    "flux_ring": lambda: pipeline("flux", 16, RING),
    "flux_uneven": lambda: pipeline("flux", 13, RING, height=112, width=112),  # 13 text tokens, 7 x 7 image tokens
    "wan": lambda: pipeline("wan", 13, RING),
    "flux2": lambda: compare(*flux2(), RING),
    "flux2_with_a_plan": lambda: compare(*flux2(), cp_plan=dict(Flux2Transformer2DModel._cp_plan)),
    "qwen_masked": lambda: compare(*qwen(mask=True), ULYSSES),
    "qwen_masked_ring": lambda: compare(*qwen(mask=True), RING),
    "qwen_strict": lambda: compare(*qwen(mask=True), args=args(ULYSSES, strict=True)),
    "flux_masked": lambda: compare(*masked(padded(7, 13)[:, None, None]), RING),
    "ltx_masked": lambda: compare(*ltx(text=16), RING),
    "mask_of_queries": lambda: compare(*masked(torch.ones(62, 62, dtype=torch.bool).tril())),
    "qwen_one_text_token": lambda: short(1),
    "qwen_three_text_tokens": lambda: short(3),
    "qwen_three_text_tokens_masked": lambda: short(3, mask=True),
    "ltx_three_text_tokens": lambda: compare(*ltx(text=3), RING),
    "flux_three_text_tokens": lambda: compare(*flux(text=3)),
    "adapter_added": lambda: adapted(add_adapter, add_adapter),
    "ltx2": lambda: compare(*ltx2()),
    "no_processor": lambda: sf_xfuser.parallelize(sd3(), args=args()),
    "unknown_module": lambda: sf_xfuser.parallelize(flux2()[0], args=args(), cp_plan={"blocks.*": {}}),
    "unknown_argument": lambda: sf_xfuser.parallelize(flux2()[0], args=args(), cp_plan={"": {"tokens": SAMPLE}}),
    "heads_that_no_plan_splits": lambda: sf_xfuser.parallelize(flux2()[0], args=args("torus=2,ulysses=2,ring=2")),
    "device_mesh": lambda: compare(*flux2(), mesh=device_mesh(), args=args()),
    "device_mesh_of_a_group": lambda: compare(*flux2(), mesh=device_mesh("sp", "dp")["sp"], args=args("torus=2")),
    "fused": lambda: compare(*flux2(), args=args(kernel="fused")),  # head size 32 is unsupported
    "another_backend": lambda: sf_xfuser.parallelize(flux2()[0], args=sf_xfuser.TorusArgs(backend="usp")),
}


def main() -> None:
    dist.init_process_group("gloo")
    cases = {f"case_{name}": lambda rank, call=call: call() for name, call in CASES.items()}
    run_cases(globals() | cases, sys.argv[2:], (ValueError, RuntimeError))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
