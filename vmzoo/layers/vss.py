"""The visual state-space (VSS) block."""

from timm.layers import DropPath
from torch import Tensor, nn

from .linear import Mlp
from .norm import LayerNorm, add_norm
from .ss2d import SS2D


class VSSBlock(nn.Module):
    """Pre-norm residual block on channels-last maps: a 2D selective scan, then (if `mlp_ratio` > 0) an MLP.

    Args:
        dim: Channels.
        mixer_layer: Class of the token mixer, called with `dim` and `mixer_kwargs`.
        mlp_ratio: Hidden width of the MLP over `dim`; 0 leaves the MLP out.
        mlp_act_layer: Activation of the MLP.
        mlp_layer: Class of the MLP, called as `Mlp` is.
        drop_path: Stochastic depth rate of both branches.
        mixer_kwargs: Options of the mixer.
    """

    def __init__(
        self,
        dim: int,
        mixer_layer: type[nn.Module] = SS2D,
        mlp_ratio: float = 4.0,
        mlp_act_layer: type[nn.Module] = nn.GELU,
        mlp_layer: type[nn.Module] = Mlp,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
        **mixer_kwargs,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm = LayerNorm(dim, **dd)
        self.op = mixer_layer(dim, **mixer_kwargs, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        if mlp_ratio > 0:
            self.norm2 = LayerNorm(dim, **dd)
            self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=mlp_act_layer, **dd)
        else:
            self.mlp = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        branch = self.drop_path(self.op(self.norm(x)))
        if self.mlp is None:
            return x + branch
        x, y = add_norm(self.norm2, x, branch)
        return x + self.drop_path(self.mlp(y))
