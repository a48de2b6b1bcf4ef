"""Stems and downsampling of hierarchical backbones, channels-last: [B, H, W, C] in and out (stems take NCHW images).

Sequential indices, and so parameter names, are those of the published VMamba checkpoints.
"""

import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from .linear import Linear
from .norm import LayerNorm


class Permute(nn.Module):
    """`x.permute(*dims)` as a layer."""

    def __init__(self, *dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(*self.dims)

    def extra_repr(self) -> str:
        return ', '.join(map(str, self.dims))


def to_channels_last() -> Permute:
    """[B, C, H, W] -> [B, H, W, C], a view."""
    return Permute(0, 2, 3, 1)


def to_channels_first() -> Permute:
    """[B, H, W, C] -> [B, C, H, W], a view."""
    return Permute(0, 3, 1, 2)


def check_images(x: Tensor, in_chans: int, ndim: int = 2) -> None:
    """Refuse anything but a batch of images [B, in_chans, H, W] with a ValueError that says what is wrong.

    Args:
        x: What the model got.
        in_chans: Channels that it takes.
        ndim: Axes of an image: 3 for volumes [B, in_chans, D, H, W].
    """
    if x.ndim != ndim + 2:
        kind, axes = ('Volumes', 'D, H, W') if ndim == 3 else ('Images', 'H, W')
        raise ValueError(
            f'{kind} come as a batch [B, {in_chans}, {axes}], got {tuple(x.shape)}: unsqueeze(0) makes one.'
        )
    if x.shape[1] != in_chans:
        raise ValueError(
            f'The model takes {in_chans} channels, got {x.shape[1]}: create it with in_chans={x.shape[1]}, '
            'or convert the images.'
        )


class PatchStem(nn.Sequential):
    """Non-overlapping patches of an image [B, in_chans, H, W]: convolution, then norm (Swin's patch embedding)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int = 4, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd),
            to_channels_last(),
            LayerNorm(dim, float32=True, **dd),
        )
        self.patch_size = patch_size

    def min_input(self, size: int) -> int:
        """Smallest image side that gives `size` output positions."""
        return size * self.patch_size


class ConvStem(nn.Sequential):
    """Two overlapping convolutions, each followed by a norm, that together reduce an image by `patch_size`."""

    def __init__(self, in_chans: int, dim: int, patch_size: int = 4, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        if patch_size < 4 or patch_size % 2:
            raise ValueError(f'The overlapping stem needs an even patch_size of at least 4, got {patch_size}.')
        self.stride = stride = patch_size // 2
        conv = {'kernel_size': stride + 1, 'stride': stride, 'padding': 1, **dd}
        super().__init__(
            nn.Conv2d(in_chans, dim // 2, **conv),
            to_channels_last(),
            LayerNorm(dim // 2, **dd),
            to_channels_first(),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, **conv),
            to_channels_last(),
            LayerNorm(dim, float32=True, **dd),
        )

    def min_input(self, size: int) -> int:
        """Smallest image side that gives `size` output positions."""
        for _ in range(2):
            size = max((size - 1) * self.stride + self.stride - 1, 1)
        return size


class ConvDownsample(nn.Sequential):
    """Halve a map: convolution, then norm. 3x3 kernels overlap and give ceil(n / 2); 2x2 kernels give floor(n / 2)."""

    def __init__(self, dim: int, out_dim: int, kernel_size: int = 3, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            to_channels_first(),
            nn.Conv2d(dim, out_dim, kernel_size, stride=2, padding=(kernel_size - 1) // 2, **dd),
            to_channels_last(),
            LayerNorm(out_dim, float32=True, **dd),
        )
        self.kernel_size = kernel_size

    def min_input(self, size: int) -> int:
        """Smallest side that gives `size` output positions."""
        return 2 * size - 1 if self.kernel_size == 3 else 2 * size


class PatchMerging(nn.Module):
    """Halve a map: the four pixels of each 2x2 cell side by side, norm, linear (Swin, https://arxiv.org/abs/2103.14030).

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output.
        odd: What to do with an odd side: 'pad' with a row or column of zeros, or 'crop' the last one.
    """

    def __init__(self, dim: int, out_dim: int, odd: str = 'pad', device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if odd not in ('pad', 'crop'):
            raise ValueError(f"odd must be 'pad' or 'crop', got {odd!r}.")
        self.odd = odd
        self.reduction = Linear(4 * dim, out_dim, bias=False, **dd)
        self.norm = LayerNorm(4 * dim, **dd)

    def min_input(self, size: int) -> int:
        """Smallest side that gives `size` output positions."""
        return 2 * size - 1 if self.odd == 'pad' else 2 * size

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        if self.odd == 'pad':
            rows, columns = (height + 1) // 2, (width + 1) // 2
            x = F.pad(x, (0, 0, 0, 2 * columns - width, 0, 2 * rows - height))
        else:
            rows, columns = height // 2, width // 2
            x = x[:, : 2 * rows, : 2 * columns]
        x = x.unflatten(1, (rows, 2)).unflatten(3, (columns, 2))  # [B, H', row, W', column, C]
        # order of the phases (row, column): (0, 0), (1, 0), (0, 1), (1, 1)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


class StridedPatchEmbed(nn.Module):
    """Image to tokens by one convolution; patches overlap where the stride is below their size.

    Args:
        img_size: Image size expected; sets `grid_size`.
        patch_size: Side of a patch.
        stride: Step between patches.
        in_chans: Image channels.
        embed_dim: Token channels.
        strict_img_size: Refuse images of another size.
        pad: Fill images with zeros at the bottom and right, so that a patch starts at every `stride` pixels; otherwise
            what fills no patch is left out.
        bias: Whether the convolution has one.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        strict_img_size: bool = True,
        pad: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.stride = to_2tuple(stride)
        self.strict_img_size = strict_img_size
        self.pad = pad
        self.set_input_size(img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, bias=bias, device=device, dtype=dtype)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Set the image size expected."""
        img_size = to_2tuple(img_size)
        self.grid_size = self.dynamic_feat_size(img_size)
        self.img_size = img_size
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels between neighbouring tokens."""
        return max(self.stride) if as_scalar else self.stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in an image of `img_size`."""
        if self.pad:
            rows, cols = (-(-size // step) for size, step in zip(img_size, self.stride))
            return rows, cols
        if any(size < patch for size, patch in zip(img_size, self.patch_size)):
            raise ValueError(
                f'An image of {img_size[0]}x{img_size[1]} holds no patch of {self.patch_size[0]}x{self.patch_size[1]}; '
                'resize or pad it.'
            )
        rows, cols = ((s - p) // step + 1 for s, p, step in zip(img_size, self.patch_size, self.stride))
        return rows, cols

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, in_chans, H, W] -> tokens [B, M, D] in row-major order, and the grid they form."""
        check_images(x, self.proj.in_channels)
        img_size = tuple(x.shape[-2:])
        if self.strict_img_size and img_size != self.img_size:
            raise ValueError(
                f'The model is built for images of {self.img_size[0]}x{self.img_size[1]}, got '
                f'{img_size[0]}x{img_size[1]}. Resize the images, call set_input_size(), or create the model with '
                'img_size=... or dynamic_img_size=True.'
            )
        grid = self.dynamic_feat_size(img_size)
        if self.pad:
            rows, cols = (
                max((n - 1) * step + patch - size, 0)
                for n, step, patch, size in zip(grid, self.stride, self.patch_size, img_size)
            )
            x = F.pad(x, (0, cols, 0, rows))
        return self.proj(x).flatten(2).transpose(1, 2), grid
