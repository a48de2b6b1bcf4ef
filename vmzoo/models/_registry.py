"""Which of timm's registered models are ours."""

from timm.models import get_pretrained_cfg, is_model, list_models, model_entrypoint


def list_architectures(family: str | None = None) -> list[str]:
    """Returns the registered names, without tags, of one family (`vmamba`) or of all, in timm's order."""
    return [name for name in list_models() if (own := family_of(name)) and family in (None, own)]


def family_of(name: str) -> str | None:
    """Returns the family of a registered name: the file in `vmzoo.models` that defines it; None if it is not ours."""
    if not is_model(name):
        return None
    package, _, module = model_entrypoint(name).__module__.rpartition('.')
    return module if package == __package__ else None


def default_cfgs_of(name: str) -> dict[str, object]:
    """Returns `tag -> PretrainedCfg` of an architecture, the default first; `''` is the tag of an untagged cfg."""
    tags = [tagged.partition('.')[2] for tagged in list_models(f'{name}.*', include_tags=True)]
    default = get_pretrained_cfg(name)
    cfgs = {tag: get_pretrained_cfg(f'{name}.{tag}') for tag in tags if tag} or {'': default}
    return dict(sorted(cfgs.items(), key=lambda item: item[1].tag != default.tag))
