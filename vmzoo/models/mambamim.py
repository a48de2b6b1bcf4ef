"""MambaMIM: masked pre-training of HyMamba's encoder.

Paper: `MambaMIM: Pre-training Mamba with State Space Token Interpolation and its Application to Medical Image
Segmentation` - https://arxiv.org/abs/2408.08070
Code: https://github.com/FengheTan9/MambaMIM (Apache-2.0); no weights are published

Three quarters of a volume's cells of 16x16x16 voxels are hidden, in every convolution too; only tokens of visible cells
enter the Mamba blocks. At stride 16 the hidden cells are then filled by state-space token interpolation (TOKI), at the
finer strides by learned tokens, and a light convolutional decoder reconstructs the volume. The loss is the squared
error in the hidden cells, each of them normalised.

    model = MambaMIM(timm.create_model('hymamba'))
    out = model(volume)
    out.loss.backward()

    network = timm.create_model('hymamba', num_classes=14)
    network.load_state_dict(vmzoo.convert_state_dict(model.state_dict(), network))

Written from the paper and a description of the published code's function. What differs (`as_released` goes back to it):
* each sample keeps its own visible tokens, where the release counts those of the whole batch;
* interpolated tokens lie at their cells, where the release reads the array of tokens as one of channels.
Parameters that the published loss does not depend on (48 M of 114 M) are left out.
"""

import math
import re
from typing import NamedTuple

import torch
from timm.layers import get_device_dtype, trunc_normal_
from torch import Tensor, nn

from ..layers import compute_dtype, conv_nd, init_truncated_, to_map, to_tokens
from .hymamba import STRIDE, HyMamba, enlarge, our_key

__all__ = ['MambaMIM', 'MaskedReconstruction', 'interpolate_tokens']


class MaskedReconstruction(NamedTuple):
    """What :class:`MambaMIM` returns.

    Attributes:
        loss: Mean squared error of the hidden cells, a scalar.
        reconstruction: The volume [B, in_chans, D, H, W], in cells that are normalised: see `MambaMIM.restore`.
        visible: Cells that were seen, boolean [B, 1, D / 16, H / 16, W / 16].
    """

    loss: Tensor
    reconstruction: Tensor
    visible: Tensor


def interpolate_tokens(x: Tensor, visible: Tensor, A: Tensor) -> Tensor:
    """State-space token interpolation (TOKI): tokens for the places between visible ones.

    Anchors are the visible places, the first and the last. From one anchor to the next, g places on, place j is the
    sum over i <= j of A^(g - 1 - i) applied to the blend of both anchors' tokens, which begins with the one and has
    reached the other at g - 1. The last place is A applied to its token.

    Args:
        x: Tokens [B, L, D].
        visible: Boolean [B, L].
        A: State matrix [D, D].

    Returns:
        [B, L, D].
    """
    length = x.shape[1]
    places = torch.arange(length, device=x.device)
    anchor = visible | (places == 0) | (places == length - 1)
    start = torch.where(anchor, places, 0).cummax(dim=1).values
    at_or_after = torch.where(anchor, places, length - 1).flip(1).cummin(dim=1).values.flip(1)
    end = torch.cat((at_or_after[:, 1:], at_or_after[:, -1:]), dim=1)
    rest = torch.where(places == length - 1, 1, end - 1 - places)  # exponents of A
    share = (places - start).to(x.dtype) / (end - start - 1).clamp(min=1)

    first, second = (x.gather(1, index.unsqueeze(-1).expand_as(x)) for index in (start, end))
    blend = _apply_power(torch.lerp(first, second, share.unsqueeze(-1)), A, rest, max(length - 2, 1))
    summed = (start.unsqueeze(2) == start.unsqueeze(1)) & (places <= places.unsqueeze(1))  # [B, L, L]
    return summed.to(x.dtype) @ blend


def _apply_power(x: Tensor, A: Tensor, exponents: Tensor, largest: int) -> Tensor:
    """A^e x of each token, by the bits of its exponent: [B, L, D], [D, D] and [B, L] -> [B, L, D]."""
    for bit in range(largest.bit_length()):
        A = A if bit == 0 else A @ A
        x = torch.where((exponents >> bit & 1).bool().unsqueeze(-1), x @ A.mT, x)
    return x


