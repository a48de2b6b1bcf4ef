"""VMamba.

Paper: `VMamba: Visual State Space Model` - https://arxiv.org/abs/2401.10166 (NeurIPS 2024)
Weights: https://github.com/MzeroMiko/VMamba (MIT)

A four-stage hierarchical backbone whose token mixer, SS2D, runs a selective scan along four routes over the map. Three
generations are one class here:

* `vmamba_{tiny,small,base}_s*l*`, the current models: scan without gate, d_state 1, MLPs, overlapping convolutions as
  stem and downsampling. `s` is the width ratio of the scan, `l` the depth of stage three. `vmamba_tiny_0220` is an
  earlier gated one.
* `vmamba_v0_*`, of the first preprint: gated scan with d_state 16, no MLP, patch merging.
* `vmamba_*_m2`: Mamba-2 mixer; the authors never trained it.

Written for timm from the paper's description of the function; parameter names are those of the published checkpoints.
The network is channels-last throughout (the published one is channels-first), the routes live inside one fused operator
instead of four expanded copies of the map, and no compiled extension is needed. The scan's decay, skip and step bias
are exempt from weight decay.
"""

import re
from functools import partial

from timm.layers import calculate_drop_path_rates, get_act_layer
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import (
    SS2D,
    SSD2D,
    ConvDownsample,
    ConvStem,
    PatchMerging,
    PatchStem,
    VSSBlock,
)
from ._builder import build_model, imagenet_cfg
from ._hierarchical import HierarchicalBackbone, Stage, stage_dims

__all__ = ['VMamba']

_MIXERS = {'ss2d': SS2D, 'ssd': SSD2D}
_STEMS = {'conv': ConvStem, 'patch': PatchStem}
_DOWNSAMPLES = {
    'conv': (ConvDownsample, {}),
    'conv2x2': (ConvDownsample, {'kernel_size': 2}),
    'merge': (PatchMerging, {}),
    'merge_crop': (PatchMerging, {'odd': 'crop'}),
}


def _choose(option: str, name: str, choices: dict):
    if name not in choices:
        raise ValueError(f'Unknown {option} {name!r}; choose from {", ".join(choices)}.')
    return choices[name]


class VMamba(HierarchicalBackbone):
    """VMamba backbone and classifier. Takes images [B, in_chans, H, W] of any size from `min_input_size` on.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: Pooling before the classifier, '' for none.
        output_stride: Accepted for timm's sake: only the network's own stride is possible.
        patch_size: Stride of the stem.
        depths: Blocks of each stage.
        embed_dim: Channels of each stage, or those of the first, which then double from stage to stage.
        mixer: Token mixer: 'ss2d', or 'ssd' for the Mamba-2 form.
        d_state: State size of the scan.
        ssm_ratio: Width of the scan over that of the block.
        dt_rank: Rank of the scan's step projection ('auto': a sixteenth of the block's width); heads of 'ssd'.
        kernel_size: Of the depthwise convolution before the scan; 0 leaves it out.
        conv_bias: Bias of that convolution.
        act_layer: Activation before the scan, and of the gate.
        gate: Multiply the scan's output with a second projection of its input.
        gate_act: Put that projection through `act_layer`.
        out_norm: LayerNorm on the scan's output.
        out_act_layer: Activation after that norm.
        scan: Order of the scan, one of `vmzoo.layers.scan_names()`.
        mlp_ratio: Hidden width of the MLPs over that of the block; 0 for none.
        mlp_act_layer: Activation of the MLPs.
        stem: 'conv' (two overlapping convolutions) or 'patch' (one that does not overlap).
        downsample: 'conv' (overlapping), 'conv2x2', 'merge' (patch merging; odd maps are padded) or 'merge_crop' (odd
            maps lose their last row or column).
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from zero.

    Raises:
        ValueError: An option outside its choices.
    """

    out_norms = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        output_stride: int | None = None,
        patch_size: int = 4,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        embed_dim: int | tuple[int, ...] = 96,
        mixer: str = 'ss2d',
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | str = 'auto',
        kernel_size: int = 3,
        conv_bias: bool = False,
        act_layer: str | type[nn.Module] = 'silu',
        gate: bool = False,
        gate_act: bool = True,
        out_norm: bool = True,
        out_act_layer: str | type[nn.Module] | None = None,
        scan: str = 'cross',
        mlp_ratio: float = 4.0,
        mlp_act_layer: str | type[nn.Module] = 'gelu',
        stem: str = 'conv',
        downsample: str = 'conv',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        embed_dim = stage_dims(embed_dim, depths)
        block_kwargs = {
            'mixer_layer': _choose('mixer', mixer, _MIXERS),
            'mlp_ratio': mlp_ratio,
            'mlp_act_layer': get_act_layer(mlp_act_layer),
            'd_state': d_state,
            'ssm_ratio': ssm_ratio,
            'dt_rank': dt_rank,
            'kernel_size': kernel_size,
            'conv_bias': conv_bias,
            'act_layer': get_act_layer(act_layer),
            'gate': gate,
            'gate_act': gate_act,
            'out_norm': out_norm,
            'out_act_layer': get_act_layer(out_act_layer),
            'scan': scan,
            **dd,
        }
        downsample_layer, downsample_kwargs = _choose('downsample', downsample, _DOWNSAMPLES)
        stem = _choose('stem', stem, _STEMS)(in_chans, embed_dim[0], patch_size, **dd)
        stages = []
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)):
            blocks = [VSSBlock(embed_dim[i], drop_path=rate, **block_kwargs) for rate in rates]
            is_last = i == len(depths) - 1
            down = None if is_last else downsample_layer(*embed_dim[i : i + 2], **downsample_kwargs, **dd)
            stages.append(Stage(blocks, down))
        super().__init__(
            stem, stages, embed_dim, in_chans, num_classes, global_pool, patch_size, drop_rate, output_stride, **dd
        )
        self.init_weights(needs_reset=False)


