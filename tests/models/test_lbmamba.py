"""What is LBVim's own: alternating directions, segments in a mixer, pooling by attention, the dense form."""

import logging

import pytest
import timm
import torch
import torch.nn.functional as F

import vmzoo
from vmzoo.layers import MambaMixer
from vmzoo.layers.mamba import token_paths
from vmzoo.models.lbmamba import LatentPool
from vmzoo_kernels.reference import selective_scan_reference

TINY = {'img_size': 64, 'depth': 4, 'embed_dim': 48, 'd_state': 4}
BLOCKS = {'block_indices': (0, 1, 2, 3)}


def tiny(name='lbvim_tiny', **kwargs):
    return timm.create_model(name, **{**TINY, **kwargs}).double().eval()


def image(height=64, width=64):
    return torch.randn(2, 3, height, width, dtype=torch.float64)


# Directions and segments


def mix(mixer: MambaMixer, x, segment, suffix='', reverse=False):
    """One path of a mixer without its gate and output projection, by the definition."""
    x = x.flip(1) if reverse else x
    conv, x_proj, dt_proj = (getattr(mixer, f'{name}{suffix}') for name in ('conv1d', 'x_proj', 'dt_proj'))
    u = mixer.in_proj(x).chunk(2, dim=-1)[0].mT
    u = F.silu(F.conv1d(F.pad(u, (3, 0)), conv.weight, conv.bias, groups=len(conv.weight)))
    dt, B, C = x_proj(u.mT).split([mixer.dt_rank, 4, 4], dim=-1)
    A, D = -getattr(mixer, f'A{suffix}_log').exp(), getattr(mixer, f'D{suffix}')
    B, C = (v.mT.unsqueeze(1) for v in (B, C))
    y, _ = selective_scan_reference(
        u, (dt @ dt_proj.weight.mT).mT, A, B, C, D, None, dt_proj.bias, True, segment=segment
    )
    return y.mT.flip(1) if reverse else y.mT


@pytest.mark.parametrize('scan', ['forward', 'backward', 'forward_backward'])
@pytest.mark.parametrize('segment, length, steps', [(5, 18, 5), ('auto', 18, 4), ('auto', 130, 8)])
def test_a_mixer_scans_segments_against_its_first_direction(scan, segment, length, steps):
    mixer = MambaMixer(16, d_state=4, scan=scan, segment=segment).double()
    assert mixer.state_dict().keys() == MambaMixer(16, d_state=4, scan=scan).state_dict().keys()
    x = torch.randn(2, length, 16, dtype=torch.float64)
    want = mix(mixer, x, steps, reverse=scan == 'backward')
    if scan == 'forward_backward':  # the reverse remains a plain scan, as in the published two-direction block
        want = (want + mix(mixer, x, 0, '_b', reverse=True)) / 2
    z = mixer.in_proj(x).chunk(2, dim=-1)[1]
    torch.testing.assert_close(mixer(x), mixer.out_proj(want * F.silu(z)))


def test_paths_of_a_mixer_can_be_returned_apart():
    mixer = MambaMixer(16, d_state=4, segment=3).double()
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    paths = token_paths('forward_backward', 10, x.device)
    apart = mixer.scan_paths(x, paths, merge=False)
    torch.testing.assert_close(apart.sum(2), mixer.scan_paths(x, paths))
    mixer.segment = None
    plain = mixer.scan_paths(x, paths, merge=False)
    assert torch.equal(apart[:, :, 1], plain[:, :, 1])
    assert not torch.allclose(apart[:, :, 0], plain[:, :, 0])


def test_vim_takes_segments_too():
    options = {'img_size': 64, 'depth': 2, 'embed_dim': 32, 'd_state': 4}
    plain, local = (timm.create_model('vim_tiny_patch16_224', segment=segment, **options) for segment in (None, 'auto'))
    local.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(plain.eval()(x), local.eval()(x))


@pytest.mark.parametrize('depth', [3, 4])
def test_tokens_reversed_after_every_block_give_the_same(depth):
    """The published order of things; maps stay those of the image, also after an odd number of blocks."""
    model, x = tiny(depth=depth), image()
    final, maps = model.forward_intermediates(x, output_fmt='NLC')
    tokens = model.patch_embed(x)[0] + model.pos_embed
    for i, block in enumerate(model.layers):
        tokens = block(tokens)[0].flip(1)
        torch.testing.assert_close(maps[i], tokens if i % 2 else tokens.flip(1))
    torch.testing.assert_close(final, model.norm_f(maps[-1]))


