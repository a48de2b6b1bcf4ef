"""Weights for the channels of channels-last maps."""

from torch import Tensor, nn

from .linear import Linear
from .norm import LayerNorm


class SqueezeExcite(nn.Module):
    """Scale the channels of a map by a function of their means (https://arxiv.org/abs/1709.01507).

    Args:
        dim: Channels C.
        reduction: Of the hidden width: `dim` over it.
    """

    def __init__(self, dim: int, reduction: int = 8, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype, 'bias': False}
        hidden = max(dim // reduction, 1)
        self.fc = nn.Sequential(Linear(dim, hidden, **dd), nn.ReLU(), Linear(hidden, dim, **dd), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        return x * self.fc(x.mean(dim=(1, 2), keepdim=True))


class ChannelAttention(nn.Module):
    """Weights for the channels of a map, from the mean of its normed positions.

    Args:
        dim: Channels.
        rd_ratio: Hidden width over `dim`.
    """

    def __init__(self, dim: int, rd_ratio: float = 0.125, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        hidden_dim = max(1, int(dim * rd_ratio))
        self.norm = LayerNorm(dim, **dd)
        self.global_reduce = Linear(dim, hidden_dim, **dd)
        self.act = nn.GELU()
        self.channel_select = Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        weights = self.channel_select(self.act(self.global_reduce(self.norm(x).mean((1, 2)))))  # [B, C]
        return x * weights.sigmoid()[:, None, None]
