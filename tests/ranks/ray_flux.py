"""xDiT's Ray path on CPU workers, as examples/ray/ray_flux_example.py drives it: the driver parses the flags, the
workers get nothing but the pickled configuration. Ray is told of four GPUs that are only names here."""

from __future__ import annotations

import os

import ray
import torch
from run_pipeline import PROMPT, SEED, STEPS, small_input  # the directory of a script is on its path
from xfuser import xFuserArgs
from xfuser.config import FlexibleArgumentParser
from xfuser.model_executor.pipelines import xFuserFluxPipeline
from xfuser.ray.pipeline.pipeline_utils import RayDiffusionPipeline


def main() -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29655", "OMP_NUM_THREADS": "1"}
    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    engine_config, _ = xFuserArgs.from_cli_args(arguments).create_config()
    ray.init(num_cpus=2, num_gpus=arguments.ray_world_size, include_dashboard=False)
    pipe = RayDiffusionPipeline.from_pretrained(
        PipelineClass=xFuserFluxPipeline,
        pretrained_model_name_or_path=engine_config.model_config.model,
        engine_config=engine_config,
        torch_dtype=torch.float32,
    )
    results = pipe(
        prompt=PROMPT,
        num_inference_steps=STEPS,
        max_sequence_length=16,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="latent",
        **small_input(arguments.model),
    )
    torch.save(next(latents for latents in results if latents is not None), arguments.out)
    ray.shutdown()


if __name__ == "__main__":
    main()
