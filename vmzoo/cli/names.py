"""How commands find the model that a user names."""

import difflib

from timm.models._pretrained import PretrainedCfg

from vmzoo.models._registry import default_cfgs_of, list_architectures
from vmzoo.weights import CheckpointError, PublishedWeight, published_weights


def find_model(wanted: str) -> tuple[str, PretrainedCfg]:
    """Returns the architecture and the cfg of a name with or without a tag.

    Raises:
        ValueError: Unknown model or tag; the message has what comes close.
    """
    name, _, tag = wanted.partition('.')
    names = list_architectures()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f'did you mean {" or ".join(close)}?' if close else '`vmzoo list` shows all'
        raise ValueError(f'unknown model {name}: {hint}')
    cfgs = default_cfgs_of(name)
    if not tag:
        return name, next(iter(cfgs.values()))
    if tag not in cfgs:
        raise ValueError(f'{name} has no tag {tag}; it has: {", ".join(cfgs)}')
    return name, cfgs[tag]


def find_weight(wanted: str) -> PublishedWeight:
    """Returns the published weights of a name with or without a tag.

    Raises:
        ValueError: Unknown model or tag.
        CheckpointError: It has no weights that can be downloaded.
    """
    name, cfg = find_model(wanted)
    for weight in published_weights():
        if weight.name == f'{name}.{cfg.tag}':
            return weight
    raise CheckpointError(
        f'no weights that can be downloaded are published for {wanted}; `vmzoo list --pretrained` shows those that are'
    )
