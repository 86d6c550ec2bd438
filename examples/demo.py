"""xDiT's Flux pipeline with ``--sp-backend torus`` on four ranks, which emulate two machines of two ranks.

    make demo                                        # or: python examples/demo.py --prompt "a small cat on a red chair"

Runs the same prompt with plain diffusers on one process, with xDiT's USP and with Torus Attention, and compares the
pictures. Without --model it creates a small Flux with random weights (real classes, real tokenizers), so all pictures
show the same noise. Both parallel runs start examples/03_flux_with_the_flag.py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sf_xfuser.integrations.xdit.degrees import read_model_facts
from sf_xfuser.layout.plan import Plan, make_plan

SCRIPT = Path(__file__).with_name("03_flux_with_the_flag.py")
MACHINES, RANKS_PER_MACHINE = 2, 2
WORLD = MACHINES * RANKS_PER_MACHINE
TOLERANCE = 1e-3  # of pixel values in [0, 1], in fp32, after the VAE


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a small cat sits on a red chair near the window")
    parser.add_argument("--model", type=Path, default=None, help="folder of a Flux model (default: create a small one)")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels (default: 512)")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (default: 4)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for pictures and results")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument("--single", action="store_true", help=argparse.SUPPRESS)  # a subprocess runs this variant
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.single:
        run_single(options)
        return 0
    console = Console(stderr=True)
    options.model = options.model or small_model(options.out, console)
    facts = read_model_facts(str(options.model))
    if facts is None:
        sys.exit(f"{options.model} has no transformer/config.json with a head count; give a diffusers Flux model")
    usp = make_plan(MACHINES, RANKS_PER_MACHINE, heads=facts.heads, rule="usp")
    torus = make_plan(MACHINES, RANKS_PER_MACHINE, heads=facts.heads)
    degrees = ["--ulysses_degree", usp.layout.ulysses_degree, "--ring_degree", usp.layout.ring_degree]
    variants: dict[str, tuple[list[object], Plan | None]] = {
        "single process": (single_process(options), None),
        "xDiT USP": (launch(options, "usp", *degrees), usp),
        "torus": (launch(options, "torus", "--sp-backend", "torus", "--sp-topology", f"{MACHINES}x2"), torus),
    }
    rows = []
    for name, (command, plan) in variants.items():
        folder = options.out / str(command[command.index("--out") + 1]).rpartition("/")[2]
        for old_file in folder.glob("*"):
            old_file.unlink()
        with console.status(f"{name} ..."):
            started = time.perf_counter()
            run(command, options.out / f"{folder.name}.log")
            seconds = time.perf_counter() - started
        console.print(f"{name}: done in {seconds:.0f} s (start-up included)")
        rows.append(result(name, folder, options, plan))
    compare(rows, options.out)
    (options.out / "results.json").write_text(json.dumps(rows, indent=2))
    print(json.dumps(rows, indent=2)) if options.json else show(rows, options)
    return 0 if all(row["max_abs_difference"] <= TOLERANCE for row in rows) else 1


def small_model(out: Path, console: Console) -> Path:
    """Create a Flux with few layers and random weights, where attention takes a measurable part of a step."""
    folder = out / "model"
    with console.status("creating a small Flux model ..."):
        command = [sys.executable, "-m", "sf_xfuser.bench.tiny_models", "flux", folder, "--heads", 8, "--head-dim", 32]
        run([*command, "--layers", 4], out / "model.log")
    return folder


def single_process(options: argparse.Namespace) -> list[object]:
    """The command of the variant without xDiT: this script with ``--single``."""
    return [
        sys.executable, __file__, "--single", "--model", options.model, "--prompt", options.prompt, "--size",
        options.size, "--steps", options.steps, "--seed", options.seed, "--out", options.out / "single",
    ]  # fmt: skip


def launch(options: argparse.Namespace, name: str, *flags: object) -> list[object]:
    """The torchrun command of a variant. Variants differ only in ``flags``."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}", SCRIPT,
        "--model", options.model, "--prompt", options.prompt, "--height", options.size, "--width", options.size,
        "--num_inference_steps", options.steps, "--seed", options.seed, "--out", options.out / name, *flags,
    ]  # fmt: skip


