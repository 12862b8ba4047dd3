"""Exact pruning by a full stable sort, sharing nothing with src."""

import numpy as np


def smallest(values, count):
    """Mask of the `count` smallest magnitudes; among equals the first by index."""
    flat = np.abs(np.asarray(values, dtype=np.float64)).reshape(-1)
    mask = np.zeros(flat.size, dtype=bool)
    mask[np.argsort(flat, kind="stable")[:count]] = True
    return mask.reshape(np.shape(values))
