"""VM-UNet.

Paper: `VM-UNet: Vision Mamba UNet for Medical Image Segmentation` - https://arxiv.org/abs/2402.02491
Code: https://github.com/JCruan519/VM-UNet (Apache-2.0); no weights of its own are published

A U-Net of VMamba's first blocks: gated scans along four routes, without MLPs. The encoder merges patches, the decoder
expands them, and what enters a stage of the encoder is added to the decoder's map of the same size.

Written for timm from the paper's description of the function. What differs from the published code:
* a model of one class returns logits too, not probabilities: apply `sigmoid`;
* images of one channel go to a model of one channel as they are (`in_chans=1`), and are repeated for one of three;
* the scan's decay, skip and step bias are exempt from weight decay.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import SS2D, NormPoolHead, PatchExpand, PatchMerging, PatchStem, VSSBlock
from ._builder import build_model
from ._conv_unet import segmentation_cfg
from ._hierarchical import HierarchicalBackbone, Stage, stage_dims
from ._unet import DecoderStage, UNet, falling_rates, fill_from_model, without_surplus
from .vmamba import checkpoint_filter_fn as convert_vmamba

__all__ = ['VMUNet']

_GatedScan = partial(SS2D, ssm_ratio=2.0, gate=True, conv_bias=True)


class VMUNet(UNet):
    """VM-UNet: images [B, in_chans, H, W] -> logits [B, num_classes, H, W]. Sides must be multiples of 32.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of a pixel; 0 for none.
        patch_size: Stride of the stem.
        depths: Blocks of each stage of the encoder.
        decoder_depths: Blocks of each stage of the decoder, coarsest first.
        embed_dim: Channels of each stage of the encoder, or those of the first, which then double from stage to stage.
        d_state: State size of the scans.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the coarsest blocks; it grows linearly from zero to there and falls
            again in the decoder. Trained with 0.2.
        mixer_layer: Token mixer of the blocks, called with their channels, `d_state`, `device` and `dtype`.

    Raises:
        ValueError: `depths`, `decoder_depths` and `embed_dim` differ in their number of stages.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        patch_size: int = 4,
        depths: tuple[int, ...] = (2, 2, 9, 2),
        decoder_depths: tuple[int, ...] = (2, 9, 2, 2),
        embed_dim: int | tuple[int, ...] = 96,
        d_state: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mixer_layer: Callable[..., nn.Module] = _GatedScan,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        dims = stage_dims(embed_dim, depths)
        if len(decoder_depths) != len(depths):
            raise ValueError(f'depths {tuple(depths)} and decoder_depths {tuple(decoder_depths)} differ in length.')

        def blocks(dim: int, rates: list[float]) -> list[nn.Module]:
            options = {'mixer_layer': mixer_layer, 'd_state': d_state, 'mlp_ratio': 0.0, **dd}
            return [VSSBlock(dim, drop_path=rate, **options) for rate in rates]

        stages = []
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)):
            down = PatchMerging(*dims[i : i + 2], odd='crop', **dd) if i + 1 < len(depths) else None
            stages.append(Stage(blocks(dims[i], rates), down))
        encoder = HierarchicalBackbone(
            PatchStem(in_chans, dims[0], patch_size, **dd),
            stages,
            dims,
            in_chans,
            num_classes=0,
            patch_size=patch_size,
            classifier=NormPoolHead(dims[-1], 0, '', norm=nn.Identity()),
        )
        decoder = []
        dims = dims[::-1]
        for i, rates in enumerate(falling_rates(drop_path_rate, decoder_depths)):
            up = PatchExpand(*dims[i - 1 : i + 1], **dd) if i else None
            decoder.append(DecoderStage(blocks(dims[i], rates), up))
        num_features = dims[-1] // patch_size
        final_up = PatchExpand(dims[-1], num_features, patch_size, **dd)
        super().__init__(encoder, decoder, final_up, num_features, num_classes, drop_rate)
        self.init_weights(needs_reset=False)

    def decode(self, inputs: list[Tensor], outputs: list[Tensor]) -> Tensor:
        """What each stage of the encoder takes and makes, [B, H', W', C] -> features of every pixel."""
        x = self.decoder[0](outputs[-1])
        for stage, skip in zip(self.decoder[1:], reversed(inputs[1:])):
            x = stage(x + skip)
        return self.final_up(x)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: VMUNet) -> dict[str, Tensor]:
    """Map a published model's names to ours, or start a model from a classifier, as published.

    Args:
        state_dict: Unwrapped weights of a VM-UNet, or of a VMamba of the first generation (`vmamba_v0_*`). Every block
            of the latter goes to its place in the encoder, and to the mirrored place in the decoder if there is one. A
            warning names what has no counterpart and stays as initialised.
        model: The model they are for.
    """
    state_dict = {key.removeprefix('vmunet.'): value for key, value in state_dict.items()}
    if any(key.startswith(('encoder.', 'decoder.')) for key in state_dict):
        return state_dict
    parts: dict[str, dict[str, Tensor]] = {'': {}, 'encoder.': {}, 'decoder.': {}}
    for key, value in state_dict.items():
        if key.startswith('layers_up.'):
            parts['decoder.'][key.removeprefix('layers_up.')] = value
        elif key.startswith(('final_up.', 'final_conv.')):
            parts[''][key.replace('final_conv.', 'head.')] = value
        else:
            parts['encoder.'][key] = value
    parts['encoder.'] = convert_vmamba(parts['encoder.'], model.encoder)
    parts['decoder.'] = convert_vmamba(parts['decoder.'], model.decoder)
    is_classifier = not (parts['decoder.'] or parts[''])
    if is_classifier:
        parts['encoder.'] = without_surplus(parts['encoder.'], model.encoder)
        parts['decoder.'] = _mirror(parts['encoder.'], model)
    out = {f'{part}{key}': value for part, weights in parts.items() for key, value in weights.items()}
    return fill_from_model(out, model) if is_classifier else out


