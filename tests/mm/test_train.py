"""Training: it learns, resumes exactly, stops with a reason, and runs in two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from mm.conftest import folder_arguments
from timm.models import register_model

from vmzoo.cli.main import main
from vmzoo.mm.checkpoint import save_atomically
from vmzoo.mm.hooks import first_nonfinite

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}:{ROOT / "kernels"}'}


def scalars(work_dir, key):
    """Logged values of a scalar, in order."""
    files = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def load(path):
    return torch.load(path, weights_only=True)


def test_digits_are_learnt(tmp_path, capsys):
    assert main(['train', 'vmamba_nano_digits', '--epochs', '3', '--work-dir', str(tmp_path)]) == 0
    losses = scalars(tmp_path, 'loss')
    assert losses[-1] < 0.7 * losses[0]
    assert scalars(tmp_path, 'top1')[-1] > 80
    assert list(tmp_path.glob('*/vis_data/events.out.tfevents*'))
    best = load(tmp_path / 'best.pth')
    assert best['meta']['model_name'] == 'vmamba_nano' and best['meta']['classes'] == [str(i) for i in range(10)]
    out = capsys.readouterr().out
    test = json.loads(
        subprocess.check_output(
            [
                sys.executable,
                ROOT / 'tools/test.py',
                'vmamba_nano_digits',
                tmp_path / 'best.pth',
                '--work-dir',
                tmp_path,
            ],
            env=ENV,
        ).splitlines()[-1]
    )
    assert f'top1 {test["top1"]:.2f} %' in out
    assert sum(map(sum, test['confusion'])) == 360


def test_killed_training_resumes_to_the_same_end(image_folder, tmp_path, capsys):
    # Augmentation, mixing, drop path, workers and averaging all draw or keep state that has to come back.
    options = ('--epochs', '6', '--ema', '--resume')
    workers = ('train_dataloader.batch_size=8', 'train_dataloader.num_workers=1')

    def arguments(work_dir):
        return folder_arguments(image_folder, tmp_path / work_dir, *options, cfg_options=workers)

    assert main(arguments('whole')) == 0
    process = subprocess.Popen(
        [sys.executable, '-m', 'vmzoo.cli.main', *arguments('killed')], env=ENV, stdout=subprocess.DEVNULL
    )
    last = tmp_path / 'killed' / 'last.pth'
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= load(last)['meta']['epoch'] < 6
    capsys.readouterr()
    assert main(arguments('killed')) == 0
    out = capsys.readouterr().out
    assert 'resuming' in out and 'WARNING' not in out

    whole, resumed = load(tmp_path / 'whole/last.pth'), load(last)
    for part in ('state_dict', 'ema_state_dict'):
        assert whole[part].keys() == resumed[part].keys()
        for key, value in whole[part].items():
            assert torch.equal(value, resumed[part][key]), f'{part} {key}'
    assert whole['param_schedulers'] == resumed['param_schedulers']
    assert scalars(tmp_path / 'whole', 'loss')[-1] == scalars(tmp_path / 'killed', 'loss')[-1]
    best, best_resumed = load(tmp_path / 'whole/best.pth'), load(tmp_path / 'killed/best.pth')
    assert best['meta'] == best_resumed['meta']
    assert all(torch.equal(value, best_resumed['state_dict'][key]) for key, value in best['state_dict'].items())


def test_finished_training_is_not_repeated(train_folder, tmp_path, capsys):
    assert train_folder('--epochs', '1') == 0
    before = (tmp_path / 'work/last.pth').read_bytes()
    assert train_folder('--epochs', '1') == 1
    assert 'add --resume' in capsys.readouterr().err
    assert train_folder('--epochs', '1', '--resume') == 0
    assert (tmp_path / 'work/last.pth').read_bytes() == before


def test_resuming_another_training_is_refused(train_folder, capsys):
    assert train_folder('--epochs', '1') == 0
    assert train_folder('--epochs', '1', '--resume', cfg_options=['model.model_kwargs={"embed_dim":16}']) == 1
    assert 'belongs to another model' in capsys.readouterr().err
    assert train_folder('--epochs', '2', '--resume') == 1
    assert 'a training of 1 epochs' in capsys.readouterr().err


def test_resuming_never_unpickles_code(train_folder, tmp_path, capsys):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)

    (tmp_path / 'work').mkdir()
    torch.save({'state_dict': {}, 'meta': Hostile()}, tmp_path / 'work/last.pth')
    assert train_folder('--resume') == 1
    assert 'not a checkpoint written by vmzoo' in capsys.readouterr().err
    assert not (tmp_path / 'executed').exists()


def test_checkpoints_are_replaced_in_one_step(tmp_path):
    path = tmp_path / 'last.pth'
    save_atomically({'epoch': torch.tensor(1)}, path)
    with pytest.raises((AttributeError, TypeError)):
        save_atomically({'epoch': torch.tensor(2), 'fails': lambda: None}, path)
    assert load(path) == {'epoch': torch.tensor(1)}


def test_any_model_from_a_checkpoint_file(train_folder, tmp_path):
    assert train_folder('--epochs', '1') == 0
    weights = str(tmp_path / 'work/best.pth')
    still = ['optim_wrapper.optimizer.lr=0.0']
    assert train_folder('--epochs', '1', '--pretrained', weights, work_dir=tmp_path / 'again', cfg_options=still) == 0
    first, again = load(weights)['state_dict'], load(tmp_path / 'again/best.pth')['state_dict']
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    other = ['model.model_name=test_resnet', 'train_dataloader.dataset.input_size=(3,32,32)']
    assert train_folder('--epochs', '1', work_dir=tmp_path / 'other', cfg_options=other) == 0
    meta = load(tmp_path / 'other/best.pth')
    model = timm.create_model('test_resnet', num_classes=2)
    model.load_state_dict(meta['state_dict'])


def test_mixed_precision_on_cpu(train_folder, tmp_path):
    for name, options in (('float32', ()), ('bfloat16', ('--amp',))):
        assert train_folder('--epochs', '2', *options, work_dir=tmp_path / name) == 0
    full, mixed = scalars(tmp_path / 'float32', 'loss'), scalars(tmp_path / 'bfloat16', 'loss')
    assert full != mixed
    assert mixed == pytest.approx(full, rel=0.05)


def test_two_processes(image_folder, tmp_path):
    arguments = folder_arguments(image_folder, tmp_path, '--epochs', '2', '--launcher', 'pytorch')[1:]
    subprocess.run(
        [
            *(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'),
            *(ROOT / 'tools/train.py', *arguments),
        ],
        env=ENV,
        check=True,
        timeout=300,
    )
    assert load(tmp_path / 'last.pth')['meta']['iter'] == 2 * 1  # 16 images, batches of 8, two processes
    assert (tmp_path / 'best.pth').exists()


@register_model
def nan_on_third_call(
    pretrained=False, num_classes=2, in_chans=3, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None
):
    """A network of which one layer fails at the third training step."""

    class Failing(torch.nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += self.training
            return super().forward(x) * (torch.nan if self.calls >= 3 else 1.0)

    model = torch.nn.Sequential()
    model.add_module('stem', torch.nn.Conv2d(in_chans, 4, 4, 4))
    model.add_module('pool', torch.nn.AdaptiveAvgPool2d(1))
    model.add_module('flatten', torch.nn.Flatten())
    model.add_module('failing', Failing(4, 4))
    model.add_module('head', torch.nn.Linear(4, num_classes))
    model.num_classes = num_classes
    return model


def test_nan_loss_stops_and_names_the_module(train_folder, tmp_path, capsys):
    assert train_folder('--model', 'nan_on_third_call') == 1
    err = capsys.readouterr().err
    assert 'loss = nan at epoch 2, iteration 3' in err
    assert 'in the output of backbone.failing (Failing)' in err
    kept = load(tmp_path / 'work/last.pth')
    assert kept['meta']['epoch'] == 1
    assert all(value.isfinite().all() for value in kept['state_dict'].values())


def test_overflowing_step_is_named(train_folder, capsys):
    options = ['optim_wrapper.optimizer.lr=1e38', 'optim_wrapper.optimizer.type=sgd', 'optim_wrapper.clip_grad=None']
    assert train_folder(cfg_options=options) == 1
    assert 'it first appears in the' in capsys.readouterr().err


def test_first_nonfinite_tells_inputs_parameters_and_modules_apart():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU()))
    bad = torch.tensor([[1.0, 1.0], [torch.inf, 1.0]])
    assert first_nonfinite(model, (bad,), {}) == 'in the input images (1)'
    assert 'in the loss itself' in first_nonfinite(model, (torch.ones(1, 2),), {})
    model[1][0].register_forward_hook(lambda *_: bad, prepend=True)
    assert first_nonfinite(model, (torch.ones(2, 2),), {}) == 'in the output of 1.0 (Identity)'
    model[0].weight.data[0, 0] = torch.nan
    assert 'in the parameter 0.weight' in first_nonfinite(model, (torch.ones(1, 2),), {})


@pytest.fixture
def own_folder(image_folder, tmp_path):
    return Path(shutil.copytree(image_folder, tmp_path / 'data'))


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('content', [b'', b'no picture', None])
def test_broken_image_is_named_and_skipped_on_request(train_folder, own_folder, capsys, content, workers):
    broken = own_folder / 'train/cat/3.png'
    broken.write_bytes(broken.read_bytes()[:200] if content is None else content)
    options = [f'train_dataloader.num_workers={workers}']
    assert train_folder('--epochs', '1', data=own_folder, cfg_options=options) == 1
    err = capsys.readouterr().err
    assert f'cannot read the image {broken}' in err and '--skip-broken' in err and 'Traceback' not in err
    assert train_folder('--epochs', '1', '--skip-broken', data=own_folder, cfg_options=options) == 0
    assert str(broken) in capsys.readouterr().out


def test_file_that_is_no_image_is_named_at_once(train_folder, own_folder, capsys):
    (own_folder / 'val/coffee/notes.txt').write_text('remember the milk')
    assert train_folder('--epochs', '1', data=own_folder) == 1
    assert 'notes.txt is not an image' in capsys.readouterr().err
    assert train_folder('--epochs', '1', '--skip-broken', data=own_folder) == 0


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda root: shutil.rmtree(root / 'train'), 'must hold one folder of images for each class'),
        (lambda root: shutil.rmtree(root / 'train/cat'), 'at least two'),
        (lambda root: shutil.rmtree(root / 'val'), 'there is no folder'),
        (lambda root: (root / 'val/dog').mkdir(), 'is no class of'),
        (lambda root: (root / 'train/dog').mkdir(), 'dog holds no image'),
    ],
)
def test_incomplete_folder(train_folder, own_folder, capsys, change, message):
    change(own_folder)
    assert train_folder(data=own_folder) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['no_such_config'], 'vmamba_nano_digits'),
        (['image_folder', '--data', 'x'], '--model NAME'),
        (['image_folder', '--model', 'vmamba_nano'], '--data DIR'),
        (['image_folder', '--model', 'vmamba_tini', '--data', 'x'], 'did you mean'),
        (['vmamba_nano_digits', '--data', 'x'], 'has its own data'),
        (['vmamba_nano_digits', '--epochs', '0'], 'at least 1'),
        (['vmamba_nano_digits', '--pretrained', 'nowhere.pth'], 'no file nowhere.pth'),
        (['vmamba_nano_digits', '--amp', 'float16'], 'bfloat16'),
        (['--resume', 'vmamba_nano_digits', '--epochs', '0'], 'at least 1'),
        (['vmamba_nano_digits', '--cfg-options', 'oops'], 'key=value'),
        (['vmamba_nano_digits', '--cfg-options', 'optim_wraper.clip_grad=None'], 'did you mean optim_wrapper'),
        (['vmamba_nano_digits', '--cfg-options', 'model.smoothing=0.1'], "keyword argument 'smoothing'"),
        (['vmamba_nano_digits', '--cfg-options', 'train_dataloader.dataset.crop=1'], "keyword argument 'crop'"),
        (['vmamba_nano_digits', '--cfg-options', 'model.type=Classifier'], 'Classifier is not in the'),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, message):
    if 'float16' in arguments and torch.cuda.is_available():
        pytest.skip('float16 is right on a GPU')
    assert main(['train', *arguments, '--work-dir', str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_config_without_a_training_is_named(tmp_path, capsys):
    (tmp_path / 'plain.py').write_text('model = dict(type="VMZooClassifier")\n')
    assert main(['train', str(tmp_path / 'plain.py')]) == 1
    assert 'plain.py is no training config: it lacks train_cfg, train_dataloader' in capsys.readouterr().err


@pytest.mark.parametrize('module', ['mmengine', 'cv2', 'matplotlib', 'sklearn', 'tensorboard'])
def test_missing_extra_says_what_to_install(module):
    code = (
        'import sys, torch._dynamo\n'  # which asks whether scikit-learn is there
        f'sys.modules[{module!r}] = None\n'
        'from vmzoo.cli.main import main\n'
        'sys.exit(main(sys.argv[1:]))'
    )
    result = subprocess.run(
        [sys.executable, '-c', code, 'train', 'vmamba_nano_digits'], env=ENV, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert f'training needs {module}' in result.stderr
    assert 'pip install "vmzoo[train]"' in result.stderr and 'Traceback' not in result.stderr
