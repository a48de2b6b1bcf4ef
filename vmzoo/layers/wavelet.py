"""Wavelet transforms of channels-first maps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Low and high frequencies of a 2x2 cell: the mean, then the differences of rows, of columns and of diagonals.
_HAAR = ((1, 1), (1, 1)), ((1, 1), (-1, -1)), ((1, -1), (1, -1)), ((1, -1), (-1, 1))


class HaarTransform(nn.Module):
    """The four bands of each channel in a Haar wavelet transform, side by side, at half of the map's size.

    Args:
        dim: Channels C.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.register_buffer('filters', torch.empty(4 * dim, 1, 2, 2, device=device, dtype=dtype), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the filters, which are constants."""
        filters = 0.5 * torch.tensor(_HAAR, dtype=self.filters.dtype, device=self.filters.device)
        self.filters.copy_(filters.unsqueeze(1).repeat(len(self.filters) // 4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 4 * C, H / 2, W / 2], after filling up odd sides with zeros."""
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return F.conv2d(x, self.filters, stride=2, groups=x.shape[1])

    def inverse(self, bands: Tensor) -> Tensor:
        """[B, 4 * C, H, W] -> [B, C, 2 * H, 2 * W]: the filters are orthonormal."""
        return F.conv_transpose2d(bands, self.filters, stride=2, groups=bands.shape[1] // 4)
