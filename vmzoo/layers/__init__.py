"""Blocks that two or more model families share."""

from .channel_attention import ChannelAttention, SqueezeExcite
from .conv import DepthwiseConv, MultiScaleConv, conv_bn
from .deform_conv import DCNv4, deform_aggregate
from .fusible import ConvNorm, NormLinear, PointwiseNorm
from .head import DistilledHead, NormPoolHead
from .high_resolution import FusionNeck, HRModule, bottleneck
from .linear import Linear, Mlp, SwiGlu, grouped_linear, init_truncated_, linear
from .mamba import MambaMixer, MambaMlpBlock, TokenPaths, VimBlock
from .neighborhood_attention import check_attention_backend, na2d_av, na2d_qk
from .norm import LayerNorm, RMSNorm
from .odss import ConvBnAct, ODSSBlock
from .patch import (
    ConvDownsample,
    ConvStem,
    PatchMerging,
    PatchStem,
    Permute,
    StridedPatchEmbed,
    check_images,
    to_channels_first,
    to_channels_last,
)
from .scan_block import ScanBlock2d
from .shuffle import LayerwiseShuffle
from .spatial import conv_nd, resize_linear, to_map, to_tokens
from .ss2d import SS2D, SSD2D, scan_names
from .ssm_init import auto_dt_rank, compute_dtype, init_A_log_, init_dt_bias_, init_dt_weight_, init_linear_weight_
from .unet import ConcatFusion, PatchExpand, spread_channels
from .vision_lstm import MatrixLSTMMixer, VisionLSTMBlock, matrix_lstm
from .vss import VSSBlock
from .wavelet import HaarTransform

__all__ = [
    'SS2D',
    'SSD2D',
    'ChannelAttention',
    'ConcatFusion',
    'ConvBnAct',
    'ConvDownsample',
    'ConvNorm',
    'ConvStem',
    'DCNv4',
    'DepthwiseConv',
    'DistilledHead',
    'FusionNeck',
    'HRModule',
    'HaarTransform',
    'LayerNorm',
    'LayerwiseShuffle',
    'Linear',
    'MambaMixer',
    'MambaMlpBlock',
    'MatrixLSTMMixer',
    'Mlp',
    'MultiScaleConv',
    'NormLinear',
    'NormPoolHead',
    'ODSSBlock',
    'PatchExpand',
    'PatchMerging',
    'PatchStem',
    'Permute',
    'PointwiseNorm',
    'RMSNorm',
    'ScanBlock2d',
    'SqueezeExcite',
    'StridedPatchEmbed',
    'SwiGlu',
    'TokenPaths',
    'VSSBlock',
    'VimBlock',
    'VisionLSTMBlock',
    'auto_dt_rank',
    'bottleneck',
    'check_attention_backend',
    'check_images',
    'compute_dtype',
    'conv_bn',
    'conv_nd',
    'deform_aggregate',
    'grouped_linear',
    'init_A_log_',
    'init_dt_bias_',
    'init_dt_weight_',
    'init_linear_weight_',
    'init_truncated_',
    'linear',
    'matrix_lstm',
    'na2d_av',
    'na2d_qk',
    'resize_linear',
    'scan_names',
    'spread_channels',
    'to_channels_first',
    'to_channels_last',
    'to_map',
    'to_tokens',
]
