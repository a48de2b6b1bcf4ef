"""The whole detector: published weights, and the form for deployment."""

import copy
import re
from typing import Any

import torch
from mmcv.cnn import fuse_conv_bn
from mmdet.models.detectors import SingleStageDetector
from mmdet.structures.bbox import bbox_xyxy_to_cxcywh
from mmengine.registry import MODELS
from torch import Tensor, nn

from vmzoo.models.mambayolo import checkpoint_filter_fn, convert_block, split_layers

# number of a published layer -> our module
_BLOCKS = {11: 'neck.top_down.0', 14: 'neck.top_down.1', 17: 'neck.bottom_up.0', 20: 'neck.bottom_up.1'}
_DOWNSAMPLES = {15: 'neck.downsamples.0', 18: 'neck.downsamples.1'}
_HEAD = 21
_BRANCHES = {'cv2': 'bbox_head.reg_convs', 'cv3': 'bbox_head.cls_convs'}


@MODELS.register_module()
class MambaYOLODetector(SingleStageDetector):
    """Mamba-YOLO for mmdet. Images are RGB in [0, 1], with sides that are multiples of 32.

    A state dict with the published names (`model.0.conv.0.weight`, ...) loads like one with ours, so that `load_from`
    takes it. Arguments are those of mmdet's `SingleStageDetector`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_accept_published_names)

    def deploy(self) -> 'DeployedDetector':
        """A copy for inference: one network from image to predictions, with batch norms folded into convolutions."""
        return DeployedDetector(self)


class DeployedDetector(nn.Module):
    """Network of a detector in its published form of inference; `torch.export` takes it.

    Suppression of overlapping boxes is left to the runtime.

    Args:
        detector: It is copied and left as it is.
    """

    def __init__(self, detector: MambaYOLODetector) -> None:
        super().__init__()
        detector = copy.deepcopy(detector).eval().requires_grad_(False)
        self.backbone = fuse_conv_bn(detector.backbone)
        self.neck = fuse_conv_bn(detector.neck)
        self.bbox_head = fuse_conv_bn(detector.bbox_head)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, 3, H, W] -> [B, 4 + num_classes, A]: centre, width and height in pixels, probabilities."""
        boxes, scores = self.bbox_head.decode(*self.bbox_head(self.neck(self.backbone(x))))
        return torch.cat((bbox_xyxy_to_cxcywh(boxes), scores), dim=-1).mT


def convert_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a published detector to those of a `MambaYOLODetector` on a `VMZooBackbone`.

    The constant bins of the distances, a parameter in published files, are left out.
    """
    layers = split_layers(state_dict)
    out = {f'backbone.model.{key}': value for key, value in checkpoint_filter_fn(state_dict, None).items()}
    for i, module in _BLOCKS.items():
        for key, value in layers.get(i, {}).items():
            name, value = convert_block(key, value)
            out[f'{module}.{name}'] = value
    for i, module in _DOWNSAMPLES.items():
        out.update((f'{module}.{key}', value) for key, value in layers.get(i, {}).items())
    for key, value in layers.get(_HEAD, {}).items():
        branch, _, name = key.partition('.')
        if branch in _BRANCHES:
            out[f'{_BRANCHES[branch]}.{name}'] = value
    return out


def _accept_published_names(detector: MambaYOLODetector, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before loading, rename published weights in place; others stay as they are."""
    start = re.compile(rf'{re.escape(prefix)}(model\.\d+\..+)')
    published = {match[1]: key for key in state_dict if (match := start.match(key))}
    if f'model.{_HEAD}.cv2.0.0.conv.weight' in published:
        weights = convert_published({name: state_dict.pop(key) for name, key in published.items()})
        state_dict.update((f'{prefix}{name}', value) for name, value in weights.items())
