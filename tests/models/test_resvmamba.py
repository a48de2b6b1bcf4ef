"""What Res-VMamba promises beyond timm's contract."""

import logging

import pytest
import timm
import torch

import vmzoo
from vmzoo.weights import CheckpointMismatch


def small(name: str = 'resvmamba_tiny', **kwargs) -> torch.nn.Module:
    return timm.create_model(name, depths=(1, 1, 1, 1), embed_dim=16, **{'num_classes': 5, **kwargs}).eval()


def test_residual_is_added_to_the_output_of_a_stage():
    model = small().double()
    x = torch.randn(2, 6, 9, 16, dtype=torch.float64)
    stage = model.layers[0]
    pooled = torch.stack([x[:, i::2, j::2][:, :3, :4] for i in (0, 1) for j in (0, 1)]).amax(0)
    pooled = torch.cat([pooled, x[:, :, 8:].unflatten(1, (3, 2)).amax(2)], dim=2)  # the odd column, alone
    projected = torch.nn.functional.linear(pooled, stage.shortcut.proj.weight[..., 0, 0], stage.shortcut.proj.bias)
    torch.testing.assert_close(stage(x), stage.downsample(stage.blocks(x)) + projected)


def test_a_cropping_downsampling_crops_the_residual_too():
    assert small(downsample='merge_crop')(torch.randn(1, 3, 45, 36)).shape == (1, 5)


def test_without_residual_it_is_the_first_vmamba():
    model, plain = small(residual='none'), small('vmamba_v0_tiny')
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_random_residual_differs_from_call_to_call_around_that_without():
    model, x = small(residual='random').double(), torch.randn(1, 8, 8, 16, dtype=torch.float64)
    plain = small(residual='none').double()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        residuals = torch.stack([model.layers[0](x) - plain.layers[0](x) for _ in range(400)])
    assert not torch.equal(residuals[0], residuals[1])
    assert residuals.mean(0).abs().max() < 0.3 * residuals.std(0).max()
    pooled = torch.nn.functional.max_pool2d(x.permute(0, 3, 1, 2), 2)
    want = ((pooled.square().sum(1) + 1) / (3 * 16)).sqrt()  # of 16 weights and a bias, uniform in +-1/4
    torch.testing.assert_close(residuals.std(dim=(0, -1)), want, rtol=0.05, atol=0)


def test_a_checkpoint_without_projections_keeps_those_of_the_model(caplog):
    published = small(residual='none').state_dict()
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items() if '.shortcut.' in key}
    with caplog.at_level(logging.WARNING, 'vmzoo'):
        model.load_state_dict(vmzoo.convert_state_dict({'model': published}, model))
    assert len(before) == 6 and all(key in caplog.text for key in before) and "residual='none'" in caplog.text
    state = model.state_dict()
    assert all(torch.equal(state[key], {**published, **before}[key]) for key in state)


def test_projections_are_not_dropped_silently(caplog):
    trained = small().state_dict()
    with pytest.raises(CheckpointMismatch, match=r'layers\.0\.shortcut\.proj\.weight'):
        vmzoo.convert_state_dict(trained, small(residual='none'))
    del trained['layers.1.shortcut.proj.bias']
    with pytest.raises(CheckpointMismatch, match=r'missing keys \(1\): layers\.1\.shortcut\.proj\.bias'):
        vmzoo.convert_state_dict(trained, small())


def test_pruning_removes_the_residual_that_leads_nowhere():
    model = small(features_only=True, out_indices=(0, 1))
    assert [key for key in model.model.state_dict() if '.shortcut.' in key] == [
        'layers.0.shortcut.proj.weight',
        'layers.0.shortcut.proj.bias',
    ]


def test_unknown_residual_is_named():
    with pytest.raises(ValueError, match='proj, none, random'):
        small(residual='mean')
