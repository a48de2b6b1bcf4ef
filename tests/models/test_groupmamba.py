"""What is GroupMamba's own: groups that do not mix in the scan, two classifiers, a class block, published names."""

import pytest
import timm
import torch
import torch.nn.functional as F

import vmzoo
from vmzoo.layers import SS2D, DistilledHead
from vmzoo.models.groupmamba import GroupLinear, GroupMamba, GroupSS2D, ModulatedGroupMixer, checkpoint_filter_fn

TINY = {'stem_dim': 8, 'depths': (1, 1, 1, 1), 'embed_dim': (16, 16, 32, 48), 'num_classes': 5}


def tiny(**kwargs) -> GroupMamba:
    return timm.create_model('groupmamba_tiny', **{**TINY, **kwargs})


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.double()


# Group scan


def test_a_group_is_an_ss2d_of_one_direction():
    """Each group against a plain SS2D that scans rows, of the map turned so that its direction becomes that."""
    mixer = randomized(GroupSS2D(12))
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    parts = []
    for k, group in enumerate(x.chunk(4, dim=-1)):
        plain = SS2D(3, ssm_ratio=1.0, dt_rank=1, gate=True, conv_bias=True, scan='forward').double()
        own = {}
        for name, value in mixer.state_dict().items():
            own[name] = value[k : k + 1] if name.endswith(('x_proj_weight', 'projs_weight', 'projs_bias')) else value
            if name.endswith(('A_logs', 'Ds', 'conv2d.weight', 'conv2d.bias', 'out_norm.weight', 'out_norm.bias')):
                own[name] = value.chunk(4)[k]
            elif name.endswith('_proj.weight'):
                own[name] = value[k]
        if k % 2:
            own['conv2d.weight'] = own['conv2d.weight'].transpose(2, 3)
        if k >= 2:
            own['conv2d.weight'] = own['conv2d.weight'].flip(2, 3)
        plain.load_state_dict(own)

        def turn(v, k=k, back=False):
            steps = [lambda v: v.transpose(1, 2) if k % 2 else v, lambda v: v.flip(1, 2) if k >= 2 else v]
            for step in reversed(steps) if back else steps:
                v = step(v)
            return v

        parts.append(turn(plain(turn(group)), back=True))
    torch.testing.assert_close(mixer(x), torch.cat(parts, dim=-1))


def test_group_linear_keeps_groups_and_chunks_apart():
    layer = randomized(GroupLinear(8, 16, chunks=2))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    first, second = layer(x).chunk(2, dim=-1)
    for k in range(4):
        want = x[..., 2 * k : 2 * k + 2] @ layer.weight[k].T  # both chunks of a group
        torch.testing.assert_close(torch.cat((first, second), -1)[..., 2 * k : 2 * k + 2], want[..., :2])
        torch.testing.assert_close(second[..., 2 * k : 2 * k + 2], want[..., 2:])


def test_the_gate_sees_all_channels():
    mixer = randomized(ModulatedGroupMixer(16))
    x = torch.randn(2, 4, 4, 16, dtype=torch.float64)
    u = F.layer_norm(x, (16,), mixer.norm.weight, mixer.norm.bias)
    gate = mixer.fc2(F.relu(mixer.fc1(u.mean((1, 2))))).sigmoid()
    y = mixer.scan(u) * mixer.skip_scale * u * gate[:, None, None]
    want = mixer.proj(F.layer_norm(y, (16,), mixer.norm.weight, mixer.norm.bias))
    torch.testing.assert_close(mixer(x), want)


# Classifiers


def test_evaluation_averages_the_classifiers_and_training_returns_both():
    model = tiny().eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    head, head_dist = (layer(features) for layer in model.get_classifier())
    torch.testing.assert_close(model(x), (head + head_dist) / 2)
    assert model.train()(x).shape == (2, 5)
    model.set_distilled_training()
    assert [out.shape for out in model(x)] == [(2, 5), (2, 5)]
    assert model.eval()(x).shape == (2, 5)


def test_a_model_without_distillation_takes_a_distilled_checkpoint():
    source, model = tiny(), tiny(distillation=False)
    model.load_state_dict(vmzoo.convert_state_dict(source.state_dict(), model))
    assert torch.equal(model.get_classifier().weight, source.get_classifier()[0].weight)
    assert not any('head_dist' in key for key in model.state_dict())


def test_another_class_count_keeps_both_classifiers_as_initialised(caplog):
    source, model = tiny(), tiny(num_classes=7)
    want = [layer.weight.clone() for layer in model.get_classifier()]
    model.load_state_dict(vmzoo.convert_state_dict(source.state_dict(), model))
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model.get_classifier(), want))
    assert 'classifier.head: 5 → 7' in caplog.text
    assert 'classifier.head_dist: 5 → 7' in caplog.text


def test_patches_do_not_see_the_class_block():
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model.forward_features(x)
        for parameter in model.classifier.parameters():
            parameter.add_(1.0)
        assert torch.equal(model.forward_features(x), before)


def test_a_backbone_has_no_class_block():
    model = tiny(features_only=True).model
    assert not list(model.classifier.parameters())


# Names, initial values, options


def test_groups_are_joined_in_their_order_whatever_that_of_the_file():
    def published(name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {f'block2.0.attn.mamba_g{k}.{name}': torch.full(shape, float(k)) for k in (3, 1, 4, 2)}

    state = published('Ds', (2,)) | published('in_proj.weight', (4, 2)) | published('x_proj_weight', (1, 3, 2))
    got = checkpoint_filter_fn(state, tiny(device='meta'))
    shapes = {'Ds': (8,), 'in_proj.weight': (4, 4, 2), 'x_proj_weight': (4, 3, 2)}
    assert {key: tuple(value.shape) for key, value in got.items()} == {
        f'layers.1.blocks.0.mixer.scan.{name}': shape for name, shape in shapes.items()
    }
    for value in got.values():
        assert value.flatten().unique_consecutive().tolist() == [1, 2, 3, 4]


def test_filter_leaves_our_own_names_alone():
    model = tiny(device='meta')
    state = model.state_dict()
    mapped = checkpoint_filter_fn(state, model)
    assert list(mapped) == list(state)
    assert all(mapped[key] is state[key] for key in state)


def test_initial_values_are_the_published_ones():
    model = timm.create_model('groupmamba_tiny', depths=(1, 1, 1, 1))
    mixer = model.layers[3].blocks[0].mixer
    assert torch.equal(mixer.skip_scale, torch.ones(1))
    assert mixer.scan.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert mixer.scan.x_proj_weight.abs().max().item() == pytest.approx(112**-0.5, rel=0.02)
    assert mixer.scan.dt_projs_weight.abs().max().item() == pytest.approx(7**-0.5, rel=0.02)
    assert not mixer.scan.A_logs.any()
    assert (mixer.scan.Ds == 1).all()
    assert model.layers[3].blocks[0].mlp.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert not mixer.proj.bias.any()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'depths': (1, 1)}, 'number of stages'),
        ({'embed_dim': (16, 16, 32, 50)}, '50 channels cannot be split into 4'),
        ({'embed_dim': (8, 16, 32, 48)}, '8 channels leave the gate'),
        ({'global_pool': 'max'}, "'avg' or '', got 'max'"),
        ({'global_pool': ''}, 'num_classes=0'),
        ({'output_stride': 16}, 'output_stride must be 32'),
    ],
)
def test_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_a_refused_pooling_changes_nothing():
    head = DistilledHead(8, 5)
    with pytest.raises(ValueError, match='max'):
        head.reset(3, 'max')
    assert head(torch.randn(2, 8, 3, 3)).shape == (2, 5)
