"""3. An ordinary xDiT script for Flux. It does not import sf-xfuser: the flag is enough.

    python -m sf_xfuser.bench.tiny_models flux out/tiny-flux
    torchrun --nproc-per-node 4 examples/03_flux_with_the_flag.py --model out/tiny-flux --prompt "a red chair" \
        --height 128 --width 128 --num_inference_steps 4 --out out/example3 --sp-backend torus --sp-topology 2x2

Every rank writes rank<N>.json (seconds of each step, peak memory). The last rank also writes image.png and image.pt.
"""

from __future__ import annotations

import json
import resource
import time
from itertools import pairwise
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from xfuser import xFuserArgs, xFuserFluxPipeline
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import get_runtime_state, get_world_group


def main() -> None:
    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser(description=__doc__))
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture and the timings")
    arguments = parser.parse_args()
    engine_config, input_config = xFuserArgs.from_cli_args(arguments).create_config()

    cuda = torch.cuda.is_available()
    device = f"cuda:{get_world_group().local_rank}" if cuda else "cpu"
    pipe = xFuserFluxPipeline.from_pretrained(
        pretrained_model_name_or_path=engine_config.model_config.model,
        engine_config=engine_config,
        torch_dtype=torch.bfloat16 if cuda else torch.float32,
    ).to(device)
    pipe.set_progress_bar_config(disable=get_world_group().rank != 0)

    ends = []

    def step_ended(pipeline, step, timestep, tensors):
        if cuda:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return tensors

    result = pipe(
        prompt=input_config.prompt,
        height=input_config.height,
        width=input_config.width,
        num_inference_steps=input_config.num_inference_steps,
        max_sequence_length=input_config.max_sequence_length,
        guidance_scale=input_config.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(input_config.seed),
        callback_on_step_end=step_ended,
        output_type="pt",
    )

    arguments.out.mkdir(parents=True, exist_ok=True)
    rank = get_world_group().rank
    memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    steps = [after - before for before, after in pairwise(ends)]
    (arguments.out / f"rank{rank}.json").write_text(json.dumps({"step_seconds": steps, "peak_memory_bytes": memory}))
    if result is not None:  # xDiT returns the picture on the last rank
        picture = result.images.float().cpu()
        torch.save(picture, arguments.out / "image.pt")
        VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(picture))[0].save(arguments.out / "image.png")
    get_runtime_state().destroy_distributed_env()


if __name__ == "__main__":
    main()
