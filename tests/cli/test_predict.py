"""`vmzoo predict`: the numbers, the pictures and the errors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vmzoo.cli.main import main
from vmzoo.cli.predict import load_classifier, scan_of
from vmzoo.images import read_image

pytest.importorskip('matplotlib')
DATA = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation='bicubic', crop_pct=1.0)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A file such as training writes, of an untrained network."""
    torch.manual_seed(0)
    model = timm.create_model('vmamba_nano', num_classes=6)
    meta = dict(model_name='vmamba_nano', model_kwargs={}, num_classes=6, in_chans=3, classes=list('abcdef'), data=DATA)
    path = tmp_path_factory.mktemp('checkpoint') / 'best.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two images in each of the folders a to f, one in a folder that is no class."""
    root = tmp_path_factory.mktemp('images')
    for i, name in enumerate('abcdefz'):
        (root / name).mkdir()
        for j in range(1 if name == 'z' else 2):
            Image.effect_noise((40 + i, 36), 20 * (i + j + 1)).save(root / name / f'{j}.png')
    return root


def test_folder_of_classes(checkpoint, folder, tmp_path, capsys):
    assert main(['predict', '--checkpoint', str(checkpoint), str(folder), '--out', str(tmp_path), '--json']) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result['images']) == 13
    assert [image['target'] for image in result['images']] == [*'aabbccddeeff', None]
    for image in result['images']:
        probabilities = [best['probability'] for best in image['top5']]
        assert len(probabilities) == 5 and probabilities == sorted(probabilities, reverse=True)
    right = sum(image['top5'][0]['name'] == image['target'] for image in result['images'])
    assert result['accuracy'] == pytest.approx(right / 12)
    names = ['predictions.png', 'confusion_matrix.png', 'scan_routes.png']
    assert result['pictures'] == [str(tmp_path / name) for name in names]
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300 and len(picture.getcolors(2**24)) > 20


def test_probabilities_are_the_models(checkpoint, folder, tmp_path, capsys):
    path = folder / 'z/0.png'
    assert main(['predict', '--checkpoint', str(checkpoint), str(path), '--out', str(tmp_path), '--json']) == 0
    (image,) = json.loads(capsys.readouterr().out)['images']
    classifier = load_classifier(None, str(checkpoint))
    x = timm.data.create_transform(**DATA)(Image.open(path).convert('RGB'))[None]
    expected = classifier.model(x).softmax(-1)[0].sort(descending=True)
    assert [best['index'] for best in image['top5']] == expected.indices[:5].tolist()
    assert [best['probability'] for best in image['top5']] == pytest.approx(expected.values[:5].tolist(), abs=1e-6)
    assert not (tmp_path / 'confusion_matrix.png').exists()


def test_table_for_people(checkpoint, folder, tmp_path, capsys):
    assert main(['predict', '--checkpoint', str(checkpoint), str(folder / 'a'), '--out', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert '5th' in out and str(folder / 'a/1.png') in out and 'accuracy' in out and 'scan_routes.png' in out


def test_names_are_never_markup_or_formulas(checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content['meta']['classes'] = ['[red]a', r'$\b$', '[/c]', 'd', 'e', 'f']
    torch.save(content, tmp_path / 'best.pth')
    image = tmp_path / r'$\b$' / '[blue]image.png'
    image.parent.mkdir()
    Image.new('RGB', (32, 32)).save(image)
    assert main(['predict', '--checkpoint', str(tmp_path / 'best.pth'), str(image), '--out', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert str(image) in out and sum(name in out for name in content['meta']['classes']) >= 5
    assert (tmp_path / 'confusion_matrix.png').exists()


def test_weights_without_a_description_need_the_model(folder, tmp_path, capsys):
    model = timm.create_model('vmamba_nano')
    torch.save({'model': model.state_dict()}, tmp_path / 'plain.pth')
    command = [
        'predict',
        '--checkpoint',
        str(tmp_path / 'plain.pth'),
        str(folder / 'z'),
        '--out',
        str(tmp_path / 'out'),
    ]
    assert main(command) == 1
    assert 'add --model NAME' in capsys.readouterr().err
    assert main([*command, '--model', 'vmamba_nano', '--json']) == 0
    (image,) = json.loads(capsys.readouterr().out)['images']
    assert not image['top5'][0]['name'].isdecimal()  # ImageNet's names
    assert (tmp_path / 'out/scan_routes.png').exists()


def test_a_model_that_does_not_scan_gets_no_routes():
    assert scan_of(timm.create_model('test_resnet')) is None
    assert scan_of(timm.create_model('vmamba_nano')) == 'cross'


def test_16_bit_greys_are_scaled(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for suffix in ('png', 'tiff'):
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f'deep.{suffix}')
        assert (np.asarray(read_image(tmp_path / f'deep.{suffix}')) == grey[..., None]).all()
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / 'float.tiff')
    with pytest.raises(ValueError, match=r'cannot read the image .*float\.tiff.*no known range'):
        read_image(tmp_path / 'float.tiff')


def test_missing_matplotlib_is_named_before_the_work(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert main(['predict', '--checkpoint', str(tmp_path / 'not even looked for'), str(folder)]) == 1
    err = capsys.readouterr().err
    assert 'matplotlib' in err and 'pip install "vmzoo[train]"' in err


@pytest.mark.parametrize('content', [b'', b'no picture', 'truncated'])
def test_broken_image_is_named(checkpoint, folder, tmp_path, capsys, content):
    good = (folder / 'a/0.png').read_bytes()
    broken = tmp_path / 'broken.png'
    broken.write_bytes(good[: len(good) // 2] if content == 'truncated' else content)
    assert main(['predict', '--checkpoint', str(checkpoint), str(broken), '--out', str(tmp_path)]) == 1
    assert str(broken) in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], '--model NAME with published weights'),
        (['--model', 'vmamba_nano'], 'has no published weights'),
        (['--model', 'vmunet_isic'], 'is a model for segmentation'),
        (['--model', 'no_such_model'], 'unknown model'),
        (['--checkpoint', 'nowhere.pth'], 'nowhere.pth'),
        (['--checkpoint', '{checkpoint}', '--model', 'vim_tiny'], 'is of vmamba_nano, not of vim_tiny'),
        (['--checkpoint', '{checkpoint}', '{empty}'], 'no image in'),
        (['--checkpoint', '{checkpoint}', 'nowhere.png'], 'there is no image nowhere.png'),
    ],
)
def test_errors(checkpoint, folder, tmp_path, capsys, arguments, message):
    (tmp_path / 'empty').mkdir()
    places = dict(checkpoint=checkpoint, empty=tmp_path / 'empty')
    arguments = [argument.format(**places) for argument in arguments]
    assert main(['predict', '--out', str(tmp_path), *arguments, str(folder / 'z/0.png')]) == 1
    assert message in capsys.readouterr().err


def test_digits_as_files_give_the_tested_pixels(tmp_path):
    pytest.importorskip('mmengine')
    from vmzoo.mm import DigitsDataset

    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, root / 'tools/make_tiny_data.py', tmp_path, '--only', 'digits'],
        env={'PYTHONPATH': f'{root}:{root / "kernels"}'},
        check=True,
    )
    dataset = DigitsDataset('test')
    assert len(list(tmp_path.glob('digits/test/*/*.png'))) == 360
    path = tmp_path / f'digits/test/{dataset.targets[0]}/{dataset.indices[0]:04d}.png'
    assert (np.asarray(Image.open(path)) == dataset[0]['inputs'].permute(1, 2, 0).numpy()).all()