def test_one_block_sees_the_segment_and_two_see_everything():
    x, y = (image() for _ in range(2))
    y[..., :48, :] = x[..., :48, :]  # all but the last row of 4 patches
    with torch.inference_mode():
        one = tiny(depth=1, segment=8)
        same = (one.forward_features(x) == one.forward_features(y)).all(-1)
        assert torch.equal(same, (torch.arange(16) < 8).expand(2, -1))  # a segment has two rows
        two = tiny(depth=2)
        assert not (two.forward_features(x) == two.forward_features(y)).all(-1).any()


# Attention pooling


def test_attention_pooling():
    pool = LatentPool(12, 3).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    k, v = pool.kv(x).chunk(2, dim=-1)
    heads = []
    for h in (slice(0, 4), slice(4, 8), slice(8, 12)):
        weight = (k[..., h] @ pool.latent[0, 0, h] / 2).softmax(dim=1)
        heads.append((weight.unsqueeze(-1) * v[..., h]).sum(1))
    torch.testing.assert_close(pool(x), F.layer_norm(torch.cat(heads, -1), (12,)))
    with pytest.raises(ValueError, match='12 must be a multiple of the number of heads 5'):
        LatentPool(12, 5)


def test_the_pooling_outlives_its_classifier():
    model, x = tiny('lbvim_528_atthead'), image()
    with torch.inference_mode():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(5)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled)
        model.reset_classifier(5, 'avg')
        assert isinstance(model.head, torch.nn.Linear)
        model.double().reset_classifier(7, 'attn')
        assert model(x).shape == (2, 7)
    with pytest.raises(ValueError, match=r"one of .*'avg', 'attn'.* got 'token'"):
        model.reset_classifier(7, 'token')


# Dense form


def test_backbone_maps_are_the_mixers_outputs_at_any_size():
    model = tiny('lbvim_300_backbone', **BLOCKS, out_dim=8)
    mixed = []
    for block in model.layers:
        block.mixer.register_forward_hook(lambda *args: mixed.append(args[-1]))
    with torch.inference_mode():
        maps = model(image(48, 80))
        for level, (got, tokens) in enumerate(zip(maps, mixed, strict=True)):
            want = getattr(model, f'outnorm_{level}')(getattr(model, f'out_map_{level}')(tokens))
            torch.testing.assert_close(got, want.mT.unflatten(2, (3, 5)))
    model = timm.create_model('lbvim_300_backbone', features_only=True, out_indices=(1, 3), **TINY, **BLOCKS)
    info = model.feature_info
    assert (info.channels(), info.reduction()) == ([192, 192], [16, 16])
    assert info.module_name() == ['outnorm_1', 'outnorm_3']


def test_backbone_takes_a_classifier_s_weights(caplog):
    source, model = tiny(), tiny('lbvim_tiny_backbone', **BLOCKS)
    model.layers[0].norm.bias.data.fill_(7)
    before = model.outnorm_0.weight.clone()
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(vmzoo.convert_state_dict(source.state_dict(), model))
    assert 'the output layers stay as initialised' in caplog.text
    assert torch.equal(model.outnorm_0.weight, before)
    assert torch.equal(model.layers[3].mixer.A_log, source.layers[3].mixer.A_log)
    assert torch.count_nonzero(model.layers[0].norm.bias) == 0
    again = tiny('lbvim_tiny_backbone', **BLOCKS)
    again.load_state_dict(vmzoo.convert_state_dict(model.state_dict(), again))
    x = image()
    torch.testing.assert_close(again(x), model(x))


def test_position_embedding_follows_the_image_size():
    source, model = tiny(), tiny(img_size=96)
    model.load_state_dict(vmzoo.convert_state_dict(source.state_dict(), model))
    with torch.inference_mode():
        want = model(image(96, 96).fill_(0.5))
        source.set_input_size(96)
        torch.testing.assert_close(source(image(96, 96).fill_(0.5)), want)


# Bad options


@pytest.mark.parametrize(
    'options, message',
    [
        ({'segment': 0}, "at least 1, 'auto' or None, got 0"),
        ({'global_pool': 'token'}, "got 'token'"),
        ({'global_pool': 'attn', 'pool_heads': 7}, 'multiple of the number of heads 7'),
        ({'norm_layer': 'batchnorm'}, "got 'batchnorm'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)(image())
