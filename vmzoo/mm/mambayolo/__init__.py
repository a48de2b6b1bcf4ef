"""Mamba-YOLO (https://arxiv.org/abs/2406.05835) for mmdet: assigner, neck, head, detector.

Importing it registers them in mmengine's root registries; a config needs
``custom_imports = dict(imports=['vmzoo.mm.mambayolo'])``. `vmzoo.mm` does not import it, because trainings of other
tasks shall not load mmdet. The backbone is that of `vmzoo.models.mambayolo`, in a `VMZooBackbone`.
"""

from ..environment import require

require('mmdet')

from .assigner import CenterFirstAssigner
from .detector import DeployedDetector, MambaYOLODetector, convert_published
from .head import MambaYOLOHead
from .neck import MambaYOLOPAFPN

__all__ = [
    'CenterFirstAssigner',
    'DeployedDetector',
    'MambaYOLODetector',
    'MambaYOLOHead',
    'MambaYOLOPAFPN',
    'convert_published',
]
