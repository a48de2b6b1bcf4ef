"""torchvision's operators for detectors where mmcv was built without them, or without those for a GPU.

mmcv's wheels fit certain versions of torch and CUDA; built from source beside others, mmcv has operators for the CPU
alone, or none. Mask R-CNN and its relatives need two, and torchvision has both.
"""

import importlib
import sys
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

    Args:
        force: Use it in any case.

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
    on_gpu = torch.cuda.is_available() and (absent or compiled.get_compiling_cuda_version() == 'not available')
    if not (absent or on_gpu or force):
        return False
    ops = importlib.import_module('mmcv.ops')
    if compiled.nms is not nms:
        print_log("mmcv's operators are not built for this device: RoIAlign and NMS are torchvision's", 'current')
        compiled.nms = nms
        ops.RoIAlign.forward = _with_torchvision(ops.RoIAlign.forward)
    return True


def _with_torchvision(forward):
    def wrapper(layer, *args, **kwargs):
        layer.use_torchvision = True
        return forward(layer, *args, **kwargs)

    return wrapper
