"""What A2Mamba and its parts promise beyond timm's contract."""

import fake_natten
import pytest
import timm
import torch
from golden import golden

import vmzoo
from vmzoo.layers.rope import apply_rope, pixel_rope_tables
from vmzoo.models.a2mamba import A2MambaBlock, AttentiveScan, checkpoint_filter_fn, resize_bias
from vmzoo_kernels import selective_scan

from .checks import count_graphs
from .exemptions import SMALL


def small(**kwargs) -> torch.nn.Module:
    return timm.create_model('a2mamba_nano', **{**SMALL['a2mamba'], **kwargs})


def published_state(name: str) -> dict[str, torch.Tensor]:
    keys = golden.load(f'a2mamba/{name}')[0]['keys']
    return {key: torch.from_numpy(value) for key, value in golden.fill_state(keys).items()}


@pytest.mark.parametrize(
    'option, message',
    [
        ({'window_size': (3, 3, 4, 1)}, 'window_size must be odd'),
        ({'window_size': (3, 3)}, 'window_size .* 4 are needed'),
        ({'embed_dim': (16, 16)}, 'embed_dim'),
        ({'num_heads': 3}, '3 heads do not fit 16 channels'),
        ({'num_heads': 1}, 'even'),
        ({'num_heads': 8}, 'multiples of 4'),
        ({'layer_scale': 'both'}, "'both'"),
        ({'layer_scale_init': (1.0,)}, 'layer_scale_init'),
        ({'attn_backend': 'flex'}, 'torch, natten'),
        ({'output_stride': 16}, 'output_stride must be 32'),
        ({'global_pool': ''}, 'num_classes=0'),
    ],
    ids=str,
)
def test_bad_option_is_named(option, message):
    with pytest.raises(ValueError, match=message):
        small(**option)


def test_smallest_image():
    model = timm.create_model('a2mamba_nano', depths=(1, 1, 1, 1)).eval()
    assert model.min_input_size == 193
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, 193, 230))).all()
    with pytest.raises(ValueError, match=r'192x224.*at least 193 pixels'):
        model(torch.randn(1, 3, 192, 224))
    # without the last stages, less is needed
    features = timm.create_model('a2mamba_nano', features_only=True, out_indices=(0,))
    assert features.model.min_input_size == 41
    assert features(torch.randn(1, 3, 41, 50))[0].shape[-2:] == (11, 13)


def test_features_are_what_the_classifier_pools():
    model = small().eval()
    x = torch.randn(1, 3, 64, 64)
    assert model.num_features == model.head_hidden_size == model.forward_features(x).shape[1] == 32
    final, stages = model.forward_intermediates(x, norm=True)
    assert [y.shape[1] for y in (final, *stages)] == [32, 16, 16, 16, 16]
    model.prune_intermediate_layers(prune_norm=True, prune_head=False)
    assert model(x).shape == (1, 16, 2, 2)
    assert model.num_features == 16
    model.reset_classifier(3, 'avg')
    assert model(x).shape == (1, 3)


