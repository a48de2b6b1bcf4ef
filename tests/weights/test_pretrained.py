"""`pretrained=True` through timm's own calls, against a server on this machine that serves the published format."""

import json
import re
from hashlib import sha256

import pytest
import timm
import torch
from local_server import serving

from vmzoo.weights import CheckpointError, CheckpointMismatch, download, manifest


class Config(dict):
    """Stands for yacs' CfgNode."""


pytestmark = pytest.mark.usefixtures('torch_home')


@pytest.fixture(scope='module')
def source():
    model = timm.create_model('vmamba_nano').eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def published(source, tmp_path):
    """A file as published: weights under `model`, training state, and a config object."""
    path = tmp_path / 'published_ckpt_epoch_1.pth'
    torch.save(
        {
            'model': source.state_dict(),
            'optimizer': {'state': {}},
            'config': Config(MODEL=Config(TYPE='vssm')),
            'epoch': 1,
        },
        path,
    )
    return path


@pytest.fixture
def served(published):
    """The address and the paths asked for."""
    body = published.read_bytes()
    answers = {
        '/good.pth': lambda request: request.reply(body),
        '/cut.pth': lambda request: request.reply(body[: len(body) // 2], length=len(body)),
        '/half.pth': lambda request: request.reply(body[: len(body) // 2]),
        '/page.pth': lambda request: request.reply(b'<html>Please sign in</html>'),
    }
    with serving(answers) as server:
        yield server.address, server.requests


def create(name='vmamba_nano', *, source, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **kwargs)


def test_file_is_one_that_timm_refuses(published):
    with pytest.raises(RuntimeError, match='weights_only'):
        timm.models.load_state_dict(str(published))


def test_url_downloads_once_into_the_cache(source, served, torch_home):
    address, requests = served
    image = torch.randn(1, 3, 32, 32)
    for _ in range(2):
        model = create(source={'url': f'{address}/good.pth'}).eval()
        torch.testing.assert_close(model(image), source(image))
    assert requests == [('/good.pth', None)]
    assert (torch_home / 'hub/checkpoints/good.pth').is_file()


def test_google_drive(source, published, torch_home, monkeypatch):
    """The page of a file stands in the cfg; every file has its own name in the cache."""
    body = published.read_bytes()
    answers = {f'/download?id={file}&confirm=t': lambda request: request.reply(body) for file in ('1a-B_c', '2d')}
    with serving(answers) as server:
        monkeypatch.setattr(download, 'DRIVE_DOWNLOAD', server.address + '/download?id={}&confirm=t')
        for file in ('1a-B_c', '2d', '2d'):
            url = f'https://drive.google.com/file/d/{file}/view'
            model = create(source={'url': url})
            assert torch.equal(model.classifier.head.weight, source.classifier.head.weight)
            assert model.pretrained_cfg['url'] == url
    assert [path for path, _ in server.requests] == list(answers)
    assert all((torch_home / f'hub/checkpoints/google_drive_{file}').is_file() for file in ('1a-B_c', '2d'))


def test_default_cfg_url(source, served, monkeypatch):
    """The plain call: the address comes from the registered cfg."""
    address, _ = served
    cfg = timm.get_pretrained_cfg('vmamba_nano')
    monkeypatch.setattr(cfg, 'url', f'{address}/good.pth')
    monkeypatch.setattr('timm.models._builder.get_pretrained_cfg', lambda name: cfg)
    model = timm.create_model('vmamba_nano', pretrained=True)
    assert torch.equal(model.classifier.head.weight, source.classifier.head.weight)


def test_cache_dir(served, tmp_path):
    address, _ = served
    create(source={'url': f'{address}/good.pth'}, cache_dir=tmp_path / 'mine')
    assert (tmp_path / 'mine/good.pth').is_file()


def test_local_file(source, published):
    model = create(source={'file': str(published)})
    assert torch.equal(model.classifier.head.weight, source.classifier.head.weight)
    assert model.pretrained_cfg['file'] == str(published)


def test_file_changes(source, published):
    overlay = {'file': str(published)}
    image = torch.randn(2, 3, 32, 32)
    five = create(source=overlay, num_classes=5)
    assert five(image).shape == (2, 5)
    assert torch.equal(five.classifier.norm.weight, source.classifier.norm.weight)

    none = create(source=overlay, num_classes=0).eval()
    torch.testing.assert_close(none(image), source.forward_head(source.forward_features(image), pre_logits=True))

    grey = create(source=overlay, in_chans=1).eval()
    torch.testing.assert_close(grey(image[:, :1]), source(image[:, :1].expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)

    features = create(source=overlay, features_only=True, out_indices=(1, 3)).eval()
    expected = source.forward_intermediates(image, indices=(1, 3), intermediates_only=True)
    for got, want in zip(features(image), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_own_weights_through_the_other_sources(source, tmp_path):
    """An in-memory state dict, a folder that timm saved, and `checkpoint_path` go through timm's loaders."""
    image = torch.randn(1, 3, 32, 32)
    model = create(source={'state_dict': source.state_dict()}).eval()
    torch.testing.assert_close(model(image), source(image))

    timm.models.save_for_hf(source, tmp_path / 'saved', safe_serialization=True)
    model = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    torch.testing.assert_close(model(image), source(image))

    model = timm.create_model('vmamba_nano', checkpoint_path=str(tmp_path / 'saved/model.safetensors')).eval()
    torch.testing.assert_close(model(image), source(image))


def test_wrong_architecture_names_keys_and_shapes(published):
    with pytest.raises(CheckpointMismatch) as error:
        create('vmamba_tiny_s1l8', source={'file': str(published)})
    message = str(error.value)
    assert message.startswith(f'{published}: the checkpoint does not fit vmamba_tiny_s1l8 (VMamba)')
    assert 'missing keys' in message
    assert 'patch_embed.0.weight: (' in message
    assert 'It fits vmamba_nano: create that model instead.' in message


def test_first_release_of_vmamba(tmp_path):
    """The published names of the January 2024 files."""
    size = {'depths': (1, 1, 1, 1), 'embed_dim': 16}
    source = timm.create_model('vmamba_v0_tiny', **size).eval()
    names = [
        (r'^patch_embed\.0', 'patch_embed.proj'),
        (r'^patch_embed\.2', 'patch_embed.norm'),
        (r'(blocks\.\d+)\.norm', r'\1.ln_1'),
        (r'(blocks\.\d+)\.op', r'\1.self_attention'),
        (r'^classifier\.', ''),
    ]

    def published_name(key):
        for ours, theirs in names:
            key = re.sub(ours, theirs, key)
        return key

    state = {published_name(key): value for key, value in source.state_dict().items()}
    assert {'head.weight', 'norm.weight', 'layers.0.blocks.0.ln_1.weight', 'layers.0.downsample.norm.weight'} <= set(
        state
    )
    torch.save({'model': state, 'config': Config()}, tmp_path / 'vssmtiny.pth')
    model = create('vmamba_v0_tiny', source={'file': str(tmp_path / 'vssmtiny.pth')}, **size).eval()
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(image), source(image))


def test_vim_at_another_image_size(tmp_path):
    """The position embedding is resized; the class token's row stays what it was."""
    source = timm.create_model('vim_tiny_patch16_224', depth=2)
    torch.save({'model': source.state_dict(), 'args': Config()}, tmp_path / 'vim.pth')
    overlay = {'file': str(tmp_path / 'vim.pth')}
    model = create('vim_tiny_patch16_224', source=overlay, depth=2, img_size=96)
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 1000)
    assert torch.equal(model.pos_embed[:, 6 * 6 // 2], source.pos_embed[:, 14 * 14 // 2])


@pytest.mark.parametrize('file', ['cut.pth', 'half.pth', 'page.pth', 'none.pth'])
def test_damaged_download_does_not_stay_in_the_cache(served, torch_home, file):
    address, requests = served
    counts = []
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=rf'could not download .*{file}|{file} and was removed from the cache'
        ):
            create(source={'url': f'{address}/{file}'})
        counts.append(len(requests))
    assert counts[1] == 2 * counts[0]
    assert [path.name for path in (torch_home / 'hub/checkpoints').iterdir()] == [f'.{file}.lock']


def test_mismatch_keeps_the_download(served, torch_home):
    address, _ = served
    with pytest.raises(CheckpointMismatch):
        create('vmamba_tiny_s1l8', source={'url': f'{address}/good.pth'})
    assert (torch_home / 'hub/checkpoints/good.pth').is_file()


def test_missing_local_file_stays_a_file_error():
    with pytest.raises(FileNotFoundError, match=r'absent\.pth'):
        create(source={'file': 'absent.pth'})


def test_no_weights_published():
    with pytest.raises(CheckpointError, match='No weights are published for vmamba_nano'):
        timm.create_model('vmamba_nano', pretrained=True)


def test_recorded_digest_is_verified(served, published, torch_home, monkeypatch):
    address, requests = served
    url = f'{address}/good.pth'
    content = published.read_bytes()
    digests = {url: {'sha256': sha256(content).hexdigest(), 'size': len(content)}}
    monkeypatch.setattr(manifest, '_entries', lambda: digests)
    create(source={'url': url})

    cached = torch_home / 'hub/checkpoints/good.pth'
    cached.write_bytes(content + b'\0')
    create(source={'url': url})
    assert len(requests) == 2 and cached.read_bytes() == content

    digests[url]['sha256'] = '0' * 64
    with pytest.raises(CheckpointError, match=f'its SHA-256 is .* and should be {"0" * 64}'):
        create(source={'url': url})
    assert not cached.exists()


def test_manifest_covers_every_published_weight():
    weights = manifest.published_weights()
    assert {weight.name for weight in weights} >= {'vmamba_tiny_s1l8.in1k', 'vmamba_v0_base.dp05_in1k'}
    assert all(weight.license for weight in weights), 'every published weight states its licence'
    urls = json.loads(manifest.resources.files('vmzoo.weights').joinpath('manifest.json').read_text())
    assert urls.keys() == {weight.url for weight in weights}
    metrics = {weight.name: weight.metrics for weight in weights}
    assert metrics['vmamba_v0_small.in1k'] and not metrics['vmunet_isic.vmamba_in1k'], 'its encoder only starts there'
