"""The deformable aggregation equals torchvision's operator and `grid_sample`, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d

from vmzoo.layers import DCNv4, deform_aggregate

SHAPES = [
    (2, 6, 5, 8, 2, 3),
    (1, 1, 1, 3, 1, 3),
    (1, 1, 7, 4, 4, 3),
    (3, 4, 1, 6, 3, 3),
    (1, 5, 6, 10, 1, 5),
    (2, 7, 3, 4, 2, 1),
]


def arguments(batch, height, width, dim, groups, kernel_size, spread=1.5, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    kwargs = {'dtype': torch.float64, 'requires_grad': True, **kwargs}
    points = (batch, height, width, groups, kernel_size**2)
    x = torch.randn(batch, height, width, dim, **kwargs)
    offset = (spread * torch.randn(*points, 2)).to(kwargs['dtype']).requires_grad_(kwargs['requires_grad'])
    return x, offset, torch.randn(points, **kwargs)


def by_torchvision(x: Tensor, offset: Tensor, mask: Tensor, kernel_size: int) -> Tensor:
    """A depthwise deformable convolution with a kernel of ones; its points come row by row, its offsets as (y, x)."""
    by_row = torch.arange(kernel_size**2).view(kernel_size, kernel_size).T.flatten()
    offset = offset[..., by_row, :].flip(-1).flatten(3).permute(0, 3, 1, 2)
    mask = mask[..., by_row].flatten(3).permute(0, 3, 1, 2)
    kernel = torch.ones(x.shape[-1], 1, kernel_size, kernel_size, dtype=x.dtype)
    out = deform_conv2d(x.permute(0, 3, 1, 2), offset, kernel, padding=kernel_size // 2, mask=mask)
    return out.permute(0, 2, 3, 1)


def by_grid_sample(x: Tensor, offset: Tensor, mask: Tensor, kernel_size: int) -> Tensor:
    batch, height, width, _ = x.shape
    groups, num_points = mask.shape[-2:]
    images = x.view(batch, height, width, groups, -1).permute(0, 3, 4, 1, 2).flatten(0, 1)  # [B * G, D / G, H, W]
    out = torch.zeros_like(images)
    for point in range(num_points):
        column, row = point // kernel_size - kernel_size // 2, point % kernel_size - kernel_size // 2
        columns = torch.arange(width)[:, None] + column + offset[..., point, 0]  # [B, H, W, G]
        rows = torch.arange(height)[:, None, None] + row + offset[..., point, 1]
        grid = torch.stack(((2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1), dim=-1)
        grid = grid.permute(0, 3, 1, 2, 4).flatten(0, 1)
        sample = F.grid_sample(images, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
        out = out + sample * mask[..., point].permute(0, 3, 1, 2).flatten(0, 1)[:, None]
    return out.unflatten(0, (batch, groups)).permute(0, 3, 4, 1, 2).flatten(3)


@pytest.mark.parametrize('reference', [by_torchvision, by_grid_sample])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_equals_references_with_gradients(shape, reference):
    inputs = arguments(*shape)
    got, want = (f(*inputs, shape[-1]) for f in (deform_aggregate, reference))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(want)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (got, want)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('spread', [0.0, 100.0, 1e8], ids=['on the pixels', 'mostly outside', 'far outside'])
def test_positions_on_pixels_and_outside(spread):
    x, offset, mask = arguments(2, 4, 5, 6, 2, 3, spread, requires_grad=False)
    torch.testing.assert_close(deform_aggregate(x, offset, mask), by_torchvision(x, offset, mask, 3))
    if spread > 1e6:
        assert not deform_aggregate(x, offset, mask).any()


def test_without_offsets_it_is_a_convolution():
    x, offset, _ = arguments(1, 5, 7, 4, 1, 3, 0.0, requires_grad=False)
    kernel = torch.arange(9.0, dtype=torch.float64).view(3, 3)  # [row, column]
    got = deform_aggregate(x, offset, kernel.T.flatten().expand(1, 5, 7, 1, 9))
    want = F.conv2d(x.permute(0, 3, 1, 2), kernel.expand(4, 1, 3, 3), padding=1, groups=4)
    torch.testing.assert_close(got, want.permute(0, 2, 3, 1))


@pytest.mark.parametrize('offset_x', [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_where_it_is(offset_x):
    x, offset, mask = arguments(1, 6, 6, 4, 2, 3, requires_grad=False)
    group = (0, 2, 3, slice(2, 4))
    want = deform_aggregate(x, offset, mask)
    offset[0, 2, 3, 1, 4, 0] = 1e6
    want[group] = torch.nan if offset_x != offset_x else deform_aggregate(x, offset, mask)[group]
    offset[0, 2, 3, 1, 4, 0] = offset_x
    torch.testing.assert_close(deform_aggregate(x, offset, mask), want, rtol=0, atol=0, equal_nan=True)


def test_positions_keep_their_digits_in_half_precision():
    """bfloat16 has no number between 128 and 129."""
    x = torch.arange(300.0).view(1, 1, 300, 1)
    offset, mask = torch.full((1, 1, 300, 1, 1, 2), 0.5), torch.ones(1, 1, 300, 1, 1)
    offset[..., 1] = 0
    got = deform_aggregate(x, offset.bfloat16(), mask.bfloat16(), kernel_size=1)
    torch.testing.assert_close(got[0, 0, :-1, 0], torch.arange(299.0) + 0.5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_trains(dtype):
    layer = DCNv4(16, 2, offset_kernel_size=3, pointwise=True)
    x = torch.randn(2, 5, 6, 16, requires_grad=True)
    want = layer(x)
    layer.to(dtype)
    got = layer(x.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - want).norm() < 0.05 * want.norm()
    got.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize('groups, columns', [(1, 32), (2, 56), (3, 88), (8, 216)])
def test_filling_is_not_read(groups, columns):
    layer = DCNv4(24, groups).double()
    assert layer.offset_mask.weight.shape == (columns, 24)
    x = torch.randn(1, 4, 4, 24, dtype=torch.float64)
    with torch.no_grad():
        want = layer(x)
        layer.offset_mask.weight[27 * groups :] = torch.nan
        torch.testing.assert_close(layer(x), want, rtol=0, atol=0)


def test_offsets_come_before_the_value_projection():
    layer = DCNv4(8, 1, pointwise=True).double()
    x = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        points = layer.offset_mask(x)[..., :27]
        offset, mask = points[..., :18].unflatten(-1, (1, 9, 2)), points[..., None, 18:]
        want = layer.output_proj(by_torchvision(layer.value_proj(x), offset, mask, 3))
        torch.testing.assert_close(layer(x), want)


def test_empty_batch_and_meta():
    assert DCNv4(8, 2)(torch.empty(0, 3, 4, 8)).shape == (0, 3, 4, 8)
    assert DCNv4(8, 2, device='meta')(torch.empty(2, 3, 4, 8, device='meta')).shape == (2, 3, 4, 8)


def test_compiles_for_any_size():
    layer = DCNv4(8, 2).eval()
    graphs = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    with torch.no_grad():
        for height, width in ((4, 6), (5, 9)):
            x = torch.randn(2, height, width, 8)
            torch.testing.assert_close(compiled(x), layer(x))
    assert graphs.frame_count == 1


def test_multiply_accumulates_are_counted():
    inputs = arguments(2, 4, 5, 6, 3, 3)
    for train in (False, True):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
            deform_aggregate(*inputs)
        assert counter.get_total_flops() == 2 * 2 * 4 * 5 * 6 * 9 * 4  # 9 points of 4 neighbours for every value


@pytest.mark.parametrize(
    'arguments, message',
    [((10, 3), '10 channels.*3 groups'), ((8, 2, 4), 'odd'), ((8, 2, 3, 2), 'odd')],
    ids=['groups', 'kernel', 'offset kernel'],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DCNv4(*arguments)
