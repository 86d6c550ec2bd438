"""The first launch lines of a newcomer, with xDiT's own runner and ``xdit``: what is refused is one sentence, and every
rank exits with status 2; what is right runs from an empty cache."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sf_xfuser.config import LaunchEnvironment
from sf_xfuser.integrations.xdit import validation
from tests.launch import environment, finish, torchrun

CHAIR = ["--prompt", "a chair"]
FLUX = ["--model", "FLUX.1-dev", *CHAIR]
TORUS = [*FLUX, "--sp-backend", "torus"]
OFFLINE = {"HF_HUB_OFFLINE": "1"}

REFUSED = {  # name: (ranks, arguments, what rank 0 prints). Nothing is in the local cache.
    "misspelled model": (
        2,
        ["--model", "FLUX.1-devv", *CHAIR, "--sp-backend", "torus"],
        "--model FLUX.1-devv is not in xDiT's registry; did you mean FLUX.1-dev\\?",
    ),
    "unknown model": (
        1,
        ["--model", "my/model", *CHAIR, "--sp-backend", "torus"],
        "--model my/model is not in xDiT's registry; its runner has .*, FLUX.1-dev, .*",
    ),
    "backend": (
        2,
        [*FLUX, "--sp-backend", "torsu"],
        "--sp-backend must be one of .*, got 'torsu'; did you mean torus\\?",
    ),
    "flag": (1, [*FLUX, "--sp-bakend", "torus"], "--sp-bakend is not a flag; did you mean --sp-backend\\?"),
    "plan": (2, [*TORUS, "--sp-plan", "torsu=2"], "--sp-plan must be .*, got 'torsu=2'"),
    "topology of a typo": (1, [*TORUS, "--sp-topology", "2y1"], "--sp-topology must be 'auto' or NxM .*, got '2y1'"),
    "topology": (1, [*TORUS, "--sp-topology", "2x2"], "--sp-topology 2x2 describes 4 ranks, but the job has 1: .*"),
    "timeout": (1, [*TORUS, "--sp-timeout", "soon"], "--sp-timeout must be a positive number of seconds, .*'soon'"),
    "transport of GPUs": (
        4,
        [*TORUS, "--sp-transport", "nvshmem"],
        "--sp-transport nvshmem cannot be used here: .*; use --sp-transport auto",
    ),
    "degrees": (
        2,
        ["--model", "Wan2.1-VACE-1.3B", *CHAIR, "--sp-backend", "usp", "--ulysses_degree", "8"],
        "ulysses_degree=8 x ring_degree=1 = 8, but 2 processes leave 2 for sequence parallelism; .*",
    ),
    "heads": (
        4,
        ["--model", "SD3.5", *CHAIR, "--sp-backend", "ulysses"],
        "ulysses_degree=4 does not divide the 38 heads of the model .*",
    ),
}


def own_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("sf-xfuser")]


@pytest.mark.parametrize("case", REFUSED)
def test_one_sentence_and_status_2(case, tmp_path):
    nproc, arguments, expected = REFUSED[case]
    env = {**OFFLINE, "HF_HOME": str(tmp_path)}
    output = torchrun("xdit_runner.py", tmp_path, *arguments, nproc=nproc, env=env, expect_failure=True).output
    (line,) = own_lines(output)
    assert re.fullmatch(f"sf-xfuser: {expected}", line), line
    assert "Traceback" not in output and "usage:" not in output, output
    assert len(re.findall("ended with exit status 2$", output, re.MULTILINE)) == nproc, output


def test_traceback_on_request(tmp_path):
    env = {**OFFLINE, "HF_HOME": str(tmp_path), "SF_XFUSER_TRACEBACK": "1"}
    output = torchrun(
        "xdit_runner.py", tmp_path, *TORUS, "--sp-plan", "x", nproc=1, env=env, expect_failure=True
    ).output
    assert "Traceback" in output and "ValueError: --sp-plan must be" in output and not own_lines(output)


def test_ranks_that_refuse_for_other_reasons(tmp_path):
    """A rank with another reason prints its own. Ranks differ in SF_XFUSER_ARGS, as machines of a job may."""
    arguments = [*FLUX, "--ulysses_degree", "2"]
    per_rank = json.dumps(["{", '{"backend": "torsu"}', '{"backend": "torus", "plan": "x"}', "{"])
    env = {**OFFLINE, "HF_HOME": str(tmp_path), "ARGS_OF_RANKS": per_rank}
    output = torchrun("xdit_runner.py", tmp_path, *arguments, nproc=4, env=env, expect_failure=True).output
    expected = [
        r"sf-xfuser \(rank 1\): SF_XFUSER_ARGS: --sp-backend must be .* did you mean torus\?",
        r"sf-xfuser \(rank 2\): SF_XFUSER_ARGS: --sp-plan must be .*, got 'x'",
        "sf-xfuser: SF_XFUSER_ARGS must be JSON like .*, got '{': .*",
    ]
    found = sorted(own_lines(output))
    assert len(found) == 3 and all(map(re.fullmatch, expected, found)), output
    assert len(re.findall("ended with exit status 2$", output, re.MULTILINE)) == 4, output


def test_torchrun_reports_status_2_of_every_rank(tmp_path):
    """For a model whose heads are unknown."""
    env = {**OFFLINE, "HF_HOME": str(tmp_path)}
    arguments = ["--model", "Krea-2-Raw", *CHAIR, "--sp-backend", "torus"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m"]
    finished = finish([*command, "xfuser.runner", *arguments], timeout=120, env=env, cwd=tmp_path)
    (line,) = own_lines(finished.output)
    assert "the number of attention heads is unknown; give --ulysses_degree and --ring_degree" in line
    assert "krea/krea-2-raw is not in the local cache, and HF_HUB_OFFLINE is set" in line
    assert len(re.findall(r"exitcode +: 2 ", finished.output)) == 4, finished.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [*TORUS, "--sp-topology", "2x2", "--nproc_per_node", "2"],
            "--sp-topology 2x2 describes 4 ranks, but .* has 2",
        ),
        ([*FLUX, "--sp-backend", "torsu"], "--sp-backend must be one of .*, got 'torsu'; did you mean torus\\?"),
    ],
)
def test_xdit_refuses_before_it_starts_ranks(arguments, expected, tmp_path):
    xdit = str(Path(sys.executable).with_name("xdit"))
    finished = finish([xdit, *arguments], timeout=120, env={**OFFLINE, "HF_HOME": str(tmp_path)}, cwd=tmp_path)
    assert finished.returncode == 2
    assert re.match(f"sf-xfuser: {expected}", own_lines(finished.output)[0]), finished.output
    assert "Traceback" not in finished.output and "torch.distributed" not in finished.output


def test_more_ranks_than_gpus():
    launched = LaunchEnvironment(rank=2, local_rank=2, world_size=4, local_world_size=4)
    expected = "4 ranks were started on a machine with 2 GPU(s): use --nproc-per-node 2"
    assert validation.missing_gpus(launched, 2) == expected
    assert validation.missing_gpus(launched, 3) is None
    assert validation.missing_gpus(launched, 0) is None  # CPU ranks


# -- the hub ---------------------------------------------------------------------------------------------------------


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A server with the hub's endpoints, and the requests that it gets. Its one repository ``some/flux`` is ``folder``;
    ``gated/...`` needs a licence, ``bare/...`` has no files, ``slow/...`` never answers, and others do not exist."""
    requests: list[str] = []
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            requests.append(f"{self.command} {self.path} {self.headers.get('authorization')}")
            headers, status, body = {"X-Repo-Commit": "c" * 40}, 200, b""
            repo, _, name = self.path.partition("?")[0].removeprefix("/api/models/").lstrip("/").partition("/resolve/")
            file = folder / name.partition("/")[2]
            if repo.startswith("slow/"):
                ended.wait(60)
            elif repo.startswith("gated/"):
                status, headers["X-Error-Code"] = 403, "GatedRepo"
            elif repo.startswith("some/flux") and self.path.startswith("/api/"):
                files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                names = [str(path.relative_to(folder)) for path in files]
                siblings = [{"rfilename": name} for name in names]
                sizes = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": name}
                    for name, path in zip(names, files, strict=True)
                ]
                answer = sizes if "/tree/" in repo else {"id": "some/flux", "sha": "c" * 40, "siblings": siblings}
                body = json.dumps(answer).encode()
            elif repo == "some/flux" and file.is_file():
                body, headers["ETag"] = file.read_bytes(), f'"{name}"'
            else:
                exists = repo.startswith(("some/flux", "bare/"))
                status, headers["X-Error-Code"] = 404, "EntryNotFound" if exists else "RepoNotFound"
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", requests
        finally:
            ended.set()
            server.shutdown()


