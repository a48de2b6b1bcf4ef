"""Training on mmengine: everything in vmzoo that imports an mm library lives in this package.

Importing it registers the classes below in mmengine's root registries, so that a config needs only
``custom_imports = dict(imports=['vmzoo.mm'])``. Classification needs mmengine alone, never mmcv.
"""

try:  # some of these are needed only later, which is late to say so
    import cv2  # noqa: F401
    import matplotlib  # noqa: F401
    import mmengine  # noqa: F401
    import sklearn  # noqa: F401
    import tensorboard  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f'training needs {error.name}, which is not installed; run: pip install "vmzoo[train]"'
    ) from error

import vmzoo  # noqa: F401  registers the models with timm

from .backbone import VMZooBackbone
from .classifier import ImagePreprocessor, VMZooClassifier
from .datasets import DigitsDataset, ImageFolderDataset
from .hooks import BestAndLastHook, EpochSeedHook, NonFiniteLossHook, ProgressHook
from .metrics import ClassificationMetric
from .optim import AutocastOptimWrapper, TimmOptimWrapperConstructor
from .runner import VMZooRunner

__all__ = [
    'AutocastOptimWrapper',
    'BestAndLastHook',
    'ClassificationMetric',
    'DigitsDataset',
    'EpochSeedHook',
    'ImageFolderDataset',
    'ImagePreprocessor',
    'NonFiniteLossHook',
    'ProgressHook',
    'TimmOptimWrapperConstructor',
    'VMZooBackbone',
    'VMZooClassifier',
    'VMZooRunner',
]
