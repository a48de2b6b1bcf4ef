"""torchvision's operators for detectors where mmcv was built without them, or without those for a GPU.

mmcv's wheels fit certain versions of torch and CUDA; built from source beside others, mmcv has operators for the CPU
alone, or none. Mask R-CNN and its relatives need two, and torchvision has both. Those of mmcv also know no bfloat16.
"""

import importlib
import sys
from functools import wraps
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import torch
import torchvision
from mmengine.logging import print_log

# Modules that have taken the function by its name, if they are imported.
ROI_ALIGN_USERS = ('mmcv.ops', 'mmcv.ops.roi_align', 'mmdet.structures.mask.structures')


class _Absent(ModuleType):
    """Stands for mmcv's compiled module, so that what builds on it can be imported."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, loader=None)  # mmengine looks whether there is such a module

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


def roi_align(
    input: torch.Tensor,
    rois: torch.Tensor,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    pool_mode: str = 'avg',
    aligned: bool = True,
) -> torch.Tensor:
    """`mmcv.ops.roi_align`, computed in float32.

    Args:
        input: Maps [B, C, H, W].
        rois: Number of the map, and box [N, 5].
        output_size: (h, w).
        spatial_scale: Of the map to the image that the boxes are on.
        sampling_ratio: Samples along each side of a bin; 0 for as many as it has pixels.
        pool_mode: 'avg'; torchvision has no other.
        aligned: Whether pixels are at half-integer places.

    Returns:
        [N, C, h, w] in the dtype of the maps.
    """
    if pool_mode != 'avg':
        raise ValueError(f"torchvision's RoIAlign has no pool_mode {pool_mode!r}; build mmcv's operators")
    pooled = torchvision.ops.roi_align(
        input.float(), rois.float(), output_size, spatial_scale, sampling_ratio, aligned=aligned
    )
    return pooled.to(input.dtype)


def complete_operators(force: bool = False) -> bool:
    """Use torchvision for RoIAlign and NMS if mmcv cannot run them here; to be called before a model is built.

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
    ops = importlib.import_module('mmcv.ops')
    own_nms, own_roi_align = (getattr(function, '__wrapped__', function) for function in (compiled.nms, ops.roi_align))

    @wraps(own_nms)
    def nms_in_float32(bboxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int) -> torch.Tensor:
        run = nms if needed else own_nms
        return run(bboxes.float(), scores.float(), iou_threshold=iou_threshold, offset=offset)

    @wraps(own_roi_align)
    def roi_align_of_any_dtype(input: torch.Tensor, rois: torch.Tensor, *args) -> torch.Tensor:
        run = roi_align if needed or input.dtype == torch.bfloat16 else own_roi_align
        return run(input, rois, *args)

    compiled.nms = nms_in_float32
    for name in ROI_ALIGN_USERS:
        if name in sys.modules:
            sys.modules[name].roi_align = roi_align_of_any_dtype
    return needed
