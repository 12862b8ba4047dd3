"""The loss of a causal language model as one module: token ids in, mean next-token loss out.

Forward and backward of a run go through it, so that whatever wraps a model (DDP, torch.compile) wraps the
loss too, and a head that is a plain linear layer is taken a chunk of tokens at a time. A model that does more
with its hidden states or logits than that (softcapping, a scale, a loss of its own) gives its own loss.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from relora.train.chunked_loss import auto_chunk_tokens, chunked_cross_entropy

_PROBE_TOKENS = 2


class TokenLoss(nn.Module):
    """A causal language model that returns its loss."""

    def __init__(self, model: PreTrainedModel, *, chunk_tokens: int | None) -> None:
        """Look whether the head can be taken in chunks, with a forward pass of two tokens.

        Args:
            model: On its device; its modules may be changed in place later (inject, fold), after which a new
                TokenLoss is made.
            chunk_tokens: Tokens whose logits exist at one time; None fits the device, 0 takes them whole.
        """
        super().__init__()
        self.model = model
        self.chunk_tokens = 0
        self.obstacle = None if chunk_tokens == 0 else _obstacle(model)
        """Why the logits exist whole although chunks were asked for; None if they do not."""
        if chunk_tokens != 0 and self.obstacle is None:
            weight = _head(model).weight
            self.chunk_tokens = chunk_tokens or auto_chunk_tokens(weight.shape[0], weight.device)

    @property
    def body(self) -> nn.Module:
        """What gives the last hidden states."""
        return _body(self.model)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean next-token loss of (B, T) token ids, in float32."""
        if not self.chunk_tokens:
            whole: Tensor = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            return whole.float()
        return _chunked(self.model, tokens, self.chunk_tokens)


def _head(model: PreTrainedModel) -> nn.Linear:
    return cast(nn.Linear, model.get_output_embeddings())


def _body(model: PreTrainedModel) -> nn.Module:
    """Return what gives the last hidden states: the decoder, which for OPT is inside the base model."""
    decoder = model.get_decoder()
    return cast(nn.Module, model.base_model if decoder is model else decoder)


def _chunked(model: PreTrainedModel, tokens: Tensor, chunk_tokens: int) -> Tensor:
    hidden: Tensor = _body(model)(input_ids=tokens, use_cache=False).last_hidden_state
    head = _head(model)
    return chunked_cross_entropy(
        hidden[:, :-1].flatten(0, 1),
        head.weight,
        head.bias,
        tokens[:, 1:].flatten(),
        chunk_tokens=chunk_tokens,
    ).float()


def _obstacle(model: PreTrainedModel) -> str | None:
    """Say why a model's loss is not the plain cross-entropy of its head on its last hidden states, or None.

    A short forward pass shows it: the head must be given the base model's own output, and what it returns
    must be the logits. Where tensors have values, the two losses must agree as well.
    """
    head, body = model.get_output_embeddings(), _body(model)
    if type(head) is not nn.Linear:
        return f"its output head is a {type(head).__name__}, not a plain linear layer"
    if body is model:
        return "its hidden states cannot be had apart from its logits"
    states: list[Tensor] = []
    calls: list[tuple[Tensor, Tensor]] = []
    hooks = [
        body.register_forward_hook(lambda _, __, out: states.append(out[0])),
        head.register_forward_hook(lambda _, args, out: calls.append((args[0], out))),
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            tokens = torch.arange(_PROBE_TOKENS, device=head.weight.device).unsqueeze(0)
            tokens = tokens.clamp(max=head.weight.shape[0] - 1)
            own = model(input_ids=tokens, labels=tokens, use_cache=False)
            if not (len(states) == len(calls) == 1 and _is_same(calls[0][0], states[0])):
                return "its head is not given the last hidden states as they are"
            if not _is_same(calls[0][1], own.logits) or calls[0][1]._version:
                return "it changes the logits that its head returns"
            ours = _chunked(model, tokens, _PROBE_TOKENS)
            if not isinstance(ours, FakeTensor) and not torch.allclose(ours, own.loss.float(), rtol=1e-4):
                return "its loss is not the mean cross-entropy of the next token"
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return None


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are one and the same stretch of memory, with or without values in it."""
    shares = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return shares and one.shape == other.shape and one.storage_offset() == other.storage_offset()
