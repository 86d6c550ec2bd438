"""Settings for the whole suite."""

from hypothesis import settings

# Timings are noisy on shared machines, and no test here is about time.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
