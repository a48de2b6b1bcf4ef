"""What U-Nets on channels-first maps share, of pictures or volumes: timm's methods over encoder, decoder and head."""

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import get_device_dtype
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import check_images, conv_nd


class ConvUNet(nn.Module):
    """U-Net: pictures [B, in_chans, H, W] or volumes [B, in_chans, D, H, W] -> logits [B, num_classes, *size].

    Features of the model are the decoder's last map, at the image's size; those of `features_only=True` are the maps of
    the encoder's stages, which are also what the decoder joins.

    Args:
        ndim: Axes of an image: 2 or 3.
        stem: [B, in_chans, *size] -> [B, C, *size].
        stages: Encoder stages, each taking the map of the one before it.
        dims: Channels of each stage's map.
        reductions: By how much each stage's map is smaller than the image, along the last axis.
        decoder: Decoder stages from the deepest on, one less than encoder stages: (map, encoder map) -> map of the size
            of the encoder map. The last returns `dims[0]` channels.
        final: What precedes the head: [B, dims[0], *size] -> the same shape.
        in_chans: Channels of the image.
        num_classes: Channels of the logits; 0 for the features instead.
        drop_rate: Dropout before the head.
    """

    task = 'segmentation'

    def __init__(
        self,
        ndim: int,
        stem: nn.Module,
        stages: Iterable[nn.Module],
        dims: tuple[int, ...],
        reductions: tuple[int, ...],
        decoder: Iterable[nn.Module],
        final: nn.Module | None = None,
        in_chans: int = 3,
        num_classes: int = 2,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.ndim = ndim
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[0]
        self.grad_checkpointing = False
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.decoder = nn.ModuleList(decoder)
        self.final = nn.Identity() if final is None else final
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(dims[0], num_classes, device=device, dtype=dtype)
        self.feature_info = [
            {'num_chs': dim, 'reduction': reduction, 'module': f'stages.{i}'}
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]

    def _make_head(self, dim: int, num_classes: int, device=None, dtype=None) -> nn.Module:
        """The layer that makes logits of a map with `dim` channels."""
        if num_classes == 0:
            return nn.Identity()
        return conv_nd(self.ndim, dim, num_classes, device=device, dtype=dtype)

    def _check_size(self, size: tuple[int, ...]) -> None:
        """Refuse images of a size that the model does not take, with a ValueError that names it."""

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter; `needs_reset` also those that constructors have initialised (`to_empty()`)."""
        if needs_reset:
            for module in reversed(list(self.modules())):  # a mixer after its layers, which it initialises differently
                if hasattr(module, 'reset_parameters'):
                    module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that a scan is sensitive to."""
        return {name for name, _ in self.named_parameters() if name.endswith(('.A_log', '.D', '.dt_proj.bias'))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups, from the stem through encoder and decoder, for layer-wise learning rates; the head is last."""
        return {'stem': r'^stem\.', 'encoder': r'^stages\.(\d+)', 'decoder': r'^decoder\.(\d+)'}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The layer that makes the logits."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the layer that makes the logits, or remove it for 0; `global_pool` is timm's, and nothing is pooled.

        Raises:
            ValueError: The model was pruned to its encoder.
        """
        if num_classes and self.decoder is None:
            raise ValueError('The model was pruned to its encoder, which makes no logits: create it anew.')
        self.head = self._make_head(self.num_features, num_classes, **get_device_dtype(self)).train(self.training)
        self.num_classes = num_classes

    def _run(self, stage: nn.Module, *maps: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(stage, *maps)
        return stage(*maps)

    def _encode(self, x: Tensor, num_stages: int | None = None) -> list[Tensor]:
        """Image -> the maps of the first so many encoder stages (all if None), finest first."""
        check_images(x, self.in_chans, self.ndim)
        self._check_size(tuple(x.shape[2:]))
        x = self.stem(x)
        maps = []
        for stage in self.stages[:num_stages]:
            x = self._run(stage, x)
            maps.append(x)
        return maps

    def _decode(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps of all encoder stages -> those of the decoder's, deepest first; of a pruned model the last alone."""
        if self.decoder is None:
            return maps[-1:]
        decoded, x = [], maps[-1]
        for stage, skip in zip(self.decoder, maps[-2::-1]):
            x = self._run(stage, x, skip)
            decoded.append(x)
        return decoded

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the image, and the maps of chosen encoder stages.

        Args:
            x: Image [B, in_chans, *size].
            indices: Stages to return: the last n if an integer, all if None.
            norm: Without effect: the maps have no norm that could be left out.
            stop_early: Do not compute what follows the last of these stages; its map takes the features' place.
            output_fmt: 'NCHW': channels come first, in volumes too.
            intermediates_only: Return only the stages' maps.

        Returns:
            The list of maps, preceded by the features [B, C, *size] unless `intermediates_only`.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        maps = self._encode(x, max_index + 1 if stop_early or intermediates_only else None)
        intermediates = [maps[i] for i in take_indices]
        if intermediates_only:
            return intermediates
        return maps[-1] if stop_early else self.final(self._decode(maps)[-1]), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the maps of the given encoder stages do not need, decoder and head too; returns their indices.

        Without `prune_head` the model is kept as it is if the last stage is among them: its decoder needs all.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        if prune_head or max_index + 1 < len(self.stages):
            self.stages = self.stages[: max_index + 1]
            self.feature_info = self.feature_info[: max_index + 1]
            self.decoder, self.final = None, nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[-1]['num_chs']
            self.reset_classifier(0)
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, *size] -> features [B, C, *size]."""
        return self.final(self._decode(self._encode(x))[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, C, *size] -> logits [B, num_classes, *size], or the features if `pre_logits`."""
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, *size] -> logits [B, num_classes, *size]."""
        return self.forward_head(self.forward_features(x))


def segmentation_cfg(**kwargs: Any) -> dict[str, Any]:
    """Entries of a U-Net's cfg; images are normalised one by one, as nnU-Net does, so that mean and std do nothing."""
    in_chans = kwargs['input_size'][0]
    return {
        'url': '',
        'pool_size': None,
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        'mean': (0.0,) * in_chans,
        'std': (1.0,) * in_chans,
        'classifier': 'head',
        **kwargs,
    }
