"""What is published, with its licence; and the digests of the files, for those that are known.

Address, licence and source of a weight stand in the model's `default_cfgs`; `manifest.json` adds what timm's cfg has no
field for: the file's SHA-256 and size. `null` there means that nobody has recorded it yet, and nothing is verified.
"""

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from .errors import CheckpointError


@dataclass(frozen=True)
class PublishedWeight:
    """One published file: `name` is `architecture.tag`; `sha256` and `size` (bytes) are None while unrecorded."""

    name: str
    url: str
    license: str
    sha256: str | None
    size: int | None


@functools.cache
def _digests() -> dict[str, dict]:
    return json.loads(resources.files(__package__).joinpath('manifest.json').read_text(encoding='utf-8'))


def published_weights() -> list[PublishedWeight]:
    """Lists every weight that a registered vmzoo model can download."""
    from vmzoo.models._registry import default_cfgs_of, list_architectures

    weights = []
    for architecture in list_architectures():
        for tag, cfg in default_cfgs_of(architecture).items():
            if cfg.url:
                digest = _digests().get(cfg.url, {})
                name = f'{architecture}.{tag}'
                weights.append(PublishedWeight(name, cfg.url, cfg.license, digest.get('sha256'), digest.get('size')))
    return weights


def verify(path: str | os.PathLike[str], url: str) -> None:
    """Compares a downloaded file with the recorded digest of its address, if one is recorded.

    Raises:
        CheckpointError: Size or SHA-256 differ.
    """
    digest = _digests().get(url, {})
    size = Path(path).stat().st_size
    if digest.get('size') is not None and size != digest['size']:
        raise CheckpointError(f'{path}: has {size} bytes, {url} should have {digest["size"]}')
    if digest.get('sha256') is not None:
        with open(path, 'rb') as file:
            found = _sha256(file)
        if found != digest['sha256']:
            raise CheckpointError(f'{path}: SHA-256 is {found}, of {url} it should be {digest["sha256"]}')


def _sha256(file) -> str:
    hasher = hashlib.sha256()
    while block := file.read(1 << 20):
        hasher.update(block)
    return hasher.hexdigest()