def _mirror(encoder: dict[str, Tensor], model: VMUNet) -> dict[str, Tensor]:
    """The encoder's blocks under the names of those of the decoder at the same resolution."""
    wanted = model.decoder.state_dict()
    last = len(model.encoder.layers) - 1
    out = {}
    for key, value in encoder.items():
        if match := re.match(r'layers\.(\d+)\.(blocks\..+)', key):
            out[f'{last - int(match[1])}.{match[2]}'] = value
    return {key: value for key, value in out.items() if key in wanted}


def _cfg(num_classes: int = 1, side: int = 256, std: float = 1.0) -> dict[str, Any]:
    return segmentation_cfg(
        url='https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth',
        num_classes=num_classes,
        input_size=(3, side, side),
        interpolation='bilinear',
        std=(std, std, std),
        first_conv='encoder.patch_embed.0',
        license='mit',
        origin_url='https://github.com/JCruan519/VM-UNet',
        paper_name='VM-UNet: Vision Mamba UNet for Medical Image Segmentation',
        paper_ids='arXiv:2402.02491',
    )


default_cfgs = generate_default_cfgs(
    {
        'vmunet_isic.vmamba_in1k': _cfg(std=1 / 255),
        'vmunet_synapse.vmamba_in1k': _cfg(num_classes=9, side=224),
        'vmunet_2292.vmamba_in1k': _cfg(std=1 / 255),
    }
)

_create_vmunet = partial(build_model, VMUNet, pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def vmunet_isic(pretrained: bool = False, **kwargs) -> VMUNet:
    """VM-UNet for skin lesions, 27.4 M parameters: 80.2 % mIoU on ISIC17, 81.4 % on ISIC18."""
    model_args = {'depths': (2, 2, 2, 2), 'decoder_depths': (2, 2, 2, 1)}
    return _create_vmunet('vmunet_isic', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmunet_synapse(pretrained: bool = False, **kwargs) -> VMUNet:
    """VM-UNet for abdominal organs, 27.4 M parameters: 81.1 % Dice on Synapse."""
    model_args = {'depths': (2, 2, 2, 2), 'decoder_depths': (2, 2, 2, 1)}
    return _create_vmunet('vmunet_synapse', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmunet_2292(pretrained: bool = False, **kwargs) -> VMUNet:
    """Deeper VM-UNet, the default of the published code, 44.3 M parameters; no result is published."""
    model_args = {'depths': (2, 2, 9, 2), 'decoder_depths': (2, 9, 2, 2)}
    return _create_vmunet('vmunet_2292', pretrained=pretrained, **dict(model_args, **kwargs))
