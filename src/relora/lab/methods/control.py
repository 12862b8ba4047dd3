"""control: the paper's control, a smaller model that trains at full rank as many parameters as ReLoRA does.

Depth and heads stay, so that what differs is width. For a hidden_size h the intermediate_size f that gives
the wanted count follows from 2 V h + L (4 h^2 + 3 h f + 2 h) + h; of the widths that heads allow, the one is
taken whose f / h is nearest to the large model's.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from relora.errors import ConfigError
from relora.lab.methods.options import ControlOptions
from relora.train.architecture import ModelConfig
from relora.train.blueprint import blueprint
from relora.train.config import Recipe
from relora.train.method_parts import PreparedData
from relora.train.phase import inject_factors, num_parameters
from relora.train.training_method import TrainingMethod

TOLERANCE = 0.02
"""How far the count may be from the wanted one."""


class Control(TrainingMethod):
    """Full-rank AdamW on a smaller model."""

    _facts: dict[str, Any]

    def model_recipe(self, data: PreparedData) -> Recipe:
        """Return the recipe with the small model's sizes."""
        wanted = wanted_parameters(self.recipe, data.vocab_size)
        sizes = control_sizes(self.recipe.model, vocab_size=data.vocab_size, parameters=wanted)
        return replace(self.recipe, model=sizes)

    def facts(self) -> dict[str, Any]:
        """Return the sizes chosen."""
        return self._facts

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Note the size, from the model itself, and what it was meant to be."""
        del optimizer
        config = cast(Any, model).config
        wanted = wanted_parameters(self.recipe, config.vocab_size)
        count = num_parameters(model)
        assert abs(count - wanted) <= TOLERANCE * wanted
        self._facts = {
            "wanted_parameters": wanted,
            "parameters": count,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
        }


def wanted_parameters(recipe: Recipe, vocab_size: int) -> int:
    """Return the count the control should have: given, or what ReLoRA trains by this recipe."""
    options = recipe.options
    assert isinstance(options, ControlOptions)
    if options.parameters is not None:
        return options.parameters
    return inject_factors(blueprint(recipe, vocab_size=vocab_size), recipe).num_trainable_parameters


def control_sizes(model: ModelConfig, *, vocab_size: int, parameters: int) -> ModelConfig:
    """Return the sizes of a model of the same depth with nearly so many parameters.

    Raises:
        ConfigError: if no width has a count within 2 %.
    """
    large = model.architecture
    assert large is not None
    layers, heads = large.num_hidden_layers, large.num_attention_heads
    best: tuple[float, int, int] | None = None
    for hidden in range(2 * heads, 4 * large.hidden_size, 2 * heads):
        left = parameters - (2 * vocab_size * hidden + layers * (4 * hidden**2 + 2 * hidden) + hidden)
        intermediate = round(left / (3 * hidden * layers))
        if intermediate < 1:
            break
        miss = abs(left - 3 * hidden * intermediate * layers) / parameters
        shape = intermediate / hidden / (large.intermediate_size / large.hidden_size)
        distance = max(shape, 1 / shape)
        if miss <= TOLERANCE and (best is None or distance < best[0]):
            best = distance, hidden, intermediate
    if best is None:
        raise ConfigError(
            f'run.method "control": no model of {layers} layers and {heads} heads has {parameters:,} '
            f"parameters with a vocabulary of {vocab_size}: give fewer heads, or [method] parameters"
        )
    return ModelConfig(
        preset=None,
        hidden_size=best[1],
        intermediate_size=best[2],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=large.max_position_embeddings,
    )
