"""Published weights: safe reading, conversion to our keys, strict loading, and the manifest of what is published."""

from .convert import LoadReport, convert, convert_state_dict, load_checkpoint
from .errors import CheckpointError, CheckpointMismatch
from .manifest import PublishedWeight, published_weights, verify
from .read import read_checkpoint

__all__ = [
    'CheckpointError',
    'CheckpointMismatch',
    'LoadReport',
    'PublishedWeight',
    'convert',
    'convert_state_dict',
    'load_checkpoint',
    'published_weights',
    'read_checkpoint',
    'verify',
]
