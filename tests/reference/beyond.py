"""The policies beyond the paper once more, dense and in plain numpy float64; shares no code with src.

Sources: the formulas of FRUGAL (Adam on a subspace, sign on the rest), LDAdam's and the generalised transport
of moments, SCALE's column normalisation, and Adam's definition.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def complement(gradient: Array, lora_a: Array) -> Array:
    """Return the part of (out, in) outside the row space of lora_a, by a least-squares fit of every row; what
    rounding leaves of an entry that lies in it is 0, so that it has no sign.
    """
    coefficients, *_ = np.linalg.lstsq(lora_a.T, gradient.T, rcond=None)
    rest = gradient - (lora_a.T @ coefficients).T
    return np.where(np.abs(rest) < 1e-12 * np.abs(gradient).max(), 0.0, rest)


def majority(gradients: list[Array]) -> Array:
    """Return what most of the gradients say of each entry: -1, 0 (a tie) or 1."""
    votes = np.zeros_like(gradients[0])
    for gradient in gradients:
        votes[gradient > 0] += 1
        votes[gradient < 0] -= 1
    return np.where(votes > 0, 1.0, np.where(votes < 0, -1.0, 0.0))


def unit_columns(gradient: Array) -> Array:
    """Scale each column to root mean square 1."""
    out = np.zeros_like(gradient)
    for k in range(gradient.shape[1]):
        rms = math.sqrt(float(np.mean(gradient[:, k] ** 2)))
        out[:, k] = gradient[:, k] / rms if rms else 0.0
    return out


class SplitAdam:
    """Adam on the coordinates of W in the rows of A, sign descent on the rest; W itself is dense."""

    def __init__(self, weight: Array, lora_a: Array, *, betas: tuple[float, float], eps: float) -> None:
        self.weight, self.lora_a, self.betas, self.eps = weight.copy(), lora_a, betas, eps
        self.first = np.zeros((weight.shape[0], len(lora_a)))
        self.second = np.zeros_like(self.first)
        self.steps = 0

    def step(self, gradient: Array, *, lr: float, scaling: float, sign_lr: float) -> None:
        """Take one step with the gradient of W."""
        self._step_in_the_rows(gradient, lr=lr, scaling=scaling)
        self.weight -= sign_lr * np.sign(complement(gradient, self.lora_a))

    def _step_in_the_rows(self, gradient: Array, *, lr: float, scaling: float) -> None:
        self.steps += 1
        low = scaling * gradient @ self.lora_a.T
        beta1, beta2 = self.betas
        self.first = beta1 * self.first + (1 - beta1) * low
        self.second = beta2 * self.second + (1 - beta2) * low**2
        mean = self.first / (1 - beta1**self.steps)
        size = np.sqrt(self.second / (1 - beta2**self.steps)) + self.eps
        self.weight -= scaling * (lr * mean / size) @ self.lora_a


class SplitMuon(SplitAdam):
    """The same with Muon's step on the rest, without Nesterov's look ahead."""

    def __init__(self, weight: Array, lora_a: Array, *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(weight, lora_a, betas=betas, eps=eps)
        self.mean = np.zeros_like(weight)

    def step(  # type: ignore[override]
        self, gradient: Array, *, lr: float, scaling: float, rest_lr: float, decay: float
    ) -> None:
        """Take one step with the gradient of W."""
        self._step_in_the_rows(gradient, lr=lr, scaling=scaling)
        self.mean = decay * self.mean + (1 - decay) * complement(gradient, self.lora_a)
        step = newton_schulz(complement(self.mean, self.lora_a))
        self.weight -= rest_lr * 0.2 * math.sqrt(max(gradient.shape)) * complement(step, self.lora_a)


def second_moment_carried(moment: Array, old: Array, new: Array) -> Array:
    """Return v in the new rows' coordinates, entry by entry."""
    out = np.zeros((moment.shape[0], len(new)))
    for i in range(moment.shape[0]):
        mean = sum(moment[i]) / len(old)
        for j in range(len(new)):
            seen = [float(np.dot(old[k], new[j])) ** 2 for k in range(len(old))]
            mixed = sum(seen[k] * moment[i, k] for k in range(len(old)))
            out[i, j] = max(0.0, mixed + mean * max(0.0, 1 - sum(seen)))
    return out


def captured(gradient: Array, rows: Array) -> float:
    """Return the energy of (out, in) in the span of orthonormal rows, over the most so many rows can have."""
    best = np.linalg.svd(gradient, compute_uv=False)[: len(rows)]
    return float(np.sum((gradient @ rows.T) ** 2) / np.sum(best**2))


def newton_schulz(matrix: Array) -> Array:
    """Return what five iterations of Muon's polynomial make of a matrix: of its singular values, as an odd
    polynomial acts on nothing else.
    """
    norm = math.sqrt(float(np.sum(matrix**2)))
    u, s, vh = np.linalg.svd(matrix / norm if norm else matrix, full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return np.asarray(u @ np.diag(s) @ vh)
