"""MobileMamba.

Paper: `MobileMamba: Lightweight Multi-Receptive Visual Mamba Network` - https://arxiv.org/abs/2411.15941 (CVPR 2025)
Weights: https://github.com/lewandofskee/MobileMamba (MIT)

Three stages at strides 16, 32 and 64, built from convolutions and batch norms. The token mixer splits its channels in
three: a global part (a selective scan of the rows in both directions, plus a depthwise convolution of the map's Haar
wavelet bands), a local part (a depthwise convolution), and an identity. The local part has one kernel size a stage, as
in the published code; the paper draws several.

Written for timm from the paper's description of the function. What differs from the published code:
* the stages are modules (`layers.1`, after `layers.0`, which is the stem's map as a feature), the downsampling being at
  the end of the stage before;
* the wavelet's filters are constants, not parameters: those in published files are not read;
* the scan's decay, skip and step bias are exempt from weight decay.

For deployment `model.eval().fuse()`, or `timm.models.reparameterize_model(model.eval())` for a copy, folds batch norms,
residual depthwise convolutions and channel scales into the layers beside them. Outputs stay the same; the parameters
have other names, so that weights have to be loaded before.
"""

import math
import re
from functools import partial

import torch
from timm.layers import DropPath, SqueezeExcite, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model, reparameterize_model
from torch import Tensor, nn

from ..layers import SS2D, ConvNorm, DistilledHead, HaarTransform, NormLinear, PointwiseNorm, init_linear_weight_
from ._builder import build_model, imagenet_cfg
from ._hierarchical import ChannelsFirstStage, DistilledBackbone

__all__ = ['MobileMamba']

# Training checkpoints hold both; the stated accuracies are those of the averaged weights.
PREFERRED_WRAPPER = 'net_E'


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module):
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class ResidualDepthwise(Residual):
    """Depthwise 3x3 convolution and batch norm, added to its input.

    Args:
        dim: Channels.
        norm_init: Initial weight of the norm.
    """

    def __init__(self, dim: int, norm_init: float = 1.0, device=None, dtype=None):
        super().__init__(ConvNorm(dim, dim, 3, groups=dim, norm_init=norm_init, device=device, dtype=dtype))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The same function in evaluation as one layer: the input is the kernel's centre."""
        conv = self.m.fuse()
        conv.weight[:, :, 1, 1] += 1
        return conv


class Ffn(nn.Module):
    """Two 1x1 convolutions with an activation between them: [B, dim, H, W] -> [B, dim, H, W].

    Args:
        dim: Channels of input and output.
        hidden_dim: Channels between.
    """

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__()
        self.pw1 = ConvNorm(dim, hidden_dim, device=device, dtype=dtype)
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(hidden_dim, dim, norm_init=0.0, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))


class Scale(nn.Module):
    """A factor for each channel of [B, dim, H, W].

    Args:
        dim: Channels.
        init: Initial value.
    """

    def __init__(self, dim: int, init: float = 1.0, device=None, dtype=None):
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the factors."""
        nn.init.constant_(self.weight, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class BidirectionalSS2D(SS2D):
    """Gated SS2D of the rows in both directions, whose projections have batch norms.

    Args:
        dim: Channels of input and output.
        ssm_ratio: Inner width over `dim`.
    """

    def __init__(self, dim: int, ssm_ratio: float, device=None, dtype=None):
        super().__init__(
            dim,
            ssm_ratio=ssm_ratio,
            conv_bias=True,
            gate=True,
            scan='forward_backward',
            device=device,
            dtype=dtype,
        )

    def _build_projection(self, in_features: int, out_features: int, dd: dict) -> nn.Module:
        return PointwiseNorm(in_features, out_features, **dd)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the scan's own parameters; sub-modules have their own method."""
        init_linear_weight_(self.x_proj_weight)
        nn.init.uniform_(self.dt_projs_weight, 0.0, 0.1)
        nn.init.uniform_(self.dt_projs_bias, 0.0, 0.1)
        nn.init.zeros_(self.A_logs)
        nn.init.ones_(self.Ds)


