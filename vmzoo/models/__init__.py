"""Model families, one file each. Importing this package registers their models with timm."""

from .vim import VisionMamba, VisionMambaPyramid
from .vmamba import VMamba

__all__ = ['VMamba', 'VisionMamba', 'VisionMambaPyramid']
