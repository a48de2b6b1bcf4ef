"""What hierarchical backbones share: timm's methods over a stem, stages and a head, on channels-last maps."""

from collections.abc import Iterable

import torch
from timm.layers import get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import DistilledHead, NormPoolHead, check_images, init_truncated_


class Stage(nn.Module):
    """Blocks at one resolution, then the downsampling to the next.

    Args:
        blocks: Blocks on maps [B, H, W, C].
        downsample: [B, H, W, C] -> [B, H', W', C'], with a method `min_input`; None for no downsampling.
        shortcut: What to add to its result: a function of the stage's input; None for nothing.
        min_size: Smallest side of a map that the blocks take.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        downsample: nn.Module | None = None,
        shortcut: nn.Module | None = None,
        min_size: int = 1,
    ):
        super().__init__()
        self.min_size = min_size
        self.grad_checkpointing = False
        self.blocks = nn.Sequential(*blocks)
        self.downsample = nn.Identity() if downsample is None else downsample
        self.shortcut = shortcut

    def forward_blocks(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C], without the downsampling."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def forward_downsample(self, x: Tensor, inputs: Tensor) -> Tensor:
        """What the blocks made of the stage's inputs, both [B, H, W, C] -> [B, H', W', C']."""
        x = self.downsample(x)
        return x if self.shortcut is None else x + self.shortcut(inputs)

    def end(self) -> None:
        """Make this the last stage: remove what leads to the next."""
        self.downsample = nn.Identity()
        self.shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H', W', C']."""
        return self.forward_downsample(self.forward_blocks(x), x)


