"""Being here puts tests/ on sys.path, so that tests import `reference` (independent references) and `loops`."""
