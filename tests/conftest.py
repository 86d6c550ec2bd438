"""Settings for the whole suite."""

import os
import signal

from hypothesis import settings

# Kernels run in Triton's interpreter in this process. Triton reads it when it is first imported, as xfuser does;
# programs that tests start do not see it (launch.py).
os.environ["TRITON_INTERPRET"] = "1"

# Timings are noisy on shared machines, and no test here is about time.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# Programs inherit that Ctrl-C is ignored, as it is where a script runs pytest in the background; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
