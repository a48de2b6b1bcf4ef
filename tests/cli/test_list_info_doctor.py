"""The commands that only look: `vmzoo list`, `info`, `doctor`, and the frame around every command."""

import json
import sys

import pytest
import torch

import vmzoo
from vmzoo.cli import doctor
from vmzoo.cli.main import COMMANDS, main
from vmzoo.models._registry import list_architectures, summarize, summary_of


@pytest.fixture
def run(capsys):
    def run(*argv):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def listed(run, *options):
    code, out, _ = run('list', *options, '--json')
    assert code == 0
    return {entry['name']: entry for entry in json.loads(out)}


def test_list_shows_every_registered_model(run):
    assert sorted(listed(run)) == sorted(list_architectures())
    code, out, err = run('list')
    assert code == 0 and not err
    assert all(f' {name} ' in out for name in list_architectures())


def test_list_filters(run):
    everything = listed(run)
    vim = listed(run, '--family', 'vim')
    assert vim and set(vim) == {name for name, entry in everything.items() if entry['family'] == 'vim'}
    small = listed(run, '--min-params', '2', '--max-params', '10')
    assert small and all(2e6 <= entry['params'] <= 10e6 for entry in small.values())
    assert set(listed(run, 'vmamba_v0_*')) == {'vmamba_v0_tiny', 'vmamba_v0_small', 'vmamba_v0_base'}
    published = listed(run, '--pretrained')
    assert published['vmamba_v0_base']['weights'] == ['in1k', 'dp05_in1k']
    assert 'vmamba_nano' not in published
    backbones = listed(run, '--task', 'backbone')
    assert backbones and all(entry['task'] == 'backbone' for entry in backbones.values())


def test_list_without_a_match(run):
    code, out, err = run('list', 'resnet*')
    assert code == 1 and not out
    assert err == 'vmzoo list: error: no model matches; `vmzoo list` shows all\n'


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ((), 'arguments are required: command'),
        (('lst',), "invalid choice: 'lst'"),
        (('list', '--family', 'resnet'), "invalid choice: 'resnet' (choose from"),
        (('list', '--max-params', 'many'), "invalid float value: 'many'"),
        (('info',), 'arguments are required: name'),
    ],
    ids=' '.join,
)
def test_wrong_usage_exits_with_2(run, argv, message):
    code, _, err = run(*argv)
    assert code == 2
    assert message in err


@pytest.mark.parametrize('name', list_architectures())
def test_info_of_every_model(run, name):
    code, out, _ = run('info', name)
    assert code == 0
    assert f'{summary_of(name).params / 1e6:.2f} M' in out


def test_info(run):
    code, out, err = run('info', 'vmamba_tiny_s1l8')
    assert code == 0 and not err
    for part in ('30.25 M', '3x224x224', '96 (1/4), 192 (1/8), 384 (1/16), 768 (1/32)', 'arXiv:2401.10166', 'mit'):
        assert part in out
    assert 'vssm1_tiny_0230s_ckpt_epoch_264.pth (ImageNet-1k top-1 82.6 %, as published; no digest recorded)' in out

    code, out, _ = run('info', 'vmamba_v0_base.dp05_in1k', '--json')
    facts = json.loads(out)
    assert facts['channels'] == [128, 256, 512, 1024]
    assert [weight['name'] for weight in facts['weights']] == ['vmamba_v0_base.in1k', 'vmamba_v0_base.dp05_in1k']


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('vmamba_tiny_s1l9', 'unknown model vmamba_tiny_s1l9: did you mean vmamba_tiny_s1l8'),
        ('xyzzy', 'unknown model xyzzy: `vmzoo list` shows all'),
        ('resnet18', 'unknown model resnet18'),
        ('vmamba_nano.in22k', 'vmamba_nano has no tag in22k; it has: untrained'),
    ],
)
def test_info_of_an_unknown_model(run, name, message):
    code, out, err = run('info', name)
    assert code == 1 and not out
    assert message in err


def test_debug_shows_where_an_error_arose(run):
    with pytest.raises(ValueError, match='unknown model'):
        main(['info', 'xyzzy', '--debug'])


def test_an_unrecorded_model_is_summarised_when_asked_for(monkeypatch):
    monkeypatch.setattr('vmzoo.models._registry._recorded', dict)
    assert summary_of('vmamba_nano') == summarize('vmamba_nano')


def test_doctor(run, monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    code, out, err = run('doctor')
    assert code == 0 and not err
    for part in (
        f'torch           {torch.__version__.partition("+")[0]}',
        'chosen',
        'correct',
        f'vmzoo           {vmzoo.__version__}',
    ):
        assert part in out
    if not torch.cuda.is_available():
        assert 'triton  not used: ' in out


def test_doctor_reports_what_is_missing(run, monkeypatch):
    needs = ['torch>=99', 'no-such-package>=1', "other-package>=2; extra == 'train'"]
    monkeypatch.setattr(doctor.metadata, 'requires', lambda name: needs)
    code, out, err = run('doctor')
    assert code == 1
    assert 'torch>=99 is needed' in err
    assert 'no-such-package>=1 is not installed' in err
    assert "other-package>=2 is not installed; for vmzoo train: pip install 'vmzoo[train]'" in out


def test_doctor_reports_a_wrong_scan(run, monkeypatch):
    scan = doctor.route_scan
    monkeypatch.setattr(
        doctor, 'route_scan', lambda x, *args, **kwargs: scan(x, *args, **kwargs) + (x.dtype == torch.float32)
    )
    code, out, err = run('doctor')
    assert code == 1
    assert 'WRONG' in out
    assert 'backend computes wrong results here' in err


@pytest.mark.parametrize('command', COMMANDS)
def test_help(run, command):
    code, out, _ = run(command, '--help')
    assert code == 0
    assert out.startswith(f'usage: vmzoo {command}')


def test_help_lists_the_commands(run):
    code, out, _ = run('--help')
    assert code == 0
    assert all(f'{name} ' in out and text in out for name, text in COMMANDS.items())


def test_a_closed_pipe_is_no_error(tmp_path):
    import subprocess

    command = f'"{sys.executable}" -m vmzoo list | head -n 1; exit ${{PIPESTATUS[0]}}'
    result = subprocess.run(['bash', '-c', command], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, '')
