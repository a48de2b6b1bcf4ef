"""HyMamba

Paper: `MambaMIM: Pre-training Mamba with State Space Token Interpolation and its Application to Medical Image
Segmentation` - https://arxiv.org/abs/2408.08070
Code: https://github.com/FengheTan9/MambaMIM (Apache-2.0); no weights are published

A U-Net for volumes: convolutional stages (MedNeXt blocks) down to stride 16, Mamba over the tokens of the last stage,
one scan in raster order, and UNETR's decoder. Its encoder can be pretrained by :class:`.mambamim.MambaMIM`, for which
every stage takes a mask: it computes what a sparse convolution over the visible cells would.

Written from the paper and a description of the published code's function. What differs:
* volumes of any sides of multiples of 16 are taken: the position table, which is fixed, is computed for other sizes
  than `img_size`;
* the backward direction of the Mamba layers, which published checkpoints have but no result depends on, is left out;
* stochastic depth of the token blocks, and the scan's decay, skip and step bias are exempt from weight decay.
"""

import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, to_3tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import LayerNorm, Linear, MambaMixer, Mlp, check_images, conv_nd, to_map, to_tokens
from ._builder import build_model
from ._conv_unet import ConvUNet, segmentation_cfg

__all__ = ['HyMamba']

_logger = logging.getLogger(__name__)

STRIDE = 16  # of the tokens: four poolings


def hide(x: Tensor, visible: Tensor | None) -> Tensor:
    """Map [B, C, *size] with zeros where `visible`, boolean [B, 1, *size], is false; the map itself for None."""
    return x if visible is None else x.masked_fill(~visible, 0.0)


def enlarge(visible: Tensor, size: tuple[int, ...]) -> Tensor:
    """Boolean map [B, 1, *cells] -> [B, 1, *size], every cell repeated."""
    return F.interpolate(visible.float(), size=size, mode='nearest').bool()


