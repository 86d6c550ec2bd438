"""Two ranks: PipeFusion's sends arrive over gloo, and xDiT's Flux pipeline with two stages equals plain diffusers.

torchrun --nproc-per-node 2 platform_pipefusion.py FOLDER_OF_TINY_FLUX
"""

import gc
import sys
import time

import torch
from diffusers import FluxPipeline
from xfuser import xFuserArgs, xFuserFluxPipeline
from xfuser.core.distributed import get_pp_group, get_runtime_state, init_distributed_environment

PATCHES = 6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZE = {"height": 128, "width": 128, "guidance_scale": 3.5, "max_sequence_length": 16, "output_type": "latent"}


def patch(number, generation, dtype):
    return (torch.arange(3 + number).float() + 100 * number + 1000 * generation).to(dtype).repeat(2, 1)


def check_sends(dtype):
    """Rank 0 posts all sends, then deletes and overwrites the tensors; rank 1 receives them late and in order."""
    pipeline, stored = get_pp_group(), []
    for generation in range(3):
        pipeline.reset_buffer()
        if pipeline.rank_in_group == 0:
            started = time.monotonic()
            for number in range(PATCHES):
                tensor = patch(number, generation, dtype)
                pipeline.pipeline_isend(tensor, segment_idx=number)
                tensor.zero_()
                del tensor
            if generation == 0:
                assert time.monotonic() - started < 0.5, "a send must not wait for its receiver"
            gc.collect()
        else:
            time.sleep(1.0 if generation == 0 else 0.0)
            for number in range(PATCHES):
                pipeline.add_pipeline_recv_task(number)
            pipeline.recv_next()
            for number in range(PATCHES):
                received = pipeline.get_pipeline_recv_data(idx=number)
                assert received.dtype == dtype
                assert torch.equal(received, patch(number, generation, dtype)), (generation, number, received)
                if number + 1 < PATCHES:
                    pipeline.recv_next()
        torch.distributed.barrier()
        stored.append(len(vars(pipeline).get("_sf_gloo_sends", ())))
    assert stored[0] == stored[-1], f"the number of stored sends grows with each round: {stored}"


def denoise(pipeline, steps):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(0)
    result = pipeline(prompt="a cat", num_inference_steps=steps, generator=generator, return_dict=False, **SIZE)
    return result[0] if result else None


def check_flux(folder):
    """Two stages equal plain diffusers, synchronous or with one patch; two patches use stale keys by design."""
    expected = denoise(FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32), 4)
    for num_patches in (1, 2):
        config, _ = xFuserArgs(
            model=folder, pipefusion_parallel_degree=2, num_pipeline_patch=num_patches
        ).create_config()
        pipeline = xFuserFluxPipeline.from_pretrained(folder, engine_config=config, torch_dtype=torch.float32)
        results = []
        for warmup_steps in (4, 1, 1):
            get_runtime_state().runtime_config.warmup_steps = warmup_steps
            results.append(denoise(pipeline, 4))
        if results[0] is None:  # the last stage has the result
            continue
        errors = [(result - expected).abs().mean().item() for result in results]
        print(f"{num_patches} patches, mean error synchronous, asynchronous, again:", *(f"{e:.1e}" for e in errors))
        assert errors[0] < 1e-5, errors
        assert torch.equal(results[1], results[2]), "asynchronous PipeFusion is not deterministic"
        assert errors[1] < 1e-5 if num_patches == 1 else 1e-4 < errors[1] < 5e-2, errors


def main():
    init_distributed_environment()
    check_flux(sys.argv[1])
    for dtype in DTYPES:  # with the pipeline group of check_flux
        check_sends(dtype)
    get_runtime_state().destroy_distributed_env()


main()