_RENAMES = [
    # first release
    (r'^patch_embed\.proj\.', 'patch_embed.0.'),
    (r'^patch_embed\.norm\.', 'patch_embed.2.'),
    (r'^norm\.', 'classifier.norm.'),
    (r'^head\.', 'classifier.head.'),
    (r'\.ln_1\.', '.norm.'),
    (r'\.self_attention\.', '.op.'),
    # single-file version
    (r'\.op\.x_proj\.weight$', '.op.x_proj_weight'),
    (r'\.op\.dt_projs\.weight$', '.op.dt_projs_weight'),
    # Mamba-2 mixer, whose convolution sits between two permutations
    (r'\.op\.conv2d\.1\.', '.op.conv2d.'),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Map the names and shapes of every published generation to ours (those of the current published code).

    Args:
        state_dict: Unwrapped weights: v0 ("vanilla") names, current names with linear weights of any layout ([O, I] or
            [O, I, 1, 1]), or the names of the single-file version.
        model: The model they are for.
    """
    wanted = model.state_dict()
    merges_patches = any(isinstance(module, PatchMerging) for module in model.modules())
    out = {}
    for name, value in state_dict.items():
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
        if merges_patches:
            name = re.sub(r'\.downsample\.1\.', '.downsample.norm.', name)
            name = re.sub(r'\.downsample\.2\.', '.downsample.reduction.', name)
        if name.endswith(('.x_proj_weight', '.dt_projs_weight')) and value.ndim == 2:
            value = value.unflatten(0, (4, -1))
        elif value.ndim == 4 and value.shape[2:] == (1, 1) and name in wanted and wanted[name].ndim == 2:
            value = value.flatten(1)
        out[name] = value
    return out


def _cfg(file: str = '', **kwargs) -> dict:
    return imagenet_cfg(
        url=f'https://github.com/MzeroMiko/VMamba/releases/download/{file}' if file else '',
        first_conv='patch_embed.0',
        classifier='classifier.head',
        license='mit',
        origin_url='https://github.com/MzeroMiko/VMamba',
        paper_name='VMamba: Visual State Space Model',
        paper_ids='arXiv:2401.10166',
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        'vmamba_nano.untrained': _cfg(input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0),
        'vmamba_tiny_s1l8.in1k': _cfg('%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth'),
        'vmamba_tiny_s2l5.in1k': _cfg('%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth'),
        'vmamba_small_s2l15.in1k': _cfg('%23v2cls/vssm_small_0229_ckpt_epoch_222.pth'),
        'vmamba_base_s2l15.in1k': _cfg('%23v2cls/vssm_base_0229_ckpt_epoch_237.pth'),
        'vmamba_small_s1l20.in1k': _cfg('%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth'),
        'vmamba_base_s1l20.in1k': _cfg('%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth'),
        'vmamba_tiny_0220.in1k': _cfg('%2320240220/vssmtiny_dp02_ckpt_epoch_258.pth'),
        'vmamba_tiny_m2.untrained': _cfg(),
        'vmamba_small_m2.untrained': _cfg(),
        'vmamba_base_m2.untrained': _cfg(),
        'vmamba_v0_tiny.in1k': _cfg('%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth'),
        'vmamba_v0_small.in1k': _cfg('%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth'),
        'vmamba_v0_base.in1k': _cfg('%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth'),
        # an earlier run, from which the published v0 detection and segmentation models started
        'vmamba_v0_base.dp05_in1k': _cfg('%2320240218/vssmbase_dp05_ckpt_epoch_260.pth'),
    }
)

_create_vmamba = partial(build_model, VMamba, pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def vmamba_nano(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-Nano, 0.8 M parameters: for tests, demonstrations and images of 32 to 64 pixels. Ours; no weights."""
    model_args = {'depths': (1, 1, 2, 1), 'embed_dim': (24, 48, 96, 144)}
    return _create_vmamba('vmamba_nano', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-T, 30.2 M parameters, 82.6 % top-1 on ImageNet-1k (trained with drop path 0.2)."""
    model_args = {'depths': (2, 2, 8, 2), 'embed_dim': 96, 'ssm_ratio': 1.0}
    return _create_vmamba('vmamba_tiny_s1l8', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-T of twice the scan width, 30.7 M parameters, 82.5 % top-1 on ImageNet-1k (drop path 0.2)."""
    model_args = {'depths': (2, 2, 5, 2), 'embed_dim': 96, 'ssm_ratio': 2.0}
    return _create_vmamba('vmamba_tiny_s2l5', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-S, 50.1 M parameters, 83.6 % top-1 on ImageNet-1k (drop path 0.3)."""
    model_args = {'depths': (2, 2, 15, 2), 'embed_dim': 96, 'ssm_ratio': 2.0}
    return _create_vmamba('vmamba_small_s2l15', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-B, 88.6 M parameters, 83.9 % top-1 on ImageNet-1k (drop path 0.6)."""
    model_args = {'depths': (2, 2, 15, 2), 'embed_dim': 128, 'ssm_ratio': 2.0}
    return _create_vmamba('vmamba_base_s2l15', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-S of half the scan width, 49.0 M parameters, 83.3 % top-1 on ImageNet-1k (drop path 0.3)."""
    model_args = {'depths': (2, 2, 20, 2), 'embed_dim': 96, 'ssm_ratio': 1.0}
    return _create_vmamba('vmamba_small_s1l20', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-B of half the scan width, 86.6 M parameters, 83.8 % top-1 on ImageNet-1k (drop path 0.5)."""
    model_args = {'depths': (2, 2, 20, 2), 'embed_dim': 128, 'ssm_ratio': 1.0}
    return _create_vmamba('vmamba_base_s1l20', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_0220(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-T of 20 February 2024, gated, 32.5 M parameters, 82.5 % top-1 on ImageNet-1k (drop path 0.2)."""
    model_args = {'depths': (2, 2, 4, 2), 'embed_dim': 96, 'ssm_ratio': 2.0, 'gate': True}
    return _create_vmamba('vmamba_tiny_0220', pretrained=pretrained, **dict(model_args, **kwargs))


_M2_ARGS = {'mixer': 'ssd', 'd_state': 64, 'ssm_ratio': 1.0, 'act_layer': 'gelu'}


@register_model
def vmamba_tiny_m2(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-T with a Mamba-2 mixer, 25.3 M parameters; never trained by the authors."""
    model_args = dict(_M2_ARGS, depths=(2, 2, 4, 2), embed_dim=96)
    return _create_vmamba('vmamba_tiny_m2', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_m2(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-S with a Mamba-2 mixer, 39.1 M parameters; never trained by the authors."""
    model_args = dict(_M2_ARGS, depths=(2, 2, 12, 2), embed_dim=96)
    return _create_vmamba('vmamba_small_m2', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_m2(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-B with a Mamba-2 mixer, 67.5 M parameters; never trained by the authors."""
    model_args = dict(_M2_ARGS, depths=(2, 2, 12, 2), embed_dim=128)
    return _create_vmamba('vmamba_base_m2', pretrained=pretrained, **dict(model_args, **kwargs))


V0_ARGS = {
    'd_state': 16,
    'ssm_ratio': 2.0,
    'gate': True,
    'conv_bias': True,
    'mlp_ratio': 0.0,
    'stem': 'patch',
    'downsample': 'merge_crop',
}


@register_model
def vmamba_v0_tiny(pretrained: bool = False, **kwargs) -> VMamba:
    """First VMamba-T, 22.9 M parameters, 82.2 % top-1 on ImageNet-1k (drop path 0.1)."""
    model_args = dict(V0_ARGS, depths=(2, 2, 9, 2), embed_dim=96)
    return _create_vmamba('vmamba_v0_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_v0_small(pretrained: bool = False, **kwargs) -> VMamba:
    """First VMamba-S, 44.4 M parameters, 83.5 % top-1 on ImageNet-1k (drop path 0.3)."""
    model_args = dict(V0_ARGS, depths=(2, 2, 27, 2), embed_dim=96)
    return _create_vmamba('vmamba_v0_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_v0_base(pretrained: bool = False, **kwargs) -> VMamba:
    """First VMamba-B, 76.3 M parameters, 83.7 % top-1 on ImageNet-1k (drop path 0.6)."""
    model_args = dict(V0_ARGS, depths=(2, 2, 27, 2), embed_dim=128)
    return _create_vmamba('vmamba_v0_base', pretrained=pretrained, **dict(model_args, **kwargs))
