"""Linear layers through oneDNN: the same function as torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vmzoo.layers import Linear, linear


@pytest.fixture(params=['inference', 'training'], autouse=True)
def mode(request):
    with torch.set_grad_enabled(request.param == 'training'):
        yield request.param


def layer(out=5, inner=7):
    return torch.randn(out, inner, requires_grad=True), torch.randn(out, requires_grad=True)


INPUTS = {
    'rows': lambda: torch.randn(3, 7),
    'one row': lambda: torch.randn(7),
    'map': lambda: torch.randn(2, 3, 4, 7),
    'transposed': lambda: torch.randn(2, 7, 4).mT,
    'part of rows': lambda: torch.randn(3, 14)[:, ::2],
    'repeated': lambda: torch.randn(1, 7).expand(3, 7),
    'empty': lambda: torch.randn(0, 7),
}


@pytest.mark.parametrize('x', INPUTS.values(), ids=INPUTS)
def test_is_the_plain_layer(x):
    x, (weight, bias) = x(), layer()
    for w in (weight, torch.randn(7, 5).t(), torch.randn(5, 14)[:, 1::2]):
        for b in (bias, None, torch.randn(10)[::2], torch.randn(1).expand(5)):
            got, want = linear(x, w, b), F.linear(x, w, b)
            assert got.shape == want.shape
            torch.testing.assert_close(got, want)


def test_refuses_what_the_plain_layer_refuses():
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        linear(torch.randn(3, 6), torch.randn(5, 7))
    with pytest.raises(RuntimeError, match='same dtype'):
        linear(torch.randn(3, 7), torch.randn(5, 7, dtype=torch.float64))


def test_gradients(mode):
    (weight, bias), x = layer(), torch.randn(3, 7, requires_grad=True)
    if mode == 'inference':
        assert not linear(x, weight, bias).requires_grad
        return
    for leaves in ((x, weight, bias), (x,), (bias,)):
        frozen = [v if any(v is leaf for leaf in leaves) else v.detach() for v in (x, weight, bias)]
        grads = [torch.autograd.grad(f(*frozen).square().sum(), leaves) for f in (linear, F.linear)]
        for got, want in zip(*grads):
            torch.testing.assert_close(got, want)


def test_autocast():
    weight, bias = layer()
    with torch.autocast('cpu', torch.bfloat16):
        assert linear(torch.randn(3, 7), weight, bias).dtype == torch.bfloat16


def test_transforms(recwarn):
    weight, bias = layer()
    x = torch.randn(4, 3, 7)
    torch.testing.assert_close(torch.vmap(lambda v: linear(v, weight, bias))(x), F.linear(x, weight, bias))
    assert not recwarn.list  # as there would be of an operator that torch maps by a loop
    _, tangent = torch.func.jvp(lambda v: linear(v, weight), (x,), (x,))
    torch.testing.assert_close(tangent, F.linear(x, weight))


def test_exporters_see_a_linear_layer():
    module = Linear(7, 5).eval()
    assert 'aten::linear' in str(torch.jit.trace(module, torch.randn(3, 7)).inlined_graph)
    graph = torch.export.export(module, (torch.randn(3, 7),)).graph
    assert any('linear' in str(node.target) for node in graph.nodes)


def test_flops_are_counted():
    weight, bias = layer()
    counts = []
    for function in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            function(torch.randn(2, 3, 7), weight, bias)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 6 * 7 * 5] * 2
