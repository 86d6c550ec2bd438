"""7. xDiT on Ray workers. They parse no command line: xDiT sends them the flag in its configuration.

    pip install ray
    python -m sf_xfuser.bench.tiny_models flux out/tiny-flux
    python examples/07_ray.py --model out/tiny-flux --prompt "a red chair" --height 128 --width 128 \
        --num_inference_steps 2 --use_ray --ray_world_size 4 --out out/example7.pt --sp-backend torus --sp-topology 2x2

Writes the picture as a tensor [1, 3, H, W] in 0..1. Without GPUs it declares one GPU per worker to Ray.
"""

from __future__ import annotations

import os

import ray
import torch
from xfuser import xFuserArgs, xFuserFluxPipeline
from xfuser.config import FlexibleArgumentParser
from xfuser.ray.pipeline.pipeline_utils import RayDiffusionPipeline


def main() -> None:
    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser(description=__doc__))
    parser.add_argument("--out", required=True, help="file for the picture")
    arguments = parser.parse_args()
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "29655"}.items():
        os.environ.setdefault(name, value)
    engine_config, input_config = xFuserArgs.from_cli_args(arguments).create_config()

    cuda = torch.cuda.is_available()
    if not cuda:
        ray.init(num_cpus=2, num_gpus=arguments.ray_world_size, include_dashboard=False)
    pipe = RayDiffusionPipeline.from_pretrained(
        PipelineClass=xFuserFluxPipeline,
        pretrained_model_name_or_path=engine_config.model_config.model,
        engine_config=engine_config,
        torch_dtype=torch.bfloat16 if cuda else torch.float32,
    )
    results = pipe(
        prompt=input_config.prompt,
        height=input_config.height,
        width=input_config.width,
        num_inference_steps=input_config.num_inference_steps,
        max_sequence_length=input_config.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(input_config.seed),
        output_type="pt",
    )
    picture = next(images for images in results if images is not None)  # xDiT returns it on the last rank
    torch.save(picture.float().cpu(), arguments.out)
    ray.shutdown()


if __name__ == "__main__":
    main()
