"""The scan block for other people's networks."""

import copy
import pickle

import pytest
import torch
from torch import nn

from vmzoo.layers import ScanBlock2d, VSSBlock, scan_names

every_scan = pytest.mark.parametrize('routes', scan_names())


def without_gradient(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@every_scan
def test_any_size_and_gradients_to_everything(routes):
    block = ScanBlock2d(8, routes, d_state=2, gate=True)
    for size in ((8, 8), (7, 5), (1, 9), (6, 1), (1, 1)):
        x = torch.randn(2, 8, *size, requires_grad=True)
        block.zero_grad()
        y = block(x)
        y.square().mean().backward()
        assert y.shape == x.shape and y.isfinite().all()
        assert without_gradient(block) == []
        assert x.grad.abs().sum() > 0
    assert block(torch.randn(0, 8, 4, 4)).shape == (0, 8, 4, 4)


def test_is_the_vss_block_on_channels_first_maps():
    block = ScanBlock2d(8, 'bidi', d_state=3, ssm_ratio=1.5, dt_rank=2, kernel_size=5, mlp_ratio=1.0)
    plain = VSSBlock(8, scan='bidi', d_state=3, ssm_ratio=1.5, dt_rank=2, kernel_size=5, conv_bias=True, mlp_ratio=1.0)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(block(x), plain(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_options_shape_the_block():
    def keys(**kwargs) -> set[str]:
        return {name.rpartition('.')[0] for name, _ in ScanBlock2d(8, **kwargs).named_parameters()}

    assert {'mlp.fc1', 'norm2'} <= keys() and not {'mlp.fc1', 'norm2'} & keys(mlp_ratio=0.0)
    assert 'op.conv2d' not in keys(kernel_size=0)
    block = ScanBlock2d(8, d_state=5, ssm_ratio=3.0, dt_rank=2, gate=True, act_layer=nn.GELU, mlp_act_layer=nn.ReLU)
    assert block.op.A_logs.shape == (4 * 24, 5)
    assert block.op.in_proj.out_features == 48
    assert isinstance(block.op.act, nn.GELU) and isinstance(block.mlp.act, nn.ReLU)
    assert "routes='cross'" in repr(block)


def test_memory_format_is_that_of_the_input():
    block = ScanBlock2d(8)
    x = torch.randn(2, 8, 5, 6)
    y, channels_last = block(x), block(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous()
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, channels_last)
    torch.testing.assert_close(block(x.mT).mT.shape, y.shape)


@every_scan
def test_compiles_without_graph_breaks(routes):
    block = ScanBlock2d(8, routes, drop_path=0.1).eval()
    x = torch.randn(2, 8, 7, 6)
    torch.compiler.reset()
    got = torch.compile(block, fullgraph=True, backend='aot_eager')(x)
    torch.testing.assert_close(got, block(x))
    got.mean().backward()
    assert without_gradient(block) == []


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['float16', 'bfloat16'])
@pytest.mark.parametrize('routes', ['cross', 'cascade', 'atrous'])
def test_half_precision(routes, dtype):
    block = ScanBlock2d(8, routes, d_state=4, gate=True)
    x = torch.randn(2, 8, 7, 6)
    want = block(x)
    with torch.autocast('cpu', dtype):
        got = block(x)
    got.float().mean().backward()
    assert without_gradient(block) == []
    assert (got.float() - want).norm() < 0.01 * want.norm()
    block.to(dtype)
    half = block(x.to(dtype))
    assert half.dtype == dtype
    assert (half.float() - want).norm() < 0.02 * want.norm()


def test_drop_path_drops_in_training_only():
    block = ScanBlock2d(8, drop_path=0.5)
    x = torch.randn(64, 8, 4, 4)
    dropped = (block(x) == x).flatten(1).all(1)
    assert 0 < dropped.sum() < 64
    assert torch.equal(block.eval()(x), block(x))


def test_initialises_from_the_meta_device():
    block = ScanBlock2d(8, 'atrous', device='meta', dtype=torch.float64).to_empty(device='cpu')
    with torch.no_grad():
        for p in block.parameters():
            p.fill_(torch.nan)
    block.reset_parameters()
    assert block(torch.randn(1, 8, 5, 5, dtype=torch.float64)).isfinite().all()
    assert 0.01 < block.mlp.fc1.weight.std() < 0.03


@pytest.mark.parametrize('routes, seen', [('cross', 49), ('unidi', 25), ('bidi', 49)])
def test_a_pixel_sees_what_its_routes_have_passed(routes, seen):
    x = torch.randn(1, 8, 7, 7, dtype=torch.float64, requires_grad=True)
    block = ScanBlock2d(8, routes, kernel_size=0, dtype=torch.float64)
    block(x)[0, :, 3, 3].sum().backward()
    assert (x.grad.abs().sum(1) > 0).sum() == seen


def test_copies():
    block = ScanBlock2d(8).eval()
    x = torch.randn(1, 8, 4, 5)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), block(x))


@pytest.mark.parametrize(
    'option, message',
    [
        ({'routes': 'zigzag'}, "Unknown scan 'zigzag'; choose from atrous, backward, bidi"),
        ({'dim': 0}, 'dim must be at least 1'),
        ({'d_state': 0}, 'd_state must be at least 1'),
        ({'ssm_ratio': 0.0}, 'no inner channel'),
        ({'dt_rank': 'full'}, "'full'"),
        ({'kernel_size': 4}, 'odd'),
        ({'mlp_ratio': -1.0}, 'mlp_ratio -1.0'),
        ({'mlp_ratio': 0.01}, 'no hidden channel'),
        ({'drop_path': 1.0}, 'drop_path'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_bad_options_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        ScanBlock2d(**{'dim': 8, **option})


def test_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match='scan'):
        ScanBlock2d(8, scan='cross')


@pytest.mark.parametrize('shape', [(8, 5, 6), (2, 5, 6, 8), (2, 8, 5, 6, 7), (2, 16, 5, 6), (1, 8, 0, 4)], ids=str)
def test_maps_of_the_wrong_shape_are_named(shape):
    with pytest.raises(ValueError, match=r'\[B, 8, H, W\].*got \(' + ', '.join(map(str, shape))):
        ScanBlock2d(8)(torch.randn(shape))
