"""How much rank training has really gained: the spectrum of W_t - W_0 (paper section 4, figures 4 and 5).

    with N cycles of rank r:  rank(W_t - W_0) <= min(N * r, m, n)

Take `function_weights` before and after, and compare.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relora.errors import ConfigError
from relora.method.linear import LoRALinear
from relora.method.shards import gathered, reshard_, whole
from relora.method.targets import canonical_name, looks_linear


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Singular values of one layer's change, and what they say."""

    singular_values: Tensor
    """(min(out_features, in_features),), float64, largest first."""
    noise: float
    """Bound of what rounding alone puts into a singular value."""

    @property
    def rank(self) -> int:
        """Number of singular values above the noise."""
        return self.num_above(self.noise)

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007)."""
        total = float(self.singular_values.sum())
        if not total:
            return 0.0
        shares = self.singular_values / total
        return math.exp(float(torch.special.entr(shares).sum()))

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over squared spectral norm."""
        top = float(self.singular_values[0])
        return float((self.singular_values / top).square().sum()) if top else 0.0

    @property
    def condition_number(self) -> float:
        """Largest over smallest singular value; infinite where the change is rank-deficient."""
        if self.rank < len(self.singular_values):
            return math.inf
        return float(self.singular_values[0] / self.singular_values[-1])

    def num_above(self, threshold: float) -> int:
        """Count the singular values above `threshold`; the paper's figures count those below 0.1."""
        return int((self.singular_values > threshold).sum())


@torch.no_grad()
def function_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy the weight that each linear layer applies: base + delta where it carries factors.

    Of a sharded model every rank calls this, and gets all of it.

    Returns:
        Full module name -> (out_features, in_features) CPU copy, in the base's dtype or, for an injected
        layer, float64 from the base's master.
    """
    reshard_(model)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.drop_stale_residual_()
            everything = slice(None)
            delta = module.delta()
            rows = module.master_rows(everything).to(delta.dtype) + delta
            weights[canonical_name(name)] = gathered(rows, module.weight).cpu()
        elif looks_linear(module) and isinstance(weight := module._parameters.get("weight"), Tensor):
            plain = whole(weight.detach())
            rows = plain if isinstance(module, nn.Linear) else plain.T
            weights[canonical_name(name)] = rows.cpu().clone()
    return weights


def spectra(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Spectrum]:
    """Return the spectrum of after - before for each layer that both name.

    Args:
        before: `function_weights` of the model at the start.
        after: `function_weights` of the same model later.

    Raises:
        ConfigError: if the two name no layer in common.
    """
    names = [name for name in after if name in before]
    if not names:
        raise ConfigError("spectra: `before` and `after` name no layer in common: not the same model")
    return {name: spectrum(after[name].double() - before[name].double(), like=after[name]) for name in names}


def spectrum(delta: Tensor, *, like: Tensor | None = None) -> Spectrum:
    """Return the singular values of a change of a weight.

    Args:
        delta: (out_features, in_features).
        like: The weight itself: every merge has rounded it to float32, or to its own dtype where that is
            coarser (a folded bf16 layer), which puts noise of about eps * |W| * sqrt(out + in) into every
            singular value. None: the noise of `delta`'s own entries.
    """
    rounded = delta if like is None else like
    eps = max(torch.finfo(torch.float32).eps, torch.finfo(rounded.dtype).eps)
    scale = float(rounded.abs().max())
    # Rounding has a standard deviation of at most eps * |W| / sqrt(12), and a random matrix of it a
    # spectral norm of that times sqrt(out) + sqrt(in); the factor 4 leaves room for a hundred merges.
    noise = 4 * eps * scale * sum(math.sqrt(side) for side in delta.shape)
    return Spectrum(singular_values=torch.linalg.svdvals(delta.double()), noise=noise)
