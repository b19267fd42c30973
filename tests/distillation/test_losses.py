"""The transfer loss, beside numpy."""

import numpy as np
import pytest
import torch

from smi_fast.distillation.losses import transfer_loss


def test_the_loss_is_equation_6(seed):
    s, t = np.random.default_rng(seed).normal(size=(2, 7, 5)) * 4
    p, q = (np.exp(x / 20) / np.exp(x / 20).sum(1, keepdims=True) for x in (t, s))
    expected = 400 * (p * np.log(p / q)).sum(1).mean()
    student = torch.from_numpy(s).requires_grad_()
    loss = transfer_loss(student, torch.from_numpy(t), 20)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    (grad,) = torch.autograd.grad(loss, student)
    np.testing.assert_allclose(grad.numpy(), 20 * (q - p) / 7, rtol=1e-9, atol=1e-12)
