"""What is published, with its licence; and the digests of the files, for those that are known.

Address, licence and source of a weight stand in the model's `default_cfgs`; `manifest.json` adds, by address, what
timm's cfg has no field for: the file's SHA-256 and size, and the accuracy that its publisher states. A digest of `null`
means that nobody has recorded it yet, and nothing is verified.
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
    """One published file.

    Attributes:
        name: `architecture.tag`.
        url: The publisher's file, or the hub's page of it.
        hub_id: Repository on the Hugging Face hub from which `pretrained=True` takes it instead, None if it is `url`.
        sha256: Digest in hexadecimal, None while unrecorded.
        size: Bytes, None while unrecorded.
        metrics: As published, in percent: `imagenet1k_top1`, `imagenet1k_top5`; of dense models `coco_pose_ap`,
            `crowdpose_ap`, `ade20k_miou`.
    """

    name: str
    url: str
    hub_id: str | None
    license: str
    sha256: str | None
    size: int | None
    metrics: dict[str, float]


@functools.cache
def _entries() -> dict[str, dict]:
    return json.loads(resources.files(__package__).joinpath('manifest.json').read_text(encoding='utf-8'))


def published_weights() -> list[PublishedWeight]:
    """Lists every weight that a model of the zoo can download."""
    from vmzoo.models._registry import default_cfgs_of, list_architectures, summary_of

    weights = []
    for architecture in list_architectures():
        is_segmenter = summary_of(architecture).task == 'segmentation'
        for tag, cfg in default_cfgs_of(architecture).items():
            if cfg.url or cfg.hf_hub_id:
                url, hub_id = (cfg.url, cfg.hf_hub_id) if cfg.url else (f'https://huggingface.co/{cfg.hf_hub_id}', None)
                entry = {'sha256': None, 'size': None, 'metrics': {}} | _entries().get(url, {})
                if is_segmenter:  # the file starts its encoder: the accuracy is another model's
                    entry = {**entry, 'metrics': {}}
                weights.append(PublishedWeight(f'{architecture}.{tag}', url, hub_id, cfg.license, **entry))
    return weights


def verify(path: str | os.PathLike[str], url: str) -> None:
    """Compares a downloaded file with the recorded digest of its address, if one is recorded.

    Raises:
        CheckpointError: Size or SHA-256 differ.
    """
    entry = _entries().get(url, {})
    size = Path(path).stat().st_size
    if entry.get('size') is not None and size != entry['size']:
        raise CheckpointError(f'{path}: has {size} bytes, {url} should have {entry["size"]}')
    if entry.get('sha256') is not None:
        found = _sha256(path)
        if found != entry['sha256']:
            raise CheckpointError(f'{path}: SHA-256 is {found}, of {url} it should be {entry["sha256"]}')


def _sha256(path: str | os.PathLike[str]) -> str:
    hasher = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()
