"""Published weights: the manifest, verified downloads, safe reading, conversion to our keys, strict loading."""

from .cache import CachedFile, cache_folder, cached_files, remove_cached
from .convert import LoadReport, convert, convert_state_dict, load_checkpoint
from .download import download_file
from .errors import CheckpointError, CheckpointMismatch
from .manifest import PublishedWeight, published_weights
from .read import read_checkpoint

__all__ = [
    'CachedFile',
    'CheckpointError',
    'CheckpointMismatch',
    'LoadReport',
    'PublishedWeight',
    'cache_folder',
    'cached_files',
    'convert',
    'convert_state_dict',
    'download_file',
    'load_checkpoint',
    'published_weights',
    'read_checkpoint',
    'remove_cached',
]
