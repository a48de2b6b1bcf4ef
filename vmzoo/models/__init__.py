"""Model families, one file each. Importing this package registers their models with timm."""

from .vmamba import VMamba

__all__ = ['VMamba']
