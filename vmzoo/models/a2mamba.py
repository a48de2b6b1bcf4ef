"""A2Mamba.

Paper: `A2Mamba: Attention-augmented State Space Models for Visual Recognition` - https://arxiv.org/abs/2507.16624
Weights: https://github.com/LMMMEng/A2Mamba (no licence is stated)

A four-stage hierarchical backbone. Half of the heads of its token mixer attend to a dense window around each position,
the other half to a dilated one that spans the whole map. What they gather runs through one row-major selective scan,
whose hidden states, not its outputs, are gathered once more by the same two attention maps. In the last stage full
attention takes the place of the scan.

Written for timm from the paper's description of the function. The network is channels-last throughout (the published
one is channels-first), and neighbourhood attention is plain torch; NATTEN is an option. Published checkpoints list the
relative bias, which the two halves of the heads share, twice: once here. Rotary tables are computed, not stored.
"""

import re
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from vmzoo_kernels import get_routes, route_scan

from ..layers import (
    DepthwiseConv,
    LayerNorm,
    Linear,
    NormPoolHead,
    auto_dt_rank,
    check_attention_backend,
    compute_dtype,
    conv_bn,
    init_A_log_,
    init_dt_bias_,
    init_dt_weight_,
    init_truncated_,
    linear,
    na2d_av,
    na2d_qk,
    to_channels_first,
    to_channels_last,
)
from ..layers.rope import apply_rope, pixel_rope_tables
from ._builder import build_model, imagenet_cfg
from ._hierarchical import HierarchicalBackbone, Stage

__all__ = ['A2Mamba']


class LayerScale(nn.Module):
    """Scale and shift of every channel."""

    def __init__(self, dim: int, init_value: float, device=None, dtype=None):
        super().__init__()
        self.init_value = init_value
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.init_value)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return x * self.weight + self.bias


