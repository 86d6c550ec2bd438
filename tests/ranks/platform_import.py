"""One process: every module of xDiT imports, all hooks are applied, and remove() restores everything.

With the argument "cuda-build" PyTorch claims to be built for CUDA 13, on a machine without a GPU.
"""

import importlib
import inspect
import os
import pkgutil
import sys

import torch

from sf_xfuser.integrations.hooks import _ABSENT

if "cuda-build" in sys.argv[1:]:
    torch.version.cuda = "13.0"
    torch.backends.cudnn.is_available = lambda: True

from sitecustomize import HOOK_SET  # isort: skip  (already imported by the interpreter)

# Without triton this module keeps the placeholder that defined its kernels.
KEEPS_PLACEHOLDER = "xfuser.core.sparge_attention.block_mask"
# Not imported: the ring package (does not import with yunchang 0.6.4 on any platform), and Ray.
SKIPPED = ("xfuser.core.long_ctx_attention.ring", "xfuser.ray")
SOURCES = os.path.dirname(os.path.realpath(sys.modules["sf_xfuser.integrations"].__file__))


def import_all(package):
    failed = {}
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if module.name.startswith(SKIPPED):
            continue
        try:
            imported = importlib.import_module(module.name)
        except Exception as error:
            failed[module.name] = error
            continue
        if module.ispkg:
            failed |= import_all(imported)
    return failed


def from_platform(value):
    """Whether ``value`` is a function of the hooks, or a class of cpu_platform or an instance of one."""
    kind = value if inspect.isclass(value) else type(value)
    code = getattr(inspect.unwrap(value, stop=lambda f: hasattr(f, "__code__")), "__code__", None)
    return kind.__module__.startswith("sf_xfuser.integrations.xdit.cpu_platform") or (
        code is not None and os.path.realpath(code.co_filename).startswith(SOURCES)
    )


def traces():
    """Every attribute of a host module, or of a class in one, that cpu_platform defines."""
    roots = ("xfuser", "yunchang", "diffusers", "transformers.modeling_utils", "torch.cuda")
    for name, module in list(sys.modules.items()):
        if not (name in roots or name.startswith(tuple(f"{root}." for root in roots))):
            continue
        if name == KEEPS_PLACEHOLDER:
            continue
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if from_platform(value):
                yield f"{name}.{key}"
            if inspect.isclass(value) and value.__module__ == name:
                yield from (f"{name}.{key}.{member}" for member, value_ in vars(value).items() if from_platform(value_))


def main():
    import xfuser
    import xfuser.cli
    import xfuser.runner
    from xfuser import envs

    failed = import_all(xfuser)
    unexpected = {name: error for name, error in failed.items() if not isinstance(error, ModuleNotFoundError)}
    assert not unexpected, unexpected
    missing_packages = sorted({str(error.name) for error in failed.values()})
    assert not [name for name in missing_packages if name.startswith(("xfuser", "yunchang", "triton"))], failed

    namespace = {}
    exec("from xfuser.core.distributed import *", namespace)
    assert "initialize_model_parallel" in namespace and "get_runtime_state" in namespace

    assert envs.get_device(1) == torch.device("cpu") and envs.get_platform() == "cpu"
    assert envs.get_torch_distributed_backend() == "gloo"
    assert envs.PACKAGES_CHECKER.get_packages_info()["has_long_ctx_attn"]
    not_applied = [(hook.module, hook.name) for hook in HOOK_SET.hooks if HOOK_SET.state(hook) != "applied"]
    assert not not_applied, not_applied
    expected = {"torch.cuda.synchronize", "xfuser.core.distributed.group_coordinator.synchronize"}
    assert expected <= set(traces()), sorted(traces())
    undo = [entry for entries in HOOK_SET._undo.values() for entry in entries]

    HOOK_SET.remove()
    assert not set(traces()), set(traces())
    for entry in undo:
        assert vars(entry.owner).get(entry.attribute, _ABSENT) is entry.original, entry
    assert "triton" not in sys.modules or sys.modules["triton"].__spec__ is not None
    assert not envs.PACKAGES_CHECKER.get_packages_info()["has_long_ctx_attn"]
    if torch.version.cuda is None:
        try:
            envs.get_torch_distributed_backend()
        except NotImplementedError:
            pass
        else:
            raise AssertionError("xDiT's own function should be restored")
    print("imported and removed; not importable without", missing_packages)


main()
