"""MHS-VM: multi-head scans, in a U-Net.

Paper: `MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba` - https://arxiv.org/abs/2406.05992
Code and weights: https://github.com/PixDeep/MHS-VM (Apache-2.0)

VM-UNet whose blocks share their channels out between heads. Each head scans along a family of routes of its own, and
scan route attention, which has no parameters, weighs the sum of its four scans by how much they differ.

Written for timm from the paper's description of the function. What differs from the published code:
* routes are computed for the map at hand, instead of being read from a file of tables for one size;
* what differs in VM-UNet (`vmunet.py`): logits instead of probabilities, images of one channel, weight decay.
"""

import re
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vmzoo_kernels import get_routes, route_scan

from ..layers import SS2D, LayerNorm, Linear, auto_dt_rank, compute_dtype
from ._builder import build_model
from ._conv_unet import segmentation_cfg
from .vmunet import VMUNet
from .vmunet import checkpoint_filter_fn as convert_vmunet

__all__ = ['MHSUNet']

_ROUTES = 4  # of a head


def scan_route_attention(y: Tensor, threshold: float) -> Tensor:
    """The sum of a head's scans, weighed in every channel of a pixel by how much they differ.

    The weight is the standard deviation over the mean of what exceeds the least of them, less `threshold`, and at
    least zero.

    Args:
        y: [..., K, D], the results of K scans.
        threshold: Taken off the weight.

    Returns:
        [..., D].
    """
    excess = (y - y.amin(dim=-2, keepdim=True)).mean(dim=-2)
    return y.sum(dim=-2) * torch.relu(y.std(dim=-2) / (excess + 1e-5) - threshold)


