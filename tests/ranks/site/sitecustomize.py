"""Runs in every Python process that has this folder on PYTHONPATH.

With SF_XFUSER_AUTOLOAD=0 it installs the CPU platform before xfuser is imported, to test it without the plugin. With
TINY_FLUX set to a model folder it registers the runner model "tiny-flux" as a user's package would
(``register_model``).
"""

import os
from dataclasses import replace

from sf_xfuser.integrations.hooks import Hook, HookSet
from sf_xfuser.integrations.xdit import cpu_platform


def _register_tiny_flux(path):
    from xfuser.model_executor.models.runner_models.base_model import register_model
    from xfuser.model_executor.models.runner_models.flux import xFuserFluxModel

    @register_model("tiny-flux")
    class TinyFlux(xFuserFluxModel):
        settings = replace(xFuserFluxModel.settings, model_name=os.environ["TINY_FLUX"])

    return path


REGISTER = Hook(
    module="xfuser.model_executor.models.runner_models",
    name="__path__",
    wrap=_register_tiny_flux,
    why="`python -m xfuser.runner` knows only the models that were registered before it looks one up",
    remove_when="xDiT discovers registered models of other packages",
)

PLATFORM = cpu_platform.HOOKS if os.environ.get("SF_XFUSER_AUTOLOAD") == "0" else ()
HOOK_SET = HookSet([*PLATFORM, *([REGISTER] if "TINY_FLUX" in os.environ else [])])
HOOK_SET.install()
