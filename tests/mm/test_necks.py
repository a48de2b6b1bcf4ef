"""The pyramid for backbones whose finest map is coarse."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import nn

import vmzoo.mm  # noqa: F401 (registers the neck)

CHANNELS = (6, 8, 10)


def neck(**kwargs) -> nn.Module:
    return MODELS.build(dict(type='UpsamplingFPN', in_channels=CHANNELS, out_channels=4, **kwargs)).eval()


def maps(height: int = 8, width: int = 12) -> list[torch.Tensor]:
    sizes = [(-(-height // s), -(-width // s)) for s in (1, 2, 4)]
    return [torch.randn(2, dim, *size) for dim, size in zip(CHANNELS, sizes)]


@pytest.mark.parametrize(('num_finer', 'sizes'), [(0, (8, 4, 2, 1, 1)), (1, (16, 8, 4, 2, 1)), (2, (32, 16, 8, 4, 2))])
def test_levels(num_finer, sizes):
    levels = neck(num_finer=num_finer)(maps(8, 8))
    assert [tuple(level.shape) for level in levels] == [(2, 4, size, size) for size in sizes]


def test_odd_sizes():
    assert [level.shape[2:] for level in neck()(maps(7, 5))] == [(14, 10), (7, 5), (4, 3), (2, 2), (1, 1)]


def test_function():
    model, x = neck(num_finer=1, num_outs=5), maps()
    for norm in model.norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    normed = [
        F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2], norm.weight, norm.bias).permute(0, 3, 1, 2)
        for y, norm in zip(x, model.norms)
    ]
    a, b, c = (conv(y) for conv, y in zip(model.lateral_convs, normed))
    b = b + c.repeat_interleave(2, 2).repeat_interleave(2, 3)
    a = a + b.repeat_interleave(2, 2).repeat_interleave(2, 3)
    want = [conv(y) for conv, y in zip(model.output_convs, (model.finer_convs[0](a), a, b, c))]
    for level, expected in zip(model(x), [*want, want[-1][:, :, ::2, ::2]]):
        torch.testing.assert_close(level, expected)


def test_every_parameter_learns():
    model = neck(num_finer=2)
    sum(level.sum() for level in model(maps())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_too_few_levels_are_named():
    with pytest.raises(ValueError, match='num_outs=4'):
        neck(num_finer=2, num_outs=4)
