"""A tiny training loop: a model of odd shapes, and batches that are a function of the step alone."""

import copy
from collections import OrderedDict

import torch
from torch import nn

from relora import JaggedCosineLR, ReLoRA, inject


def tiny_model(dtype=torch.float32):
    """Two linear layers (11, 7) and (9, 11), with a norm that trains at full rank."""
    generator = torch.Generator().manual_seed(11)
    model = nn.Sequential(
        OrderedDict(up=nn.Linear(7, 11), norm=nn.LayerNorm(11), act=nn.Tanh(), down=nn.Linear(11, 9))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def batch(step, *, width=7, out=9, rows=16):
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(rows, width, generator=generator)
    return x, torch.randn(rows, out, generator=generator)


def adamw(model, **settings):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **({"lr": 1e-2} | settings))


class Loop:
    """Model, optimizers, restarts and perhaps a schedule, advanced in the order the README shows."""

    def __init__(
        self, config, model=None, make_optimizers=adamw, *, schedule=None, seed=0, wrap=None, **calendar
    ):
        self.model = tiny_model() if model is None else model
        self.dtype = next(self.model.parameters()).dtype
        inject(self.model, config, seed=seed)
        self.called = self.model if wrap is None else wrap(self.model)
        made = make_optimizers(self.model)
        self.optimizers = made if isinstance(made, list) else [made]
        self.schedulers = [JaggedCosineLR(o, **schedule) for o in self.optimizers] if schedule else []
        self.relora = ReLoRA(self.called, made, config, seed=seed, **calendar)
        self.reports = []

    def loss(self, step=0):
        x, y = batch(step)
        return (self.called(x.to(self.dtype)).float() - y).square().mean()

    def update(self, step):
        """Everything of a step but the restart."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self.loss(step)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item()

    def run(self, first, last):
        """Take the steps first .. last; return their losses."""
        losses = []
        for step in range(first, last + 1):
            losses.append(self.update(step))
            report = self.relora.after_step(step)
            self.reports += [report] if report else []
            for scheduler in self.schedulers:
                scheduler.step()
        return losses

    def factors(self):
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name}

    def state(self):
        """What a checkpoint would hold, as copies: of model, optimizers and counters."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return copy.deepcopy((self.model.state_dict(), optimizers, self.relora.state_dict()))

    def load(self, state, *, is_model_first=True):
        """Take it over, the model before or after the rest."""
        model, optimizers, counters = copy.deepcopy(state)  # optimizers keep what they load
        if is_model_first:
            self.model.load_state_dict(model)
        for optimizer, saved in zip(self.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(saved)
        self.relora.load_state_dict(counters)
        if not is_model_first:
            self.model.load_state_dict(model)

    def everything(self):
        """Every tensor and number training goes on from, as copies."""
        states = {
            f"optimizer {index}: {name} {key}": value
            for index, optimizer in enumerate(self.optimizers)
            for name, parameter in self.model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        counters = {f"relora: {key}": value for key, value in self.relora.state_dict().items()}
        rates = {
            f"rate {index}.{number}": group["lr"]
            for index, optimizer in enumerate(self.optimizers)
            for number, group in enumerate(optimizer.param_groups)
        }
        whole = self.model.state_dict() | states | counters | rates
        return {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in whole.items()}


def differing(left, right):
    """Names under which two `everything` are not bit-equal."""

    def same(a, b):
        if isinstance(a, torch.Tensor):
            # equal_nan: a refused restart leaves the NaN that it was refused for.
            return a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        return a == b

    assert left.keys() == right.keys()
    return [key for key in left if not same(left[key], right[key])]
