"""8. xDiT's unchanged HTTP service (entrypoints/launch.py of the xfuser wheel) with the flag, which its parser lacks.

    pip install ray fastapi uvicorn
    python -m sf_xfuser.bench.tiny_models flux out/FLUX.1-dev
    python examples/08_http_service.py --model_path out/FLUX.1-dev --world_size 4 --sp-backend torus --sp-topology 2x2

When the service listens on its port:

    curl localhost:6000/generate --json '{"prompt": "a red chair", "num_inference_steps": 2, "height": 128,
        "width": 128}'

With GPUs, run launch.py itself. Without GPUs, this script declares one GPU per worker to Ray and then runs launch.py.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import ray
import torch


def main() -> None:
    xfuser = find_spec("xfuser")
    script = Path(xfuser.submodule_search_locations[0]).parent / "entrypoints" / "launch.py"
    if not torch.cuda.is_available():
        workers = int(sys.argv[sys.argv.index("--world_size") + 1])
        ray.init(num_cpus=workers, num_gpus=workers, include_dashboard=False)
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
