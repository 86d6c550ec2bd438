"""The main job: xDiT's Flux pipeline on four ranks as two machines of two, with ``--sp-backend torus``.

    make demo                                        # or: python examples/demo.py --prompt "a small cat on a red chair"

Makes a small Flux with random weights (real classes, real tokenizers) unless --model names a folder, then runs the
same prompt on one process with plain diffusers, through xDiT's USP, and through Torus Attention, and compares the
pictures. The two parallel runs are examples/03_flux_with_the_flag.py; their launch lines differ in the flag alone. The
pictures of the small model are noise; that they are the same noise is the point.
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
TOLERANCE = 1e-3  # of pixel values in [0, 1]: fp32, and a VAE behind the latents


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a small cat sits on a red chair near the window")
    parser.add_argument("--model", type=Path, default=None, help="a Flux model folder (default: a small one is made)")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels (default: 512)")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (default: 4)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for pictures and figures")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    parser.add_argument("--single", action="store_true", help=argparse.SUPPRESS)  # the one-process run, in a process
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
        sys.exit(f"{options.model} has no transformer/config.json with a head count: give a diffusers Flux folder")
    usp = make_plan(MACHINES, RANKS_PER_MACHINE, heads=facts.heads, rule="usp")
    torus = make_plan(MACHINES, RANKS_PER_MACHINE, heads=facts.heads)
    degrees = ["--ulysses_degree", usp.layout.ulysses_degree, "--ring_degree", usp.layout.ring_degree]
    variants: dict[str, tuple[list[object], Plan | None]] = {
        "single process": ([sys.executable, __file__, "--single", *shared(options, "single")], None),
        "xDiT USP": (launch(options, "usp", *degrees), usp),
        "torus": (launch(options, "torus", "--sp-backend", "torus", "--sp-topology", f"{MACHINES}x2"), torus),
    }
    rows = []
    for name, (command, plan) in variants.items():
        folder = options.out / str(command[command.index("--out") + 1]).rpartition("/")[2]
        for stale in folder.glob("*"):
            stale.unlink()
        with console.status(f"{name} ..."):
            started = time.perf_counter()
            run(command, options.out / f"{folder.name}.log")
            seconds = time.perf_counter() - started
        console.print(f"{name}: done in {seconds:.0f} s (start-up included)")
        rows.append(figures(name, folder, options, plan))
    compare(rows, options.out)
    (options.out / "figures.json").write_text(json.dumps(rows, indent=2))
    print(json.dumps(rows, indent=2)) if options.json else show(rows, options)
    return 0 if all(row["max_abs_difference"] <= TOLERANCE for row in rows) else 1


def small_model(out: Path, console: Console) -> Path:
    """A Flux of a few layers with random weights, large enough that attention takes a visible part of a step."""
    folder = out / "model"
    with console.status("making a small Flux model ..."):
        command = [sys.executable, "-m", "sf_xfuser.bench.tiny_models", "flux", folder, "--heads", 8, "--head-dim", 32]
        run([*command, "--layers", 4], out / "model.log")
    return folder


def shared(options: argparse.Namespace, name: str) -> list[object]:
    size = ["--size", options.size, "--steps", options.steps]
    return ["--model", options.model, "--prompt", options.prompt, *size, "--seed", options.seed,
            "--out", options.out / name]  # fmt: skip


def launch(options: argparse.Namespace, name: str, *flags: object) -> list[object]:
    """One torchrun line; the variants differ in ``flags`` only."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}", SCRIPT,
        "--model", options.model, "--prompt", options.prompt, "--height", options.size, "--width", options.size,
        "--num_inference_steps", options.steps, "--seed", options.seed, "--out", options.out / name, *flags,
    ]  # fmt: skip


def run(command: list[object], log: Path) -> None:
    """Run to the end, output to ``log``; Ctrl-C and errors end every process of it."""
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
    """Plain diffusers on one process: what every parallel run has to give."""
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


def figures(name: str, folder: Path, options: argparse.Namespace, plan: Plan | None) -> dict:
    """One row. A step lasts as long as it does on the slowest rank; the median step is given."""
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
    """Attention traffic that leaves all machines in one step, from the layout (the tests hold it to the schedule)."""
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
        "Differences are of pixels in 0..1 against the first row; MB across machines are per step, from the layout. "
        "The runs share this computer's cores and loopback, so their times say nothing about machines. At two machines "
        "both layouts move the same bytes; they part from three machines on (examples/01_explain_a_plan.py)."
    )
    console.print(f"picture: {rows[-1]['folder']}/image.png; figures: {options.out / 'figures.json'}")


if __name__ == "__main__":
    sys.exit(main())
