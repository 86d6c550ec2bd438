"""xDiT's own runner with a tiny Flux. Usage: runner.py FOLDER CASES

FOLDER has the model as ``black-forest-labs/FLUX.1-dev``, its name in the runner's registry, and gets the results. CASES
is JSON: names to argument lists of ``xfuser.runner``. Each case makes two requests in float32, and rank 0 writes the
latents of both as NAME.pt. Every rank reports the text of ``explain()`` and the requests of the mesh, or the
error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch
import torch.distributed as dist
from cases import report  # the directory of a script is on its path
from run_pipelines import destroy_model_parallel
from xfuser import xFuserArgs
from xfuser.config import FlexibleArgumentParser
from xfuser.runner import xFuserModelRunner

import sf_xfuser
from sf_xfuser.torus.mesh import Mesh


def run_case(name: str, argv: list[str]) -> None:
    parser = xFuserArgs.add_runner_args(FlexibleArgumentParser())
    arguments = vars(parser.parse_args(["--model", "FLUX.1-dev", "--output_directory", ".", *argv]))
    runner = xFuserModelRunner(arguments)
    input_args = runner.preprocess_args(arguments)
    runner.initialize(input_args)
    pipe = runner.model.pipe.to(torch.float32)  # the runner loads bfloat16, or float16 under PipeFusion
    runner.model.engine_config.runtime_config.dtype = torch.float32
    decoded, decode = [], pipe.vae.decode
    pipe.vae.decode = lambda latents, **options: decoded.append(latents) or decode(latents, **options)
    for seed in (1, 2):
        output, _ = runner.run(input_args | {"seed": seed})
        runner.save(output=output)
    results = [None] * dist.get_world_size()
    dist.all_gather_object(results, decoded)
    if dist.get_rank() == 0:
        torch.save(next(latents for latents in results if latents), f"{name}.pt")


def main() -> None:
    os.chdir(sys.argv[1])
    begun: list[str] = []
    begin_request = Mesh.begin_request
    Mesh.begin_request = lambda mesh, request: begun.append(request) or begin_request(mesh, request)
    for name, argv in json.loads(sys.argv[2]).items():
        begun.clear()
        try:
            run_case(name, argv)
            text = "\n".join([sf_xfuser.explain(), *(f"request: {what}" for what in begun)])
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
        report(name, text)
        destroy_model_parallel()
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
