"""torchvision's operators for detectors where mmcv was built without them, or without those for a GPU.

mmcv's wheels fit certain versions of torch and CUDA; built from source beside others, mmcv has operators for the CPU
alone, or none. Mask R-CNN and its relatives need two, and torchvision has both. Those of mmcv also know no bfloat16.
"""

import importlib
import sys
from functools import wraps
from importlib.util import find_spec
from types import ModuleType

import torch
import torchvision
from mmengine.logging import print_log


class _Absent(ModuleType):
    """Stands for mmcv's compiled module, so that what builds on it can be imported."""

    def __getattr__(self, name: str):
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*_, **__):
            raise RuntimeError(
                f'this model needs {name}, which mmcv was built without and torchvision does not have: build '
                "mmcv's operators"
            )

        return missing


def nms(bboxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int) -> torch.Tensor:
    """Indices of the kept boxes, best first, as `mmcv._ext.nms`; `offset` 1 counts a box's last pixel as inside."""
    if offset:
        bboxes = torch.cat([bboxes[:, :2], bboxes[:, 2:] + offset], 1)
    return torchvision.ops.nms(bboxes, scores, iou_threshold)


def complete_operators(force: bool = False) -> bool:
    """Use torchvision for RoIAlign and NMS if mmcv cannot run them here; to be called before mmdet is imported.

    NMS then runs in float32 whatever the boxes' dtype, and RoIAlign takes bfloat16.

    Args:
        force: Use torchvision in any case.

    Returns:
        Whether torchvision is used.
    """
    if find_spec('mmcv') is None:
        return False
    if find_spec('mmcv._ext') is None:
        mmcv = importlib.import_module('mmcv')
        mmcv._ext = sys.modules['mmcv._ext'] = _Absent('mmcv._ext')
    compiled = importlib.import_module('mmcv._ext')
    absent = isinstance(compiled, _Absent)
    without_gpu = not absent and compiled.get_compiling_cuda_version() == 'not available'
    needed = force or absent or (torch.cuda.is_available() and without_gpu)
    if needed and not force:
        print_log("mmcv's operators are not built for this device: RoIAlign and NMS are torchvision's", 'current')
    layer = importlib.import_module('mmcv.ops').RoIAlign
    own_nms, own_forward = (getattr(f, '__wrapped__', f) for f in (compiled.nms, layer.forward))

    @wraps(own_nms)
    def in_float32(bboxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int) -> torch.Tensor:
        run = nms if needed else own_nms
        return run(bboxes.float(), scores.float(), iou_threshold=iou_threshold, offset=offset)

    @wraps(own_forward)
    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        self.use_torchvision = self.use_torchvision or needed or input.dtype == torch.bfloat16
        return own_forward(self, input, rois)

    compiled.nms, layer.forward = in_float32, forward
    return needed
