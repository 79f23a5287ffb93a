"""The split cross-entropy against PyTorch's own over all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlmds.models import loss
from vlmds.models.loss import can_split, token_losses
from vlmds.planning.memory import saved_bytes

K, D, V = 11, 16, 50


def made(dtype=torch.float32):
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=False, dtype=dtype).requires_grad_(False)
    return (torch.randn(K, D, dtype=dtype) * 3).requires_grad_(), head, torch.randint(V, (K,))


@pytest.mark.parametrize("tokens", [1, 4, 11, 128])
def test_losses_and_gradient_are_those_of_all_logits(monkeypatch, tokens):
    monkeypatch.setattr(loss, "TOKENS", tokens)
    hidden, head, targets = made(torch.float64)
    weights = torch.rand(K)  # of each token's loss in what is minimised
    found = token_losses(hidden, head, targets)
    expected = F.cross_entropy(head(hidden), targets, reduction="none")
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)
    (got,) = torch.autograd.grad((found * weights).sum(), hidden)
    (want,) = torch.autograd.grad((expected * weights).sum(), hidden)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_as_near_as_pytorchs_own():
    hidden, head, targets = made(torch.bfloat16)
    exact = hidden.detach().double().requires_grad_()
    true = F.cross_entropy(exact @ head.weight.double().T, targets, reduction="none")
    own = F.cross_entropy(head(hidden).float(), targets, reduction="none")
    found = token_losses(hidden, head, targets)
    assert found.dtype == torch.float32
    assert (found - true).abs().max() <= 1.01 * (own - true).abs().max()
    gradients = [
        torch.autograd.grad(x.sum(), y)[0].double() for x, y in ((true, exact), (own, hidden), (found, hidden))
    ]
    error = [(g - gradients[0]).norm() / gradients[0].norm() for g in gradients[1:]]
    assert error[1] < max(1.5 * error[0], 0.01)


def test_a_scaled_loss_underflows_nowhere():
    """The step's loss is divided by the tokens of the global batch, then grows by the world size."""
    hidden, head, targets = made()
    small = torch.autograd.grad((token_losses(hidden, head, targets) * 1e-6).sum(), hidden)[0]
    large = torch.autograd.grad(token_losses(hidden, head, targets).sum(), hidden)[0]
    torch.testing.assert_close(small * 1e6, large)


def test_large_and_equal_logits():
    hidden, head, targets = made()
    huge = (hidden.detach() * 1e4).requires_grad_()
    expected = F.cross_entropy(head(huge), targets, reduction="none")
    torch.testing.assert_close(token_losses(huge, head, targets), expected)
    zero = torch.zeros(2, D, requires_grad=True)
    torch.testing.assert_close(token_losses(zero, head, targets[:2]), torch.full((2,), V).float().log())


def test_no_logits_are_kept_for_the_backward_pass():
    hidden, head, targets = made()
    kept = saved_bytes(lambda: token_losses(hidden, head, targets), own=[head.weight])
    assert kept == hidden.nbytes
    with torch.no_grad():
        assert saved_bytes(lambda: token_losses(hidden, head, targets), own=[]) == 0


def test_what_is_no_plain_frozen_output_layer_is_left_to_the_model():
    _, head, _ = made()
    assert can_split(head, "qwen3") and not can_split(head, "gemma2")
    assert not can_split(nn.Linear(D, V).requires_grad_(False), "qwen3")  # with a bias
    assert not can_split(head.requires_grad_(True), "qwen3")
