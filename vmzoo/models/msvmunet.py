"""MSVM-UNet.

Paper: `MSVM-UNet: Multi-Scale Vision Mamba UNet for Medical Image Segmentation` - https://arxiv.org/abs/2408.13735
(BIBM 2024)
Code: https://github.com/gndlwch2w/msvm-unet (no licence is stated); no weights of its own are published

VMamba as the encoder of a U-Net. In the decoder's blocks the MLP sees its neighbourhood at several scales; maps grow by
large-kernel patch expanding, which looks at neighbours before it makes pixels of channels.

Written for timm from the paper's description of the function. What differs from the published code:
* the network is channels-last, and pointwise convolutions on such maps are linear layers;
* depthwise convolutions of several sizes whose results are added are one convolution with the sum of their kernels;
* images of one channel go to a model of one channel as they are (`in_chans=1`), and are repeated for one of three;
* the scan's decay, skip and step bias are exempt from weight decay.
"""

import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import ConcatFusion, LayerNorm, Mlp, VSSBlock, spread_channels
from ._builder import build_model
from ._conv_unet import segmentation_cfg
from ._unet import DecoderStage, UNet, falling_rates, fill_from_model, without_surplus
from .vmamba import VMamba
from .vmamba import checkpoint_filter_fn as convert_vmamba

__all__ = ['MSVMUNet']


