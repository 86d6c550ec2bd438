"""Run models that xDiT 0.7 computes wrongly. Usage: repairs.py CASES.json

CASES.json maps names to argument lists of run_pipeline.py, for its families flux and sd3 and for those of
repaired_models.py. If a case raises, every rank prints its error, and the next case runs.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import run_pipeline
import torch
import torch.distributed as dist
from cases import report
from diffusers import QwenImageTransformer2DModel
from repaired_models import BUILDERS, OPTIONS, inputs
from run_pipelines import destroy_model_parallel

import sf_xfuser


@torch.no_grad()
def run_rank(arguments: Any) -> None:
    """Like run_pipeline.run_rank, for the families of repaired_models.py."""
    import xfuser
    from xfuser import xFuserArgs
    from xfuser.core.distributed import initialize_runtime_state
    from xfuser.model_executor.models.transformers import transformer_qwen

    engine_config, _ = xFuserArgs.from_cli_args(arguments).create_config()
    engine_config.runtime_config.dtype = torch.float32
    family = arguments.family
    if family == "qwen":
        plain = QwenImageTransformer2DModel.from_pretrained(arguments.model)
        initialize_runtime_state(SimpleNamespace(transformer=plain, vae_scale_factor=8), engine_config)
        model = transformer_qwen.xFuserQwenImageTransformerWrapper.from_pretrained(
            arguments.model, torch_dtype=torch.float32
        )
    else:
        wrapper = {"flux2": xfuser.xFuserFlux2Pipeline, "latte": xfuser.xFuserLattePipeline}[family]
        model = wrapper.from_pretrained(arguments.model, engine_config=engine_config, **OPTIONS)
        model.set_progress_bar_config(disable=True)
    result = model(**inputs(family, arguments.text_length, arguments.num_inference_steps))
    gathered: list[torch.Tensor | None] = [None] * dist.get_world_size()
    latents = result[0] if result else None
    dist.all_gather_object(gathered, latents if isinstance(latents, torch.Tensor) else None)
    if dist.get_rank() == 0:
        by_rank = {rank: latents for rank, latents in enumerate(gathered) if latents is not None}
        torch.save({"world_size": len(gathered), "latents": by_rank}, arguments.out)


def main() -> None:
    run_pipeline.FAMILIES = (*run_pipeline.FAMILIES, *BUILDERS)
    for name, argv in json.loads(Path(sys.argv[1]).read_text()).items():
        sys.argv = ["run_pipeline.py", *argv]
        try:
            arguments = run_pipeline.parse_arguments()
            (run_rank if arguments.family in BUILDERS else run_pipeline.run_rank)(arguments)
            text, explained = "ok", sf_xfuser.explain()
        except Exception as error:
            traceback.print_exc()
            text, explained = f"{type(error).__name__}: {error}", ""
        report(name, [text, explained])
        if "--pipefusion_parallel_degree" in argv and text != "ok":
            raise SystemExit(1)  # the other pipeline stages would hang
        destroy_model_parallel()
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