FETCH = """
import sys
from sf_xfuser.integrations.xdit import known_models
known_models.FETCH_TIMEOUT_S = 3.0
for name in sys.argv[1:]:
    try:
        print(known_models.fetched_facts(name, {}).heads)
    except ValueError as error:
        print(error)
"""


def fetch(*names: str, **env: str) -> list[str]:
    """The heads of each model, or why they are unknown."""
    env = environment({"PYTHONWARNINGS": "ignore", **env})
    command = [sys.executable, "-c", FETCH, *names]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=True)
    return finished.stdout.splitlines()


def test_heads_from_the_hub(model_folder, tmp_path):
    cache = {"HF_HOME": str(tmp_path), "HF_TOKEN": "hf_token"}
    with hub(model_folder("flux")) as (address, requests):
        names = ["some/flux", "gated/flux", "bare/flux", "slow/flux", "black-forest-labs/FLUX.1-devv", "a b"]
        found = fetch(*names, HF_ENDPOINT=address, **cache)
        assert {line.split()[1] for line in requests if "some/flux" in line} == {
            "/some/flux/resolve/main/transformer/config.json"
        }
        assert all(line.endswith("Bearer hf_token") for line in requests if "some/flux" in line), requests
    expected = [
        "8",
        "gated/flux is gated: accept its licence at https://huggingface.co/gated/flux, then run .*HF_TOKEN",
        "bare/flux has no transformer/config.json",
        "slow/flux: the hub: waited 3 s, it did not answer",
        "black-forest-labs/FLUX.1-devv is not on the hub, or private; did you mean black-forest-labs/FLUX.1-dev\\?",
        "a b: .*",
    ]
    assert len(found) == len(expected) and all(map(re.fullmatch, expected, found)), found
    # now cached: no network
    assert fetch("some/flux", HF_ENDPOINT="http://127.0.0.1:1", **cache) == ["8"]
    assert fetch("some/other", HF_ENDPOINT="http://127.0.0.1:1", **cache, **OFFLINE) == [
        "some/other is not in the local cache, and HF_HUB_OFFLINE is set"
    ]


def test_a_first_launch_from_an_empty_cache(model_folder, tmp_path):
    """xDiT's own loading then downloads the rest into the same cache."""
    script = Path(__file__).parents[2] / "examples" / "03_flux_with_the_flag.py"
    arguments = ["--model", "some/flux", *CHAIR, "--height", "128", "--width", "128", "--num_inference_steps", "1"]
    arguments += ["--max_sequence_length", "16", "--out", str(tmp_path), "--sp-backend", "torus"]
    with hub(model_folder("flux")) as (address, requests):
        env = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": address}
        output = torchrun(os.fspath(script), *arguments, nproc=2, env=env, warm=False).output  # HF_* is read at import
    requests = [line for line in requests if "some/flux" in line]
    first = next(index for index, line in enumerate(requests) if "transformer/config.json" not in line)
    assert first > 0, requests
    assert (tmp_path / "image.png").stat().st_size > 0
    own = [line for line in output.splitlines() if "--sp-" in line]
    assert sum("planned for" in line for line in own) == sum("Torus Attention;" in line for line in own) == 1, own
