"""xLSTM-UNet

Paper: `xLSTM-UNet can be an Effective 2D & 3D Medical Image Segmentation Backbone with Vision-LSTM (ViL) better than
its Mamba Counterpart` - https://arxiv.org/abs/2407.01530
Code: https://github.com/tianrun-chen/xLSTM-UNet-PyTorch (Apache-2.0 but for a file of AGPL-3.0, of which nothing is
here); weights in a folder of Google Drive

nnU-Net's residual U-Net, for pictures and for volumes, with Vision-LSTM blocks (a matrix LSTM over the positions in
raster order): one behind the last stage of the encoder (`bot`), or one behind several stages (`enc`). Where a stage has
at least as many channels as positions, an `enc` model runs the block over the channels instead.

Written from the papers and a description of the published code's function. What differs:
* the matrix LSTM is computed in chunks, in time and memory that grow with the number of tokens and not its square;
* maps of odd sides are enlarged to the size of the encoder's map, so that images of any size are taken (`enc` models
  are made for one size, as published);
* heads of lower resolutions exist in models with `deep_supervision` only, and give logits in training only;
* stochastic depth and dropout; norms of the Vision-LSTM blocks hold their weights, not what exceeds 1.
"""

import math
import re
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import VisionLSTMBlock, conv_nd, to_map, to_tokens
from ._builder import build_model
from ._conv_unet import ConvUNet, segmentation_cfg

__all__ = ['XLSTMUNet']

Size = tuple[int, ...]
_NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_SLOPE = 0.01  # of the leaky ReLUs


