"""What EfficientVMamba promises beyond timm's contract."""

import pytest
import timm
import torch
from golden import golden

import vmzoo
from vmzoo.layers import SS2D, VSSBlock
from vmzoo.models._hierarchical import ChannelsFirstStage
from vmzoo.models.efficientvmamba import checkpoint_filter_fn

from .checks import count_graphs


def small(**kwargs) -> torch.nn.Module:
    return timm.create_model('efficientvmamba_tiny', **{'depths': (1, 1, 1, 1), 'embed_dim': 16, **kwargs})


def test_published_checkpoint_of_averaged_weights_loads():
    meta, _ = golden.load('efficientvmamba/efficientvmamba_tiny')
    state = {f'module.module.{k}': torch.from_numpy(v) for k, v in golden.fill_state(meta['keys']).items()}
    model = timm.create_model('efficientvmamba_tiny')
    model.load_state_dict(vmzoo.convert_state_dict({'state_dict': state, 'epoch': 300}, model))
    stem = state['module.module.patch_embed.0.weight']
    assert torch.equal(model.patch_embed[0].weight, stem)
    old_names = {'patch_embed.0.': 'patch_embed.proj.', 'classifier.': '', 'blocks.0.op.': 'blocks.0.self_attention.'}
    old_names |= {'patch_embed.2.': 'patch_embed.norm.', 'blocks.0.norm.': 'blocks.0.ln_1.'}
    for new, old in old_names.items():
        state = {key.replace(new, old): value for key, value in state.items()}
    assert any('.self_attention.' in key for key in state) and any('.ln_1.' in key for key in state)
    converted = vmzoo.convert_state_dict(state, model)
    assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())


def test_filter_leaves_our_own_names_alone():
    model = small(mlp_ratio=2.0)
    assert list(checkpoint_filter_fn(model.state_dict(), model)) == list(model.state_dict())


def test_scans_stop_where_convolutions_begin():
    for stages in (1, 3):
        model = small(num_scan_stages=stages)
        assert [isinstance(stage, ChannelsFirstStage) for stage in model.layers] == [i >= stages for i in range(4)]
        assert sum(isinstance(module, SS2D) for module in model.modules()) == stages


def test_other_scans_and_mlps():
    model = small(scan='cross', mlp_ratio=2.0).eval()
    assert all(block.mlp is not None for block in model.modules() if isinstance(block, VSSBlock))
    assert model(torch.randn(1, 3, 40, 28)).shape == (1, 1000)


@pytest.mark.parametrize(
    'option, message',
    [
        ({'scan': 'zigzag'}, 'atrous'),
        ({'depths': (1, 1), 'embed_dim': (16, 32, 64)}, 'number of stages'),
        ({'output_stride': 16}, 'output_stride must be 32'),
        ({'d_state': 0}, 'd_state must be at least 1'),
        ({'global_pool': ''}, 'num_classes=0'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_bad_option_is_named(option, message):
    with pytest.raises(ValueError, match=message):
        small(**option)


def test_smallest_image():
    model = small().eval()
    assert model(torch.randn(1, 3, 4, 5)).isfinite().all()
    with pytest.raises(ValueError, match=r'3x40.*at least 4 pixels'):
        model(torch.randn(1, 3, 3, 40))


def test_even_and_odd_maps_share_one_compiled_graph():
    assert count_graphs(small(num_classes=10), [(64, 96), (52, 44)]) == 1
