"""Being here puts tests/ on sys.path, for imports of `reference` and `loops`."""
