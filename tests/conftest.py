"""Being here puts tests/ on sys.path, for imports of `reference` and the helpers beside it."""

from hypothesis import settings

# The gate must not depend on luck: the same examples every time. Look further with
# `pytest tests/properties --hypothesis-profile=search`.
settings.register_profile("gate", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=2000, deadline=None)
settings.load_profile("gate")
