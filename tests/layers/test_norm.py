"""The norm layers: torch's own on a CPU, and the dtypes they hand on."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vmzoo.layers import LayerNorm, RMSNorm
from vmzoo.layers.norm import _out_dtype, add_norm

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
PAIRS = pytest.mark.parametrize('layer, base', [(LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)])


def filled(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


@PAIRS
def test_weights_and_values_are_those_of_torch(layer, base):
    ours, plain = filled(layer(12)), base(12, eps=1e-5)
    plain.load_state_dict(ours.state_dict())
    assert isinstance(ours, base)
    x = torch.randn(2, 5, 12)
    assert torch.equal(ours(x), plain(x))


def test_autocast_on_a_cpu_leaves_the_dtype():
    ours, plain = filled(LayerNorm(12)), nn.LayerNorm(12)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 12)
    with torch.autocast('cpu', BF16):
        for v in (x, x.bfloat16()):
            assert torch.equal(ours(v), plain(v)) and ours(v).dtype == v.dtype


@PAIRS
def test_float32_enters_a_half_precision_model(layer, base):
    """The result is rounded once, after the norm of what came in."""
    ours = filled(layer(12, dtype=BF16))
    x = torch.randn(2, 5, 12)
    plain = base(12, eps=1e-5)
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), plain(x).bfloat16())
    assert ours(x.bfloat16()).dtype == BF16


@pytest.mark.parametrize(
    'dtype, float32, want',
    [(FULL, False, HALF), (HALF, False, HALF), (FULL, True, FULL), (HALF, True, FULL), (torch.float64, False, FULL)],
    ids=str,
)
def test_dtype_under_autocast_on_a_gpu(monkeypatch, dtype, float32, want):
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda device: device == 'cuda')
    monkeypatch.setattr(torch, 'get_autocast_dtype', lambda device: HALF)
    assert _out_dtype(SimpleNamespace(is_cuda=True, dtype=dtype), torch.ones(1), float32) == want


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@PAIRS
def test_autocast_on_a_gpu(layer, base):
    """The autocast dtype at once, as near as torch's float32 result and a cast; or float32 where it is asked for."""
    x = torch.randn(64, 96, device='cuda')
    for float32 in (False, True):
        ours, plain = filled(layer(96, float32=float32)).cuda(), base(96, eps=1e-5).cuda()
        plain.load_state_dict(ours.state_dict())
        with torch.autocast('cuda', HALF):
            y = ours(x)
            assert y.dtype == (FULL if float32 else HALF)
            torch.testing.assert_close(y, plain(x).to(y.dtype))


def test_sum_and_norm_calls_what_is_hooked_or_another_norm():
    x, branch = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    norm, seen = LayerNorm(8), []
    for other in (norm, torch.nn.LayerNorm(8)):
        total, y = add_norm(other, x, branch)
        assert torch.equal(total, x + branch) and torch.equal(y, other(x + branch))
    norm.register_forward_hook(lambda *args: seen.append('norm'))
    add_norm(norm, x, branch)
    assert seen == ['norm']


def test_sum_and_norm_on_a_gpu_is_one_call(monkeypatch):
    called = []

    def add_layer_norm(x, branch, weight, bias, eps, out_dtype):
        called.append((eps, out_dtype))
        return x + branch, torch.nn.functional.layer_norm(x + branch, (8,), weight, bias, eps)

    monkeypatch.setattr('vmzoo.layers.norm.add_layer_norm', add_layer_norm)
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True)
    norm = LayerNorm(8, eps=1e-3)
    x, branch = torch.randn(2, 8), torch.randn(2, 8)
    total, y = add_norm(norm, x, branch)
    assert torch.equal(y, norm(total)) and called == [(1e-3, torch.float32)]
    norm.register_forward_hook(lambda *args: None)
    assert torch.equal(add_norm(norm, x, branch)[1], y) and len(called) == 1
