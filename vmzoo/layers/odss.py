"""The ODSS block of Mamba-YOLO (https://arxiv.org/abs/2406.05835): a scan between two convolutional branches.

Maps are channels-last, [B, H, W, C]; convolutions see them as a view, so that nothing is copied. Every batch norm has
YOLO's epsilon and momentum.
"""

from collections import OrderedDict

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from .linear import Linear
from .norm import LayerNorm
from .ss2d import SS2D
from .ssm_init import init_linear_weight_


def yolo_batch_norm(dim: int, device=None, dtype=None) -> nn.BatchNorm2d:
    """A batch norm with the epsilon and momentum of the YOLO family."""
    return nn.BatchNorm2d(dim, eps=1e-3, momentum=0.03, device=device, dtype=dtype)


class ConvBnAct(nn.Sequential):
    """Convolution, batch norm, activation: [B, in_dim, H, W] -> [B, dim, H', W'].

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        kernel_size: Of the convolution.
        stride: Of the convolution. Maps keep their size but for it, if the kernel is odd.
        bias: Bias of the convolution.
        act_layer: Activation.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        bias: bool = False,
        act_layer: type[nn.Module] = nn.SiLU,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        padding = (kernel_size - 1) // 2
        conv = nn.Conv2d(in_dim, dim, kernel_size, stride, padding, bias=bias, **dd)
        super().__init__(OrderedDict(conv=conv, bn=yolo_batch_norm(dim, **dd), act=act_layer()))


class StepNormalSS2D(SS2D):
    """SS2D whose step projection and bias start from a normal distribution, and its decays from -1."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the scan's own parameters; sub-modules have their own method."""
        init_linear_weight_(self.x_proj_weight)
        nn.init.normal_(self.dt_projs_weight)
        nn.init.normal_(self.dt_projs_bias)
        nn.init.zeros_(self.A_logs)
        nn.init.ones_(self.Ds)


class LSBlock(nn.Module):
    """Local spatial block: a depthwise 3x3 convolution with norm, then two pointwise layers, added to the input.

    Args:
        dim: Channels.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm = yolo_batch_norm(dim, **dd)
        self.fc2 = Linear(dim, dim, **dd)
        self.act = nn.GELU()
        self.fc3 = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        y = self.norm(self.fc1(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return x + self.fc3(self.act(self.fc2(y)))


class RGBlock(nn.Module):
    """Residual gated block: an MLP whose gate passes a residual depthwise 3x3 convolution.

    Args:
        dim: Channels of input and output.
        hidden_dim: Channels between.
    """

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = Linear(dim, 2 * hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        gate, x = self.fc1(x).chunk(2, dim=-1)
        gate = self.act(self.dwconv(gate.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + gate)
        return self.fc2(gate * x)


class ODSSBlock(nn.Module):
    """Projection, then two residual steps: a scan of what the LS block makes of the map, and the RG block.

    The paper's block, in both of its published forms: with one scan (backbone), or with several of them one after
    another, between which there is neither norm nor residual (neck).

    Args:
        dim: Channels of the output.
        proj: Applied first, [B, C_in, H, W] -> [B, C, H, W]; None for nothing.
        num_scans: Scans in a row.
        d_state: State size of the scans.
        ssm_ratio: Inner width of the scans over `dim`.
        mlp_ratio: Hidden width of the RG block over `dim`, before the third that its gate costs is taken off.
        drop_path: Stochastic depth rate of both steps.
    """

    def __init__(
        self,
        dim: int,
        proj: nn.Module | None = None,
        num_scans: int = 1,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        scan = {'d_state': d_state, 'ssm_ratio': ssm_ratio, 'conv_bias': True, 'act_layer': nn.GELU, 'gate': True, **dd}
        self.proj = nn.Identity() if proj is None else proj
        self.lsblock = LSBlock(dim, **dd)
        self.norm = LayerNorm(dim, eps=1e-6, **dd)
        self.ss2d = nn.Sequential(*(StepNormalSS2D(dim, **scan) for _ in range(num_scans)))
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = RGBlock(dim, int(2 * int(mlp_ratio * dim) / 3), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C_in] -> [B, H, W, C]."""
        x = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.ss2d(self.norm(self.lsblock(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))
