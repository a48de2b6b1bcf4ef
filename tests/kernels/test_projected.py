"""The scan with its projections is the scan of the projected map, on every path."""

import pytest
import torch
import torch.nn.functional as F
from kernels.test_cuda_scan import emulator, make  # noqa: F401 (a fixture)

from kernels import emulated
from vmzoo_kernels import get_routes, projected, projected_scan, route_scan


def case(rank=6, dim=40, dtype=torch.float64, size=(5, 9), d_state=1, proj_dtype=None):
    inputs = make(size, dim, d_state, rank, 'cross', torch.float64, batch=2)
    x_proj = torch.randn(4, rank + 2 * d_state, dim, dtype=torch.float64) * dim**-0.5
    wide = torch.promote_types(dtype, torch.float32)
    tensors = [inputs.x.to(dtype), x_proj.to(proj_dtype or dtype), *(v.to(wide) for v in inputs[4:8])]
    tensors[2] = torch.log(-tensors[2])
    return [v.requires_grad_() for v in tensors], get_routes('cross', *size)


def gradients(function, tensors, routes, dy):
    y = function(*tensors, routes)
    return y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))


def unfused(x, x_proj, A_log, D, dt_weight, dt_bias, routes):
    x_dbl = F.linear(x, x_proj.flatten(0, 1)).unflatten(-1, x_proj.shape[:2])
    return route_scan(x, x_dbl, -torch.exp(A_log), D, dt_weight, dt_bias, routes, backend='torch')


def test_on_a_cpu_it_is_route_scan():
    tensors, routes = case()
    dy = torch.randn(2, 45, 40, dtype=torch.float64)
    got, want = gradients(projected_scan, tensors, routes, dy), gradients(unfused, tensors, routes, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@emulated.needs_compiler
@pytest.mark.parametrize('rank, d_state', [(6, 1), (12, 1), (5, 3)])
@pytest.mark.parametrize('proj_dtype', [torch.float16, torch.float32], ids=str)
def test_one_node_gives_the_same(emulator, monkeypatch, rank, d_state, proj_dtype):  # noqa: F811
    monkeypatch.setattr(projected, 'resolve_backend', lambda *args: 'cuda')
    tensors, routes = case(rank, 32, torch.float16, d_state=d_state, proj_dtype=proj_dtype)
    exact = [v.detach().double().requires_grad_() for v in tensors]
    dy = torch.randn(2, 45, 32)
    got, want = gradients(projected_scan, tensors, routes, dy), gradients(unfused, exact, routes, dy)
    assert got[0].grad_fn.name() == '_ProjectedBackward'
    for i, (a, b) in enumerate(zip(got, want)):
        assert a.dtype == (torch.float16 if i == 0 else tensors[i - 1].dtype)
        assert (a.double() - b).norm() < 2e-3 * b.norm(), i


@emulated.needs_compiler
def test_one_node_under_autocast_and_without_gradients(emulator, monkeypatch):  # noqa: F811
    monkeypatch.setattr(projected, 'resolve_backend', lambda *args: 'cuda')
    tensors, routes = case(12, 32, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        y = projected_scan(*tensors, routes)
        with torch.no_grad():
            assert torch.equal(projected_scan(*tensors, routes), y)
    assert y.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(y.float().sum(), tensors[0])
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()


@emulated.needs_compiler
def test_one_node_has_no_second_derivative(emulator, monkeypatch):  # noqa: F811
    monkeypatch.setattr(projected, 'resolve_backend', lambda *args: 'cuda')
    tensors, routes = case(6, 32, torch.float16)
    (gradient,) = torch.autograd.grad(projected_scan(*tensors, routes).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative'):
        gradient.sum().backward()


def test_shapes_that_do_not_fit_are_named():
    tensors, routes = case()
    with pytest.raises(ValueError, match=r'A should be \[K, D, N\]'):
        projected_scan(*tensors[:2], tensors[2][:, :8], *tensors[3:], routes)
    with pytest.raises(ValueError, match='routes over 45 positions do not fit'):
        projected_scan(tensors[0][:, :44], *tensors[1:], routes)


def test_a_backend_that_cannot_run_is_an_error():
    tensors, routes = case()
    with pytest.raises(RuntimeError, match="scan backend 'cuda' cannot run here"):
        projected_scan(*tensors, routes, backend='cuda')
