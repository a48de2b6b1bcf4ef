"""Vision backbones built on 2D selective scans: `import vmzoo`, then `timm.create_model('vmamba_tiny_s1l8')`."""

from . import models  # registers every model with timm

__version__ = '0.1.0'
__all__ = ['__version__', 'convert_state_dict', 'models']


def __getattr__(name: str):
    if name == 'convert_state_dict':
        from .weights import convert_state_dict

        return convert_state_dict
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
