"""Filling a model with a fixture's weights, and comparing its outputs."""

import torch

import vmzoo

from . import golden


def fill(model: torch.nn.Module, meta: dict) -> torch.Tensor:
    """Load the fixture's weights into the model, strictly; returns the fixture's image."""
    state = {key: torch.from_numpy(value) for key, value in golden.fill_state(meta['keys']).items()}
    assert sum(p.numel() for p in model.parameters()) == meta['params']
    model.load_state_dict(vmzoo.convert_state_dict(state, model))
    model.eval()
    return torch.from_numpy(golden.make_input(**meta['inputs']['x']))


def errors(got: dict[str, torch.Tensor], want: dict) -> dict[str, float]:
    """Relative error of every stored output."""
    assert got.keys() >= want.keys()
    return {key: golden.error(got[key].numpy(), want[key]) for key in want}