class MultiHeadSS2D(SS2D):
    """SS2D of heads: each scans its share of the channels along four routes of its own, with projections of its own.

    in_proj -> depthwise conv -> activation -> projection to the heads -> scans -> scan route attention in each head ->
    norm -> projection -> norm -> gate. The heads' parameters lie side by side.

    Args:
        dim: Channels C of input and output, a multiple of `num_heads`.
        num_heads: 3, which scan along `serpentine`, `diagonal` and `spiral` routes, or 4, with `raster` ones.
        threshold: That of the scan route attention.
        d_state: State size of each channel.

    Raises:
        ValueError: Another number of heads, or channels that do not divide between them.
    """

    def __init__(
        self, dim: int, num_heads: int = 4, threshold: float = 0.4, d_state: int = 16, device=None, dtype=None
    ):
        dd = {'device': device, 'dtype': dtype}
        if num_heads not in (3, 4):
            raise ValueError(f'num_heads must be 3 or 4, got {num_heads}.')
        if dim % num_heads:
            raise ValueError(f'{dim} channels cannot be split between {num_heads} heads: choose a multiple.')
        rank, scan = auto_dt_rank(dim // num_heads), f'heads_{num_heads}'
        super().__init__(dim, d_state, ssm_ratio=1.0, dt_rank=rank, conv_bias=True, gate=True, scan=scan, **dd)
        self.threshold = threshold
        self.head_proj = Linear(dim, dim, bias=False, **dd)
        self.cat_norm = LayerNorm(dim, **dd)
        self.y_proj = Linear(dim, dim, bias=False, **dd)
        self.out_proj = nn.Identity()

    def _build_scan_parameters(self, dd: dict) -> None:
        k, n, r = self.num_routes, self.d_state, self.dt_rank
        d = self.d_inner * _ROUTES // k
        self.x_proj_weight = nn.Parameter(torch.empty(k, r + 2 * n, d, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(k, d, r, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(k, d, **dd))
        self.A_logs = nn.Parameter(torch.empty(k * d, n, **dd))
        self.Ds = nn.Parameter(torch.empty(k * d, **dd))

    def _scan_map(self, x: Tensor, height: int, width: int) -> Tensor:
        # x [B, L, C] -> [B, L, C]
        heads = self.num_routes // _ROUTES
        parts = self.head_proj(x).unflatten(-1, (heads, 1, -1))  # [B, L, heads, 1, D]
        parts = parts.expand(-1, -1, -1, _ROUTES, -1).flatten(2, 3)  # [B, L, K, D]
        A_log, *parameters = self.scan_parameters()
        y = route_scan(
            parts,
            self._project_steps(parts, self.x_proj_weight),
            -torch.exp(A_log),
            *parameters,
            get_routes(self.scan, height, width, device=x.device),
            merge=False,
            out_dtype=compute_dtype(x.dtype),  # what the attention compares is nearly equal
        )
        y = scan_route_attention(y.unflatten(2, (heads, _ROUTES)), self.threshold).flatten(2)
        return self.y_proj(self.cat_norm(y).to(x.dtype))


class MHSUNet(VMUNet):
    """MHS-UNet: images [B, in_chans, H, W] -> logits [B, num_classes, H, W]. Sides must be multiples of 32.

    Args:
        num_heads: Heads of every block, 3 or 4.
        threshold: What the scan route attention takes off its weights.
        kwargs: Arguments of `VMUNet`, but for `mixer_layer`.

    Raises:
        ValueError: The channels of a stage do not divide between the heads, or what `VMUNet` raises.
    """

    def __init__(self, num_heads: int = 4, threshold: float = 0.4, **kwargs):
        super().__init__(mixer_layer=partial(MultiHeadSS2D, num_heads=num_heads, threshold=threshold), **kwargs)


# One tensor has several names, of which the last in a file counts, as when the published model loads it.
_RENAMES = [
    (r'\.mhs\.x_ssproj(?:_W|\.weight)$', '.head_proj.weight'),
    (r'\.mhs\.(cat_norm|y_proj)\.', r'.\1.'),
    (r'\.scanhead_(\w)\.(?:mambaeng|scanning\.seq2seq_engine)\.', r'.scanhead_\1.'),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: MHSUNet) -> dict[str, Tensor]:
    """Map a published model's names to ours, in which the heads' parameters lie side by side.

    Args:
        state_dict: Unwrapped weights.
        model: The model they are for.
    """
    out, heads = {}, {}
    for name, value in state_dict.items():
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
        if match := re.match(r'(.+\.)mhs\.scanhead_([CXSZ])\.(.+)', name):
            prefix, letter, parameter = match.groups()
            heads.setdefault(prefix + parameter, {})[letter] = value
        else:
            out[name] = value
    for name, values in heads.items():
        out[name] = torch.cat([values[letter] for letter in 'CXSZ' if letter in values])
    return convert_vmunet(out, model)


def _cfg(heads: int) -> dict[str, Any]:
    repository, commit = 'https://github.com/PixDeep/MHS-VM', 'be64b6fa4970a7f57c2e9677645219ffae6c1da5'
    return segmentation_cfg(
        url=f'{repository}/raw/{commit}/pretrained/best_{heads}h.pth',
        num_classes=1,
        input_size=(3, 256, 256),
        interpolation='bilinear',
        std=(1 / 255, 1 / 255, 1 / 255),
        first_conv='encoder.patch_embed.0',
        license='apache-2.0',
        origin_url=repository,
        paper_name='MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba',
        paper_ids='arXiv:2406.05992',
    )


default_cfgs = generate_default_cfgs({'mhsvm_3h.isic': _cfg(3), 'mhsvm_4h.isic18': _cfg(4)})

_create_mhsvm = partial(build_model, MHSUNet, pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def mhsvm_3h(pretrained: bool = False, **kwargs) -> MHSUNet:
    """MHS-UNet of three heads for skin lesions, 17.4 M parameters; no figure is stated."""
    model_args = {'num_heads': 3, 'threshold': 0.5, 'depths': (2, 2, 2, 2), 'decoder_depths': (2, 2, 2, 1)}
    return _create_mhsvm('mhsvm_3h', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mhsvm_4h(pretrained: bool = False, **kwargs) -> MHSUNet:
    """MHS-UNet of four heads for skin lesions, 17.3 M parameters: 80.9 % mIoU on ISIC18."""
    model_args = {'num_heads': 4, 'threshold': 0.4, 'depths': (2, 2, 2, 2), 'decoder_depths': (2, 2, 2, 1)}
    return _create_mhsvm('mhsvm_4h', pretrained=pretrained, **dict(model_args, **kwargs))