class ConvMlp(nn.Module):
    """MLP that adds a depthwise convolution of its hidden channels to them."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.act = nn.GELU()
        self.dwconv = DepthwiseConv(hidden_dim, **dd)
        self.fc2 = Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.act(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class AttentiveScan(nn.Module):
    """Row-major selective scan of one state a channel, whose states attention gathers before they are read out.

    Args:
        dim: Channels.
        num_heads: Heads of the attention.
        kernel_size: Side of the attention's windows.
        backend: Of the attention.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int, backend: str = 'torch', device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.backend = backend
        self.dt_rank = auto_dt_rank(dim)
        self.x_proj_weight = nn.Parameter(torch.empty(self.dt_rank + 2, dim, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(dim, self.dt_rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(dim, **dd))
        self.A_logs = nn.Parameter(torch.empty(dim, 1, **dd))
        self.Ds = nn.Parameter(torch.empty(dim, **dd))
        self.conv2d = DepthwiseConv(dim, 5, **dd)
        self.act = nn.SiLU()
        self.state_fusion = nn.Conv2d(num_heads, num_heads, 1, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the scan's own parameters; sub-modules have their own method."""
        bound = self.x_proj_weight.shape[1] ** -0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        init_dt_weight_(self.dt_projs_weight)
        init_dt_bias_(self.dt_projs_bias)
        init_A_log_(self.A_logs)
        nn.init.ones_(self.Ds)

    def _scan(self, x: Tensor, factors: Tensor, height: int, width: int) -> Tensor:
        # x [B, L, C], factors dt | B [B, L, R + 1] -> states [B, L, C]; read out with C = 1, the outputs are the states
        x_dbl = F.pad(factors, (0, 1 + -(self.dt_rank + 2) % 8), value=1.0).unsqueeze(2)  # rows of a multiple of 8
        dtype = compute_dtype(self.A_logs.dtype)
        A = -torch.exp(self.A_logs.to(dtype))
        dt_bias = self.dt_projs_bias.to(dtype)
        routes = get_routes('forward', height, width, device=x.device)
        no_skip = torch.zeros_like(dt_bias)
        return route_scan(x, x_dbl, A[None], no_skip[None], self.dt_projs_weight[None], dt_bias[None], routes)

    def _gather(self, states: Tensor, attn: tuple[Tensor, Tensor], dilation: tuple[int, int]) -> Tensor:
        # states [B, H, W, C] -> [B, H, W, C]
        states = states.unflatten(-1, (self.num_heads, -1)).permute(0, 3, 1, 2, 4)  # [B, N, H, W, D]
        dense, dilated = states.chunk(2, dim=1)
        dense = na2d_av(attn[0], dense, self.kernel_size, 1, self.backend)
        dilated = na2d_av(attn[1], dilated, self.kernel_size, dilation, self.backend)
        states = torch.cat((dense, dilated), dim=1)
        states = self.state_fusion(states.flatten(3)).unflatten(3, (-1, states.shape[-1]))
        return states.permute(0, 2, 3, 1, 4).flatten(3)

    def forward(self, x: Tensor, attn: tuple[Tensor, Tensor], dilation: tuple[int, int]) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C], in at least float32.

        Args:
            x: Map.
            attn: Attention maps [B, N / 2, H, W, k * k] of the dense and of the dilated half of the heads.
            dilation: Of the second.
        """
        _, height, width, _ = x.shape
        x = self.act(self.conv2d(x)).flatten(1, 2)  # [B, L, C]
        factors, readout = linear(x, self.x_proj_weight).split((self.dt_rank + 1, 1), dim=-1)
        states = self._scan(x, factors, height, width).unflatten(1, (height, width))
        states = self._gather(states, attn, dilation).flatten(1, 2)
        dtype = compute_dtype(x.dtype)
        y = readout.to(dtype) * states.to(dtype) + self.Ds.to(dtype) * x.to(dtype)
        return y.unflatten(1, (height, width))


class TokenMixer(nn.Module):
    """Multi-scale attention-augmented scan: attention in two windows, then a scan of what it gathers, gated.

    Args:
        dim: Channels.
        num_heads: Heads, an even number.
        kernel_size: Side of the attention's windows.
        attn_size: Positions of the map that full attention, instead of a scan, has a bias for; None for a scan.
        backend: Of the attention in windows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        attn_size: int | None = None,
        backend: str = 'torch',
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if dim % num_heads or num_heads % 2 or dim // num_heads % 4:
            raise ValueError(
                f'{num_heads} heads do not fit {dim} channels: their number must be even and divide the channels into '
                'multiples of 4.'
            )
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.kernel_size = kernel_size
        self.backend = backend
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.gate = nn.Sequential(
            Linear(dim, dim, **dd), to_channels_first(), nn.BatchNorm2d(dim, **dd), nn.SiLU(), to_channels_last()
        )
        self.lepe = DepthwiseConv(dim, 5, **dd)
        self.ssm = AttentiveScan(dim, num_heads, kernel_size, backend, **dd) if attn_size is None else None
        self.norm = LayerNorm(dim, eps=1e-6, **dd)
        self.proj = nn.Sequential(LayerNorm(dim, eps=1e-6, **dd), Linear(dim, dim, **dd))
        side = 2 * kernel_size - 1
        self.rpb = nn.Parameter(torch.empty(num_heads // 2, side, side, **dd))
        self.full_rpb = None
        if attn_size is not None:
            self.full_rpb = nn.Parameter(torch.empty(1, num_heads, attn_size, attn_size, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the relative biases; sub-modules have their own method."""
        nn.init.zeros_(self.rpb)
        if self.full_rpb is not None:
            nn.init.zeros_(self.full_rpb)

    def _attend(self, q: Tensor, k: Tensor, dilation: int | tuple[int, int]) -> Tensor:
        scores = na2d_qk(q, k, self.kernel_size, dilation, self.rpb, self.backend)
        return scores.softmax(dim=-1).to(q.dtype)

    def _attend_fully(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        q, k, x = (v.flatten(2, 3) for v in (q, k, x))
        bias = resize_bias(self.full_rpb, q.shape[2]).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, x, attn_mask=bias, scale=1.0).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C], with rotary tables [H, W, D]."""
        _, height, width, dim = x.shape
        size = self.kernel_size
        dilation = min(height // size, size), min(width // size, size)
        qkv = self.qkv(x)
        lepe = self.lepe(qkv[..., 2 * dim :])
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(
            3, 0, 4, 1, 2, 5
        )  # [B, N, H, W, D] each
        q, k = apply_rope(q, cos, sin) * self.head_dim**-0.5, apply_rope(k, cos, sin)

        (q1, q2), (k1, k2), (v1, v2) = (t.chunk(2, dim=1) for t in (q, k, v))
        attn = self._attend(q1, k1, 1), self._attend(q2, k2, dilation)
        dense = na2d_av(attn[0], v1, size, 1, self.backend)
        dilated = na2d_av(attn[1], dense + v2, size, dilation, self.backend)
        y = torch.cat((dense, dilated), dim=1)  # [B, N, H, W, D]
        if self.ssm is not None:
            y = self.ssm(y.permute(0, 2, 3, 1, 4).flatten(3), attn, dilation)
        else:
            y = self._attend_fully(q, k, y).unflatten(1, (height, width))
        y = self.norm(y) + lepe
        dtype = compute_dtype(y.dtype)  # the product can leave the range of float16
        return self.proj(self.gate(x).to(dtype) * y.to(dtype))


def resize_bias(bias: Tensor, length: int) -> Tensor:
    """A bias [1, N, L', L'] of queries on keys for maps of another number of positions, resized as if an image.

    Positions are flattened, so this is only near to what the bias was trained for; the published code does the same.
    """
    if bias.shape[-1] == length:
        return bias
    dtype = torch.promote_types(bias.dtype, torch.float32)
    resized = F.interpolate(bias.to(dtype), size=(length, length), mode='bicubic', align_corners=False)
    return resized.to(bias.dtype)


class A2MambaBlock(nn.Module):
    """Position encoding, token mixer, position encoding, MLP, each added to the map.

    Args:
        dim: Channels.
        mlp_ratio: Hidden width of the MLP over `dim`.
        layer_scale: What is scaled and shifted by channel: the 'branch' of mixer and MLP, the 'shortcut' beside it, or
            None.
        layer_scale_init: Initial scale.
        drop_path: Stochastic depth rate of both branches.
        mixer_kwargs: Options of the mixer.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        layer_scale: str | None = None,
        layer_scale_init: float = 1.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
        **mixer_kwargs,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if layer_scale not in (None, 'branch', 'shortcut'):
            raise ValueError(f"layer_scale must be 'branch', 'shortcut' or None, got {layer_scale!r}.")
        self.scales_shortcut = layer_scale == 'shortcut'
        self.cpe1 = DepthwiseConv(dim, **dd)
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        self.token_mixer = TokenMixer(dim, **mixer_kwargs, **dd)
        self.cpe2 = DepthwiseConv(dim, **dd)
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvMlp(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.layer_scale1, self.layer_scale2 = (
            LayerScale(dim, layer_scale_init, **dd) if layer_scale else nn.Identity() for _ in range(2)
        )

    def _add(self, x: Tensor, branch: Tensor, scale: nn.Module) -> Tensor:
        if self.scales_shortcut:
            return scale(x) + self.drop_path(branch)
        return x + self.drop_path(scale(branch))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C], with rotary tables [H, W, D]."""
        x = x + self.cpe1(x)
        x = self._add(x, self.token_mixer(self.norm1(x), cos, sin), self.layer_scale1)
        x = x + self.cpe2(x)
        return self._add(x, self.mlp(self.norm2(x)), self.layer_scale2)


class A2MambaStage(Stage):
    """Blocks at one resolution, which share their rotary tables, then the downsampling to the next."""

    def forward_blocks(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C], without the downsampling."""
        first = self.blocks[0]
        x = x.to(first.cpe1.weight.dtype)  # the residual stream grows: under autocast it stays float32
        tables = pixel_rope_tables(x.shape[1:3], first.token_mixer.head_dim, device=x.device, dtype=x.dtype)
        for block in self.blocks:
            x = checkpoint(block, x, *tables) if self.grad_checkpointing else block(x, *tables)
        return x


class Stem(nn.Sequential):
    """Four convolutions, each with its norm, that reduce an image [B, in_chans, H, W] to a map [B, H / 4, W / 4, C]."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        half = dim // 2
        super().__init__(
            *conv_bn(in_chans, half, 3, 2, **dd),
            nn.GELU(),
            *conv_bn(half, half, 3, **dd),
            nn.GELU(),
            *conv_bn(half, dim, 3, 2, **dd),
            nn.GELU(),
            *conv_bn(dim, dim, 3, **dd),
            to_channels_last(),
        )

    def min_input(self, size: int) -> int:
        """Smallest image side that gives `size` output positions."""
        return 4 * size - 3


class Downsample(nn.Sequential):
    """Halve a channels-last map: convolution, then batch norm."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        convolution = conv_bn(dim, out_dim, 3, 2, device=device, dtype=dtype)
        super().__init__(to_channels_first(), *convolution, to_channels_last())

    def min_input(self, size: int) -> int:
        """Smallest side that gives `size` output positions."""
        return 2 * size - 1


def _per_stage(name: str, value, num_stages: int) -> tuple:
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,) * num_stages
    if len(value) != num_stages:
        raise ValueError(f'{name} {value} and depths differ in their number of stages: {num_stages} are needed.')
    return value


class A2Mamba(HierarchicalBackbone):
    """A2Mamba backbone and classifier. Takes images [B, in_chans, H, W] of any size from `min_input_size` on.

    Features of the network are what its classifier pools, `head_hidden_size` channels; those of its stages are their
    outputs. Options for stages are one value, or one for each.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: Pooling before the classifier, '' for none.
        output_stride: Accepted for timm's sake: only the network's own stride is possible.
        img_size: Image size that the last stage's full attention has a bias for; for others it is resized.
        depths: Blocks of each stage.
        embed_dim: Channels of each stage.
        num_heads: Heads of each stage.
        window_size: Side of the attention's windows in each stage, odd: no map may be smaller.
        mlp_ratio: Hidden width of the MLPs over that of the block, by stage.
        layer_scale: By stage: learnt scale and shift of the channels of every 'branch', of the 'shortcut' beside it, or
            None.
        layer_scale_init: Initial scale, by stage.
        head_hidden_size: Channels that the classifier pools.
        attn_backend: 'torch', or 'natten' for attention in windows by NATTEN 0.17, if that is installed.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from zero.

    Raises:
        ValueError: An option outside its choices, or not one value for each stage.
        RuntimeError: 'natten' is asked for and cannot serve.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        output_stride: int | None = None,
        img_size: int | tuple[int, int] = 224,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        embed_dim: int | tuple[int, ...] = (32, 64, 128, 192),
        num_heads: int | tuple[int, ...] = (2, 2, 4, 8),
        window_size: int | tuple[int, ...] = (11, 9, 7, 7),
        mlp_ratio: float | tuple[float, ...] = (4.0, 4.0, 3.0, 3.0),
        layer_scale: str | tuple[str | None, ...] | None = None,
        layer_scale_init: float | tuple[float, ...] = 1.0,
        head_hidden_size: int = 1024,
        attn_backend: str = 'torch',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        n = len(depths)
        dims = _per_stage('embed_dim', embed_dim, n)
        options = {
            'num_heads': _per_stage('num_heads', num_heads, n),
            'kernel_size': _per_stage('window_size', window_size, n),
            'mlp_ratio': _per_stage('mlp_ratio', mlp_ratio, n),
            'layer_scale': _per_stage('layer_scale', layer_scale, n),
            'layer_scale_init': _per_stage('layer_scale_init', layer_scale_init, n),
        }
        if any(size < 1 or size % 2 == 0 for size in options['kernel_size']):
            raise ValueError(f'window_size must be odd, got {window_size}.')
        check_attention_backend(attn_backend)
        height, width = (-(-side // 2 ** (n + 1)) for side in to_2tuple(img_size))
        drop_path = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            is_last = i == n - 1
            block_kwargs = {name: values[i] for name, values in options.items()}
            block_kwargs.update(attn_size=height * width if is_last else None, backend=attn_backend)
            blocks = [A2MambaBlock(dim, drop_path=rate, **block_kwargs, **dd) for rate in drop_path[i]]
            downsample = None if is_last else Downsample(dim, dims[i + 1], **dd)
            stages.append(A2MambaStage(blocks, downsample, min_size=block_kwargs['kernel_size']))
        projection = nn.Sequential(
            Linear(dims[-1], head_hidden_size, **dd),
            to_channels_first(),
            nn.BatchNorm2d(head_hidden_size, **dd),
            nn.SiLU(),
            to_channels_last(),
        )
        super().__init__(
            Stem(in_chans, dims[0], **dd),
            stages,
            dims,
            in_chans,
            num_classes,
            output_stride=output_stride,
            classifier=NormPoolHead(head_hidden_size, num_classes, global_pool, drop_rate, projection, **dd),
        )
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter; `needs_reset` also those that constructors have initialised (`to_empty()`)."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_truncated_(module)


_RENAMES = [
    (r'^layers\.(\d+)\.([01])\.', lambda m: f'layers.{int(m[1]) // 2}.downsample.{int(m[2]) + 1}.'),
    (r'^layers\.(\d+)\.blocks\.', lambda m: f'layers.{int(m[1]) // 2}.blocks.'),
    (r'\.gate\.1\.', '.gate.2.'),
    (r'\.rpb\.1$', '.rpb'),
    (r'\.rpb\.2$', '.full_rpb'),
    (r'^classifier\.0\.', 'classifier.norm.0.'),
    (r'^classifier\.1\.', 'classifier.norm.2.'),
    (r'^classifier\.4\.', 'classifier.head.'),
]
# 1x1 convolutions that are linear layers here, and scales that are grouped ones there
_FLAT = re.compile(
    r'\.(qkv|gate\.0|proj\.1|fc1|fc2|norm\.0|classifier\.head)\.weight$|^classifier\.(norm\.0|head)\.weight'
)
_SCALE = re.compile(r'\.layer_scale[12]\.weight$')


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Map the names and shapes of the published checkpoints to ours, and resize the full attention's bias.

    The published relative bias of the windows has two names, `rpb.0` and `rpb.1`, for one parameter: loaded in order,
    the second counts.

    Args:
        state_dict: Unwrapped weights, published or our own.
        model: The model they are for.
    """
    published = any(re.match(r'layers\.\d+\.0\.weight$', name) for name in state_dict)
    target = {name: p.shape[-1] for name, p in model.named_parameters() if name.endswith('.full_rpb')}
    out = {}
    for name, value in state_dict.items():
        if published:
            if name.endswith(('.rope.angle', '.rpb.0')):
                continue
            for pattern, new in _RENAMES:
                name = re.sub(pattern, new, name)
            if _FLAT.search(name):
                value = value.flatten(1)
            elif _SCALE.search(name):
                value = value.flatten()
        if name in target:
            value = resize_bias(value, target[name])
        out[name] = value
    return out


def _cfg(size: str, crop_pct: float = 0.9) -> dict:
    repo = 'https://huggingface.co/LMMM2025/A2Mamba/resolve/main/a2mamba_pretrained_weights'
    return imagenet_cfg(
        url=f'{repo}/a2mamba_{size}.pth',
        crop_pct=crop_pct,
        first_conv='patch_embed.0',
        classifier='classifier.head',
        origin_url='https://github.com/LMMMEng/A2Mamba',
        paper_name='A2Mamba: Attention-augmented State Space Models for Visual Recognition',
        paper_ids='arXiv:2507.16624',
    )


default_cfgs = generate_default_cfgs(
    {
        'a2mamba_nano.in1k': _cfg('nano'),
        'a2mamba_tiny.in1k': _cfg('tiny'),
        'a2mamba_small.in1k': _cfg('small'),
        'a2mamba_base.in1k': _cfg('base', crop_pct=0.95),
        'a2mamba_large.in1k': _cfg('large', crop_pct=0.975),
    }
)

_create_a2mamba = partial(build_model, A2Mamba, pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def a2mamba_nano(pretrained: bool = False, **kwargs) -> A2Mamba:
    """A2Mamba-N, 4.2 M parameters, 78.7 % top-1 on ImageNet-1k (trained without drop path)."""
    model_args = {'depths': (2, 2, 8, 2), 'embed_dim': (32, 64, 128, 192), 'num_heads': (2, 2, 4, 8)}
    return _create_a2mamba('a2mamba_nano', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def a2mamba_tiny(pretrained: bool = False, **kwargs) -> A2Mamba:
    """A2Mamba-T, 15.4 M parameters, 83.0 % top-1 on ImageNet-1k (drop path 0.1)."""
    model_args = {'depths': (2, 2, 10, 2), 'embed_dim': (48, 96, 256, 448), 'num_heads': (2, 4, 8, 16)}
    return _create_a2mamba('a2mamba_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def a2mamba_small(pretrained: bool = False, **kwargs) -> A2Mamba:
    """A2Mamba-S, 30.7 M parameters, 84.7 % top-1 on ImageNet-1k (drop path 0.2)."""
    model_args = {
        'depths': (2, 4, 12, 4),
        'embed_dim': (64, 128, 320, 512),
        'num_heads': (2, 4, 10, 16),
        'layer_scale': (None, None, 'shortcut', 'shortcut'),
    }
    return _create_a2mamba('a2mamba_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def a2mamba_base(pretrained: bool = False, **kwargs) -> A2Mamba:
    """A2Mamba-B, 51.1 M parameters, 85.7 % top-1 on ImageNet-1k (drop path 0.4)."""
    model_args = {
        'depths': (4, 6, 12, 6),
        'embed_dim': (96, 192, 384, 512),
        'num_heads': (4, 8, 12, 16),
        'mlp_ratio': (4.0, 4.0, 3.75, 3.75),
        'layer_scale': 'branch',
        'layer_scale_init': (1.0, 1.0, 1e-6, 1e-6),
    }
    return _create_a2mamba('a2mamba_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def a2mamba_large(pretrained: bool = False, **kwargs) -> A2Mamba:
    """A2Mamba-L, 93.7 M parameters, 86.1 % top-1 on ImageNet-1k (drop path 0.5)."""
    model_args = {
        'depths': (4, 6, 18, 6),
        'embed_dim': (96, 192, 448, 672),
        'num_heads': (4, 8, 16, 24),
        'mlp_ratio': 4.0,
        'layer_scale': 'branch',
        'layer_scale_init': (1.0, 1.0, 1e-6, 1e-6),
    }
    return _create_a2mamba('a2mamba_large', pretrained=pretrained, **dict(model_args, **kwargs))
