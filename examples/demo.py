"""xDiT's Flux pipeline on an emulated cluster of four machines: USP, flat Ulysses, Torus Attention, and auto.

    make demo
    make demo DEMO_ARGS='--prompt "a red chair" --steps 8'
    python examples/demo.py --model path/to/a/flux/folder --out out/mine
    python examples/demo.py --json > figures.json

Four processes on this computer are four machines, each with its own network and a link that is slow on purpose. They
run the same prompt with each kind of attention, and their pictures are compared with that of plain diffusers in one
process. Without --model, the demo first saves a small Flux with random weights. Everything is in --out: demo.html (one
page with all results), figures.json, timeline.png, the pictures and the log of the ranks.

The cluster needs Linux, iproute2, and root or user namespaces. Without them the four ranks run side by side on this
host, and the demo says why.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from sf_xfuser.bench import demo_page, emulate, page
from sf_xfuser.bench.demo import PROGRESS, TOLERANCE, DemoOptions
from sf_xfuser.bench.pipeline import PipelineOptions
from sf_xfuser.bench.progress import Progress
from sf_xfuser.integrations.xdit.degrees import read_model_facts

CLUSTER = "4x1"
# The heads of Flux. With heads of 16, the matrix products of a block take about as long beside the attention of 2,960
# tokens as those of Flux beside the attention at 4096 px.
SMALL_FLUX = {"heads": 24, "head_dim": 16, "layers": 1, "single_layers": 1}
TIMEOUT_S = 900.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", default="a small cat sits on a red chair near the window")
    add("--model", type=Path, help="folder of a Flux model (default: save a small one in --out)")
    add("--size", type=int, default=832, help="height and width in pixels, a multiple of 32 (default: 832)")
    add("--steps", type=int, default=4, help="denoising steps of the pictures (default: 4)")
    add("--rounds", type=int, default=8, help="timed denoising steps of each kind of attention (default: 8)")
    add("--seed", type=int, default=42)
    add("--out", type=Path, default=Path("out/demo"), help="folder for all results (default: out/demo)")
    add("--json", action="store_true", help="print figures.json instead of the table")
    options = parser.parse_args()
    if options.size < 32 or options.size % 32 or options.steps < 1 or options.rounds < 1:
        parser.error("--size must be a multiple of 32, --steps and --rounds at least 1")
    return options


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(options)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    page.require_matplotlib()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=options.out) as probe:  # before the run: can this folder be written?
        probe.write(bytes(1 << 24))
    model = options.model or options.out / "model"
    if options.model is not None and read_model_facts(str(model)) is None:
        raise ValueError(f"{model} has no transformer/config.json with a head count; give a folder of a Flux model")
    reason = emulate.unavailable()
    pipeline = PipelineOptions(
        model=str(model), topology="auto" if reason is None else CLUSTER, prompt=options.prompt, steps=options.steps,
        size={"height": options.size, "width": options.size, "guidance_scale": 3.5}, seed=options.seed,
        output_type="pt",
    )  # fmt: skip
    job = DemoOptions(
        pipeline=pipeline, make_model=SMALL_FLUX if options.model is None else None, emulated=reason is None,
        rounds=options.rounds, out=str(options.out),
    )  # fmt: skip
    if reason is not None:
        Console(stderr=True).print(f"No emulated cluster: {reason}", style="yellow", highlight=False)
    results = launch(job)
    found = demo_page.figures(results, reason)
    (options.out / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    demo_page.draw_timeline(results["timelines"], options.out / "timeline.png")
    title = f'Flux, {options.size} px, fp32, four ranks: "{options.prompt}"'
    (options.out / "demo.html").write_text(demo_page.html(found, title, options.out))
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        shown = Console()
        shown.print(title, demo_page.table(found), *demo_page.sentences(found), sep="\n", highlight=False)
        shown.print(f"One page with everything: {options.out / 'demo.html'}", highlight=False)
    if found["max_abs_difference"] <= TOLERANCE:
        return 0
    print(f"demo: a picture differs by {found['max_abs_difference']:.1e}, allowed {TOLERANCE:g}", file=sys.stderr)
    return 1


def launch(job: DemoOptions) -> dict:
    """Run the ranks with their output in ranks.log and return their results. Ctrl-C ends every process."""
    path, log = Path(job.out, "job.json"), Path(job.out, "ranks.log")
    path.write_text(json.dumps(asdict(job)))
    path.with_suffix(".result").unlink(missing_ok=True)
    ends, write = os.pipe()
    reader = threading.Thread(target=follow, args=(ends, log), daemon=True)
    reader.start()
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # CPU ranks, one core each
    ranks = ["-m", "sf_xfuser.bench.demo", str(path)]
    try:
        if job.emulated:
            spec = emulate.ClusterSpec.parse(CLUSTER, inter_rate="10gbit")  # the ranks set the rate
            command = [sys.executable, *ranks]
            status = emulate.run(spec, command, timeout_s=TIMEOUT_S, env=environment, output=write).status
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", *ranks]
            status = run_on_this_host(command, {**os.environ, **environment}, write)
    finally:
        os.close(write)
        reader.join(timeout=5)
    if status:
        raise RuntimeError(f"the ranks failed with status {status}; the end of {log}:\n{log.read_text()[-2000:]}")
    return json.loads(path.with_suffix(".result").read_text())


def run_on_this_host(command: list[str], environment: dict[str, str], output: int) -> int:
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        return process.wait(TIMEOUT_S)
    except BaseException:
        process.terminate()  # torchrun ends its ranks
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def follow(ends: int, log: Path) -> None:
    """Copy the ranks' output to ``log``, and show how far rank 0 says it is."""
    done = 0
    with Progress("demo") as progress, os.fdopen(ends, errors="replace") as lines, log.open("w") as file:
        progress.doing("starting four ranks")
        for line in lines:
            if line.startswith(PROGRESS):
                now_done, progress.total, text = json.loads(line.removeprefix(PROGRESS))
                if now_done > done:
                    progress.advance(now_done - done)
                done = now_done
                progress.doing(text)
            else:
                file.write(line)
                file.flush()


if __name__ == "__main__":
    sys.exit(main())