class LargeKernelExpand(nn.Module):
    """Enlarge a map: pointwise convolution, depthwise 3x3, then channels become the pixels of a cell, and norm.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output.
        scale: By how much either side grows.
    """

    def __init__(self, dim: int, out_dim: int, scale: int = 2, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        hidden = scale**2 * out_dim
        self.scale = scale
        self.expand = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, **dd),
            nn.BatchNorm2d(hidden, **dd),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd),
        )
        self.norm = LayerNorm(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, scale · H, scale · W, C']."""
        x = self.expand(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(spread_channels(x, self.scale))


class SummedConv(nn.ModuleList):
    """A map plus its depthwise convolutions of several sizes, as one convolution with the sum of their kernels.

    Args:
        dim: Channels C.
        kernel_sizes: Sides of the kernels, odd.
    """

    def __init__(self, dim: int, kernel_sizes: tuple[int, ...] = (1, 3, 5), device=None, dtype=None):
        options = {'groups': dim, 'bias': False, 'device': device, 'dtype': dtype}
        super().__init__(nn.Conv2d(dim, dim, side, **options) for side in kernel_sizes)
        self.side = max(kernel_sizes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        centre = torch.ones_like(self[0].weight[..., :1, :1])
        kernel = sum(F.pad(k, ((self.side - k.shape[-1]) // 2,) * 4) for k in (centre, *(conv.weight for conv in self)))
        y = F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=self.side // 2, groups=len(kernel))
        return y.permute(0, 2, 3, 1)


class MultiScaleMlp(Mlp):
    """MLP whose hidden map goes through a :class:`SummedConv`; arguments are those of `Mlp`."""

    def __init__(self, dim: int, hidden_dim: int, act_layer: type[nn.Module] = nn.GELU, device=None, dtype=None):
        super().__init__(dim, hidden_dim, act_layer, device=device, dtype=dtype)
        self.conv = SummedConv(hidden_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        return self.fc2(self.conv(self.act(self.fc1(x))))


class MSVMUNet(UNet):
    """MSVM-UNet: images [B, in_chans, H, W] -> logits [B, num_classes, H, W]. Sides must be multiples of 32.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of a pixel; 0 for none.
        patch_size: Stride of the stem.
        depths: Blocks of each stage of the encoder.
        decoder_depths: Blocks of each stage of the decoder, coarsest first, one stage less than in the encoder.
        embed_dim: Channels of each stage of the encoder, or those of the first, which then double from stage to stage.
        d_state: State size of the scans.
        ssm_ratio: Width of the scans over that of the blocks.
        mlp_ratio: Hidden width of the MLPs over that of the blocks.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the encoder's last and the decoder's first block; it grows linearly
            from zero to there and falls again. Trained with 0.2.

    Raises:
        ValueError: `depths`, `decoder_depths` and `embed_dim` do not fit together.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 9,
        patch_size: int = 4,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        decoder_depths: tuple[int, ...] = (2, 2, 2),
        embed_dim: int | tuple[int, ...] = 96,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        if len(decoder_depths) != len(depths) - 1:
            raise ValueError(f'{len(depths)} stages of the encoder need {len(depths) - 1} decoder_depths.')
        block_kwargs = {'d_state': d_state, 'ssm_ratio': ssm_ratio, 'mlp_ratio': mlp_ratio, **dd}
        encoder = VMamba(
            in_chans,
            0,
            '',
            patch_size=patch_size,
            depths=depths,
            embed_dim=embed_dim,
            drop_path_rate=drop_path_rate,
            **block_kwargs,
        )
        encoder.prune_intermediate_layers(len(depths), prune_norm=True)
        dims = [info['num_chs'] for info in reversed(encoder.feature_info)]
        decoder = []
        for i, rates in enumerate(falling_rates(drop_path_rate, decoder_depths)):
            dim = dims[i + 1]
            blocks = [VSSBlock(dim, mlp_layer=MultiScaleMlp, drop_path=rate, **block_kwargs) for rate in rates]
            decoder.append(DecoderStage(blocks, LargeKernelExpand(dims[i], dim, **dd), ConcatFusion(dim, **dd)))
        final_up = LargeKernelExpand(dims[-1], dims[-1], patch_size, **dd)
        super().__init__(encoder, decoder, final_up, dims[-1], num_classes, drop_rate)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter; `needs_reset` also those that constructors have initialised (`to_empty()`)."""
        self.encoder.init_weights(needs_reset)
        if needs_reset:
            for part in filter(None, (self.decoder, self.final_up, self.head)):
                part.apply(lambda module: module.reset_parameters() if hasattr(module, 'reset_parameters') else None)

    def decode(self, inputs: list[Tensor], outputs: list[Tensor]) -> Tensor:
        """What each stage of the encoder takes and makes, [B, H', W', C] -> features of every pixel."""
        x = outputs[-1]
        for stage, skip in zip(self.decoder, outputs[-2::-1]):
            x = stage(x, skip)
        return self.final_up(x)


_RENAMES = [
    (r'^_model\.', ''),  # Lightning's
    (r'^encoder\.layer0\.', 'encoder.patch_embed.'),
    (r'^encoder\.layer1\.0\.', 'encoder.patch_embed.5.'),
    (r'^encoder\.layer1\.2\.', 'encoder.patch_embed.7.'),
    (r'^encoder\.downsamples\.(\d+)\.', r'encoder.layers.\1.downsample.'),
    (r'^decoder\.layers\.(\d+)\.up\.', r'decoder.\1.upsample.'),
    (r'^decoder\.layers\.(\d+)\.concat_layer\.', r'decoder.\1.fuse.proj.'),
    (r'^decoder\.layers\.(\d+)\.vss_layer\.', r'decoder.\1.'),
    (r'\.mlp\.multiscale_conv\.dw_convs\.', '.mlp.conv.'),
    (r'^decoder\.out_layers\.0\.out\.', 'head.'),
    (r'^decoder\.out_layers\.0\.', 'final_up.'),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: MSVMUNet) -> dict[str, Tensor]:
    """Map a published model's names to ours, or start the encoder from a classifier, as published.

    Args:
        state_dict: Unwrapped weights of an MSVM-UNet, or of the VMamba that its encoder is (`vmamba_tiny_s1l8`,
            `vmamba_small_s1l20`). A warning names what the latter does not have and stays as initialised.
        model: The model they are for.
    """
    out = {}
    for name, value in state_dict.items():
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
        out[name] = value
    if not any(name.startswith('encoder.') for name in out):
        encoder = without_surplus(convert_vmamba(out, model.encoder), model.encoder)
        return fill_from_model({f'encoder.{name}': value for name, value in encoder.items()}, model)
    wanted = model.state_dict()
    return {  # linear layers may be stored as convolutions
        name: value.flatten(1) if value.ndim == 4 and name in wanted and wanted[name].ndim == 2 else value
        for name, value in out.items()
    }


def _cfg(file: str, num_classes: int = 9) -> dict[str, Any]:
    return segmentation_cfg(
        url=f'https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/{file}',
        num_classes=num_classes,
        input_size=(3, 224, 224),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        first_conv='encoder.patch_embed.0',
        license='mit',
        origin_url='https://github.com/gndlwch2w/msvm-unet',
        paper_name='MSVM-UNet: Multi-Scale Vision Mamba UNet for Medical Image Segmentation',
        paper_ids='arXiv:2408.13735',
    )


_TINY, _SMALL = 'vssm1_tiny_0230s_ckpt_epoch_264.pth', 'vssm1_small_0229s_ckpt_epoch_240.pth'

default_cfgs = generate_default_cfgs(
    {
        'msvmunet_synapse.vmamba_in1k': _cfg(_TINY),
        'msvmunet_acdc.vmamba_in1k': _cfg(_TINY, num_classes=4),
        'msvmunet_small_synapse.vmamba_in1k': _cfg(_SMALL),
    }
)

_create_msvmunet = partial(build_model, MSVMUNet, pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def msvmunet_synapse(pretrained: bool = False, **kwargs) -> MSVMUNet:
    """MSVM-UNet for abdominal organs, 35.9 M parameters: 85.0 % Dice on Synapse."""
    model_args = {'depths': (2, 2, 8, 2)}
    return _create_msvmunet('msvmunet_synapse', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def msvmunet_acdc(pretrained: bool = False, **kwargs) -> MSVMUNet:
    """MSVM-UNet for the heart, 35.9 M parameters: 92.6 % Dice on ACDC."""
    model_args = {'depths': (2, 2, 8, 2)}
    return _create_msvmunet('msvmunet_acdc', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def msvmunet_small_synapse(pretrained: bool = False, **kwargs) -> MSVMUNet:
    """MSVM-UNet with the encoder of VMamba-S, 54.7 M parameters; no result is published."""
    model_args = {'depths': (2, 2, 20, 2)}
    return _create_msvmunet('msvmunet_small_synapse', pretrained=pretrained, **dict(model_args, **kwargs))
