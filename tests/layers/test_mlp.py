"""The form of the MLP that trains on GPUs, on whatever device there is."""

import pytest
import torch

from vmzoo.layers import Mlp


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True)


def plainly(monkeypatch):
    """From here on, the layers one after the other."""
    monkeypatch.setattr(torch.Tensor, 'is_cuda', False)


@pytest.mark.parametrize(
    'dtype, autocast', [(torch.float64, False), (torch.bfloat16, False), (torch.float32, True)], ids=str
)
def test_same_gradients(monkeypatch, dtype, autocast):
    mlp = Mlp(6, 20, dtype=dtype)
    x = torch.randn(2, 3, 6, dtype=dtype, requires_grad=True)

    def gradients():
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            y = mlp(x)
        return y.grad_fn.name(), [y, *torch.autograd.grad(y.float().square().sum(), (x, *mlp.parameters()))]

    name, got = gradients()
    assert name == '_GeluLinearBackward'
    plainly(monkeypatch)
    _, want = gradients()
    torch.testing.assert_close(got, want)


def test_frozen_layers_and_gradients_of_gradients(monkeypatch):
    mlp = Mlp(3, 5, dtype=torch.float64)
    mlp.fc2.bias.requires_grad_(False)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert mlp(x).grad_fn.name() == '_GeluLinearBackward'
    assert torch.autograd.gradcheck(mlp, x)
    assert torch.autograd.gradgradcheck(mlp, x)


def test_keeps_no_activation(monkeypatch):
    mlp = Mlp(8, 32)

    def kept() -> int:
        memory = {}

        def keep(v: torch.Tensor) -> torch.Tensor:
            memory[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
            return v

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
            y = mlp(torch.randn(100, 8))
        assert y.requires_grad  # and with it all that it keeps is there until here
        return sum(memory.values())

    little = kept()
    plainly(monkeypatch)
    assert kept() - little == 100 * 32 * 4  # the activation


def test_what_is_hooked_or_replaced_is_called():
    mlp, seen = Mlp(4, 8), []
    mlp.act.register_forward_hook(lambda *args: seen.append('act'))
    mlp(torch.randn(2, 4))
    assert seen == ['act']
    for name, module in (('act', torch.nn.GELU('tanh')), ('fc2', torch.nn.Linear(8, 4))):
        mlp = Mlp(4, 8)
        setattr(mlp, name, module)
        assert mlp(torch.randn(2, 4)).grad_fn.name() != '_GeluLinearBackward'
