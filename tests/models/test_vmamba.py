"""What VMamba and its layers promise beyond timm's contract."""

import pytest
import timm
import torch
import torch.nn.functional as F

import vmzoo  # noqa: F401 (registers the models)
from vmzoo.layers import SS2D, SSD2D, PatchMerging, auto_dt_rank, init_A_log_, init_dt_bias_, init_dt_weight_
from vmzoo.models.vmamba import checkpoint_filter_fn

from .checks import count_graphs, loss_on_lines


def nano(**kwargs) -> torch.nn.Module:
    return timm.create_model('vmamba_nano', **kwargs)


def test_nano_is_small():
    assert sum(p.numel() for p in nano().parameters()) < 1_000_000


@pytest.mark.parametrize(
    'option, message',
    [
        ({'scan': 'zigzag'}, 'bidi, cascade, .* rotate'),
        ({'mixer': 'mamba3'}, 'ss2d, ssd'),
        ({'stem': 'v2'}, 'conv, patch'),
        ({'downsample': 'v3'}, 'conv, conv2x2, merge, merge_crop'),
        ({'kernel_size': 4}, 'odd'),
        ({'dt_rank': 'full'}, "'full'"),
        ({'dt_rank': 0}, 'positive'),
        ({'d_state': 0}, 'd_state must be at least 1'),
        ({'ssm_ratio': 0.0}, 'no inner channel'),
        ({'mixer': 'ssd', 'dt_rank': 5}, 'multiple'),
        ({'patch_size': 2}, 'patch_size'),
        ({'depths': (1, 1)}, 'depths'),
        ({'global_pool': ''}, 'num_classes=0'),
        ({'output_stride': 16}, 'output_stride must be 32'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_bad_option_is_named(option, message):
    with pytest.raises(ValueError, match=message):
        nano(**{'embed_dim': (32, 32, 32, 32), **option})


@pytest.mark.parametrize(
    'options, smallest',
    [
        ({}, 1),
        ({'stem': 'patch', 'downsample': 'merge_crop'}, 32),
        ({'stem': 'patch', 'downsample': 'merge'}, 4),
        ({'downsample': 'conv2x2'}, 29),
        ({'patch_size': 8}, 11),
    ],
)
def test_smallest_image(options, smallest):
    model = nano(**options).eval()
    assert model.min_input_size == smallest
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, smallest, smallest + 5))).all()
    if smallest > 1:
        with pytest.raises(ValueError, match=f'{smallest - 1}x40.*at least {smallest} pixels'):
            model(torch.randn(1, 3, smallest - 1, 40))


def test_fewer_stages_take_smaller_images():
    model = timm.create_model(
        'vmamba_v0_tiny', depths=(1, 1, 1, 1), embed_dim=16, features_only=True, out_indices=(0, 1)
    )
    assert [tuple(y.shape[-2:]) for y in model(torch.randn(1, 3, 8, 9))] == [(2, 2), (1, 1)]


def test_patch_merging_order_and_odd_sizes():
    x = torch.arange(2 * 3 * 1.0).view(1, 2, 3, 1)  # [[0, 1, 2], [3, 4, 5]]
    for odd, cells in (('crop', [[0, 3, 1, 4]]), ('pad', [[0, 3, 1, 4], [2, 5, 0, 0]])):
        layer = PatchMerging(1, 4, odd=odd)
        layer.norm = torch.nn.Identity()
        with torch.no_grad():
            layer.reduction.weight.copy_(torch.eye(4))
            assert layer(x).squeeze(0).squeeze(0).tolist() == cells


def test_scan_parameters_stay_in_float32_and_out_of_weight_decay():
    model = nano(dtype=torch.bfloat16)
    A_log, D, _, dt_bias = model.layers[0].blocks[0].op.scan_parameters()
    assert {A_log.dtype, D.dtype, dt_bias.dtype} == {torch.float32}
    kinds = {name.rpartition('.')[2] for name in model.no_weight_decay()}
    assert kinds == {'A_logs', 'Ds', 'dt_projs_bias'}


def test_float16_scan_does_not_overflow():
    mixer = SS2D(8, ssm_ratio=1.0).half().eval()
    with torch.no_grad():
        mixer.in_proj.weight.fill_(100)
        mixer.conv2d.weight.fill_(1)
        mixer.Ds.fill_(1000)
        x = torch.ones(1, 4, 4, 8, dtype=torch.float16)
        y = mixer(x)
        want = mixer.float()(x.float())
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y.float(), want, rtol=0.02, atol=0.02)


def test_ssd_is_ss2d_with_parameters_shared_by_head():
    ssd, plain = (layer(16, d_state=4, ssm_ratio=2.0, dt_rank=4).double() for layer in (SSD2D, SS2D))
    with torch.no_grad():
        for parameter in ssd.parameters():
            parameter.normal_()
        state = {key: value for key, value in ssd.state_dict().items() if plain.state_dict()[key].shape == value.shape}
        plain.load_state_dict(state, strict=False)
        plain.A_logs.copy_(ssd.A_logs.repeat_interleave(8, dim=1).reshape(-1, 1).expand(-1, 4))
        plain.Ds.copy_(ssd.Ds.flatten())
        plain.dt_projs_bias.copy_(ssd.dt_projs_bias.repeat_interleave(8, dim=1))
        plain.dt_projs_weight.copy_(torch.eye(4).repeat_interleave(8, dim=0).expand(4, -1, -1))
        x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
        torch.testing.assert_close(ssd(x), plain(x))


def test_initialisation_of_the_scan():
    assert [auto_dt_rank(dim) for dim in (16, 17, 96)] == [1, 2, 6]
    dt = F.softplus(init_dt_bias_(torch.empty(4, 4096)))
    assert dt.min() >= 0.999e-3
    assert dt.max() <= 0.1001
    torch.testing.assert_close(dt.log().mean(), torch.tensor([1e-3, 0.1]).log().mean(), rtol=0.02, atol=0)
    assert init_dt_weight_(torch.empty(3, 64, 4)).abs().max() <= 0.5
    torch.testing.assert_close(init_A_log_(torch.empty(5, 3)).exp(), torch.tensor([1.0, 2.0, 3.0]).expand(5, 3))
    assert init_dt_bias_(torch.empty(8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_filter_leaves_our_own_names_alone():
    for name in ('vmamba_nano', 'vmamba_v0_tiny', 'vmamba_tiny_m2'):
        model = timm.create_model(name, device='meta')
        state = model.state_dict()
        mapped = checkpoint_filter_fn(state, model)
        assert list(mapped) == list(state)
        assert all(mapped[key].shape == value.shape for key, value in state.items())


def test_learns():
    assert loss_on_lines(nano(num_classes=2), 40) < 0.3


def test_one_exported_program_takes_any_size():
    model = nano(num_classes=10).eval()
    side = {2: torch.export.Dim('height', min=33, max=512), 3: torch.export.Dim('width', min=33, max=512)}
    shapes = {'x': {0: torch.export.Dim('batch', max=64), **side}}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=shapes)
    x = torch.randn(3, 3, 40, 57)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


def test_a_new_size_does_not_recompile():
    assert count_graphs(nano(num_classes=10), [(64, 96), (53, 38), (40, 72)]) == 1
