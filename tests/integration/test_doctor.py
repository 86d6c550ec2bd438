"""``sf-xfuser doctor`` in this environment and in damaged ones: a line per section, causes with fixes, no traceback."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys

import pytest

from sf_xfuser import cli, config, doctor
from sf_xfuser.transport.gpu import facts, nvshmem
from tests.launch import environment, run

SECTIONS = ["versions", "hooks", "accelerators", "transports", "host", "topology", "environment"]


def examine(tmp_path, files: dict[str, str] | None = None, **variables: str) -> tuple[dict, str]:
    """The report, and the text at 80 columns, of a new process with ``files`` in front of the installed packages."""
    for name, text in (files or {}).items():
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    env = environment({"PYTHONPATH": str(tmp_path / "packages"), "COLUMNS": "80", **variables})
    command = [sys.executable, "-m", "sf_xfuser.cli", "doctor", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    assert "Traceback" not in done.stdout + done.stderr, done
    report = json.loads((tmp_path / "report.json").read_text())
    assert done.returncode == int(not report["usable"])
    return report, done.stdout


def test_a_usable_installation_is_one_line_per_section_and_a_launch_line(tmp_path):
    report, text = examine(tmp_path, NCCL_P2P_DISABLE="1")
    found = {finding["name"]: finding for finding in report["findings"]}
    assert report["usable"] and list(dict.fromkeys(f["section"] for f in report["findings"])) == SECTIONS
    assert found["xfuser.model_executor.layers.usp.USP"]["detail"] == "applied"
    assert found["two_sided over gloo"]["detail"] == "available" and found["transformers"]["status"] == "ok"
    lines = text.splitlines()
    shown = [line.split()[1] for line in lines[: lines.index("")] if not line.startswith(" ")]
    assert shown == SECTIONS and all(len(line.rstrip()) <= 80 for line in lines[: lines.index("")])
    assert "warn  environment  NCCL_P2P_DISABLE=1: GPUs" in text and "fix: unset NCCL_P2P_DISABLE\n" in text
    assert f"\nusable\nTry next, then add --sp-backend torus to your xDiT launch line:\n  {report['try']}\n" in text


@pytest.mark.slow
def test_the_launch_line_runs(tmp_path):
    report, _ = examine(tmp_path)
    output = run(shlex.split(report["try"]), timeout=240).output
    assert "ring-alltoall" in output and "torus" in output


def test_modules_that_fail_for_one_reason_are_one_failure(tmp_path):
    report, text = examine(tmp_path, {"yunchang/__init__.py": "def"})
    assert sum(finding["status"] == "fail" for finding in report["findings"]) > 10
    assert text.count("\n\nfail  ") == 1 and "cannot be imported: SyntaxError" in " ".join(text.split())
    assert f'fix: {sys.executable} -c "import xfuser.config.args" shows where' in text
    assert "Without xDiT, this works already:" in text and "--variants single,torus" in report["try"]


def test_pytorch_that_cannot_be_imported_is_one_failure(tmp_path):
    report, text = examine(tmp_path, {"torch/__init__.py": "raise ImportError('no libcudart.so.12')"})
    failures = [finding for finding in report["findings"] if finding["status"] == "fail"]
    assert [failure["name"] for failure in failures] == ["torch"] and "no libcudart.so.12" in failures[0]["detail"]
    assert report["try"] == "" and "fix: pip install --force-reinstall torch==" in text


def test_versions_that_another_package_refuses_are_one_entry_with_one_fix(monkeypatch):
    installed = {"transformers": "4.30.0", "yunchang": "0.3", "huggingface-hub": "9.0"}
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: installed.get(name) or real(name))
    [(status, section, text, fix)] = doctor.problems(list(doctor._conflicts()))
    assert (status, section) == ("fail", "versions")
    assert "4.30.0 is installed, but xfuser" in text and "needs yunchang>=0.6.0" in text
    assert "'transformers>=" in fix and "'yunchang>=0.6.0'" in fix and "'diffusers'" in fix  # of a newer hub


def test_malformed_variables(monkeypatch):
    for name, value in {
        config.ARGS_VARIABLE: '{"backend": "tours"}',
        "SF_XFUSER_ARG": "{}",
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "GLOO_SOCKET_IFNAME": "eth77",
    }.items():
        monkeypatch.setenv(name, value)
    found = {f.name: f for f in (*doctor._environment(), *doctor._host())}
    assert found[config.ARGS_VARIABLE].status == "fail" and "got 'tours'" in found[config.ARGS_VARIABLE].detail
    assert found["SF_XFUSER_ARG"].status == "warn" and config.ARGS_VARIABLE in found["SF_XFUSER_ARG"].detail
    assert found["CUDA_DEVICE_MAX_CONNECTIONS"].fix == "export CUDA_DEVICE_MAX_CONNECTIONS=32"
    assert (
        found["GLOO_SOCKET_IFNAME"].status == "fail" and "eth77 is no interface" in found["GLOO_SOCKET_IFNAME"].detail
    )
    for text in ("{", "[" * 100_000, "3", '{"backend": ["torus"]}'):
        monkeypatch.setenv(config.ARGS_VARIABLE, text)
        assert any(f.name == config.ARGS_VARIABLE and f.status == "fail" for f in doctor._environment())


@pytest.mark.parametrize(
    ("prepare", "name", "detail"),
    [
        ("mount -t tmpfs -o ro none /dev/shm", "/dev/shm", "read-only: no shm transport"),
        ("mount -t tmpfs -o size=64m none /dev/shm", "/dev/shm", "0.062 of 0.062 GiB free"),
        ("hostname nowhere.invalid", "host name", "nowhere.invalid has no address"),
    ],
)
def test_a_host_that_cannot_share_memory_or_be_reached(prepare, name, detail):
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "--uts", "bash", "-ec"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, prepare], capture_output=True).returncode:
        pytest.skip("needs user namespaces")
    program = "from sf_xfuser import doctor; print(*doctor._host(), sep='\\n')"
    found = run([*unshare, f'{prepare}; {sys.executable} -c "{program}"']).output
    [line] = [line for line in found.splitlines() if f"name='{name}'" in line]
    assert "status='warn'" in line and detail in line and "fix=''" not in line


def test_the_environment_of_nvshmem(monkeypatch):
    """As on an AWS machine with NVSHMEM installed."""
    monkeypatch.setattr(nvshmem, "unavailable", lambda: None)
    monkeypatch.setattr(facts, "has_efa", lambda: True)
    monkeypatch.setenv("NVSHMEM_REMOTE_TRANSPORT", "ibrc")
    found = {finding.name: finding for finding in doctor._nvshmem_variables()}
    assert found["NVSHMEM_REMOTE_TRANSPORT"].status == "warn"
    assert "set it to libfabric" in found["NVSHMEM_REMOTE_TRANSPORT"].detail


def test_a_report_that_cannot_be_written_is_one_line(capsys, tmp_path):
    assert cli.main(["doctor", "--json", str(tmp_path / "missing/report.json")]) == 2
    assert capsys.readouterr().err.startswith("sf-xfuser doctor: --json ")
