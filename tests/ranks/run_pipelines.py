"""Several runs of run_pipeline.py in one launch. Usage: run_pipelines.py CASES.json [THEN.json ...]

CASES.json maps names to argument lists; an argument "N:--flag" is for rank N only. Between cases xDiT's groups and
state are destroyed and created again in the same processes. Every rank reports ``ok`` or the error of a case, and
``sf_xfuser.explain()``. The next case runs after an error too.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import run_pipeline  # the directory of a script is on its path
import torch
import torch.distributed as dist
from cases import report

import sf_xfuser


def main() -> None:
    for name, argv in json.loads(Path(sys.argv[1]).read_text()).items():
        sys.argv = ["run_pipeline.py", *for_this_rank(argv)]
        torch.compiler.reset()
        explained = ""
        try:
            run_pipeline.run_rank(run_pipeline.parse_arguments())
            text, explained = "ok", sf_xfuser.explain()
        except (ValueError, RuntimeError) as error:
            text = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        report(name, [text, explained])
        if dist.is_initialized():  # a case may be refused before that
            destroy_model_parallel()
            dist.barrier()
    dist.destroy_process_group()


def for_this_rank(argv: list[str]) -> list[str]:
    rank = os.environ["RANK"]
    return [arg.partition(":")[2] if arg[0].isdigit() and ":" in arg else arg
            for arg in argv if not (arg[0].isdigit() and ":" in arg) or arg.partition(":")[0] == rank]  # fmt: skip


def destroy_model_parallel() -> None:
    """As RuntimeState.destroy_distributed_env, but the world stays: torchrun's store does not support a second one."""
    from xfuser.core.distributed import parallel_state

    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main()
