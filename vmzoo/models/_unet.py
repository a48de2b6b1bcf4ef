"""What U-Nets share: timm's methods over an encoder, a decoder and a classifier of every pixel."""

import logging
import re
from collections.abc import Iterable

import torch
from timm.layers import calculate_drop_path_rates, get_device_dtype
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import check_images
from ._hierarchical import HierarchicalBackbone, ScanBackbone, Stage

_logger = logging.getLogger(__name__)


def falling_rates(drop_path_rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Stochastic depth rates of a decoder's blocks by stage, falling linearly to zero."""
    rates = calculate_drop_path_rates(drop_path_rate, depths[::-1], stagewise=True)
    return [stage[::-1] for stage in rates[::-1]]


class DecoderStage(Stage):
    """Upsampling, fusion with the encoder's map, and blocks at the new resolution.

    Args:
        blocks: Blocks on maps [B, H, W, C].
        upsample: [B, H', W', C'] -> [B, H, W, C]; None for nothing.
        fuse: Called with the upsampled map and the encoder's; None for a stage without.
    """

    def __init__(self, blocks: Iterable[nn.Module], upsample: nn.Module | None = None, fuse: nn.Module | None = None):
        super().__init__(blocks)
        self.upsample = nn.Identity() if upsample is None else upsample
        self.fuse = fuse

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """[B, H', W', C'] and, if the stage fuses, [B, H, W, C] -> [B, H, W, C]."""
        x = self.upsample(x)
        if self.fuse is not None:
            x = self.fuse(x, skip)
        return self.forward_blocks(x)


class UNet(ScanBackbone):
    """Segmentation network: images [B, in_chans, H, W] -> logits [B, num_classes, H, W].

    Sides must be multiples of `size_divisor`. Images of one channel are repeated for a model of three. As for timm's
    models, `num_classes=0` gives what the classifier takes; maps of `features_only=True` are those of the encoder's
    stages. Sub-classes build the parts and have a method `decode`, from what `encode` gives to features of every pixel
    [B, H, W, num_features].

    Args:
        encoder: Backbone without classifier and final norm.
        decoder: Stages, coarsest first.
        final_up: From the last stage's map to one of the image's size.
        num_features: Channels of that.
        num_classes: Classes of a pixel; 0 for none.
        drop_rate: Dropout before the classifier.
    """

    task = 'segmentation'

    def __init__(
        self,
        encoder: HierarchicalBackbone,
        decoder: list[DecoderStage],
        final_up: nn.Module,
        num_features: int,
        num_classes: int,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.in_chans = encoder.in_chans
        self.num_features = self.head_hidden_size = num_features
        self.size_divisor = encoder.feature_info[-1]['reduction']
        self.feature_info = [{**info, 'module': f'encoder.{info["module"]}'} for info in encoder.feature_info]
        self.encoder = encoder
        self.decoder = nn.ModuleList(decoder)
        self.final_up = final_up
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups, from the stem to the decoder's last stage, for layer-wise learning rates."""

        def inside(pattern: str) -> str:
            return pattern.replace('^', r'^encoder\.', 1)

        groups = self.encoder.group_matcher(coarse)
        groups = {
            name: inside(group) if isinstance(group, str) else [(inside(pattern), order) for pattern, order in group]
            for name, group in groups.items()
        }
        return {**groups, 'decoder': r'^decoder\.(\d+)'}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.encoder.set_grad_checkpointing(enable)
        for stage in self.decoder or ():
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final 1x1 convolution."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, or by none for 0; `global_pool` is timm's, and nothing is pooled here.

        Raises:
            ValueError: The model was pruned to its encoder.
        """
        if num_classes and self.decoder is None:
            raise ValueError('The model was pruned to its encoder, which makes no logits: create it anew.')
        dd = get_device_dtype(self)
        head = nn.Conv2d(self.num_features, num_classes, 1, **dd) if num_classes else nn.Identity()
        self.head = head.train(self.training)
        self.num_classes = num_classes

    def _check(self, x: Tensor) -> Tensor:
        if x.ndim == 4 and x.shape[1] == 1 and self.in_chans == 3:
            x = x.expand(-1, 3, -1, -1)
        check_images(x, self.in_chans)
        height, width = x.shape[-2:]
        if 0 in (height, width) or height % self.size_divisor or width % self.size_divisor:
            raise ValueError(
                f'The image is {height}x{width}, but the sides must be multiples of {self.size_divisor}, so that the '
                'maps of encoder and decoder agree: pad or resize it.'
            )
        return x

    def encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What each stage of the encoder takes, and what it makes of that before its downsampling, [B, H', W', C]."""
        x = self.encoder.patch_embed(self._check(x))
        inputs, outputs = [], []
        for stage in self.encoder.layers:
            inputs.append(x)
            outputs.append(stage.forward_blocks(x))
            x = stage.forward_downsample(outputs[-1], x)
        return inputs, outputs

    def _decode(self, inputs: list[Tensor], outputs: list[Tensor]) -> Tensor:
        x = outputs[-1] if self.decoder is None else self.decode(inputs, outputs)
        return x.permute(0, 3, 1, 2)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of every pixel, and maps of chosen stages of the encoder before their downsampling.

        Args:
            x: Image [B, in_chans, H, W].
            indices: Stages to return: the last n if an integer, all if None.
            norm: Without effect: the encoder has no final norm.
            stop_early: Do not compute what follows the last of these stages. Only of use with `intermediates_only`.
            output_fmt: Layout of the stages' maps, 'NCHW' or 'NHWC'.
            intermediates_only: Return only these.

        Returns:
            The list of maps, preceded by the features of every pixel [B, C, H, W] unless `intermediates_only`.
        """
        if intermediates_only:
            return self.encoder.forward_intermediates(
                self._check(x), indices, stop_early=stop_early, output_fmt=output_fmt, intermediates_only=True
            )
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}.")
        take_indices, _ = feature_take_indices(len(self.encoder.layers), indices)
        inputs, outputs = self.encode(x)
        maps = [outputs[i] for i in take_indices]
        if output_fmt == 'NCHW':
            maps = [y.permute(0, 3, 1, 2).contiguous() for y in maps]
        return self._decode(inputs, outputs), maps

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the maps of the given stages do not need; returns their indices.

        Decoder and classifier go with `prune_head`, or if a stage of the encoder goes: they need all of them.
        """
        stages = len(self.encoder.layers)
        take_indices = self.encoder.prune_intermediate_layers(indices, prune_norm)
        self.feature_info = self.feature_info[: len(self.encoder.layers)]
        if prune_head or len(self.encoder.layers) < stages:
            self.decoder = self.final_up = None
            self.num_features = self.head_hidden_size = self.feature_info[-1]['num_chs']
            self.reset_classifier(0)
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] -> features of every pixel [B, C, H, W]."""
        return self._decode(*self.encode(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, C, H, W] -> logits [B, num_classes, H, W], or the features if `pre_logits`."""
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


def without_surplus(state_dict: dict[str, Tensor], encoder: HierarchicalBackbone) -> dict[str, Tensor]:
    """Weights of a classifier without its head and final norm, and without blocks beyond those that `encoder` has."""

    def is_surplus(key: str) -> bool:
        block = re.match(r'layers\.(\d+)\.blocks\.(\d+)\.', key)
        if block is None:
            return key.startswith('classifier.')
        stage, number = map(int, block.groups())
        return stage < len(encoder.layers) and number >= len(encoder.layers[stage].blocks)

    return {key: value for key, value in state_dict.items() if not is_surplus(key)}


def fill_from_model(state_dict: dict[str, Tensor], model: UNet) -> dict[str, Tensor]:
    """Add the model's own weights of everything but the encoder where there are none, with a warning that names it."""
    own = {key: value for key, value in model.state_dict().items() if not key.startswith('encoder.')}
    fresh = {key: value for key, value in own.items() if key not in state_dict}
    parts = dict.fromkeys('.'.join(key.split('.')[:-1][:3]) for key in fresh)
    _logger.warning('The checkpoint is of an encoder: %s stay as initialised.', ', '.join(parts))
    return {**state_dict, **fresh}
