"""What is Vim's own: class-token placement, position-embedding resizing, initial values, the dense form."""

import itertools
import logging
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import golden
from timm.layers import DropPath

import vmzoo
from vmzoo.layers.mamba import MambaMixer, causal_conv
from vmzoo.layers.rope import apply_rope, rope_tables
from vmzoo.layers.tokens import class_token_places, resize_pos_embed
from vmzoo.models.vim import VisionMamba, VisionMambaPyramid, checkpoint_filter_fn

TINY = {'img_size': 64, 'depth': 2, 'embed_dim': 32, 'd_state': 4, 'num_classes': 5}


def tiny(**kwargs) -> VisionMamba:
    return timm.create_model('vim_tiny_patch16_224', **{**TINY, **kwargs}).eval()


# Position embedding


@pytest.mark.parametrize('name', ['14to12', '14to27', '14to32', '14to32_nocls'])
def test_pos_embed_resize_equals_the_published_one_where_that_is_right(name):
    """The published code takes row 0 for the class token's: right for a token in front, and without one."""
    meta, want = golden.load(f'vim/pos_embed_{name}')
    pos_embed = torch.from_numpy(golden.make_input(**meta['inputs']['pos_embed']))
    config = meta['config']
    grids = (config['grid_from'],) * 2, (config['grid_to'],) * 2
    got = resize_pos_embed(pos_embed, *grids, class_token='front' if config['extra_tokens'] else 'none')
    assert golden.error(got.numpy(), want['pos_embed']) < 1e-6


@pytest.mark.parametrize(('old', 'new'), [((14, 14), (27, 27)), ((4, 4), (5, 3)), ((3, 3), (1, 1)), ((2, 5), (5, 2))])
def test_pos_embed_resize_moves_the_middle_row_with_the_class_token(old, new):
    grid = torch.randn(1, old[0] * old[1], 8)
    token = torch.randn(1, 1, 8)
    old_index, new_index = old[0] * old[1] // 2, new[0] * new[1] // 2
    both = torch.cat((grid[:, :old_index], token, grid[:, old_index:]), dim=1)
    got = resize_pos_embed(both, old, new, class_token='middle')
    assert torch.equal(got[:, new_index : new_index + 1], token)
    without = torch.cat((got[:, :new_index], got[:, new_index + 1 :]), dim=1)
    assert torch.equal(without, resize_pos_embed(grid, old, new))


def test_pos_embed_resize_keeps_the_same_grid_and_refuses_a_wrong_one():
    pos_embed = torch.randn(1, 17, 8)
    assert resize_pos_embed(pos_embed, (4, 4), (4, 4), class_token='middle') is pos_embed
    with pytest.raises(ValueError, match=r'17 rows does not fit a grid of 4x5'):
        resize_pos_embed(pos_embed, (4, 5), (2, 2), class_token='middle')


@pytest.mark.parametrize('size', [(64, 64), (80, 48), (33, 114), (16, 16), 96])
@pytest.mark.parametrize('options', [{}, {'stride': 8}, {'class_token': 'front', 'rope': True}])
def test_every_way_to_another_image_size_agrees(size, options):
    source = tiny(**options)
    resized, dynamic = tiny(**options), tiny(**options, dynamic_img_size=True)
    for model in (resized, dynamic):
        model.load_state_dict(source.state_dict())
    resized.set_input_size(size)
    built = tiny(**{**options, 'img_size': size})
    built.load_state_dict(vmzoo.convert_state_dict(source.state_dict(), built))
    x = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    with torch.inference_mode():
        want = built(x)
        assert torch.equal(resized(x), want)
        assert torch.equal(dynamic(x), want)


