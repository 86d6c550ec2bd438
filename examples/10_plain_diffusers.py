"""10. A plain diffusers pipeline over several ranks, without xDiT: one call, ``sf_xfuser.parallelize``.

python -m sf_xfuser.bench.tiny_models flux out/tiny-flux
torchrun --nproc-per-node 4 examples/10_plain_diffusers.py out/tiny-flux
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

import sf_xfuser


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)

    pipe = DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16 if cuda else torch.float32)
    pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    # One host emulates two machines here. On real machines omit args: topology and transport are detected.
    two_machines = sf_xfuser.TorusArgs(backend="torus", topology=f"2x{dist.get_world_size() // 2}")
    torus = sf_xfuser.parallelize(pipe.transformer, args=two_machines)

    # Every rank passes the same inputs and seed, and gets the whole image. Without generator= the noise would differ
    # between ranks, which raises an error.
    latents = pipe(
        prompt="a red chair in the rain",
        height=112,  # 7 x 7 tokens, which are not divisible by the number of ranks
        width=112,
        num_inference_steps=2,
        max_sequence_length=13,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="latent",
    ).images
    if rank == 0:
        print("\n".join(torus.mesh.lines()))
        print(f"latents {tuple(latents.shape)}, mean {latents.float().mean().item():.4f}")
        print(f"attention calls handled by torus: {torus.handled}, fallbacks: {dict(torus.fallbacks)}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
