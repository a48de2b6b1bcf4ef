"""A scan block for other people's networks."""

import torch
from torch import Tensor, nn

from .linear import init_truncated_
from .vss import VSSBlock


class ScanBlock2d(VSSBlock):
    """Residual scan block for convolutional networks: maps [B, dim, H, W] of any size in, the same shape out.

    x + SS2D(norm(x)), then x + MLP(norm(x)): VMamba's block (https://arxiv.org/abs/2401.10166) along any routes, with
    VMamba's initialisation. Inside it is channels-last, so that no copy is made of maps in that memory format; the
    result has the memory format of the input.

    Args:
        dim: Channels of input and output.
        routes: Order in which the map is visited, one of `vmzoo.layers.scan_names()`: 'cross' (rows, columns and both
            backwards; VMamba), 'bidi' (rows, and backwards), 'unidi', 'rotate', 'cascade' (rows, then columns),
            'atrous' (four routes that share the positions out between them, the cheapest; EfficientVMamba), ...
        d_state: State size of each channel.
        ssm_ratio: Inner width of the scan over `dim`.
        dt_rank: Rank of the step projection; 'auto' is ceil(dim / 16).
        kernel_size: Of the depthwise convolution before the scan, odd; 0 leaves it out.
        conv_bias: Bias of that convolution.
        act_layer: Activation before the scan, and of the gate.
        gate: Multiply the scan's output with a second projection of its input.
        mlp_ratio: Hidden width of the MLP over `dim`; 0 leaves the MLP out.
        mlp_act_layer: Activation of the MLP.
        drop_path: Stochastic depth rate of both branches.

    Raises:
        ValueError: An option outside its choices, or an input that is no map of `dim` channels.
    """

    def __init__(
        self,
        dim: int,
        routes: str = 'cross',
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = 'auto',
        kernel_size: int = 3,
        conv_bias: bool = True,
        act_layer: type[nn.Module] = nn.SiLU,
        gate: bool = False,
        mlp_ratio: float = 4.0,
        mlp_act_layer: type[nn.Module] = nn.GELU,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        if dim < 1:
            raise ValueError(f'dim must be at least 1, got {dim}.')
        if mlp_ratio < 0 or 0 < mlp_ratio * dim < 1:
            raise ValueError(f'mlp_ratio {mlp_ratio} leaves no hidden channel for dim {dim}: 0 is for no MLP.')
        if not 0 <= drop_path < 1:
            raise ValueError(f'drop_path must be at least 0 and below 1, got {drop_path}.')
        super().__init__(
            dim,
            mlp_ratio=mlp_ratio,
            mlp_act_layer=mlp_act_layer,
            drop_path=drop_path,
            scan=routes,
            d_state=d_state,
            ssm_ratio=ssm_ratio,
            dt_rank=dt_rank,
            kernel_size=kernel_size,
            conv_bias=conv_bias,
            act_layer=act_layer,
            gate=gate,
            device=device,
            dtype=dtype,
        )
        self.dim = dim
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every parameter, also those of a block that `to_empty()` has put on a device."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_truncated_(module)
            elif module is not self and hasattr(module, 'reset_parameters'):
                module.reset_parameters()

    def extra_repr(self) -> str:
        return f'{self.dim}, routes={self.op.scan!r}'

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, dim, H, W]."""
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape[2:]:
            raise ValueError(f'The block takes maps [B, {self.dim}, H, W], channels first, got {tuple(x.shape)}.')
        memory_format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        y = super().forward(x.permute(0, 2, 3, 1).contiguous())
        return y.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