def run(command: list[object], log: Path) -> None:
    """Run ``command`` with its output in ``log``. Ctrl-C and errors terminate its whole process group."""
    log.parent.mkdir(parents=True, exist_ok=True)
    line = [str(part) for part in command]
    with log.open("w") as output:
        output.write(shlex.join(line) + "\n")
        output.flush()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            line, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    if status:
        sys.exit(f"exit status {status} of {shlex.join(line)}\n" + "".join(log.read_text()[-3000:]))


def run_single(options: argparse.Namespace) -> None:
    """Plain diffusers on one process: the reference for the parallel runs."""
    import torch
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(options.model, torch_dtype=torch.float32)
    ends: list[float] = []

    def step_ended(pipeline, step, timestep, tensors):
        ends.append(time.perf_counter())
        return tensors

    picture = pipe(
        prompt=options.prompt,
        height=options.size,
        width=options.size,
        num_inference_steps=options.steps,
        max_sequence_length=256,
        guidance_scale=3.5,
        generator=torch.Generator("cpu").manual_seed(options.seed),
        callback_on_step_end=step_ended,
        output_type="pt",
    ).images
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save(picture, options.out / "image.pt")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    steps = [after - before for before, after in pairwise(ends)]
    (options.out / "rank0.json").write_text(json.dumps({"step_seconds": steps, "peak_memory_bytes": memory}))


def result(name: str, folder: Path, options: argparse.Namespace, plan: Plan | None) -> dict:
    """One row of the results: the median time of a step on the slowest rank."""
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    steps = sorted(max(times) for times in zip(*(rank["step_seconds"] for rank in ranks), strict=True))
    return {
        "variant": name,
        "degrees": f"{x.torus} x {x.ulysses} x {x.ring_degree}" if (x := plan and plan.layout) else "-",
        "folder": str(folder),
        "seconds_per_step": steps[len(steps) // 2] if steps else None,
        "bytes_between_machines_per_step": bytes_between_machines(options, plan) if plan else 0,
        "peak_memory_bytes_per_rank": max(rank["peak_memory_bytes"] for rank in ranks),
    }


def bytes_between_machines(options: argparse.Namespace, plan: Plan) -> int:
    """Attention traffic between machines in one step, computed from the layout."""
    config = json.loads((options.model / "transformer" / "config.json").read_text())
    tokens = (options.size // 16) ** 2 + 256
    layers = config["num_layers"] + config["num_single_layers"]
    elements = plan.layout.egress() * MACHINES * tokens * config["num_attention_heads"] * config["attention_head_dim"]
    return int(elements * layers * 4)


def compare(rows: list[dict], out: Path) -> None:
    import torch

    pictures = [torch.load(Path(row["folder"]) / "image.pt") for row in rows]
    for row, picture in zip(rows, pictures, strict=True):
        row["max_abs_difference"] = (picture - pictures[0]).abs().max().item()


def show(rows: list[dict], options: argparse.Namespace) -> None:
    console = Console()
    table = Table(title=f'Flux, {options.size} px, {options.steps} steps, fp32: "{options.prompt}"')
    table.add_column("variant")
    table.add_column("torus x ulysses\nx ring", justify="center")
    for column in ("max abs\ndifference", "seconds\nper step", "MB across\nmachines",
                   "peak MB\nper rank"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        step = row["seconds_per_step"]
        table.add_row(
            row["variant"],
            row["degrees"],
            f"{row['max_abs_difference']:.1e}",
            "-" if step is None else f"{step:.3f}",
            f"{row['bytes_between_machines_per_step'] / 1e6:.1f}",
            f"{row['peak_memory_bytes_per_rank'] / 1e6:.0f}",
        )
    console.print(table)
    console.print(
        "Differences are in pixel values (0..1) from the first row. MB across machines are per step, computed from "
        "the layout. All ranks share the cores and loopback of this host, so times do not predict real machines. On "
        "two machines both layouts send the same bytes, on more torus sends fewer (examples/01_explain_a_plan.py)."
    )
    console.print(f"picture: {rows[-1]['folder']}/image.png; results: {options.out / 'results.json'}")


if __name__ == "__main__":
    sys.exit(main())