class WaveletScan(nn.Module):
    """Global part of the mixer: a scan, plus a depthwise convolution of the bands of a Haar wavelet transform.

    Args:
        dim: Channels.
        kernel_size: Of the convolution.
        ssm_ratio: Inner width of the scan over `dim`.
    """

    def __init__(self, dim: int, kernel_size: int, ssm_ratio: float, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.scan = BidirectionalSS2D(dim, ssm_ratio, **dd)
        self.base_scale = Scale(dim, **dd)
        self.wavelet_conv = nn.Conv2d(
            4 * dim, 4 * dim, kernel_size, padding=kernel_size // 2, groups=4 * dim, bias=False, **dd
        )
        self.wavelet_scale = Scale(4 * dim, init=0.1, **dd)
        self.haar = HaarTransform(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, dim, H, W]."""
        y = self.scan(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        bands = self.wavelet_scale(self.wavelet_conv(self.haar(x)))
        return self.base_scale(y) + self.haar.inverse(bands)[:, :, : x.shape[2], : x.shape[3]]

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The same function in evaluation, with the scales in the layers before them."""
        if isinstance(self.base_scale, Scale):
            self.scan.out_proj = self.scan.out_proj.fuse()
            self.scan.out_proj.weight *= self.base_scale.weight.view(-1, 1)
            self.scan.out_proj.bias *= self.base_scale.weight.flatten()
            self.wavelet_conv.weight *= self.wavelet_scale.weight.view(-1, 1, 1, 1)
            self.base_scale, self.wavelet_scale = nn.Identity(), nn.Identity()
        return self


class LocalConv(nn.Module):
    """Local part of the mixer: depthwise convolution, activation, a factor for each channel; with batch norms.

    Args:
        dim: Channels.
        kernel_size: Of the convolution.
    """

    def __init__(self, dim: int, kernel_size: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.dw = ConvNorm(dim, dim, kernel_size, groups=dim, **dd)
        self.act = nn.ReLU()
        self.pw = ConvNorm(dim, dim, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, dim, H, W]."""
        return self.pw(self.act(self.dw(x)))


def split_channels(dim: int, global_ratio: float, local_ratio: float) -> tuple[int, int, int]:
    """Channels of the mixer's parts: the global one a multiple of 16, the local one, the rest.

    Raises:
        ValueError: No room for the global part.
    """
    global_dim = (int(global_ratio * dim) + 8) // 16 * 16
    if not 0 < global_dim <= dim:
        raise ValueError(
            f'A global_ratio of {global_ratio} gives the scan {global_dim} of {dim} channels, in multiples of 16: '
            'choose another ratio or width.'
        )
    local_dim = min(int(local_ratio * dim), dim - global_dim)
    return global_dim, local_dim, dim - global_dim - local_dim


class MultiReceptiveMixer(nn.Module):
    """Token mixer: the channels' global, local and identity parts, mixed by a 1x1 convolution.

    Args:
        dim: Channels.
        global_ratio: Part of the channels that are scanned, rounded to a multiple of 16.
        local_ratio: Part of the channels that are convolved, as far as there are any left.
        kernel_size: Of the convolutions of both parts.
        ssm_ratio: Inner width of the scan over its channels.
    """

    def __init__(
        self,
        dim: int,
        global_ratio: float,
        local_ratio: float,
        kernel_size: int,
        ssm_ratio: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.split = split_channels(dim, global_ratio, local_ratio)
        self.global_op = WaveletScan(self.split[0], kernel_size, ssm_ratio, **dd)
        self.local_op = LocalConv(self.split[1], kernel_size, **dd) if self.split[1] else nn.Identity()
        self.act = nn.ReLU()
        self.proj = ConvNorm(dim, dim, norm_init=0.0, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, dim, H, W]."""
        x_global, x_local, x = x.split(self.split, dim=1)
        x = torch.cat((self.global_op(x_global), self.local_op(x_local), x), dim=1)
        return self.proj(self.act(x))


class MobileMambaBlock(nn.Module):
    """The mixer between two pairs of depthwise convolution and FFN, all residual, added to its input once more.

    Args:
        dim: Channels.
        drop_path: Stochastic depth rate.
        mixer_kwargs: Options of the mixer.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None, **mixer_kwargs):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.dw0 = ResidualDepthwise(dim, norm_init=0.0, **dd)
        self.ffn0 = Residual(Ffn(dim, 2 * dim, **dd))
        self.mixer = Residual(MultiReceptiveMixer(dim, **mixer_kwargs, **dd))
        self.dw1 = ResidualDepthwise(dim, norm_init=0.0, **dd)
        self.ffn1 = Residual(Ffn(dim, 2 * dim, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, dim, H, W]."""
        y = self.mixer(self.ffn0(self.dw0(x)))
        return x + self.drop_path(self.ffn1(self.dw1(y)))


class SqueezeMerging(nn.Module):
    """Halve a map by an inverted bottleneck with squeeze-and-excitation.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output.
    """

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        hidden_dim = 4 * dim
        self.conv1 = ConvNorm(dim, hidden_dim, **dd)
        self.act = nn.ReLU()
        self.conv2 = ConvNorm(hidden_dim, hidden_dim, 3, stride=2, groups=hidden_dim, **dd)
        self.se = SqueezeExcite(hidden_dim, rd_channels=dim, **dd)
        self.conv3 = ConvNorm(hidden_dim, out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, out_dim, H / 2, W / 2], sides rounded up."""
        return self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))


class Downsample(nn.Sequential):
    """Halve a map between two pairs of depthwise convolution and FFN. Takes and returns channels-last maps.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output.
    """

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}

        def pair(dim: int) -> nn.Sequential:
            return nn.Sequential(ResidualDepthwise(dim, **dd), Residual(Ffn(dim, 2 * dim, **dd)))

        super().__init__(pair(dim), SqueezeMerging(dim, out_dim, **dd), pair(out_dim))

    def min_input(self, size: int) -> int:
        """Smallest side that gives `size` output positions."""
        return 2 * size - 1

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H / 2, W / 2, out_dim], sides rounded up."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MobileMambaStem(nn.Sequential):
    """Four convolutions of stride 2.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the output, a multiple of 8.
    """

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        if dim % 8:
            raise ValueError(f'The stem starts with an eighth of its {dim} channels: choose a multiple of 8.')
        layers = []
        dims = (in_chans, dim // 8, dim // 4, dim // 2, dim)
        for i in range(4):
            layers += [ConvNorm(dims[i], dims[i + 1], 3, stride=2, device=device, dtype=dtype), nn.ReLU()]
        super().__init__(*layers[:-1])

    def min_input(self, size: int) -> int:
        """Smallest image side that gives `size` output positions."""
        return 16 * size - 15

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, H / 16, W / 16, dim], sides rounded up."""
        x = x.contiguous(memory_format=torch.channels_last)  # the scans' order: no copies on the way to them
        return super().forward(x).permute(0, 2, 3, 1)


class MobileMamba(DistilledBackbone):
    """MobileMamba backbone and classifier. Takes images [B, in_chans, H, W] of any size.

    Its features are the stem's map and the outputs of the stages, of strides 16, 16, 32 and 64.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: Pooling before the classifier: 'avg', or '' for none.
        output_stride: Accepted for timm's sake: only the network's own stride is possible.
        depths: Blocks of each stage.
        embed_dim: Channels of each stage.
        global_ratio: Part of each stage's channels that are scanned, rounded to a multiple of 16.
        local_ratio: Part of each stage's channels that are convolved, as far as there are any left.
        kernel_size: Of each stage's convolutions in the mixer, odd.
        ssm_ratio: Inner width of the scan over its channels.
        distillation: Have a second classifier, which learns from a teacher (see `set_distilled_training`).
        drop_rate: Dropout before the classifiers.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from zero.

    Raises:
        ValueError: Options that do not fit together.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        output_stride: int | None = None,
        depths: tuple[int, ...] = (1, 2, 2),
        embed_dim: tuple[int, ...] = (192, 384, 448),
        global_ratio: tuple[float, ...] = (0.8, 0.7, 0.6),
        local_ratio: tuple[float, ...] = (0.2, 0.2, 0.3),
        kernel_size: tuple[int, ...] = (7, 5, 3),
        ssm_ratio: float = 2.0,
        distillation: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        per_stage = {
            'depths': depths,
            'embed_dim': embed_dim,
            'global_ratio': global_ratio,
            'local_ratio': local_ratio,
            'kernel_size': kernel_size,
        }
        if len({len(values) for values in per_stage.values()}) > 1:
            given = ', '.join(f'{name} {tuple(values)}' for name, values in per_stage.items())
            raise ValueError(f'These differ in their number of stages: {given}.')
        if any(size % 2 == 0 for size in kernel_size):
            raise ValueError(f'kernel_size must be odd, got {tuple(kernel_size)}.')
        dims = (embed_dim[0], *embed_dim)
        drop_path = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = [ChannelsFirstStage([])]  # whose features are those of the stem
        for i, rates in enumerate(drop_path):
            mixer_kwargs = {
                'global_ratio': global_ratio[i],
                'local_ratio': local_ratio[i],
                'kernel_size': kernel_size[i],
                'ssm_ratio': ssm_ratio,
            }
            blocks = [MobileMambaBlock(embed_dim[i], drop_path=rate, **mixer_kwargs, **dd) for rate in rates]
            is_last = i == len(depths) - 1
            stages.append(ChannelsFirstStage(blocks, None if is_last else Downsample(*embed_dim[i : i + 2], **dd)))
        head = DistilledHead(dims[-1], num_classes, global_pool, drop_rate, distillation, layer=NormLinear, **dd)
        super().__init__(
            MobileMambaStem(in_chans, dims[0], **dd),
            stages,
            dims,
            in_chans,
            num_classes,
            output_stride=output_stride,
            classifier=head,
            reductions=(16, *(16 * 2**i for i in range(len(depths)))),
            **dd,
        )
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def fuse(self) -> 'MobileMamba':
        """Fold norms, residual convolutions and scales into the layers beside them, in place, for inference.

        Returns:
            The model itself: the same function, with fewer layers and other parameters.

        Raises:
            RuntimeError: In training, where batch norms depend on the batch.
        """
        if self.training:
            raise RuntimeError('Only a model in evaluation can be fused: call eval() first.')
        return reparameterize_model(self, inplace=True)


_RENAMES = [
    (r'^blocks1\.', 'layers.1.blocks.'),
    (r'^head', 'classifier.head'),
    (r'\.mixer\.m\.attn\.', '.mixer.m.'),
    (r'\.proj\.1\.', '.proj.'),
    (r'\.global_atten\.', '.scan.'),
    (r'\.wavelet_convs\.0\.', '.wavelet_conv.'),
    (r'\.wavelet_scale\.0\.', '.wavelet_scale.'),
    (r'\.dwconv3x3\.', '.dw.c.'),
    (r'\.dwconv1x1\.', '.pw.c.'),
    (r'\.local_op\.bn1\.', '.local_op.dw.bn.'),
    (r'\.local_op\.bn2\.', '.local_op.pw.bn.'),
]


def _own_place(match: re.Match) -> str:
    """Where the modules of a published stage are: the first three of them lead to it from the stage before."""
    stage, index = int(match[1]), int(match[2])
    return f'layers.{stage - 1}.downsample.{index}.' if index < 3 else f'layers.{stage}.blocks.{index - 3}.'


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Map the published names to ours; leave out Haar filters, and the head's norms where there is no head.

    Args:
        state_dict: Unwrapped weights, published or ours.
        model: The model they are for.
    """
    own = model.state_dict()
    out = {}
    for name, value in state_dict.items():
        if name.endswith(('.wt_filter', '.iwt_filter')) and value.shape[2:] == (2, 2):
            continue
        name = re.sub(r'^blocks([23])\.(\d+)\.', _own_place, name)
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
        if name not in own and re.match(r'classifier\.head(_dist)?\.bn\.', name):
            continue
        out[name] = value
    return out


def _cfg(drive_id: str, size: int) -> dict:
    side = math.ceil(size / 64)
    return imagenet_cfg(
        url=f'https://drive.google.com/file/d/{drive_id}/view',
        input_size=(3, size, size),
        pool_size=(side, side),
        first_conv='patch_embed.0.c',
        classifier='classifier.head.l',
        license='mit',
        origin_url='https://github.com/lewandofskee/MobileMamba',
        paper_name='MobileMamba: Lightweight Multi-Receptive Visual Mamba Network',
        paper_ids='arXiv:2411.15941',
    )


default_cfgs = generate_default_cfgs(
    {
        'mobilemamba_t2.in1k': _cfg('1LXh5wjVEUu5Kj1foclC9zmlKsy7JpMQ-', 192),
        'mobilemamba_t4.in1k': _cfg('17-5Q93_cEhBYMDzWTq4sDcc4_c_ezwpd', 192),
        'mobilemamba_s6.in1k': _cfg('13en_zNB2wuHmnHKZMUQDe4KizlaTCHbP', 224),
        'mobilemamba_b1.in1k': _cfg('1ODO1XM2luMfczbDLJxHrEl-ie7yUscAC', 256),
        'mobilemamba_b2.in1k': _cfg('1tJJZqeP09D_IAKKFuQtJQOYm4eNGjr1r', 384),
        'mobilemamba_b4.in1k': _cfg('1MiGLHSldK2JpbQEe-7VlmFsaCdugDnYR', 512),
        # trained for 1,000 epochs with a teacher ("training strategy"), with one classifier all the same
        'mobilemamba_t2.kd_in1k': _cfg('14UUeEeN62a1jo5qit-m0yChQnNU8JWQG', 192),
        'mobilemamba_t4.kd_in1k': _cfg('12e1RKJEYDWVjOZuQLycjOUkA5PqCUnwu', 192),
        'mobilemamba_s6.kd_in1k': _cfg('1ujVeWpoICjioRF0aB7PD1fadM4PGFRfl', 224),
        'mobilemamba_b1.kd_in1k': _cfg('15rBhYky_f7jNSknXujuwQESaIkiTBAR1', 256),
        'mobilemamba_b2.kd_in1k': _cfg('1KuleL6Fi84zkjIhkRFbR4lqGa2iu6bOp', 384),
        'mobilemamba_b4.kd_in1k': _cfg('1KevdesGm8Pb4fEbgZ5JY4FMy9IQgYbiZ', 512),
    }
)


_create_mobilemamba = partial(
    build_model,
    MobileMamba,
    pretrained_filter_fn=checkpoint_filter_fn,
    feature_cfg={'out_indices': (1, 2, 3)},
)


@register_model
def mobilemamba_t2(pretrained: bool = False, **kwargs) -> MobileMamba:
    """MobileMamba-T2 at 192 pixels, 8.8 M parameters, 73.6 % top-1 on ImageNet-1k (76.9 % with a teacher)."""
    model_args = {'depths': (1, 2, 2), 'embed_dim': (144, 272, 368)}
    return _create_mobilemamba('mobilemamba_t2', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mobilemamba_t4(pretrained: bool = False, **kwargs) -> MobileMamba:
    """MobileMamba-T4 at 192 pixels, 14.1 M parameters, 76.1 % top-1 on ImageNet-1k (78.9 % with a teacher)."""
    model_args = {'depths': (1, 2, 2), 'embed_dim': (176, 368, 448)}
    return _create_mobilemamba('mobilemamba_t4', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mobilemamba_s6(pretrained: bool = False, **kwargs) -> MobileMamba:
    """MobileMamba-S6 at 224 pixels, 15.0 M parameters, 78.0 % top-1 on ImageNet-1k (80.7 % with a teacher)."""
    model_args = {'depths': (1, 2, 2), 'embed_dim': (192, 384, 448)}
    return _create_mobilemamba('mobilemamba_s6', pretrained=pretrained, **dict(model_args, **kwargs))


_B_ARGS = {'depths': (2, 3, 2), 'embed_dim': (200, 376, 448)}


@register_model
def mobilemamba_b1(pretrained: bool = False, **kwargs) -> MobileMamba:
    """MobileMamba-B1 at 256 pixels, 17.1 M parameters, 79.9 % top-1 on ImageNet-1k, drop path 0.03 (82.2 %)."""
    return _create_mobilemamba('mobilemamba_b1', pretrained=pretrained, **dict(_B_ARGS, **kwargs))


@register_model
def mobilemamba_b2(pretrained: bool = False, **kwargs) -> MobileMamba:
    """MobileMamba-B2, which is B1 at 384 pixels, 81.6 % top-1 on ImageNet-1k, drop path 0.03 (83.3 %)."""
    return _create_mobilemamba('mobilemamba_b2', pretrained=pretrained, **dict(_B_ARGS, **kwargs))


@register_model
def mobilemamba_b4(pretrained: bool = False, **kwargs) -> MobileMamba:
    """MobileMamba-B4, which is B1 at 512 pixels, 82.5 % top-1 on ImageNet-1k, drop path 0.03 (83.6 %)."""
    return _create_mobilemamba('mobilemamba_b4', pretrained=pretrained, **dict(_B_ARGS, **kwargs))