def test_set_input_size_keeps_the_parameters_state():
    model = tiny().requires_grad_(False).bfloat16()
    model.set_input_size((96, 64))
    assert not model.pos_embed.requires_grad
    assert model.pos_embed.dtype == torch.bfloat16
    assert model.pos_embed.shape == (1, 25, 32)
    assert model(torch.randn(1, 3, 96, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_refused_image_size_changes_nothing():
    model = tiny()
    with pytest.raises(ValueError, match='8x8 holds no patch'):
        model.set_input_size(8)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_wrong_image_size_is_named():
    model = tiny()
    with pytest.raises(ValueError, match=r'built for images of 64x64, got 64x80.*dynamic_img_size'):
        model(torch.randn(1, 3, 64, 80))
    with pytest.raises(ValueError, match=r'image of 15x64 holds no patch of 16x16'):
        tiny(dynamic_img_size=True)(torch.randn(1, 3, 15, 64))
    with pytest.raises(ValueError, match='holds no patch'):
        tiny(img_size=12)


# Class token


@pytest.mark.parametrize(('size', 'index'), [((224, 224), 98), ((80, 80), 12), ((16, 16), 0), ((48, 64), 6)])
def test_class_token_stands_in_the_middle(size, index):
    model = tiny(img_size=size, depth=1)
    assert model.token_places(model.patch_embed.num_patches) == (index,)
    seen = []
    model.layers[0].norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randn(1, 3, *size))
    want = model.cls_token[:, 0] + model.pos_embed[:, index]
    assert torch.equal(seen[0][:, index], want)
    features = torch.randn(2, model.patch_embed.num_patches + 1, 32)
    assert torch.equal(model.pool(features), features[:, index])


def test_prefix_tokens_come_with_the_intermediates():
    model, x = tiny(), torch.randn(2, 3, 64, 64)
    final, taken = model.forward_intermediates(x, indices=1, norm=True, return_prefix_tokens=True, output_fmt='NLC')
    (patches, token), tokens = taken[0], final
    assert torch.equal(token, tokens[:, 8:9])
    assert torch.equal(patches, torch.cat((tokens[:, :8], tokens[:, 9:]), dim=1))


def test_average_pooling_leaves_the_class_token_out():
    model = tiny(global_pool='avg')
    tokens = torch.randn(2, 17, 32)
    patches = torch.cat((tokens[:, :8], tokens[:, 9:]), dim=1)
    assert torch.equal(model.pool(tokens), patches.mean(dim=1))


@pytest.mark.parametrize('name', ['vim_tiny_patch16_224', 'vim_tiny_patch16_224_rope'])
def test_published_weights_load_into_the_form_without_class_token(name):
    options = {'img_size': 64, 'depth': 2}
    source = timm.create_model(name, **options)
    state = source.state_dict()
    if source.rope:
        state |= {'rope.freqs_cos': torch.zeros(16, 192), 'rope.freqs_sin': torch.zeros(16, 192)}
    model = timm.create_model('vim_tiny_patch16_gap_224', **options)
    model.load_state_dict(vmzoo.convert_state_dict(state, model))
    rows = [row for row in range(17) if row != (0 if source.rope else 8)]
    assert torch.equal(model.pos_embed, source.pos_embed[:, rows])


def test_weights_without_class_token_do_not_fit_a_model_with_one():
    with pytest.raises(RuntimeError, match='cls_token'):
        tiny().load_state_dict(checkpoint_filter_fn(tiny(class_token='none', global_pool='avg').state_dict(), tiny()))


def test_checkpoint_of_a_non_square_grid_is_not_guessed():
    with pytest.raises(ValueError, match='no square grid'):
        checkpoint_filter_fn(tiny(img_size=(64, 96)).state_dict(), tiny())


# Mixer


def test_directions_mirror_each_other():
    """With the two parameter sets exchanged, the reversed sequence gives the reversed output."""
    mixer = MambaMixer(16, d_state=4).double()
    mixer.dt_proj_b.bias.data.normal_()
    mirrored = MambaMixer(16, d_state=4).double()
    swap = {'A_log': 'A_b_log', 'D': 'D_b', 'conv1d': 'conv1d_b', 'x_proj': 'x_proj_b', 'dt_proj': 'dt_proj_b'}
    swap |= {b: a for a, b in swap.items()}
    state = mixer.state_dict()
    mirrored.load_state_dict({re.sub(r'^\w+', lambda m: swap.get(m[0], m[0]), k): v for k, v in state.items()})
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    torch.testing.assert_close(mirrored(x.flip(1)), mixer(x).flip(1))


@pytest.mark.parametrize('reverse', [False, True])
def test_convolution_is_causal_in_its_direction(reverse):
    mixer = MambaMixer(16, d_state=4)
    conv = mixer.conv1d_b if reverse else mixer.conv1d
    x = torch.randn(2, 9, 32)
    got = causal_conv(x, conv, reverse)
    sequence = x.flip(1) if reverse else x
    want = F.conv1d(F.pad(sequence.transpose(1, 2), (3, 0)), conv.weight, conv.bias, groups=32).transpose(1, 2)
    torch.testing.assert_close(got, want.flip(1) if reverse else want)


def test_one_direction_sees_no_later_token():
    model = tiny(bidirectional=False, class_token='none', global_pool='avg')
    assert not any('_b' in name.split('.')[-1] or '_b.' in name for name, _ in model.named_parameters())
    x = torch.randn(1, 3, 64, 64)
    y = x.clone()
    y[..., 48:, :] += 1
    with torch.inference_mode():
        a, b = model.forward_features(x), model.forward_features(y)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])


