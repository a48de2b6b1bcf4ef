"""Layers for pictures and volumes alike."""

import pytest
import torch

from vmzoo.layers import check_images, conv_nd, resize_linear, to_map, to_tokens


@pytest.mark.parametrize('size', [(5, 4), (2, 5, 4)])
@pytest.mark.parametrize('kernel_size', [1, 3])
def test_convolutions_keep_the_size(size, kernel_size):
    x = torch.randn(2, 3, *size)
    conv = conv_nd(len(size), 3, 6, kernel_size, groups=3)
    assert conv(x).shape == (2, 6, *size)
    assert conv.weight.shape == (6, 1, *(kernel_size,) * len(size))


def test_kernels_may_differ_from_axis_to_axis():
    conv = conv_nd(3, 1, 2, (1, 3, 5), stride=(1, 2, 2))
    assert conv.padding == (0, 1, 2)
    assert conv(torch.randn(1, 1, 4, 6, 6)).shape == (1, 2, 4, 3, 3)


def test_other_numbers_of_axes_are_refused():
    with pytest.raises(ValueError, match=r'ndim must be 2 .* or 3 .*, got 1'):
        conv_nd(1, 2, 2)


@pytest.mark.parametrize('size', [(3, 4), (2, 3, 4)])
def test_tokens_are_in_raster_order(size):
    x = torch.randn(2, 5, *size)
    tokens = to_tokens(x)
    assert torch.equal(tokens[:, size[-1]], x[:, :, 1, 0] if len(size) == 2 else x[:, :, 0, 1, 0])
    assert torch.equal(to_map(tokens, size), x)


@pytest.mark.parametrize('size', [(3, 4), (2, 3, 4)])
def test_resizing_doubles_as_by_a_factor_and_meets_odd_sizes(size):
    x = torch.randn(1, 2, *size)
    mode = 'bilinear' if len(size) == 2 else 'trilinear'
    want = torch.nn.functional.interpolate(x, scale_factor=2, mode=mode)
    assert torch.equal(resize_linear(x, want.shape[2:]), want)
    odd = tuple(2 * side + 1 for side in size)
    assert resize_linear(x, odd).shape[2:] == odd


def test_volumes_are_asked_for_by_their_axes():
    with pytest.raises(ValueError, match=r'Volumes come as a batch \[B, 1, D, H, W\], got \(1, 4, 4, 4\): unsqueeze'):
        check_images(torch.zeros(1, 4, 4, 4), 1, ndim=3)
    check_images(torch.zeros(1, 1, 4, 4, 4), 1, ndim=3)
