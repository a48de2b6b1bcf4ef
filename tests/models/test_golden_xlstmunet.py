"""xLSTM-UNet equals the published implementation: same keys and shapes, same numbers."""

import pytest
import timm
import torch
from golden import golden
from golden.models import errors, fill

NAMES = golden.names('xlstmunet')
SMALL = [name for name in NAMES if name.endswith('_small')]


def load(name: str) -> tuple[torch.nn.Module, torch.Tensor, dict, dict]:
    """Model, image, and the fixture's meta data and outputs."""
    meta, want = golden.load(f'xlstmunet/{name}')
    config = meta['config']
    model = timm.create_model(
        name.rpartition('_')[0],
        img_size=config['input_size'],
        num_classes=config['num_classes'],
        embed_dim=config['features_per_stage'],
        kernel_size=config['kernel_sizes'],
        strides=config['strides'],
        deep_supervision=True,
    )
    # beside each Vision-LSTM block the published model has a norm that it never applies
    unused = {key for key, _ in meta['keys'] if '.vil.' in key and key.endswith('.vil.norm.weight')}
    shapes = dict(meta['keys'])
    unused = [key.replace('.vil.norm.', '.norm.') for key in unused if not key.startswith('decoder.')]
    params = meta['params'] - sum(2 * shapes[key][0] for key in unused)
    return model, fill(model, {**meta, 'params': params}), meta, want


@torch.inference_mode()
def outputs(model: torch.nn.Module, x: torch.Tensor, is_bot: bool) -> dict[str, torch.Tensor]:
    blocks = model.stages[-1][:-1] if is_bot else model.stages[-1]  # a published skip is before the bottleneck's block
    last = []
    hook = blocks[-1].register_forward_hook(lambda module, inputs, output: last.append(output))
    maps = model.forward_intermediates(x, intermediates_only=True)
    hook.remove()
    got = {f'skip{i}': y for i, y in enumerate(maps)} | {'bottleneck': maps[-1], f'skip{len(maps) - 1}': last[0]}
    logits, *others = model.train()(x)  # no layer differs in training
    return got | {'logits': logits} | {f'ds{i}': y for i, y in enumerate(others, start=1)}


@pytest.mark.parametrize('name', SMALL)
def test_equals_the_published_model_in_float64(name):
    model, x, _, want = load(name)
    got = errors(outputs(model.double(), x.double(), '_bot_' in name), want)
    assert max(got.values()) < 1e-5, got


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_published_model_in_float32(name):
    model, x, meta, want = load(name)
    got = errors(outputs(model, x, '_bot_' in name), want)
    assert all(error < max(1e-4, 3 * meta['float32_error'][key]) for key, error in got.items() if key in want), got