class ChannelsFirstStage(Stage):
    """Stage whose blocks take channels-first maps."""

    def forward_blocks(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C], without the downsampling."""
        return super().forward_blocks(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def stage_dims(embed_dim: int | tuple[int, ...], depths: tuple[int, ...]) -> tuple[int, ...]:
    """Channels of each stage; those of the first, if only they are given, double from stage to stage.

    Raises:
        ValueError: There are not as many as depths.
    """
    if isinstance(embed_dim, int):
        return tuple(embed_dim * 2**i for i in range(len(depths)))
    if len(embed_dim) != len(depths):
        raise ValueError(f'embed_dim {tuple(embed_dim)} and depths {tuple(depths)} differ in their number of stages.')
    return tuple(embed_dim)


class ScanBackbone(nn.Module):
    """What backbones of 2D scans (`vmzoo.layers.SS2D`) share; they have `forward_features` and `forward_head`."""

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter; `needs_reset` also those that constructors have initialised (`to_empty()`)."""

        def init(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                init_truncated_(module)
            elif needs_reset and hasattr(module, 'reset_parameters'):
                module.reset_parameters()

        self.apply(init)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that a scan is sensitive to."""
        return {name for name, _ in self.named_parameters() if name.endswith(('.A_logs', '.Ds', '.dt_projs_bias'))}

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] -> logits [B, num_classes], or the features of a model without a classifier."""
        return self.forward_head(self.forward_features(x))


class HierarchicalBackbone(ScanBackbone):
    """Backbone and classifier of stages, each of which halves the map of the one before it.

    Takes images [B, in_chans, H, W] of any size from `min_input_size` on. Sub-classes build the parts and hand them
    over; their features are the stages' outputs before the downsampling.

    Args:
        patch_embed: Stem, [B, in_chans, H, W] -> [B, H', W', C], with a method `min_input`.
        layers: Stages.
        dims: Channels of each stage.
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: Pooling before the classifier, '' for none.
        patch_size: Stride of the stem.
        drop_rate: Dropout before the classifier.
        output_stride: Accepted for timm's sake: only the network's own stride is possible.
        classifier: Head to use instead of a `NormPoolHead` (with what this class uses of that).
        reductions: By how much each stage's map is smaller than the image, if not twice as much as that before it.

    Raises:
        ValueError: Another `output_stride`, or a classifier without pooling.
    """

    # Whether the published dense backbone has LayerNorms of its own, `outnorm{i}`, on its maps.
    out_norms = False

    def __init__(
        self,
        patch_embed: nn.Module,
        layers: list[Stage],
        dims: tuple[int, ...],
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        patch_size: int = 4,
        drop_rate: float = 0.0,
        output_stride: int | None = None,
        classifier: nn.Module | None = None,
        reductions: tuple[int, ...] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        reductions = reductions or [patch_size * 2**i for i in range(len(layers))]
        if output_stride not in (None, reductions[-1]):
            raise ValueError(
                f'output_stride must be {reductions[-1]} here, got {output_stride}: a scan cannot be dilated.'
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.patch_embed = patch_embed
        self.layers = nn.ModuleList(layers)
        self.feature_info = [
            {'num_chs': dim, 'reduction': reduction, 'module': f'layers.{i}.blocks'}
            for i, (dim, reduction) in enumerate(zip(dims, reductions))
        ]
        self.classifier = classifier or NormPoolHead(
            dims[-1], num_classes, global_pool, drop_rate, device=device, dtype=dtype
        )
        self.num_features = self.classifier.in_features
        self.head_hidden_size = self.classifier.num_features

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups, from the stem on, for layer-wise learning rates."""
        if coarse:
            return {'stem': r'^patch_embed', 'blocks': r'^layers\.(\d+)'}
        return {
            'stem': r'^patch_embed',
            'blocks': [
                (r'^layers\.(\d+)\.blocks\.(\d+)', None),
                (r'^layers\.(\d+)\.(?:downsample|shortcut|norm)', (99999,)),  # joins the last block of its stage
                (r'^classifier\.norm', (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.classifier.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; `global_pool` None keeps the pooling."""
        self.classifier.reset(num_classes, global_pool, **get_device_dtype(self))
        self.num_classes = num_classes
        self.head_hidden_size = self.classifier.num_features

    @property
    def min_input_size(self) -> int:
        """Smallest image side that leaves every stage a map that it takes."""
        size = 1
        for stage in reversed(self.layers):
            if not isinstance(stage.downsample, nn.Identity):
                size = stage.downsample.min_input(size)
            size = max(size, stage.min_size)
        return self.patch_embed.min_input(size)

    def _embed(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans)
        height, width = x.shape[-2:]
        if min(height, width) < self.min_input_size:
            raise ValueError(
                f'The image is {height}x{width}, but this model reduces it {self.feature_info[-1]["reduction"]} times '
                f'and needs at least {self.min_input_size} pixels a side: resize or pad it.'
            )
        return self.patch_embed(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the image, and of chosen stages before their downsampling.

        Args:
            x: Image [B, in_chans, H, W].
            indices: Stages to return: the last n if an integer, all if None.
            norm: Apply the final norm to the last stage's features, the only ones it fits; not one that changes their
                number of channels.
            stop_early: Do not compute what follows the last of these stages.
            output_fmt: Layout of the stage features, 'NCHW' or 'NHWC'.
            intermediates_only: Return only the stage features.

        Returns:
            The list of stage features, preceded by the final features [B, C, H, W] unless `intermediates_only`.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}.")
        norm = norm and self.num_features == self.feature_info[-1]['num_chs']
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        last = max_index if stop_early else len(self.layers) - 1
        intermediates = []
        x = self._embed(x)
        for i, stage in enumerate(self.layers[: last + 1]):
            inputs, x = x, stage.forward_blocks(x)
            if i in take_indices:
                is_final = i == len(self.layers) - 1
                intermediates.append(self.classifier.norm(x) if norm and is_final else x)
            if i < last:
                x = stage.forward_downsample(x, inputs)
        if output_fmt == 'NCHW':
            intermediates = [y.permute(0, 3, 1, 2).contiguous() for y in intermediates]
        if intermediates_only:
            return intermediates
        if last == len(self.layers) - 1:
            x = self.classifier.norm(x)
        return x.permute(0, 3, 1, 2), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the features of the given stages do not need; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        prune_end = max_index < len(self.layers) - 1
        if prune_end:
            self.layers = self.layers[: max_index + 1]
            self.layers[-1].end()
            self.feature_info = self.feature_info[: max_index + 1]
        if prune_norm or prune_end:
            channels = self.feature_info[-1]['num_chs']
            prune_end = prune_end or self.num_features != channels
            self.classifier.norm = nn.Identity()
            self.num_features = self.classifier.in_features = channels
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] -> normed features [B, C, H', W']."""
        x = self._embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.classifier.norm(x).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, C, H', W'] -> logits [B, num_classes], or pooled features if `pre_logits`."""
        return self.classifier(x, pre_logits=pre_logits)


class DistilledBackbone(HierarchicalBackbone):
    """Hierarchical backbone whose `classifier` is a `DistilledHead`."""

    classifier: DistilledHead

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, return the logits of both classifiers, as a tuple, instead of their mean."""
        self.classifier.distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The classifier's linear layer, or the two of a model with distillation."""
        head = self.classifier
        layers = (head.head, head.head_dist) if head.distillation else (head.head,)
        layers = tuple(getattr(layer, 'l', layer) for layer in layers)
        return layers if head.distillation else layers[0]
