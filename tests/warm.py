"""A process that has imported the libraries, and forks ranks from itself.

`import xfuser` takes six seconds of CPU time, nearly all of it for PyTorch, diffusers and transformers; with some
sixty launches of four ranks that was most of the suite. This process imports those once. A rank forked from it differs
from one that torchrun starts in nothing else: neither xfuser nor yunchang nor sf_xfuser is imported yet, PyTorch has
not called its back-ends, the environment, the arguments, ``sys.path`` and the output are the rank's own, and what runs
at exit runs. `launch.Launch` starts it and asks for ranks, over the socket that is its argument.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = ("torch", "diffusers", "transformers", "peft")
GRACE = 30.0  # seconds between SIGTERM and SIGKILL for the ranks that are left, as torchrun


def main() -> None:
    server = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, whose end is ours
    _import(LIBRARIES)
    _import(_imported_by_xfuser())
    gc.collect()
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(server, 1 << 20, 2)
        if not message:
            return
        if os.fork() == 0:
            server.close()
            _launch(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        with suppress(ChildProcessError):  # of the launches that have ended
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass


def _import(names: Iterable[str]) -> None:
    for name in names:
        with suppress(Exception):  # as optional here as in xfuser
            importlib.import_module(name)


def _imported_by_xfuser() -> list[str]:
    """Modules of LIBRARIES that ``import xfuser`` takes in, found by a child, which forgets the rest."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        known = set(sys.modules)
        with suppress(Exception):
            importlib.import_module("xfuser")
        found = [name for name in sys.modules if name not in known and name.split(".")[0] in LIBRARIES]
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(found))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = json.loads(pipe.read())
    os.wait()
    return found


def _launch(request: dict[str, Any], output: int, status: int) -> NoReturn:
    """What torchrun does: a store, ranks, and the end of all when one fails."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(request["cwd"])
    os.write(status, f"{os.getpid()}\n".encode())
    listener = socket.create_server(("127.0.0.1", 0))
    nproc = request["nproc"]
    ranks: dict[int, int] = {}
    for rank in range(nproc):
        pid = os.fork()
        if pid == 0:
            port = listener.getsockname()[1]
            listener.close()
            os.close(status)
            _rank(request, rank, port)
        ranks[pid] = rank
    from torch.distributed import TCPStore

    store = TCPStore(
        "127.0.0.1", listener.getsockname()[1], None, True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    failed = _ended(ranks)
    del store
    os.write(status, b"1\n" if failed else b"0\n")
    os._exit(0)


def _ended(ranks: dict[int, int]) -> bool:
    """Wait for all; whether one failed, and then the others were ended."""
    failed, until = False, 0.0
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG if failed else 0)
        if pid:
            rank, code = ranks.pop(pid), os.waitstatus_to_exitcode(status)
            if code and not (failed and code == -signal.SIGTERM):
                print(f"rank {rank} ended with exit status {code}", flush=True)
            if code and not failed:
                failed, until = True, time.monotonic() + GRACE
                for other in ranks:
                    os.kill(other, signal.SIGTERM)
        elif time.monotonic() < until:
            time.sleep(0.05)
        else:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return failed


def _rank(request: dict[str, Any], rank: int, port: int) -> NoReturn:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    size, (script, *arguments) = str(request["nproc"]), request["argv"]
    os.environ.clear()
    os.environ.update(
        request["env"], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, GROUP_RANK="0",
        GROUP_WORLD_SIZE="1", ROLE_RANK=str(rank), ROLE_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="warm", TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_MAX_RESTARTS="0",
    )  # fmt: skip
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", buffering=0, closefd=False), write_through=True)
    sys.argv = [script, *arguments]
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:1] = [str(Path(script).parent), *folders]
    code = 0
    try:
        import torch

        if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "0":
            torch._import_device_backends()
        for folder in folders:
            if (Path(folder) / "sitecustomize.py").exists():
                sys.modules.pop("sitecustomize", None)  # that of the installed Python
                importlib.import_module("sitecustomize")
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        code = _status(exit)
    except BaseException:
        code = 1
        try:
            sys.excepthook(*sys.exc_info())
        except SystemExit as exit:
            code = _status(exit)
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _status(exit: SystemExit) -> int:
    if isinstance(exit.code, str):
        print(exit.code, file=sys.stderr)
    return exit.code if isinstance(exit.code, int) else int(exit.code is not None)


if __name__ == "__main__":
    main()