def test_initial_values_are_the_published_ones():
    model = timm.create_model('vim_tiny_patch16_224', depth=4)
    mixer = model.layers[1].mixer
    states = torch.arange(1, 17, dtype=torch.float32).log().expand(384, 16)
    for A_log, D in ((mixer.A_log, mixer.D), (mixer.A_b_log, mixer.D_b)):
        torch.testing.assert_close(A_log.data, states)
        assert torch.equal(D.data, torch.ones(384))
    dt = F.softplus(mixer.dt_proj.bias)
    assert dt.min() >= 0.99e-4
    assert dt.max() <= 0.101
    assert mixer.dt_proj.weight.abs().max() <= 12**-0.5
    assert torch.count_nonzero(mixer.dt_proj_b.bias) == 0
    assert 0.9 < mixer.out_proj.weight.std() * (3 * 384 * 4) ** 0.5 < 1.1
    assert 0.015 < model.pos_embed.std() < 0.025
    assert torch.count_nonzero(model.head.bias) == 0


def test_stochastic_depth_grows_to_its_full_rate_at_the_last_block():
    model = tiny(depth=5, drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.0 for block in model.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_stream_stays_float32_in_a_half_precision_model():
    model = tiny().bfloat16()
    seen = []
    model.norm_f.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert model(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert seen == [torch.float32]


# Rotary embedding


def test_rope_turns_rows_and_columns_and_keeps_norms():
    cos, sin = rope_tables((3, 5), 16, base_grid=14)
    x = torch.randn(2, 15, 16)
    turned = apply_rope(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])
    # second half of the channels is the column's: still within a column, turned by 14 / 5 at the highest frequency
    torch.testing.assert_close(turned[:, 10, 8:], x[:, 10, 8:])
    angle = torch.tensor(14 / 5)
    torch.testing.assert_close(turned[:, 1, 8], x[:, 1, 8] * angle.cos() - x[:, 1, 9] * angle.sin())


@pytest.mark.parametrize('class_token', ['front', 'middle'])
def test_rope_leaves_the_class_token_alone(class_token):
    model = tiny(rope=True, class_token=class_token, depth=1)
    seen = []
    model.layers[0].norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randn(1, 3, 64, 64))
    (index,) = class_token_places(class_token, 16)
    torch.testing.assert_close(seen[0][:, index], model.cls_token[:, 0] + model.pos_embed[:, index])


# Dense form


def pyramid(**kwargs) -> VisionMambaPyramid:
    options = {'img_size': 64, 'depth': 4, 'embed_dim': 32, 'd_state': 4, 'block_indices': (0, 1, 2, 3)}
    return timm.create_model('vim_tiny_seg', **{**options, **kwargs})


def test_pyramid_levels_and_features_only_agree():
    model = pyramid().eval()
    x = torch.randn(2, 3, 64, 64)
    want = model(x)
    assert [tuple(level.shape[1:]) for level in want] == [(32, 16, 16), (32, 8, 8), (32, 4, 4), (32, 2, 2)]
    for levels in itertools.combinations(range(4), 2):
        features = pyramid(features_only=True, out_indices=levels).eval()
        kept = features.model.state_dict().keys()
        features.model.load_state_dict({k: v for k, v in model.state_dict().items() if k in kept})
        assert features.feature_info.reduction() == [(4, 8, 16, 32)[level] for level in levels]
        got = features(x)
        assert all(torch.equal(level, want[i]) for level, i in zip(got, levels))
        sum(level.sum() for level in got).backward()
        assert all(p.grad is not None for p in features.parameters())


def test_pyramid_takes_a_classifier_s_weights(caplog):
    source = timm.create_model('vim_tiny_patch16_224', img_size=64, depth=4, embed_dim=32, d_state=4)
    model = pyramid()
    before = model.fpn2[0].weight.clone()
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(vmzoo.convert_state_dict(source.state_dict(), model))
    assert 'the pyramid stays as initialised' in caplog.text
    assert torch.equal(model.fpn2[0].weight, before)
    assert torch.equal(model.layers[3].mixer.A_b_log, source.layers[3].mixer.A_b_log)
    assert model.pos_embed.shape == (1, 16, 32)


def test_pyramid_says_what_it_cannot_do():
    with pytest.raises(ValueError, match='no classifier'):
        pyramid(num_classes=3)
    with pytest.raises(ValueError, match='no classifier'):
        pyramid().reset_classifier(3)
    with pytest.raises(ValueError, match='four of the 2 blocks'):
        pyramid(depth=2)
    with pytest.raises(ValueError, match='too small'):
        pyramid(dynamic_img_size=True)(torch.randn(1, 3, 31, 64))


# Bad options


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'class_token': 'end'}, "'front', 'middle' or 'none', got 'end'"),
        ({'class_token': 'none'}, 'needs a class token'),
        ({'global_pool': 'max'}, "got 'max'"),
        ({'global_pool': ''}, 'needs pooled features'),
        ({'norm_layer': 'batchnorm'}, "got 'batchnorm'"),
        ({'d_state': 0}, 'd_state=0'),
        ({'rope': True, 'embed_dim': 30}, 'multiples of 4'),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)(torch.randn(1, 3, 64, 64))
