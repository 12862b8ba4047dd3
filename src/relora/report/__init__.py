"""A run's files, made into one self-contained HTML page."""