def test_the_second_name_of_a_shared_bias_counts():
    state = published_state('a2mamba_nano_d1')
    model = timm.create_model('a2mamba_nano', depths=(1, 1, 1, 1))
    model.load_state_dict(vmzoo.convert_state_dict({'model': state}, model))
    first, second = (state[f'layers.0.blocks.0.token_mixer.rpb.{i}'] for i in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(model.layers[0].blocks[0].token_mixer.rpb, second)


def test_filter_leaves_our_own_names_alone():
    for name in ('a2mamba_nano', 'a2mamba_small', 'a2mamba_base'):
        model = timm.create_model(name, device='meta')
        state = model.state_dict()
        mapped = checkpoint_filter_fn(state, model)
        assert list(mapped) == list(state)
        assert all(mapped[key] is value for key, value in state.items())


def test_weights_fit_a_model_for_another_size():
    state = published_state('a2mamba_nano_d1')
    state['layers.6.blocks.0.token_mixer.rpb.2'] *= 1000
    shape = {'depths': (1, 1, 1, 1)}
    models = [timm.create_model('a2mamba_nano', **shape, img_size=size).double().eval() for size in (224, (256, 300))]
    for model in models:
        model.load_state_dict(vmzoo.convert_state_dict(state, model))
    bias = models[1].layers[3].blocks[0].token_mixer.full_rpb
    assert bias.shape == (1, 8, 8 * 10, 8 * 10)
    x = torch.randn(1, 3, 256, 300, dtype=torch.float64)
    with torch.no_grad():
        want = models[0](x)
        assert (models[1](x) - want).norm() < 1e-6 * want.norm()  # resized in float32 beforehand
        models[1].layers[3].blocks[0].token_mixer.full_rpb.zero_()
        assert (models[1](x) - want).norm() > 1e-4 * want.norm()


def test_a_resized_bias_keeps_its_dtype():
    bias = torch.randn(1, 2, 4, 4, dtype=torch.bfloat16)
    assert resize_bias(bias, 4) is bias
    assert resize_bias(bias, 6).dtype == torch.bfloat16
    torch.testing.assert_close(resize_bias(torch.ones(1, 2, 4, 4), 6), torch.ones(1, 2, 6, 6))


def test_natten_instead_of_torch(monkeypatch):
    with pytest.raises(RuntimeError, match='natten'):
        small(attn_backend='natten')
    calls = fake_natten.install(monkeypatch)
    model, plain = small(attn_backend='natten').double().eval(), small().double().eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    assert (calls.count('na2d_qk'), calls.count('na2d_av')) == (2 * 4, 4 * 3 + 2)


def test_the_scan_hands_out_its_states():
    scan = AttentiveScan(8, num_heads=2, kernel_size=1).double()
    x, dt, B = torch.randn(2, 15, 8), torch.randn(2, 15, 1), torch.randn(2, 15, 1)
    states = scan._scan(x.double(), torch.cat((dt, B), dim=-1).double(), 3, 5)
    want = selective_scan(
        x.double().mT,
        (dt.double() @ scan.dt_projs_weight.T).mT,
        -scan.A_logs.exp(),
        B.double().mT,
        torch.ones(2, 1, 15).double(),
        delta_bias=scan.dt_projs_bias,
        delta_softplus=True,
    )
    torch.testing.assert_close(states, want.mT)


def test_rotation_by_pixels():
    cos, sin = pixel_rope_tables((3, 4), 8, dtype=torch.float64)
    assert cos.shape == sin.shape == (3, 4, 8)
    torch.testing.assert_close(cos[0, 0], torch.ones(8).double())
    q, k = torch.randn(2, 8).double()
    turned = {(h, w): [apply_rope(v, cos[h, w], sin[h, w]) for v in (q, k)] for h in range(3) for w in range(4)}
    products = [turned[h + 1, w + 2][0] @ turned[h, w][1] for h, w in ((0, 0), (1, 0), (1, 1))]
    torch.testing.assert_close(products[1:], products[:1] * 2)  # they depend on distance alone
    assert not torch.allclose(products[0], turned[1, 2][0] @ turned[1, 2][1])
    with pytest.raises(ValueError, match='multiples of 4'):
        pixel_rope_tables((3, 4), 6)


@pytest.mark.parametrize('layer_scale', ['branch', 'shortcut', None])
def test_what_is_scaled(layer_scale):
    block = A2MambaBlock(8, layer_scale=layer_scale, layer_scale_init=0.0, num_heads=2, kernel_size=1)
    for conv in (block.cpe1, block.cpe2):
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    x = torch.randn(2, 3, 4, 8)
    tables = pixel_rope_tables((3, 4), 4)
    with torch.no_grad():
        mixed = block.token_mixer.eval()(block.norm1(x), *tables)
        y = block(x, *tables)
        want = {
            'branch': x,
            'shortcut': block.mlp(block.norm2(mixed)),
            None: x + mixed + block.mlp(block.norm2(x + mixed)),
        }
    torch.testing.assert_close(y, want[layer_scale])


def test_the_residual_stream_stays_in_float32_under_autocast():
    model = small()
    dtypes = []
    for stage in model.layers:
        for block in stage.blocks:
            block.register_forward_hook(lambda module, inputs, output: dtypes.append((inputs[0].dtype, output.dtype)))
    with torch.autocast('cpu', torch.bfloat16):
        model(torch.randn(2, 3, 64, 64))
    assert dtypes == [(torch.float32, torch.float32)] * 4


def test_initialisation():
    model = timm.create_model('a2mamba_base', depths=(1, 1, 1, 1))
    blocks = [stage.blocks[0] for stage in model.layers]
    assert [float(block.layer_scale2.weight.detach().unique()) for block in blocks] == pytest.approx([1, 1, 1e-6, 1e-6])
    assert 0.015 < model.patch_embed[6].weight.std() < 0.025
    assert 0.015 < blocks[0].token_mixer.ssm.conv2d.weight.std() < 0.025
    assert all(not p.any() for name, p in model.named_parameters() if 'rpb' in name)
    kinds = {name.rpartition('.')[2] for name in model.no_weight_decay()}
    assert kinds == {'A_logs', 'Ds', 'dt_projs_bias'}


def test_new_sizes_do_not_recompile():
    model = small(num_classes=10, depths=(1, 1), window_size=(3, 1), mlp_ratio=2.0)
    # once more where the attention's dilation depends on the size
    assert count_graphs(model, [(48, 32), (53, 38), (24, 40)]) <= 2
