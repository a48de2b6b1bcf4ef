"""Builds a model and its cfg as timm does, but reads published weights as data.

timm loads pickles with `weights_only=True`, which refuses the config objects inside most published files, and goes
non-strict when the number of classes changes. Here files and downloads are read by `vmzoo.weights` instead.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    """Entries of a pretrained cfg: those of ImageNet-1k at 224 pixels, and over them the ones given."""
    return {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'license': 'unknown',
        **kwargs,
    }


def build_model(
    cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    feature_cfg: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Calls timm's `build_model_with_cfg`; a `file` or `url` in the cfg goes through the safe reader, strictly.

    Args:
        cls: Model class.
        variant: Registered name.
        pretrained: Load weights. Classifier and stem may differ from the file's, as `convert_state_dict` describes.
        pretrained_cfg: Tag or cfg that replaces the registered one.
        pretrained_cfg_overlay: Entries over the cfg: `dict(file='weights.pth')` loads a local file.
        cache_dir: Where downloads are kept, instead of `$VMZOO_HOME/checkpoints` or torch.hub's folder.
        feature_cfg: How `features_only=True` takes features, if not those of four stages by `forward_intermediates`.
        **kwargs: `pretrained_filter_fn` and the model's own arguments.

    Raises:
        CheckpointError: No weights are published, the download fails, or the file is damaged.
        CheckpointMismatch: Its weights are of another architecture.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    model_cls = cls
    if pretrained and not any(cfg.get(key) for key in ('source', 'state_dict', 'file', 'hf_hub_id', 'url')):
        from vmzoo.weights import CheckpointError

        raise CheckpointError(
            f'No weights are published for {variant}. Build it with pretrained=False, or pass '
            "pretrained_cfg_overlay=dict(file='path/to/file')."
        )
    if pretrained and _is_published_file(cfg):
        pretrained = False

        def model_cls(**model_kwargs: Any) -> nn.Module:
            model = cls(**model_kwargs)
            model.pretrained_cfg = cfg
            load_published(model, cfg, cache_dir)
            return model

    input_size = cfg['input_size']
    if is_volume := len(input_size) == 4:
        # timm knows sizes of pictures only: those of volumes go past it
        kwargs.setdefault('in_chans', input_size[0])
        if cfg['fixed_input_size']:
            kwargs.setdefault('img_size', input_size[1:])
        if 'img_size' in kwargs:
            model_cls = partial(model_cls, img_size=kwargs.pop('img_size'))
        pretrained_cfg_overlay = {**(pretrained_cfg_overlay or {}), 'input_size': None}
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
        feature_cfg={'out_indices': (0, 1, 2, 3), 'feature_cls': 'getter', **(feature_cfg or {})},
        **kwargs,
    )
    if is_volume:
        model.pretrained_cfg['input_size'] = input_size
    return model


def _is_published_file(cfg: dict[str, Any]) -> bool:
    """Follows timm's order of sources: state dict, file, hub, url; a `source` names a hub or a folder."""
    if cfg.get('source') or cfg.get('state_dict'):
        return False
    return bool(cfg.get('file') or (cfg.get('url') and not cfg.get('hf_hub_id')))


def load_published(
    model: nn.Module,
    cfg: dict[str, Any],
    cache_dir: str | os.PathLike[str] | None = None,
    load_file: Callable[[nn.Module, str], Any] | None = None,
) -> None:
    """Loads a local file or a download into a model.

    Args:
        model: The model.
        cfg: The `file`, or else the `url` that is downloaded if the cache does not have it.
        cache_dir: Where downloads are kept, instead of `$VMZOO_HOME/checkpoints` or torch.hub's folder.
        load_file: Loads the file, if not `vmzoo.weights.load_checkpoint`.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The download fails, or the file is damaged.
        CheckpointMismatch: Its weights are of another architecture.
    """
    # Imported here: weights build on models, and most models are never loaded from a file.
    from vmzoo.weights import CheckpointError, CheckpointMismatch, download_file, load_checkpoint, remove_cached

    load_file = load_file or load_checkpoint
    if cfg.get('file'):
        load_file(model, cfg['file'])
        return
    path = download_file(cfg['url'], cache_dir)
    try:
        load_file(model, str(path))
    except CheckpointMismatch:
        raise
    except CheckpointError as error:
        remove_cached(path)  # no digest is known, or the first download was damaged already
        raise CheckpointError(
            f'{error}. It came from {cfg["url"]} and was removed from the cache; try again.'
        ) from error
