"""Linear layers that are fast on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN = torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: [..., I] -> [..., O], with weight [O, I] and bias [O].

    In float32 on a CPU it goes through oneDNN, as a 1x1 convolution of rows that lie channels-last in memory already:
    on AMD processors twice as fast as the BLAS library behind ``F.linear``, elsewhere about the same. Compilers and
    exporters see the plain linear layer, for which they have rules of their own.
    """
    if torch.compiler.is_compiling() or not _ONEDNN or x.device.type != 'cpu' or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    if x.numel() == 0:  # of which a convolution has no notion
        return F.linear(x, weight, bias)
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, I, rows, 1]
    out = F.conv2d(rows, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """``nn.Linear`` through :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Two linear layers with an activation between them, on the last dimension.

    Args:
        dim: Channels of input and output.
        hidden_dim: Channels between.
        act_layer: Activation.
    """

    def __init__(self, dim: int, hidden_dim: int, act_layer: type[nn.Module] = nn.GELU, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.act = act_layer()
        self.fc2 = Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return self.fc2(self.act(self.fc1(x)))
