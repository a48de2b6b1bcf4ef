"""`vmzoo verify`, with weights of a tiny model that a server on this machine publishes."""

import io

import pytest
import timm
import torch
from local_server import serving

from vmzoo.cli.main import main
from vmzoo.weights import CheckpointError, PublishedWeight
from vmzoo.weights.cache import record_path
from vmzoo.weights.outputs import compare_outputs, fixed_picture, sample_outputs


@pytest.fixture
def published():
    """The state dict that the server sends: tests change it."""
    return timm.create_model('vmamba_nano').state_dict()


@pytest.fixture
def verify(published, tmp_path, monkeypatch, capsys):
    """Calls the command; returns its status, output and errors."""
    for name in ('VMZOO_OFFLINE', 'HF_HUB_OFFLINE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('no_proxy', '*')

    def send(request):
        buffer = io.BytesIO()
        torch.save(published, buffer)
        request.reply(buffer.getvalue())

    with serving({'/nano.pth': send}) as server:
        url = f'{server.address}/nano.pth'
        cfg = timm.get_pretrained_cfg('vmamba_nano')
        monkeypatch.setattr(cfg, 'url', url)
        monkeypatch.setattr('timm.models._builder.get_pretrained_cfg', lambda name: cfg)
        weight = PublishedWeight(f'vmamba_nano.{cfg.tag}', url, None, 'mit', None, None, {})
        monkeypatch.setattr('vmzoo.cli.names.published_weights', lambda: [weight])

        def verify():
            code = main(['verify', 'vmamba_nano', '--cache-dir', str(tmp_path)])
            return code, *capsys.readouterr()

        yield verify


def test_outputs_are_noted_and_compared(verify, tmp_path):
    code, out, err = verify()
    assert code == 0 and not err and 'noted in' in out
    code, out, err = verify()
    assert code == 0 and not err and 'as noted, to 0e+00' in out


def test_other_outputs(verify, tmp_path, monkeypatch):
    verify()
    monkeypatch.setattr('vmzoo.weights.outputs.fixed_picture', lambda size: 1 - fixed_picture(size))
    code, _, err = verify()
    assert code == 1 and 'the outputs differ from those that were noted by' in err and 'outputs.json' in err


def test_other_file_is_noted_anew(verify, published, tmp_path):
    verify()
    published['classifier.head.bias'] += 1
    (tmp_path / 'nano.pth').unlink()
    record_path(tmp_path / 'nano.pth').unlink()
    code, out, _ = verify()
    assert code == 0 and 'noted in' in out


def test_weights_that_are_not_finite(verify, published):
    published['classifier.head.bias'][3] = torch.nan
    code, _, err = verify()
    assert code == 1 and 'not finite: classifier.head.bias' in err


def test_other_shapes(tmp_path):
    note = tmp_path / 'note.json'
    assert compare_outputs([[1.0, 2.0]], note, None) is None
    assert compare_outputs([[1.0, 2.0002]], note, None) == pytest.approx(1e-4, rel=0.01)
    for outputs in ([[1.0]], [[1.0, 2.0], [3.0]]):
        with pytest.raises(CheckpointError, match='other shapes'):
            compare_outputs(outputs, note, None)
    with pytest.raises(CheckpointError, match='differ'):
        compare_outputs([[1.0, float('nan')]], note, None)


def test_samples_of_nested_outputs():
    class Model(torch.nn.Linear):
        def forward(self, x):
            return {'maps': [x, x[:, :, :1, :2]], 'count': 3}

    samples = sample_outputs(Model(1, 1), (3, 16, 16))
    assert [len(values) for values in samples] == [64, 6]
    assert samples[0][0] == 0 and samples[0][-1] == fixed_picture((3, 16, 16)).flatten()[-1].item()
