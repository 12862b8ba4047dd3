"""Being here puts tests/ on sys.path, for imports of `reference` and the helpers beside it."""

import os

# One thread a process: workers and the processes that tests start share the cores. Before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# The gate must not depend on luck: the same examples every time. Look further with
# `pytest tests/properties --hypothesis-profile=search`.
settings.register_profile("gate", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=2000, deadline=None)
settings.load_profile("gate")
