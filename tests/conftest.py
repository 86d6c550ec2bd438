"""Settings for the whole suite."""

import os

from hypothesis import settings

# Kernels run in Triton's interpreter in this process. Triton reads it when it is first imported, as xfuser does;
# programs that tests start do not see it (launch.py).
os.environ["TRITON_INTERPRET"] = "1"

# Timings are noisy on shared machines, and no test here is about time.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
