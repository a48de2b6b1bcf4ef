import pytest
import torch

from vmzoo.layers import HaarTransform


def test_bands_of_a_cell():
    """Low-pass, and the differences of rows, of columns and of diagonals, side by side for each channel."""
    x = torch.randn(1, 16, 2, 2)
    (a, b), (c, d) = x[0].permute(1, 2, 0)
    want = torch.stack((a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d), dim=1) / 2
    torch.testing.assert_close(HaarTransform(16)(x).view(16, 4), want)


@pytest.mark.parametrize('height, width', [(1, 1), (4, 6), (5, 7), (3, 8)])
def test_inverse_at_any_size(height, width):
    transform = HaarTransform(16)
    x = torch.randn(2, 16, height, width)
    bands = transform(x)
    assert bands.shape == (2, 64, -(-height // 2), -(-width // 2))
    torch.testing.assert_close(transform.inverse(bands)[:, :, :height, :width], x)
