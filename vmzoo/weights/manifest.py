"""What is published, with its licence; and the digests of the files, for those that are known.

Address, licence and source of a weight stand in the model's `default_cfgs`; `manifest.json` adds, by address, what
timm's cfg has no field for: the file's SHA-256 and size, and the accuracy that its publisher states. A digest of `null`
means that nobody has recorded it yet; what is downloaded first is then what later files are compared with.
"""

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from importlib import resources


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
            `crowdpose_ap`, `ade20k_miou`, `isic18_miou`, `isic18_dice`.
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
                if is_segmenter:  # a classifier's file starts its encoder: the accuracy is another model's
                    own = {key: value for key, value in entry['metrics'].items() if not key.startswith('imagenet1k')}
                    entry = {**entry, 'metrics': own}
                weights.append(PublishedWeight(f'{architecture}.{tag}', url, hub_id, cfg.license, **entry))
    return weights


@dataclass(frozen=True)
class Digest:
    """What a file is known by; None while unrecorded."""

    sha256: str | None = None
    size: int | None = None

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> 'Digest':
        hasher, size = hashlib.sha256(), 0
        with open(path, 'rb') as file:
            while block := file.read(1 << 20):
                hasher.update(block)
                size += len(block)
        return cls(hasher.hexdigest(), size)

    def mismatch(self, found: 'Digest') -> str:
        """Says how another file differs from this one; nothing if it does not, as far as is recorded."""
        if self.size not in (None, found.size):
            return f'it has {found.size} bytes and should have {self.size}'
        if self.sha256 not in (None, found.sha256):
            return f'its SHA-256 is {found.sha256} and should be {self.sha256}'
        return ''


def digest_of(url: str) -> Digest:
    """Returns the recorded digest of the file at an address."""
    entry = _entries().get(url, {})
    return Digest(entry.get('sha256'), entry.get('size'))
