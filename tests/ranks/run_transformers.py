"""Tiny transformers through xDiT's wrappers on every rank. Usage: run_transformers.py FOLDER CASES [MODEL ...]

FOLDER holds the saved models of ``model_table.py``; CASES is JSON, {case: flags}; MODEL selects some of them. For each
model and size three results are compared: diffusers in one process, xDiT's wrapper with torus, and the same wrapper
with xDiT's own USP in the same groups. If the row names a repair, also xDiT without it. Every rank reports a
``Measured`` for each.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import xfuser
from cases import report
from model_table import MODELS, SIZES, Input, Model  # the directory of a script is on its path
from run_pipelines import destroy_model_parallel
from xfuser import xFuserArgs
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import (
    get_runtime_state,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
    get_sp_group,
    initialize_runtime_state,
)
from xfuser.model_executor.layers.usp import attention

from sf_xfuser.integrations.xdit import repairs, session


@dataclass
class Measured:
    """Results of one rank: largest differences, handled calls, fallbacks by reason, or xDiT's own error."""

    name: str
    case: str
    size: str
    torus_single: float = float("nan")
    torus_xdit: float = float("nan")
    xdit_single: float = float("nan")
    installed_single: float = float("nan")  # xDiT's own without repairs
    alone_single: float = float("nan")  # each rank attends to its own keys only: the size of a visible error
    handled: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    repaired: list[str] = field(default_factory=list)
    error: str = ""


def flat(output: Any) -> torch.Tensor:
    """Every tensor of a model's output, one after the other; empty on a rank without a result."""
    if output is None:
        return torch.empty(0)
    if isinstance(output, torch.Tensor):
        return output.flatten()
    parts = output.values() if isinstance(output, dict) else output
    return torch.cat([flat(part) for part in parts])


def xdit_model(row: Model, folder: Path, engine_config: Any) -> torch.nn.Module:
    if row.is_pipeline:
        return getattr(xfuser, row.wrapper).from_pretrained(folder, engine_config=engine_config, **row.options(folder))
    module, _, name = row.wrapper.partition(":")
    found = getattr(importlib.import_module(f"xfuser.model_executor.models.transformers.{module}"), name)
    wrapper = found if isinstance(found, type) else found()
    plain = row.load(folder)
    initialize_runtime_state(SimpleNamespace(transformer=plain, vae_scale_factor=8), engine_config)
    if not hasattr(wrapper, "from_pretrained"):
        return wrapper(plain)
    if "kwargs" not in inspect.signature(wrapper.__init__).parameters:
        return wrapper.from_pretrained(folder, **row.options(folder))
    model = wrapper(**wrapper_config(plain))  # from_pretrained would drop the sizes that __init__ does not name
    model.load_state_dict(plain.state_dict())
    return model


def wrapper_config(plain: torch.nn.Module) -> dict[str, Any]:
    return {name: value for name, value in plain.config.items() if not name.startswith("_")}


@torch.no_grad()
def measure(row: Model, folder: Path, size: Input, engine_config: Any, found: Measured) -> None:
    def run() -> torch.Tensor:
        torch.manual_seed(1)
        return flat(split_call(model, row.call(size), row.split))

    torch.manual_seed(1)
    call = row.call(size)
    single = flat(row.load(folder)(**call))
    model = xdit_model(row, folder, engine_config)
    row.prepare(model, get_runtime_state(), size)
    torus = session.current.usp
    torus.handled, torus.fallbacks = 0, Counter()
    repairs.used.clear()
    result = run()
    found.handled, found.fallbacks = torus.handled, dict(torus.fallbacks)
    with session.without_torus():
        xdit = run()
        found.repaired = list(repairs.used)
        if row.repaired:
            args, session.current.args = session.current.args, None
            try:
                found.installed_single = difference(run(), single)
            finally:
                session.current.args = args
    torus.attend = own_keys_only
    try:
        alone = run()
    finally:
        del torus.attend
    found.torus_single = difference(result, single)
    found.torus_xdit = difference(result, xdit)
    found.xdit_single = difference(xdit, single)
    found.alone_single = difference(alone, single)


def split_call(model: Any, call: dict[str, Any], split: Mapping[str, int]) -> Any:
    """What xDiT's pipeline does around the wrapper, where the wrapper leaves that to the pipeline."""
    ranks, rank = get_sequence_parallel_world_size(), get_sequence_parallel_rank()
    for name in split.keys() & call.keys():
        if call[name].shape[split[name]] % ranks == 0:
            call[name] = call[name].chunk(ranks, dim=split[name])[rank]
    output = model(**call)
    return get_sp_group().all_gather(output[0].contiguous(), dim=split["output"]) if split else output


def own_keys_only(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    repeat = query.shape[1] // key.shape[1]
    return attention(query, key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """NaN where this rank has no result."""
    return (one - other).abs().max().item() if one.numel() else float("nan")


def main() -> None:
    folder = Path(sys.argv[1])
    models = [row for row in MODELS if row.name in sys.argv[3:] or not sys.argv[3:]]
    for case, argv in json.loads(sys.argv[2]).items():
        parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
        engine_config, _ = xFuserArgs.from_cli_args(parser.parse_args(argv)).create_config()
        engine_config.runtime_config.dtype = torch.float32
        for row in models:
            for name, size in SIZES.items():
                exception = row.exception(case, name)
                if exception is not None and exception.kind == "never":
                    continue
                found = Measured(row.name, case, name)
                try:
                    measure(row, folder / row.folder, size, engine_config, found)
                except Exception as error:  # xDiT's own, of any kind
                    found.error = f"{type(error).__name__}: {error}"
                    traceback.print_exc()
                report("model", asdict(found))
                dist.barrier()
        destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
