"""4. ``enable()`` by hand: a diffusers script that builds xDiT's configuration itself and parses no xDiT flag.

python -m sf_xfuser.bench.tiny_models wan out/tiny-wan
SF_XFUSER_AUTOLOAD=0 torchrun --nproc-per-node 4 examples/04_enable_by_hand.py out/tiny-wan
"""

from __future__ import annotations

import sys

import torch

import sf_xfuser

sf_xfuser.enable(sf_xfuser.TorusArgs(backend="torus", topology="2x2"))  # before or after xfuser is imported

from diffusers import WanPipeline
from xfuser import xFuserArgs
from xfuser.core.distributed import get_runtime_state, get_world_group, initialize_runtime_state
from xfuser.model_executor.models.transformers.transformer_wan import xFuserWanTransformer3DWrapper


def main() -> None:
    folder = sys.argv[1]
    engine_config, _ = xFuserArgs(model=folder).create_config()  # degrees come from the plan
    transformer = xFuserWanTransformer3DWrapper.from_pretrained(folder, subfolder="transformer")
    pipe = WanPipeline.from_pretrained(folder, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    initialize_runtime_state(pipe, engine_config)

    video = pipe(
        prompt="a red chair in the rain",
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=2,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="latent",
    ).frames
    if get_world_group().rank == 0:
        print(f"latents {tuple(video.shape)}, mean {video.mean().item():.4f}")
        print(sf_xfuser.explain())
    get_runtime_state().destroy_distributed_env()


if __name__ == "__main__":
    main()