class ResidualBlock(nn.Module):
    """Two convolutions with instance norms, and a shortcut.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output.
        kernel_size: Of the convolutions, along each axis.
        stride: Of the first convolution; None for a shortcut without one.
    """

    def __init__(self, dim: int, out_dim: int, kernel_size: Size, stride: Size | None = None, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        ndim = len(kernel_size)
        self.conv1 = conv_nd(ndim, dim, out_dim, kernel_size, stride=stride or 1, **dd)
        self.norm1 = _NORMS[ndim](out_dim, affine=True, **dd)
        self.conv2 = conv_nd(ndim, out_dim, out_dim, kernel_size, **dd)
        self.norm2 = _NORMS[ndim](out_dim, affine=True, **dd)
        self.conv3 = nn.Identity() if stride is None else conv_nd(ndim, dim, out_dim, stride=stride, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *size] -> [B, C', *smaller]."""
        y = F.leaky_relu(self.norm1(self.conv1(x)), _SLOPE)
        return F.leaky_relu(self.norm2(self.conv2(y)) + self.conv3(x), _SLOPE)


def residual_blocks(dim: int, out_dim: int, depth: int, kernel_size: Size, stride: Size, **dd: Any) -> list[nn.Module]:
    """A block that changes stride and channels, then others up to `depth`."""
    others = [ResidualBlock(out_dim, out_dim, kernel_size, **dd) for _ in range(depth - 1)]
    return [ResidualBlock(dim, out_dim, kernel_size, stride, **dd), *others]


class TokenMixer(VisionLSTMBlock):
    """Vision-LSTM block on a map, over its positions in raster order, or over its channels.

    Args:
        dim: Channels of the map; its positions for a block over channels.
        over_channels: Take the channels for tokens.
        block_args: Arguments of :class:`..layers.vision_lstm.VisionLSTMBlock`.
    """

    def __init__(self, dim: int, over_channels: bool = False, **block_args: Any):
        super().__init__(dim, **block_args)
        self.over_channels = over_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *size] -> [B, C, *size]."""
        tokens = super().forward(x.flatten(2) if self.over_channels else to_tokens(x))
        y = tokens.unflatten(2, x.shape[2:]) if self.over_channels else to_map(tokens, x.shape[2:])
        return y.to(x.dtype)


class DecoderStage(nn.Module):
    """Enlarge a map to the encoder's, join that, and apply residual blocks.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the encoder's map, and of the output.
        depth: Number of blocks.
        kernel_size: Of their convolutions, along each axis.
        join: Whether the encoder's map is joined.
    """

    def __init__(
        self, dim: int, out_dim: int, depth: int, kernel_size: Size, join: bool = True, device=None, dtype=None
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.join = join
        self.up = conv_nd(len(kernel_size), dim, out_dim, **dd)
        width, stride = (2 if join else 1) * out_dim, (1,) * len(kernel_size)
        self.blocks = nn.Sequential(*residual_blocks(width, out_dim, depth, kernel_size, stride, **dd))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """[B, C, *size] and the encoder's [B, C', *larger] -> [B, C', *larger]."""
        x = F.interpolate(self.up(x), size=skip.shape[2:], mode='nearest')
        return self.blocks(torch.cat((x, skip), dim=1) if self.join else x)


def _default_depths(num_stages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks of encoder and decoder stages as published: two, and one in the second halves."""
    last = num_stages - 1
    encoder = tuple(1 if i >= math.ceil(num_stages / 2) else 2 for i in range(num_stages))
    decoder = tuple(1 if i >= math.ceil(last / 2 + 0.5) else 2 for i in range(last))
    return encoder, decoder


def _per_stage(name: str, value: int | tuple[int | Size, ...], num_stages: int, ndim: int) -> list[Size]:
    """A kernel or stride of every stage, along each axis."""
    values = [value] * num_stages if isinstance(value, int) else list(value)
    if len(values) != num_stages:
        raise ValueError(f'embed_dim has {num_stages} stages, {name} {len(values)}: {value}.')
    sizes = [(v,) * ndim if isinstance(v, int) else tuple(v) for v in values]
    if any(len(size) != ndim for size in sizes):
        raise ValueError(f'{name} takes a number or {ndim} of them for each stage, got {value}.')
    return sizes


def _reduced(size: Size, reduction: Size) -> Size:
    """Size of a map that is so much smaller than an image along each axis, rounded up."""
    return tuple(-(-side // factor) for side, factor in zip(size, reduction))


def _mixer(form: str, i: int, num_stages: int, ndim: int) -> Literal['none', 'residual', 'vil']:
    """What follows the residual blocks of stage i, as published."""
    if form == 'bot':
        return 'vil' if i + 1 == num_stages else 'none'
    if ndim == 3:
        return 'residual' if i < 3 else 'vil'
    if i < 2:
        return 'residual' if i == 1 else 'none'
    return 'vil' if i % 2 != num_stages % 2 else 'none'


def _init_conv(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, a=_SLOPE)
        nn.init.zeros_(module.bias)


class XLSTMUNet(ConvUNet):
    """xLSTM-UNet: pictures [B, in_chans, H, W] or volumes [B, in_chans, D, H, W] -> logits [B, num_classes, *size].

    Images may have any size, but for `form='enc'`, whose blocks over channels belong to `img_size`.

    Args:
        ndim: 2 for pictures, 3 for volumes.
        form: Where the Vision-LSTM blocks are: 'bot', one behind the last stage, or 'enc', behind several.
        img_size: Size of the images of an 'enc' model, along each axis.
        in_chans: Channels of the image.
        num_classes: Channels of the logits; 0 for features.
        embed_dim: Channels of each stage.
        depths: Residual blocks of each encoder stage, and of the stem as of the first; None for the published number.
        decoder_depths: Residual blocks of each decoder stage, from the deepest on; None for the published number.
        kernel_size: Kernel of the convolutions, of all stages or of each, along all axes or each.
        strides: Stride of each stage, along all axes or each.
        deep_supervision: While training, return a list of logits: at the image's size, and for every other decoder
            stage, from fine to coarse.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth rate of the Vision-LSTM blocks.

    Raises:
        ValueError: Options that do not fit together.
    """

    def __init__(
        self,
        ndim: int = 2,
        form: Literal['bot', 'enc'] = 'bot',
        img_size: int | Size = 320,
        in_chans: int = 1,
        num_classes: int = 14,
        embed_dim: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512),
        depths: tuple[int, ...] | None = None,
        decoder_depths: tuple[int, ...] | None = None,
        kernel_size: int | tuple[int | Size, ...] = 3,
        strides: tuple[int | Size, ...] = (1, 2, 2, 2, 2, 2, 2),
        deep_supervision: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        dims, num_stages = tuple(embed_dim), len(embed_dim)
        if form not in ('bot', 'enc'):
            raise ValueError(f"form must be 'bot' or 'enc', got {form!r}.")
        encoder_depths, default_decoder_depths = _default_depths(num_stages)
        depths = tuple(depths or encoder_depths)
        decoder_depths = tuple(decoder_depths or default_decoder_depths)
        if len(depths) != num_stages or len(decoder_depths) != num_stages - 1:
            raise ValueError(
                f'{num_stages} stages need as many depths and {num_stages - 1} decoder_depths, got {depths} and '
                f'{decoder_depths}.'
            )
        kernels = _per_stage('kernel_size', kernel_size, num_stages, ndim)
        strides = _per_stage('strides', strides, num_stages, ndim)
        img_size = (img_size,) * ndim if isinstance(img_size, int) else tuple(img_size)
        if len(img_size) != ndim:
            raise ValueError(f'img_size takes a number or {ndim} of them, got {img_size}.')

        reductions = [strides[0]]
        for stride in strides[1:]:
            reductions.append(tuple(a * b for a, b in zip(reductions[-1], stride)))
        stages = []
        for i, dim in enumerate(dims):
            blocks = residual_blocks(dims[max(i - 1, 0)], dim, depths[i], kernels[i], strides[i], **dd)
            mixer = _mixer(form, i, num_stages, ndim)
            if mixer == 'residual':
                blocks.append(ResidualBlock(dim, dim, kernels[i], **dd))
            elif mixer == 'vil':
                positions = math.prod(_reduced(img_size, reductions[i]))
                over_channels = form == 'enc' and positions <= dim
                tokens_dim = positions if over_channels else dim
                blocks.append(TokenMixer(tokens_dim, over_channels, drop_path=drop_path_rate, **dd))
            stages.append(nn.Sequential(*blocks))
        decoder = [
            DecoderStage(dims[i + 1], dims[i], depth, kernels[i], join=ndim == 3 or i > 0, **dd)
            for i, depth in zip(reversed(range(num_stages - 1)), decoder_depths)
        ]
        super().__init__(
            ndim,
            nn.Sequential(*residual_blocks(in_chans, dims[0], depths[0], kernels[0], (1,) * ndim, **dd)),
            stages,
            dims,
            tuple(reduction[-1] for reduction in reductions),
            decoder,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            **dd,
        )
        self.reductions = reductions
        self.img_size = img_size if any(getattr(m, 'over_channels', False) for m in self.modules()) else None
        self.deep_supervision = deep_supervision
        self.aux_heads = self._make_aux_heads(**dd)
        self.init_weights(needs_reset=False)

    def _make_head(self, dim: int, num_classes: int, device=None, dtype=None) -> nn.Module:
        head = super()._make_head(dim, num_classes, device=device, dtype=dtype)
        _init_conv(head)
        return head

    def _make_aux_heads(self, device=None, dtype=None) -> nn.ModuleList:
        """Heads of the decoder stages before the last, from fine to coarse; none without deep supervision."""
        stages = self.decoder[-2::-1] if self.deep_supervision and self.decoder is not None else ()
        dims = [stage.up.out_channels for stage in stages]
        return nn.ModuleList(self._make_head(dim, self.num_classes, device, dtype) for dim in dims)

    def _check_size(self, size: Size) -> None:
        got = 'x'.join(map(str, size))
        if self.img_size not in (None, size):
            raise ValueError(
                f'The model is built for images of {"x".join(map(str, self.img_size))}, got {got}: it has weights for '
                'every position. Predict in windows of that size, or create the model with img_size=...'
            )
        if math.prod(_reduced(size, self.reductions[len(self.stages) - 1])) < 2:
            raise ValueError(
                f'The image is {got}, of which the coarsest stage has one position, but its norms need more: resize or '
                'pad it.'
            )

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as published; `needs_reset` also what constructors have initialised (`to_empty()`)."""
        super().init_weights(needs_reset)
        self.apply(_init_conv)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the layers that make the logits, or remove them for 0; `global_pool` is timm's, nothing is pooled.

        Raises:
            ValueError: The model was pruned to its encoder.
        """
        super().reset_classifier(num_classes, global_pool)
        self.aux_heads = self._make_aux_heads(**get_device_dtype(self)).train(self.training)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Image [B, in_chans, *size] -> logits [B, num_classes, *size].

        While training with `deep_supervision` a list of them, followed by those of every other decoder stage at its own
        size, from fine to coarse.
        """
        decoded = self._decode(self._encode(x))
        logits = self.forward_head(self.final(decoded[-1]))
        if not (self.deep_supervision and self.training):
            return logits
        return [logits, *(head(self.head_drop(y)) for head, y in zip(self.aux_heads, decoded[-2::-1]))]


_RENAMES = (
    (r'^(decoder\.)?encoder\.(stem|stages)\.', r'\2.'),
    (r'^decoder\.stages\.(\d+)\.', r'decoder.\1.blocks.'),
    (r'^decoder\.upsample_layers\.(\d+)\.conv\.', r'decoder.\1.up.'),
    (r'\.conv(\d)\.(?:conv|all_modules\.0)\.', r'.conv\1.'),
    (r'\.conv(\d)\.(?:norm|all_modules\.1)\.', r'.norm\1.'),
    (r'\.layer\.conv1d\.conv\.', '.layer.conv1d.'),
    (r'\.layer\.mlstm_cell\.', '.layer.'),
    (r'\.layer\.(outnorm|[qkv]_proj)\.weight$', r'.layer.\1'),
)
_VIL_NORM = re.compile(r'(\.layer\.outnorm|\.vil\.norm\.weight)$')


def _our_key(key: str, model: XLSTMUNet, num_heads: int) -> str | None:
    """Our name for a published parameter; None for one that is not used, or not by this model."""
    key = key.replace('decoder.encoder.', 'encoder.')
    if key.startswith('xlstm.'):
        key = f'encoder.xlstm_layers.{len(model.stages) - 1}.{key.removeprefix("xlstm.")}'
    if match := re.match(r'encoder\.xlstm_layers\.(\d+)\.(.+)', key):
        stage, name = int(match[1]), match[2]
        if name.startswith('norm.'):  # beside the block, and never applied
            return None
        key = f'stages.{stage}.{len(model.stages[stage]) - 1}.{name}'
    if match := re.match(r'decoder\.seg_layers\.(\d+)\.(.+)', key):
        level = num_heads - 1 - int(match[1])
        key = f'aux_heads.{level - 1}.{match[2]}' if level else f'head.{match[2]}'
    for pattern, new in _RENAMES:
        key = re.sub(pattern, new, key)
    return key


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: XLSTMUNet) -> dict[str, Tensor]:
    """Fit a published checkpoint (nnU-Net's), or one of ours, to `model`.

    Heads of lower resolutions are left out for a model without `deep_supervision`, and stay as initialised in one for
    another number of classes.
    """
    published = [key for key in state_dict if key.startswith(('encoder.', 'decoder.seg_layers.'))]
    if published:
        num_heads = 1 + max(int(key.split('.')[2]) for key in published if key.startswith('decoder.seg_layers.'))
        converted = {}
        for key, value in state_dict.items():  # of the names of a parameter the last wins, as in the published model
            our_key = _our_key(key, model, num_heads)
            if our_key is not None:
                is_offset = _VIL_NORM.search(our_key)  # published norms hold what exceeds 1
                converted[our_key.replace('.vil.', '.')] = value + 1 if is_offset else value
        state_dict = converted
    target = model.state_dict()
    out = {}
    for key, value in state_dict.items():
        if not key.startswith('aux_heads.'):
            out[key] = value
        elif key in target:
            out[key] = value if value.shape[0] == target[key].shape[0] else target[key]
    return out


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return segmentation_cfg(
        **kwargs,
        first_conv=('stem.0.conv1', 'stem.0.conv3'),
        license='unknown',
        origin_url='https://github.com/tianrun-chen/xLSTM-UNet-PyTorch',
        paper_name=(
            'xLSTM-UNet can be an Effective 2D & 3D Medical Image Segmentation Backbone with Vision-LSTM (ViL) better '
            'than its Mamba Counterpart'
        ),
        paper_ids='arXiv:2407.01530',
    )


default_cfgs = generate_default_cfgs(
    {
        f'uxlstm_{form}_{variant}': _cfg(input_size=size, num_classes=classes, fixed_input_size=form == 'enc')
        for form in ('bot', 'enc')
        for variant, size, classes in (
            ('2d.abdomen_mr', (1, 320, 320), 14),
            ('2d.endovis17', (3, 384, 640), 8),
            ('2d_s8.neurips_cell', (3, 512, 512), 3),
            ('3d.abdomen_mr', (1, 48, 160, 224), 14),
        )
    }
)

# nnU-Net's plans
_PLANS = {
    '2d': {
        'ndim': 2,
        'embed_dim': (32, 64, 128, 256, 512, 512, 512),
        'strides': (1, 2, 2, 2, 2, 2, 2),
    },
    '2d_s8': {
        'ndim': 2,
        'embed_dim': (32, 64, 128, 256, 512, 512, 512, 512),
        'strides': (1, 2, 2, 2, 2, 2, 2, 2),
    },
    '3d': {
        'ndim': 3,
        'embed_dim': (32, 64, 128, 256, 320, 320),
        'kernel_size': ((1, 3, 3), 3, 3, 3, 3, 3),
        'strides': (1, (1, 2, 2), 2, 2, 2, (1, 2, 2)),
    },
}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> XLSTMUNet:
    _, form, plan = variant.split('_', 2)
    model_args = {**_PLANS[plan], 'form': form, **kwargs}
    feature_cfg = {'out_indices': tuple(range(len(model_args['embed_dim'])))}
    return build_model(
        XLSTMUNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg, **model_args
    )


@register_model
def uxlstm_bot_2d(pretrained: bool = False, **kwargs: Any) -> XLSTMUNet:
    """xLSTM-UNet for pictures, with one Vision-LSTM block: 7 stages, for abdominal MRI by default."""
    return _create('uxlstm_bot_2d', pretrained, **kwargs)


@register_model
def uxlstm_enc_2d(pretrained: bool = False, **kwargs: Any) -> XLSTMUNet:
    """xLSTM-UNet for pictures, with Vision-LSTM blocks in the encoder: 7 stages, for abdominal MRI by default."""
    return _create('uxlstm_enc_2d', pretrained, **kwargs)


@register_model
def uxlstm_bot_2d_s8(pretrained: bool = False, **kwargs: Any) -> XLSTMUNet:
    """xLSTM-UNet for pictures, with one Vision-LSTM block: 8 stages, for cells in microscopy by default."""
    return _create('uxlstm_bot_2d_s8', pretrained, **kwargs)


@register_model
def uxlstm_enc_2d_s8(pretrained: bool = False, **kwargs: Any) -> XLSTMUNet:
    """xLSTM-UNet for pictures, with Vision-LSTM blocks in the encoder: 8 stages, for cells in microscopy by default."""
    return _create('uxlstm_enc_2d_s8', pretrained, **kwargs)


@register_model
def uxlstm_bot_3d(pretrained: bool = False, **kwargs: Any) -> XLSTMUNet:
    """xLSTM-UNet for volumes, with one Vision-LSTM block: 6 stages, for abdominal MRI by default."""
    return _create('uxlstm_bot_3d', pretrained, **kwargs)


@register_model
def uxlstm_enc_3d(pretrained: bool = False, **kwargs: Any) -> XLSTMUNet:
    """xLSTM-UNet for volumes, with Vision-LSTM blocks in the encoder: 6 stages, for abdominal MRI by default."""
    return _create('uxlstm_enc_3d', pretrained, **kwargs)
