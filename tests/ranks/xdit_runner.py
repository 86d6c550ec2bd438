"""``python -m xfuser.runner`` in a folder. Usage: xdit_runner.py FOLDER ARGUMENTS...

ARGS_OF_RANKS in the environment is JSON: a value of SF_XFUSER_ARGS for each rank.
"""

import json
import os
import runpy
import sys

os.chdir(sys.argv.pop(1))
if "ARGS_OF_RANKS" in os.environ:
    os.environ["SF_XFUSER_ARGS"] = json.loads(os.environ["ARGS_OF_RANKS"])[int(os.environ["RANK"])]
runpy.run_module("xfuser.runner", run_name="__main__", alter_sys=True)
