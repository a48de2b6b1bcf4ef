"""Classifier heads."""

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
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = 'avg',
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features = in_features
        self.norm = LayerNorm(in_features, float32=True, device=device, dtype=dtype)
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
