"""The model of a command's --model and --checkpoint."""

from typing import Any

import timm
from torch import nn

import vmzoo  # noqa: F401  registers the models
from vmzoo.models._registry import family_of, summary_of
from vmzoo.weights import LoadReport, load_checkpoint, read_checkpoint


def load_model(
    model_name: str | None, checkpoint: str | None, tasks: tuple[str, ...], **overrides: Any
) -> tuple[nn.Module, dict[str, Any], LoadReport | None]:
    """A published model by its name, or a trained one from its checkpoint.

    Args:
        model_name: Registered name; None for the one that the checkpoint states.
        checkpoint: File of weights; None for the published ones.
        tasks: What a model of the zoo may be for, as `ModelSummary.task` has it.
        **overrides: Arguments of the model that go before those in the checkpoint.

    Returns:
        The model in evaluation mode; what the checkpoint states of it; the report of loading the file.

    Raises:
        CheckpointError: The checkpoint is damaged or of another model, or a download failed.
        ValueError: Neither says which model, or it is unknown, for another task or has no weights.
    """
    meta = {}
    if checkpoint:
        meta = read_checkpoint(checkpoint).get('meta')
        meta = meta if isinstance(meta, dict) and 'model_name' in meta else {}
        if not (model_name or meta):
            raise ValueError(f'{checkpoint} does not say which model it belongs to; add --model NAME')
    name = meta.get('model_name', model_name)
    if model_name and name != model_name:
        raise ValueError(f'{checkpoint} is of {name}, not of {model_name}; leave --model out')
    if not timm.is_model(name):
        raise ValueError(f'unknown model {name}; `vmzoo list` shows the names')
    if family_of(name) and (task := summary_of(name).task) not in tasks:
        raise ValueError(f'{name} is a model for {task}, not for {tasks[0]}')
    kwargs = {key: meta[key] for key in ('num_classes', 'in_chans') if key in meta} | meta.get('model_kwargs', {})
    if not checkpoint and not getattr(timm.get_pretrained_cfg(name), 'has_weights', False):
        raise ValueError(f'{name} has no published weights; train it, then give --checkpoint FILE')
    model = timm.create_model(name, pretrained=not checkpoint, **(kwargs | overrides)).eval()
    return model, meta, load_checkpoint(model, checkpoint) if checkpoint else None
