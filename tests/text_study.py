"""A study whose [data] section names a folder of text, for tests of what happens when that changes."""

DATA = """\
data.source = "text"
data.path = "FOLDER/text"
data.cache_dir = "FOLDER/cache"
data.vocab_size = 300
data.seq_len = 16
data.heldout_fraction = 0.2
train.precision = "fp32"
"""
"""Lines of a study's [set]; FOLDER is to be replaced."""

SMALLER = '[methods.smaller]\nmethod = "full"\nset = { data.vocab_size = 280 }\n'
"""An arm with another [data] section."""

GRID = "grid = { optim.lr = [1e-3, 2e-3] }\n"
"""More of the last method, which gives the study a tuning split."""
