"""Adam in a gradient's subspace once more, in plain numpy float64 (arXiv 2403.03507, Algorithm 2)."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def galore_run(
    weight: Array,
    gradients: list[Array],
    *,
    rank: int,
    refresh_every: int,
    scale: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> Array:
    """Return the weight after a step for each gradient."""
    weight = weight.copy()
    first = second = np.zeros(())
    for done, gradient in enumerate(gradients):
        if done % refresh_every == 0:
            left, _, right = np.linalg.svd(gradient, full_matrices=False)
            basis = right[:rank].T if gradient.shape[0] >= gradient.shape[1] else left[:, :rank]
        on_the_right = gradient.shape[0] >= gradient.shape[1]
        low = gradient @ basis if on_the_right else basis.T @ gradient
        first = betas[0] * first + (1 - betas[0]) * low
        second = betas[1] * second + (1 - betas[1]) * low**2
        m_hat = first / (1 - betas[0] ** (done + 1))
        v_hat = second / (1 - betas[1] ** (done + 1))
        update = m_hat / (np.sqrt(v_hat) + eps)
        weight -= lr * scale * (update @ basis.T if on_the_right else basis @ update)
    return weight
