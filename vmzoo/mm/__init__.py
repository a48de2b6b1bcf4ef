"""Training on mmengine: everything in vmzoo that imports an mm library lives in this package.

Importing it registers the classes below in mmengine's root registries, where mmseg, mmdet and mmpretrain find them, so
that a config needs only ``custom_imports = dict(imports=['vmzoo.mm'])``; and configs may build on others by
``_base_ = 'mmseg::...'`` (see `inheritance`). Nothing here needs mmcv or one of those libraries to be imported.
"""

from .environment import check_training

check_training()

import vmzoo  # noqa: F401  registers the models with timm

from .backbone import VMZooBackbone
from .classifier import ImagePreprocessor, VMZooClassifier
from .datasets import DigitsDataset, ImageFolderDataset
from .environment import require
from .hooks import BestAndLastHook, NonFiniteLossHook, ProgressHook, StepSeedHook
from .inheritance import config_folder
from .metrics import ClassificationMetric
from .necks import UpsamplingFPN
from .optim import AutocastOptimWrapper, VMZooOptimWrapperConstructor
from .runner import VMZooFlexibleRunner, VMZooRunner
from .seeding import SeededDataset, SeededSampler
from .strategy import VMZooFSDPStrategy

__all__ = [
    'AutocastOptimWrapper',
    'BestAndLastHook',
    'ClassificationMetric',
    'DigitsDataset',
    'ImageFolderDataset',
    'ImagePreprocessor',
    'NonFiniteLossHook',
    'ProgressHook',
    'SeededDataset',
    'SeededSampler',
    'StepSeedHook',
    'UpsamplingFPN',
    'VMZooBackbone',
    'VMZooClassifier',
    'VMZooFSDPStrategy',
    'VMZooFlexibleRunner',
    'VMZooOptimWrapperConstructor',
    'VMZooRunner',
    'config_folder',
    'require',
]
