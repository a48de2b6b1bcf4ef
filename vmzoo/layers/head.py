"""Classifier heads."""

from collections.abc import Callable

from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from .norm import LayerNorm


class NormPoolHead(nn.Module):
    """Norm over channels, global pooling, linear classifier: in this order, unlike most heads.

    The norm takes a channels-last map, and is applied by the model as the end of its features; `forward` takes the
    normed map [B, C, H, W].

    Args:
        in_features: Channels C.
        num_classes: Outputs; 0 for none.
        pool_type: One of timm's ('avg', 'max', 'avgmax', 'catavgmax'), or '' to leave the map as it is.
        drop_rate: Dropout before the classifier.
        norm: What ends the features instead of a LayerNorm; it may change their number to `in_features`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = 'avg',
        drop_rate: float = 0.0,
        norm: nn.Module | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features = in_features
        self.norm = LayerNorm(in_features, float32=True, device=device, dtype=dtype) if norm is None else norm
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, device=device, dtype=dtype)

    def reset(self, num_classes: int, pool_type: str | None = None, device=None, dtype=None) -> None:
        """Replace the classifier; `pool_type` None keeps the pooling."""
        pooled = self.global_pool.pool_type if pool_type is None else pool_type
        if num_classes > 0 and not pooled:
            raise ValueError("A classifier needs pooled features: choose a global_pool other than '' or num_classes=0.")
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.num_features = self.in_features * self.global_pool.feat_mult()
        self.head = (
            nn.Linear(self.num_features, num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()
        )
        self.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, C, H, W] -> [B, num_classes]; pooled features if `pre_logits`."""
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.head(x)


class DistilledHead(nn.Module):
    """Global pooling and a classifier; with `distillation` two, of which the second learns from a teacher.

    In evaluation the two are averaged, as in timm's distilled models. So they are in training, unless
    `distilled_training` is set: then both come out, for a distillation loss.

    Args:
        in_features: Channels C.
        num_classes: Outputs; 0 for none.
        global_pool: 'avg', or '' to leave the map as it is.
        drop_rate: Dropout before the classifiers.
        distillation: Have a second classifier.
        neck: Applied to the pooled features.
        layer: Class of the classifiers, called with `in_features` and `num_classes`.

    Raises:
        ValueError: Another `global_pool`, or a classifier without pooling.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        distillation: bool = False,
        neck: nn.Module | None = None,
        layer: Callable[..., nn.Module] = nn.Linear,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features = in_features
        self.distillation = distillation
        self.distilled_training = False
        self.layer = layer
        self.norm = nn.Identity()  # of the features: they are pooled as they are
        self.neck = nn.Identity() if neck is None else neck
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, global_pool, device=device, dtype=dtype)

    def reset(self, num_classes: int, global_pool: str | None = None, device=None, dtype=None) -> None:
        """Replace the classifiers; `global_pool` None keeps the pooling."""
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool not in ('avg', ''):
            raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}.")
        if num_classes > 0 and not global_pool:
            raise ValueError("A classifier needs pooled features: choose a global_pool other than '' or num_classes=0.")
        self.global_pool = global_pool
        self.num_features = self.in_features
        for name in ('head', 'head_dist') if self.distillation else ('head',):
            dd = {'device': device, 'dtype': dtype}
            setattr(self, name, self.layer(self.in_features, num_classes, **dd) if num_classes > 0 else nn.Identity())
        self.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C, H, W] -> [B, num_classes], or that of each classifier; `pre_logits`: what the classifiers take."""
        if not self.global_pool:
            return x
        x = self.drop(self.neck(x.mean((2, 3))))
        if pre_logits:
            return x
        if not self.distillation:
            return self.head(x)
        out, out_dist = self.head(x), self.head_dist(x)
        if self.training and self.distilled_training:
            return out, out_dist
        return (out + out_dist) / 2
