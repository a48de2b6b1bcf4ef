"""`vmzoo download` and `vmzoo cache`, with a server on this machine."""

import json

import pytest
import timm
import torch
from local_server import serving

from vmzoo.cli import download as command
from vmzoo.cli.main import main
from vmzoo.weights import PublishedWeight

WEIGHTS = ('vmamba_v0_base.in1k', 'vmamba_v0_base.dp05_in1k', 'vmamba_v0_tiny.in1k')


@pytest.fixture
def run(capsys):
    def run(*argv):
        code = main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in ('VMZOO_OFFLINE', 'HF_HUB_OFFLINE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('VMZOO_HOME', str(tmp_path))
    monkeypatch.setenv('no_proxy', '*')
    return tmp_path / 'checkpoints'


@pytest.fixture
def server(cache, monkeypatch):
    """Publishes three weights, of which one is missing."""
    with serving({f'/{name}.pth': lambda request: request.reply(b'weights') for name in WEIGHTS[:2]}) as server:
        published = [
            PublishedWeight(name, f'{server.address}/{name}.pth', None, 'mit', None, None, {}) for name in WEIGHTS
        ]
        for module in ('download', 'cache', 'names'):
            monkeypatch.setattr(f'vmzoo.cli.{module}.published_weights', lambda: published)
        yield server


def test_download(run, server, cache):
    for _ in range(2):
        code, out, err = run('download', 'vmamba_v0_base', 'vmamba_v0_base.dp05_in1k')
        assert code == 0 and not err
        for name in WEIGHTS[:2]:
            row = next(line for line in out.splitlines() if line.lstrip().startswith(f'{name} '))
            assert str(cache / f'{name}.pth') in row and '7 bytes' in row and 'as first used' in row
    assert len(server.requests) == 2


def test_one_failure_does_not_stop_the_others(run, server, tmp_path):
    code, out, err = run('download', '--all-of', 'vmamba', '--cache-dir', str(tmp_path / 'mine'))
    assert code == 1
    assert err.startswith('vmzoo download: error: vmamba_v0_tiny.in1k: could not download') and err.count('\n') == 1
    assert all(str(tmp_path / f'mine/{name}.pth') in out for name in WEIGHTS[:2])


def test_weights_of_the_hub(run, monkeypatch, tmp_path):
    asked = []

    def load(hub_id, cache_dir):
        asked.append((hub_id, cache_dir))
        return {'weight': torch.zeros(250)}

    monkeypatch.setattr(command, 'load_state_dict_from_hf', load)
    code, out, _ = run('download', 'mambaout_tiny', '--cache-dir', str(tmp_path))
    assert code == 0 and 'hf-hub:timm/mambaout_tiny.in1k' in out and '1.0 kB' in out
    assert asked == [(timm.get_pretrained_cfg('mambaout_tiny').hf_hub_id, tmp_path)]


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        ([], 'give names of models, or --all-of FAMILY'),
        (['vmamba_tiny_s1l8', '--all-of', 'vim'], 'give names of models, or --all-of FAMILY'),
        (['vmamba_tiny_s1'], 'unknown model vmamba_tiny_s1: did you mean'),
        (['vmamba_nano'], 'published for vmamba_nano; `vmzoo list --pretrained` shows those that are'),
        (['--all-of', 'roma'], 'published for roma'),
    ],
)
def test_errors(run, arguments, says):
    code, out, err = run('download', *arguments)
    assert code == 1 and not out and says in err


def test_cache(run, server, cache):
    code, out, _ = run('cache')
    assert code == 0 and out == f'files: 0, 0 bytes, in {cache}\n'

    run('download', 'vmamba_v0_base')
    (cache / 'vmamba_v0_base.dp05_in1k.pth').write_bytes(b'placed by hand')
    (cache / 'other.pth').write_bytes(b'of another program')
    code, out, _ = run('cache', '--json')
    states = {file['weights']: (file['size'], file['state']) for file in json.loads(out)}
    assert states[WEIGHTS[0]] == (7, 'as first used, no digest is published')
    assert states[WEIGHTS[1]] == (14, 'not checked yet')
    assert len(states) == 2

    code, out, _ = run('cache', '--remove', '*_in1k.pth')
    assert code == 0 and out.endswith(f'removed: 1, 14 bytes, in {cache}\n')
    code, out, _ = run('cache')
    assert WEIGHTS[0] in out and WEIGHTS[1] not in out and out.endswith(f'files: 1, 7 bytes, in {cache}\n')
    code, _, err = run('cache', '--remove', 'other.pth')
    assert code == 1 and 'has no file other.pth' in err and (cache / 'other.pth').exists()