def position_table(grid: tuple[int, int, int], dim: int, device=None, dtype=None) -> Tensor:
    """Sines and cosines of every cell's coordinates, in raster order.

    A third of the channels belongs to each axis, sines first; the frequencies fall from 1 towards 1 / 10000.

    Args:
        grid: Cells along each axis.
        dim: Channels D, a multiple of 6.
        device: Where the table is made.
        dtype: Its dtype.

    Returns:
        [1, L, D].
    """
    freqs = 10000.0 ** (-torch.arange(dim // 6, device=device, dtype=torch.float64) / (dim // 6))
    axes = [torch.arange(side, device=device, dtype=torch.float64) for side in grid]
    cells = torch.stack(torch.meshgrid(*axes, indexing='ij'), dim=-1).flatten(0, 2)  # [L, 3]
    angles = cells.unsqueeze(-1) * freqs  # [L, 3, D / 6]
    table = torch.stack((angles.sin(), angles.cos()), dim=2)  # [L, 3, 2, D / 6]
    return table.flatten(1).unsqueeze(0).to(dtype or torch.get_default_dtype())


class LayerNorm3d(LayerNorm):
    """LayerNorm over the channels of a channels-first volume."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, D, H, W] -> [B, C, D, H, W]."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class MedNeXtBlock(nn.Module):
    """Depthwise 3x3x3 convolution, norm, and an MLP at every position, with a shortcut (arXiv 2303.09975).

    Args:
        dim: Channels.
        mlp_ratio: Width of the MLP over `dim`.
    """

    def __init__(self, dim: int, mlp_ratio: float, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        hidden_dim = int(mlp_ratio * dim)
        self.conv1 = conv_nd(3, dim, dim, 3, groups=dim, **dd)
        self.norm = LayerNorm3d(dim, eps=1e-6, **dd)
        self.conv2 = conv_nd(3, dim, hidden_dim, **dd)
        self.conv3 = conv_nd(3, hidden_dim, dim, **dd)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """[B, C, D, H, W] -> the same shape; where `visible` is false, both are zero."""
        y = self.conv3(F.gelu(self.conv2(self.norm(self.conv1(x)))))
        return x + hide(y, visible)


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions with norms, and a shortcut, which is projected if the channels change.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output.
    """

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = conv_nd(3, dim, out_dim, 3, **dd)
        self.conv2 = conv_nd(3, out_dim, out_dim, 3, **dd)
        self.norm1 = LayerNorm3d(out_dim, eps=1e-6, **dd)
        self.norm2 = LayerNorm3d(out_dim, eps=1e-6, **dd)
        self.conv3 = conv_nd(3, dim, out_dim, **dd) if dim != out_dim else nn.Identity()
        self.norm3 = LayerNorm3d(out_dim, eps=1e-6, **dd) if dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """[B, C, D, H, W] -> [B, C', D, H, W]; where `visible` is false, both are zero."""
        y = hide(F.leaky_relu(self.norm1(self.conv1(x))), visible)
        y = self.norm2(self.conv2(y)) + self.norm3(self.conv3(x))
        return hide(F.leaky_relu(y), visible)


class ConvStage(nn.Module):
    """MedNeXt blocks, then a convolution to the stage's channels, and a residual block beside the path to the next one.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output.
        depth: Number of blocks.
        mlp_ratio: Width of the blocks' MLPs over `dim`.
    """

    def __init__(self, dim: int, out_dim: int, depth: int = 0, mlp_ratio: float = 1.0, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.blocks = nn.ModuleList(MedNeXtBlock(dim, mlp_ratio, **dd) for _ in range(depth))
        self.expand = conv_nd(3, dim, out_dim, 3, **dd)
        self.skip: nn.Module | None = ResidualBlock(out_dim, out_dim, **dd)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map -> what the next stage takes, and the stage's features (None if pruned): [B, C', D, H, W] each."""
        for block in self.blocks:
            x = block(x, visible)
        x = hide(self.expand(x), visible)
        return x, None if self.skip is None else self.skip(x, visible)


class TokenBlock(nn.Module):
    """Pre-norm residual block: Mamba in raster order, then an MLP.

    Args:
        dim: Token channels D.
        mlp_ratio: Width of the MLP over `dim`.
        drop_path: Stochastic depth rate of both branches.
        mixer_args: Arguments of :class:`..layers.mamba.MambaMixer`.
    """

    def __init__(
        self, dim: int, mlp_ratio: float = 2.0, drop_path: float = 0.0, device=None, dtype=None, **mixer_args: Any
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = LayerNorm(dim, **dd)
        self.mamba = MambaMixer(dim, scan='forward', **mixer_args, **dd)
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published: Xavier's weights and no biases, in the mixer (and its step projection) too."""
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, L, D] -> [B, L, D]."""
        x = x + self.drop_path(self.mamba(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TokenStage(nn.Module):
    """Convolutional blocks, then token blocks over the positions.

    Args:
        dim: Channels, a multiple of 6.
        grid: Size of the map that the position table is stored for; it is computed for others.
        blocks: Convolutional blocks.
        layers: Token blocks.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int, int],
        blocks: Iterable[MedNeXtBlock],
        layers: Iterable[TokenBlock],
        device=None,
        dtype=None,
    ):
        super().__init__()
        if dim % 6:
            raise ValueError(f'The position table needs channels in multiples of 6, got {dim}.')
        self.grid = grid
        self.blocks = nn.ModuleList(blocks)
        self.register_buffer('pos_embed', position_table(grid, dim, device=device, dtype=dtype))
        self.layers = nn.ModuleList(layers)

    def reset_parameters(self) -> None:
        """Fill the position table."""
        self.pos_embed.copy_(position_table(self.grid, self.pos_embed.shape[-1], self.pos_embed.device))

    def forward(self, x: Tensor, visible: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """Map -> the map that the tokens make.

        Args:
            x: [B, C, D, H, W].
            visible: Cells that the map has, boolean [B, 1, D, H, W].
            kept: Indices of the tokens that enter the token blocks, in the order of the scan, [B, K]; the others become
                zero. None for all of them.

        Returns:
            [B, C, D, H, W].
        """
        for block in self.blocks:
            x = block(x, visible)
        size = tuple(x.shape[2:])
        tokens = to_tokens(x)  # [B, L, C]
        pos_embed = self.pos_embed
        if size != self.grid:
            pos_embed = position_table(size, x.shape[1], x.device, pos_embed.dtype)
        tokens = tokens + pos_embed
        if kept is not None:
            places = kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
            tokens, whole = tokens.gather(1, places), tokens
        for layer in self.layers:
            tokens = layer(tokens)
        if kept is not None:
            tokens = torch.zeros_like(whole, dtype=tokens.dtype).scatter(1, places, tokens)
        return to_map(tokens, size)


class ConvNorm3d(nn.Sequential):
    """Convolution without bias, then instance norm without parameters."""

    def __init__(self, dim: int, out_dim: int, kernel_size: int, device=None, dtype=None):
        conv = conv_nd(3, dim, out_dim, kernel_size, bias=False, device=device, dtype=dtype)
        super().__init__(conv, nn.InstanceNorm3d(out_dim))


class DecoderStage(nn.Module):
    """Double a map, join the encoder's, and apply a residual block (UNETR's, arXiv 2103.10504).

    Args:
        dim: Channels of the input.
        out_dim: Channels of the encoder's map, and of the output.
    """

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.up = nn.ConvTranspose3d(dim, out_dim, 2, stride=2, bias=False, **dd)
        self.conv1 = ConvNorm3d(2 * out_dim, out_dim, 3, **dd)
        self.conv2 = ConvNorm3d(out_dim, out_dim, 3, **dd)
        self.conv3 = ConvNorm3d(2 * out_dim, out_dim, 1, **dd)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """[B, C, D, H, W] and the encoder's [B, C', 2D, 2H, 2W] -> [B, C', 2D, 2H, 2W]."""
        x = torch.cat((self.up(x), skip), dim=1)
        y = self.conv2(F.leaky_relu(self.conv1(x)))
        return F.leaky_relu(y + self.conv3(x))


class HyMamba(ConvUNet):
    """HyMamba: volumes [B, in_chans, D, H, W] of sides of multiples of 16 -> logits [B, num_classes, D, H, W].

    Features of the stages are at strides 1, 2, 4, 8 and 16.

    Args:
        in_chans: Channels of the volume.
        num_classes: Channels of the logits; 0 for the decoder's last map instead.
        img_size: Sides of the volume that the position table is stored for; other sizes are taken too.
        stem_dim: Channels of the stem, and of the map before the logits.
        embed_dim: Channels of each stage; the last stage has those of the one before.
        depths: MedNeXt blocks of each stage from the second on.
        mlp_ratio: Width of their MLPs over that of the block.
        token_depth: Mamba blocks of the last stage.
        d_state: State size of each inner channel.
        d_conv: Kernel of the causal convolution.
        expand: Inner width of a Mamba layer over the token channels.
        dt_rank: Rank of the step projection; 'auto' is a 16th of the token channels, rounded up.
        token_mlp_ratio: Width of the MLPs of the Mamba blocks over the token channels.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth rate of the last Mamba block; it grows linearly from zero.

    Raises:
        ValueError: Options that do not fit together, and volumes of other shapes.
    """

    size_divisor = STRIDE

    def __init__(
        self,
        in_chans: int = 1,
        num_classes: int = 14,
        img_size: int | tuple[int, int, int] = 96,
        stem_dim: int = 32,
        embed_dim: tuple[int, int, int, int] = (64, 128, 192, 384),
        depths: tuple[int, int, int, int] = (2, 2, 2, 1),
        mlp_ratio: tuple[float, float, float, float] = (2.0, 4.0, 4.0, 4.0),
        token_depth: int = 4,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        dt_rank: int | str = 'auto',
        token_mlp_ratio: float = 2.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        for name, values in (('embed_dim', embed_dim), ('depths', depths), ('mlp_ratio', mlp_ratio)):
            if len(values) != 4:
                raise ValueError(f'{name} takes 4 numbers, got {values}.')
        img_size = tuple(to_3tuple(img_size))
        self._check_size(img_size)
        dims = (*embed_dim, embed_dim[-1])
        grid = tuple(side // STRIDE for side in img_size)
        mixer_args = {'d_state': d_state, 'd_conv': d_conv, 'expand': expand, 'dt_rank': dt_rank}
        layers = [
            TokenBlock(dims[-1], token_mlp_ratio, drop_path, **mixer_args, **dd)
            for drop_path in calculate_drop_path_rates(drop_path_rate, token_depth)
        ]
        blocks = [MedNeXtBlock(dims[-1], mlp_ratio[-1], **dd) for _ in range(depths[-1])]
        stages = [ConvStage(stem_dim, dims[0], **dd)]
        stages += [ConvStage(dims[i], dims[i + 1], depths[i], mlp_ratio[i], **dd) for i in range(3)]
        super().__init__(
            ndim=3,
            stem=conv_nd(3, in_chans, stem_dim, 3, **dd),
            stages=[*stages, TokenStage(dims[-1], grid, blocks, layers, **dd)],
            dims=dims,
            reductions=(1, 2, 4, 8, 16),
            decoder=[DecoderStage(dims[i + 1], dims[i], **dd) for i in (3, 2, 1, 0)],
            final=ResidualBlock(dims[0], stem_dim, **dd),
            in_chans=in_chans,
            num_classes=0,
            drop_rate=drop_rate,
        )
        self.num_features = self.head_hidden_size = stem_dim
        self.reset_classifier(num_classes)
        self.init_weights(needs_reset=False)

    def _check_size(self, size: tuple[int, ...]) -> None:
        if any(side < STRIDE or side % STRIDE for side in size):
            raise ValueError(
                f'The volume is {"x".join(map(str, size))}, but its sides must be multiples of {STRIDE}: pad or resize '
                'it.'
            )

    def check_volumes(self, x: Tensor) -> None:
        """Refuse what is no batch of volumes that the model takes with a ValueError that says what is wrong."""
        check_images(x, self.in_chans, self.ndim)
        self._check_size(tuple(x.shape[2:]))

    def _encode(
        self, x: Tensor, num_stages: int | None = None, visible: Tensor | None = None, kept: Tensor | None = None
    ) -> list[Tensor | None]:
        self.check_volumes(x)
        mask = None if visible is None else enlarge(visible, tuple(x.shape[2:]))
        x = hide(self.stem(hide(x, mask)), mask)
        maps = []
        for i, stage in enumerate(self.stages[:num_stages]):
            if i > 0:
                x = F.max_pool3d(x, 2)
                mask = None if visible is None else enlarge(visible, tuple(x.shape[2:]))
            if isinstance(stage, TokenStage):
                features = self._run(stage, x, mask, kept)
            else:
                x, features = self._run(stage, x, mask)
            maps.append(features)
        return maps

    def forward_visible(self, x: Tensor, visible: Tensor, kept: Tensor | None = None) -> list[Tensor | None]:
        """Features that the visible cells of a volume give: those of sparse convolutions, zero in the other cells.

        Args:
            x: Volume [B, in_chans, D, H, W].
            visible: Cells of 16x16x16 voxels that are seen, boolean [B, 1, D / 16, H / 16, W / 16].
            kept: Indices of the tokens that enter the Mamba blocks, in that order, [B, K]; the others become zero. None
                for all.

        Returns:
            The maps of every stage, finest first; None for one that the model was pruned of.
        """
        return self._encode(x, visible=visible, kept=kept)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the maps of the given stages do not need, decoder and head too; returns their indices.

        Without `prune_head` the model is kept as it is if the last stage is among them: its decoder needs all.
        """
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.decoder is None:
            for i, stage in enumerate(self.stages):
                if i not in take_indices and isinstance(stage, ConvStage):
                    stage.skip = None
        return take_indices


# Parts of the network that its pre-training does not have.
_FRESH_PARTS = ('stages.0.skip', 'decoder', 'final', 'head')
_LEVEL = {'layer': 'blocks', 'expend': 'expand', 'encoder': 'skip'}


def our_key(key: str) -> str | None:
    """Our name for a parameter of the published network; None for one that no result depends on."""
    if match := re.match(r'embeddings\.(layer|expend|encoder)(\d)\.(.+)', key):
        return f'stages.{int(match[2]) - 1}.{_LEVEL[match[1]]}.{match[3]}'
    if match := re.match(r'decoder\.decoder([2-5])\.(.+)', key):
        name = re.sub(r'conv_block\.(conv\d)\.conv\.', r'\1.0.', match[2].replace('transp_conv.conv.', 'up.'))
        return f'decoder.{5 - int(match[1])}.{name}'
    if re.search(r'^mae\.mask_token$|\.mamba\.\w+_b(_log)?(\.|$)', key):
        return None
    for theirs, ours in (
        ('embeddings.', ''),
        ('mae.blocks.', 'stages.4.layers.'),
        ('mae.', 'stages.4.'),
        ('decoder.decoder1.', 'final.'),
        ('decoder.out.conv.', 'head.'),
    ):
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: HyMamba) -> dict[str, Tensor]:
    """Fit a published checkpoint, one of ours, or either's pre-training to `model`.

    Of a pre-training the encoder is taken; what it does not have (decoder, head, the features of stride 1) stays as it
    is in the model, with a warning. A position table of another size is left out.
    """
    for prefix in ('sparse_encoder.', 'encoder.'):
        if any(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): v for key, v in state_dict.items() if key.startswith(prefix)}
    if any(key.startswith('embeddings.') for key in state_dict):
        state_dict = {our: value for key, value in state_dict.items() if (our := our_key(key)) is not None}
    if 'stem.weight' not in state_dict:
        return state_dict
    target = model.state_dict()
    missing = [part for part in _FRESH_PARTS if not any(key.startswith(f'{part}.') for key in state_dict)]
    own = {key: value for key, value in target.items() if key.startswith(tuple(f'{part}.' for part in missing))}
    if own:
        _logger.warning('The checkpoint has no %s: as initialised in the model', ', '.join(missing))
    table = 'stages.4.pos_embed'
    if table in target and table in state_dict and state_dict[table].shape != target[table].shape:
        own[table] = target[table]
    return state_dict | own


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return segmentation_cfg(
        num_classes=14,
        input_size=(1, 96, 96, 96),
        first_conv='stem',
        license='apache-2.0',
        origin_url='https://github.com/FengheTan9/MambaMIM',
        paper_name=(
            'MambaMIM: Pre-training Mamba with State Space Token Interpolation and its Application to Medical Image '
            'Segmentation'
        ),
        paper_ids='arXiv:2408.08070',
        **kwargs,
    )


default_cfgs = generate_default_cfgs({'hymamba.untrained': _cfg()})


@register_model
def hymamba(pretrained: bool = False, **kwargs: Any) -> HyMamba:
    """HyMamba, for volumes: 41.4M params."""
    return build_model(HyMamba, 'hymamba', pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)
