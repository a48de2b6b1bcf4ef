"""What a model computes on a fixed picture: noted once, then compared on any machine and with any versions."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import CheckpointError

SAMPLES = 64  # of each output tensor
TOLERANCE = 1e-3  # of the largest value: float32 on other devices and backends


def fixed_picture(size: Sequence[int]) -> Tensor:
    """Returns a picture or volume, [1, *size], of the same waves everywhere."""
    return torch.arange(math.prod(size), dtype=torch.float64).mul(0.37).sin().view(1, *size).float()


@torch.inference_mode()
def sample_outputs(model: nn.Module, size: Sequence[int]) -> list[list[float]]:
    """Returns evenly spaced values of every tensor that the model makes of the fixed picture of a size, (C, H, W)."""
    device = next(model.parameters()).device
    leaves = [leaf for leaf in tree_leaves(model.eval()(fixed_picture(size).to(device))) if isinstance(leaf, Tensor)]
    flat = [leaf.float().flatten().cpu() for leaf in leaves]
    return [values[torch.linspace(0, len(values) - 1, min(SAMPLES, len(values))).long()].tolist() for values in flat]


def compare_outputs(outputs: list[list[float]], note: Path, sha256: str | None) -> float | None:
    """Compares sampled outputs with those that were noted for the same weights, or notes them if none were.

    Args:
        outputs: Of `sample_outputs`.
        note: File of the noted outputs.
        sha256: Digest of the weights' file; outputs of another file are not compared, but replaced.

    Returns:
        The largest difference, relative to the largest noted value; None if nothing was noted before.

    Raises:
        CheckpointError: They differ.
    """
    if note.is_file():
        noted = json.loads(note.read_text(encoding='utf-8'))
        if noted['sha256'] == sha256:
            return _difference(outputs, noted['outputs'], note)
    note.write_text(json.dumps({'sha256': sha256, 'outputs': outputs}), encoding='utf-8')
    return None


def _difference(outputs: list[list[float]], noted: list[list[float]], note: Path) -> float:
    remedy = f'The code or the machine computes something else; if that is right, delete {note}.'
    if [len(values) for values in outputs] != [len(values) for values in noted]:
        raise CheckpointError(f'the outputs have other shapes than when they were noted. {remedy}')
    found, wanted = (torch.tensor([value for values in each for value in values]) for each in (outputs, noted))
    difference = ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)).item()
    if not difference <= TOLERANCE:
        raise CheckpointError(f'the outputs differ from those that were noted by {difference:.1e}. {remedy}')
    return difference
