"""The loss in chunks: the plain loss and its gradients, for every head that is a plain linear layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from relora.train.chunked_loss import auto_chunk_tokens, chunked_cross_entropy

N, D, V = 13, 5, 11
CHUNKS = [1, 4, 13, 100]


def problem(dtype: torch.dtype, *, has_bias: bool) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, D), (V, D), *([(V,)] if has_bias else [])]
    leaves = [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [leaf.requires_grad_() for leaf in leaves], torch.randint(0, V, (N,), generator=generator)


def in_chunks(leaves: list[Tensor], targets: Tensor, chunk_tokens: int) -> Tensor:
    hidden, weight, *bias = leaves
    return chunked_cross_entropy(
        hidden, weight, bias[0] if bias else None, targets, chunk_tokens=chunk_tokens
    )


def whole(leaves: list[Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(*leaves).float() if leaves[0].dtype != torch.float64
                           else F.linear(*leaves), targets)  # fmt: skip


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_loss_and_gradients_are_the_plain_ones(chunk_tokens: int, has_bias: bool) -> None:
    # float64: sums of 13 x 11 terms in another order differ by a few units in the last place.
    leaves, targets = problem(torch.float64, has_bias=has_bias)
    ours, plain = in_chunks(leaves, targets, chunk_tokens), whole(leaves, targets)
    torch.testing.assert_close(ours, plain, rtol=1e-14, atol=1e-14)
    got, wanted = torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * plain, leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_float32_agrees_to_its_rounding(chunk_tokens: int) -> None:
    leaves, targets = problem(torch.float32, has_bias=True)
    ours, plain = in_chunks(leaves, targets, chunk_tokens), whole(leaves, targets)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    got, wanted = torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_bfloat16_autocast_is_as_near_the_truth_as_the_plain_loss(chunk_tokens: int) -> None:
    exact, targets = problem(torch.float64, has_bias=True)
    truth = torch.autograd.grad(whole(exact, targets), exact)
    leaves, _ = problem(torch.float32, has_bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = in_chunks(leaves, targets, chunk_tokens), whole(leaves, targets)
    assert ours.dtype == torch.float32
    got, wanted = torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves)
    for mine, theirs, right in zip(got, wanted, truth, strict=True):
        assert mine.dtype == torch.float32
        # Twice the plain error: chunks round their parts of dW to bf16, the plain loss their sum.
        assert (mine - right).norm() <= 2 * (theirs - right).norm() + 1e-3 * right.norm()


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_only_what_trains_gets_a_gradient(trained: int) -> None:
    leaves, targets = problem(torch.float64, has_bias=True)
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index == trained)
    in_chunks(leaves, targets, 4).backward()
    (wanted,) = torch.autograd.grad(whole(leaves, targets), [leaves[trained]])
    assert [leaf.grad is not None for leaf in leaves] == [index == trained for index in range(3)]
    torch.testing.assert_close(leaves[trained].grad, wanted, rtol=1e-13, atol=1e-14)


def test_without_gradients_nothing_is_kept() -> None:
    leaves, targets = problem(torch.float64, has_bias=True)
    with torch.no_grad():
        loss = in_chunks(leaves, targets, 4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, whole(leaves, targets).detach(), rtol=1e-14, atol=1e-14)


def test_gradients_add_up_over_micro_steps() -> None:
    leaves, targets = problem(torch.float64, has_bias=False)
    for _ in range(2):
        in_chunks(leaves, targets, 5).backward()
    wanted = torch.autograd.grad(2 * whole(leaves, targets), leaves)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(wanted), rtol=1e-13, atol=1e-14)


def test_a_second_backward_pass_is_refused_in_words() -> None:
    leaves, targets = problem(torch.float64, has_bias=False)
    loss = in_chunks(leaves, targets, 5)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[400.0], [-400.0]], requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, None, torch.tensor([0, 0]), chunk_tokens=1)
    loss.backward()
    assert loss.item() == pytest.approx(240_000 / 2) and hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_chunks_fit_the_device() -> None:
    assert auto_chunk_tokens(32_000, torch.device("cpu")) == 256
    assert auto_chunk_tokens(32_000, torch.device("cuda")) == 1048
    assert auto_chunk_tokens(1_000_000, torch.device("cuda")) == 256