def to_patches(x: Tensor) -> Tensor:
    """Volume [B, C, D, H, W] -> cells [B, L, 16^3 C], in raster order, channels last."""
    for axis in (4, 3, 2):
        x = x.unflatten(axis, (-1, STRIDE))
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)


def from_patches(patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`to_patches`, for a volume of `grid` cells."""
    x = patches.unflatten(1, grid).unflatten(4, (STRIDE, STRIDE, STRIDE, -1)).permute(0, 7, 1, 4, 2, 5, 3, 6)
    for axis in (2, 3, 4):
        x = x.flatten(axis, axis + 1)
    return x


def double_conv(dim: int, out_dim: int, **dd) -> nn.Sequential:
    """Two 3x3x3 convolutions, each with batch norm and ReLU."""
    layers = []
    for in_dim in (dim, out_dim):
        layers += [conv_nd(3, in_dim, out_dim, 3, **dd), nn.BatchNorm3d(out_dim, **dd), nn.ReLU()]
    return nn.Sequential(*layers)


class ReconstructionStage(nn.Module):
    """Join the encoder's map, double the size, halve the channels.

    Args:
        dim: Channels of the input, and of the encoder's map.
        fuse: Whether there is a map to join.
    """

    def __init__(self, dim: int, fuse: bool, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fuse = double_conv(2 * dim, dim, **dd) if fuse else None
        self.up = nn.ConvTranspose3d(dim, dim, 2, stride=2, **dd)
        self.conv = double_conv(dim, dim // 2, **dd)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """[B, C, D, H, W] each -> [B, C / 2, 2D, 2H, 2W]."""
        if self.fuse is not None:
            x = self.fuse(torch.cat((x, skip), dim=1))
        return self.conv(self.up(x))


class ReconstructionDecoder(nn.Module):
    """Light decoder of four stages.

    Args:
        dim: Channels of the coarsest map, a multiple of 16.
        out_chans: Channels of the volume.
    """

    def __init__(self, dim: int, out_chans: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.stages = nn.ModuleList(ReconstructionStage(dim // 2**i, i > 0, **dd) for i in range(4))
        self.proj = conv_nd(3, dim // 16, out_chans, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published."""
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv3d):
                init_truncated_(module)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps at strides 16, 8, 4 and 2 -> volume [B, C, D, H, W]."""
        x = maps[0]
        for stage, skip in zip(self.stages, (None, *maps[1:])):
            x = stage(x, skip)
        return self.proj(x)


class MambaMIM(nn.Module):
    """Masked pre-training of a HyMamba.

    The result's encoder goes into a network through `vmzoo.convert_state_dict(model.state_dict(), network)`.

    Args:
        encoder: The network, which is pruned to what the loss depends on: its decoder and the features of stride 1 go.
        decoder_dim: Channels of the decoder's coarsest map, a multiple of 16.
        mask_ratio: Share of the cells that are hidden.
        as_released: Compute what the published code does where it departs from the paper: as many tokens enter the
            Mamba blocks as the whole batch has visible cells, hidden ones behind the visible ones, and the interpolated
            tokens [L, C] are read as [C, L].

    Raises:
        ValueError: A ratio that is not between 0 and 1, or a width that is no multiple of 16.
    """

    def __init__(self, encoder: HyMamba, decoder_dim: int = 768, mask_ratio: float = 0.75, as_released: bool = False):
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise ValueError(f'mask_ratio must be between 0 and 1, got {mask_ratio}.')
        if decoder_dim < 16 or decoder_dim % 16:
            raise ValueError(f'decoder_dim must be a multiple of 16, got {decoder_dim}.')
        dd = get_device_dtype(encoder)
        encoder.prune_intermediate_layers([1, 2, 3, 4])
        dims = [info['num_chs'] for info in encoder.feature_info[:0:-1]]  # at strides 16, 8, 4 and 2
        self.mask_ratio = mask_ratio
        self.as_released = as_released
        self.encoder = encoder
        self.decoder = ReconstructionDecoder(decoder_dim, encoder.in_chans, **dd)
        self.A_interpolation = nn.Parameter(torch.zeros(1, dims[0], dims[0], **dd))
        self.mask_token = nn.Parameter(torch.empty(1, 1, dims[0], **dd))
        self.mask_tokens = nn.ParameterList(torch.empty(1, dim, 1, 1, 1, **dd) for dim in dims[1:])
        self.densify_projs = nn.ModuleList(
            conv_nd(3, dim, decoder_dim // 2**i, 1 if i == 0 else 3, **dd) for i, dim in enumerate(dims)
        )
        nn.init.normal_(self.mask_token, std=0.02)
        for token in self.mask_tokens:
            trunc_normal_(token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Parameters that a scan is sensitive to, and the tokens for hidden cells."""
        tokens = {name for name, _ in self.named_parameters() if name.startswith('mask_token')}
        return tokens | {f'encoder.{name}' for name in self.encoder.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each of the encoder's stages in the backward pass instead of storing its activations."""
        self.encoder.set_grad_checkpointing(enable)

    def count_visible(self, grid: tuple[int, int, int]) -> int:
        """How many of a volume's cells are to be seen.

        Raises:
            ValueError: The volume has too few cells for the ratio.
        """
        length = math.prod(grid)
        count = round(length * (1 - self.mask_ratio))
        if not 0 < count < length:
            raise ValueError(
                f'Of {length} cells of {STRIDE}x{STRIDE}x{STRIDE} voxels, a mask_ratio of {self.mask_ratio} would hide '
                f'{length - count}: take larger volumes or another ratio.'
            )
        return count

    def draw_visible(
        self,
        batch: int,
        grid: tuple[int, int, int],
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Random cells to be seen, as many in every sample.

        Args:
            batch: Samples B.
            grid: Cells along each axis.
            generator: Where they are drawn from, on any device; None for torch's default one of `device`.
            device: Where the result is.

        Returns:
            Boolean [B, 1, *grid].
        """
        length, count = math.prod(grid), self.count_visible(grid)
        noise = torch.rand(batch, length, generator=generator, device=generator.device if generator else device)
        chosen = noise.argsort(dim=1)[:, :count].to(device)
        visible = torch.zeros(batch, length, dtype=torch.bool, device=device).scatter(1, chosen, True)
        return visible.view(batch, 1, *grid)

    def forward(
        self, volume: Tensor, visible: Tensor | None = None, generator: torch.Generator | None = None
    ) -> MaskedReconstruction:
        """Hide cells of volumes and reconstruct them.

        Args:
            volume: [B, in_chans, D, H, W], of sides of multiples of 16.
            visible: Cells to be seen, boolean [B, 1, D / 16, H / 16, W / 16], as many in every sample; drawn if None.
            generator: Where they are drawn from.

        Raises:
            ValueError: Volumes or masks of other shapes, or other numbers of visible cells in different samples.
        """
        self.encoder.check_volumes(volume)
        grid = tuple(side // STRIDE for side in volume.shape[2:])
        if visible is None:
            count = self.count_visible(grid)
            visible = self.draw_visible(len(volume), grid, generator, volume.device)
        else:
            count = _count(visible, (len(volume), 1, *grid))
        maps = self.encode(volume, visible, self.kept_tokens(visible, count))
        reconstruction = self.decoder(self.densify(maps, visible))
        return MaskedReconstruction(self.loss(volume, reconstruction, visible), reconstruction, visible)

    def kept_tokens(self, visible: Tensor, count: int) -> Tensor:
        """The tokens that enter the Mamba blocks, in that order: the visible ones as the scan visits them, [B, K].

        Args:
            visible: Boolean [B, 1, D / 16, H / 16, W / 16].
            count: Visible cells of each sample.
        """
        hidden = (~visible).flatten(1)  # [B, L]
        if self.as_released:
            count = min(count * len(hidden), hidden.shape[1])
        return hidden.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]

    def encode(self, volume: Tensor, visible: Tensor, kept: Tensor) -> list[Tensor]:
        """Features of the visible cells at strides 16, 8, 4 and 2; at stride 16 a learned token in the others.

        Args:
            volume: [B, in_chans, D, H, W].
            visible: Boolean [B, 1, D / 16, H / 16, W / 16].
            kept: Tokens that enter the Mamba blocks, [B, K].
        """
        _, *maps, tokens = self.encoder.forward_visible(volume, visible, kept)
        entered = torch.zeros_like(visible.flatten(1)).scatter(1, kept, True).view_as(visible)
        mask_token = self.mask_token.mT.unflatten(2, (1, 1, 1)).to(tokens.dtype)  # [1, C, 1, 1, 1]
        return [torch.where(entered, tokens, mask_token), *maps[::-1]]

    def interpolate(self, x: Tensor, visible: Tensor) -> Tensor:
        """Tokens at stride 16, [B, C, D, H, W], by :func:`interpolate_tokens`, in float32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = compute_dtype(x.dtype)
            tokens = to_tokens(x).to(dtype)
            filled = interpolate_tokens(tokens, visible.flatten(1), self.A_interpolation[0].to(dtype)).to(x.dtype)
        return filled.reshape(x.shape) if self.as_released else to_map(filled, tuple(x.shape[2:]))

    def densify(self, maps: list[Tensor], visible: Tensor) -> list[Tensor]:
        """Fill the hidden cells of the encoder's maps, coarsest first, and project them for the decoder."""
        filled = [torch.where(visible, maps[0], self.interpolate(maps[0], visible))]
        for x, token in zip(maps[1:], self.mask_tokens):
            filled.append(torch.where(enlarge(visible, tuple(x.shape[2:])), x, token.to(x.dtype)))
        return [proj(x) for proj, x in zip(self.densify_projs, filled)]

    def loss(self, volume: Tensor, reconstruction: Tensor, visible: Tensor) -> Tensor:
        """Mean over the hidden cells of the squared error to the normalised cells of the volume."""
        target, reconstruction = (to_patches(x.to(compute_dtype(x.dtype))) for x in (volume, reconstruction))
        mean, std = _moments(target)
        error = (reconstruction - (target - mean) / std).square().mean(dim=-1)  # [B, L]
        hidden = (~visible).flatten(1)
        return (error * hidden).sum() / (hidden.sum() + 1e-8)

    def restore(self, volume: Tensor, out: MaskedReconstruction) -> Tensor:
        """The volume [B, in_chans, D, H, W] with its hidden cells as reconstructed, in the volume's values."""
        mean, std = _moments(to_patches(volume))
        cells = to_patches(out.reconstruction.to(volume.dtype)) * std + mean
        restored = from_patches(cells, tuple(out.visible.shape[2:]))
        return torch.where(enlarge(out.visible, tuple(volume.shape[2:])), volume, restored)


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + 1e-6).sqrt()


def _count(visible: Tensor, shape: tuple[int, ...]) -> int:
    if visible.dtype != torch.bool or tuple(visible.shape) != shape:
        raise ValueError(f'visible must be boolean {shape}, got {visible.dtype} {tuple(visible.shape)}.')
    counts = visible.flatten(1).sum(dim=1).unique()
    if len(counts) != 1:
        raise ValueError(f'Every sample must have as many visible cells, got {counts.tolist()}.')
    return int(counts)


# Parameters of the published model that its loss does not depend on.
_UNUSED = re.compile(
    r'sparse_encoder\.embeddings\.encoder1\.|dense_decoder\.fuse\.0\.|densify_projs\.4\.|mask_tokens\.[04]$'
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: MambaMIM) -> dict[str, Tensor]:
    """Fit a published checkpoint, or one of ours, to `model`."""
    if not any(key.startswith('sparse_encoder.') for key in state_dict):
        return state_dict
    weights = {}
    for key, value in state_dict.items():
        if _UNUSED.match(key):
            continue
        if key == 'sparse_encoder.mae.mask_token':
            weights['mask_token'] = value
        elif key.startswith('sparse_encoder.'):
            name = our_key(key.removeprefix('sparse_encoder.'))
            if name is not None:
                weights[f'encoder.{name}'] = value
        elif match := re.match(r'mask_tokens\.(\d)$', key):
            weights[f'mask_tokens.{int(match[1]) - 1}'] = value
        else:
            key = re.sub(r'^dense_decoder\.dec\.(\d)\.', r'decoder.stages.\1.', key).replace('.up_sample.', '.up.')
            key = re.sub(r'^dense_decoder\.fuse\.(\d)\.conv\.', r'decoder.stages.\1.fuse.', key)
            weights[key.replace('dense_decoder.', 'decoder.')] = value
    return weights
