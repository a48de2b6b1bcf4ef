import pytest
import torch

from vmzoo.layers import MultiScaleConv


def test_multi_scale_convolution_interleaves_its_groups():
    layer = MultiScaleConv(12)
    for i, conv in enumerate(layer):
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.constant_(conv.bias, i)
    assert layer(torch.randn(1, 2, 3, 12))[0, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0] * 3
    assert [conv.kernel_size[0] for conv in layer] == [3, 5, 7, 9]


def test_channels_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match='multiple of 4, the number of kernel sizes, got 6'):
        MultiScaleConv(6)
