"""Two requests with different masks of padded text at the same address. Usage: stale_masks.py FOLDER

FOLDER has the models of ``model_table.py``. Reports the largest difference of each request from one process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import report
from model_table import MODELS, SIZES, krea2_call, ltx2_call
from run_transformers import difference, flat, xdit_model
from xfuser import xFuserArgs
from xfuser.config import FlexibleArgumentParser

CALLS = {"krea2": ("Krea 2", krea2_call), "ltx2": ("LTX-2", ltx2_call)}


@torch.no_grad()
def main() -> None:
    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", "none", "--sp-backend", "torus", "--sp-plan", "ulysses=2"])
    engine_config, _ = xFuserArgs.from_cli_args(arguments).create_config()
    for name, (model_name, call_of) in CALLS.items():
        row = next(row for row in MODELS if row.name == model_name)
        folder = Path(sys.argv[1], row.folder)
        single, model = row.load(folder), xdit_model(row, folder, engine_config)
        memory: dict[str, torch.Tensor] = {}

        def at_the_same_address(argument: str, value: Any, memory: dict[str, torch.Tensor] = memory) -> Any:
            if "mask" not in argument:
                return value
            memory.setdefault(argument, torch.empty_like(value)).copy_(value)
            return memory[argument].view_as(value)  # a new tensor object

        differences = []
        for padded in (3, 9):
            torch.manual_seed(padded)
            call = {key: at_the_same_address(key, x) for key, x in call_of(SIZES["even"], padded=padded).items()}
            differences.append(difference(flat(model(**call)), flat(single(**call))))
        report(name, differences)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
