"""`vmzoo segment`: labels in the geometry of their source, pictures, and errors.

The network quantises: a pixel's label is the whole number nearest to the mean of its channels.
"""

import json
import sys

import numpy as np
import pytest
import torch
from dicom_series import write_series
from PIL import Image
from timm.models import register_model
from torch import nn

from vmzoo.cli.main import main

nibabel = pytest.importorskip('nibabel')
pytest.importorskip('matplotlib')


class Quantizer(nn.Module):
    def __init__(self, ndim, in_chans, num_classes):
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        self.head = {2: nn.Conv2d, 3: nn.Conv3d}[ndim](in_chans, num_classes, 1)
        labels = torch.arange(num_classes, dtype=torch.float32)
        with torch.no_grad():
            self.head.weight.copy_((labels / in_chans).reshape(-1, 1, *[1] * ndim).expand_as(self.head.weight))
            self.head.bias.copy_(-(labels**2) / 2)

    def forward(self, x):
        return self.head(x)


def create(ndim, in_chans=3, num_classes=4, **_):
    model = Quantizer(ndim, in_chans, num_classes)
    model.pretrained_cfg = dict(
        input_size=(in_chans, *[8] * ndim), mean=(0.0,) * in_chans, std=(1.0,) * in_chans, classifier='head'
    )
    return model


@register_model
def quantizer_2d(pretrained=False, **kwargs):
    return create(2, **kwargs)


@register_model
def quantizer_3d(pretrained=False, **kwargs):
    return create(3, **dict(dict(in_chans=1), **kwargs))


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """Files of both networks; the one for images says what it is, as those of a training do."""
    folder = tmp_path_factory.mktemp('checkpoints')
    meta = dict(model_name='quantizer_2d', num_classes=4, in_chans=3, classes=['skin', 'a', '[b]', '$c'])
    torch.save(dict(state_dict=create(2).state_dict(), meta=meta), folder / 'images.pth')
    torch.save(create(3, in_chans=1).state_dict(), folder / 'volumes.pth')
    return folder


def segment(*arguments):
    return main(['segment', *map(str, arguments)])


@pytest.fixture
def nifti(tmp_path):
    """A volume of 0..3 in an orientation that is nobody's favourite, with its file."""
    values = np.random.default_rng(0).uniform(-0.4, 3.4, (13, 9, 11)).astype(np.float32)
    affine = np.array([[0, 0.1, -2, 5], [0.9, 0, 0, -7], [0, -1.5, 0.1, 2], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / 'brain.nii.gz')
    return values, tmp_path / 'brain.nii.gz'


@pytest.mark.parametrize(
    'options', [[], ['--mirror', '--overlap', '0.25', '--batch-size', '3'], ['--patch-size', '16']]
)
def test_volume(nifti, checkpoints, tmp_path, capsys, options):
    values, path = nifti
    common = ['--model', 'quantizer_3d', '--checkpoint', checkpoints / 'volumes.pth', '--normalize', 'none']
    assert segment(path, *common, '--out', tmp_path / 'out', '--json', *options) == 0
    (result,) = json.loads(capsys.readouterr().out)
    before, after = nibabel.load(path), nibabel.load(result['labels'])
    assert (before.affine == after.affine).all()
    assert (np.asarray(after.dataobj) == values.round().clip(0)).all()
    shares = {item['name']: item['share'] for item in result['shares']}
    assert list(shares) == ['background', 'label 1', 'label 2', 'label 3']
    assert shares['label 3'] == pytest.approx((values.round() == 3).mean())
    with Image.open(result['overlay']) as picture:
        assert min(picture.size) > 500 and len(picture.getcolors(2**24)) > 20


def test_volume_by_slices_with_defaults_normalised(nifti, checkpoints, tmp_path):
    """A network of colour images segments a grey volume slice by slice."""
    values, path = nifti
    assert segment(path, '--checkpoint', checkpoints / 'images.pth', '--out', tmp_path) == 0
    expected = ((values - values.mean()) / values.std()).round().clip(0, 3)
    assert (np.asarray(nibabel.load(tmp_path / 'brain_labels.nii.gz').dataobj) == expected).all()


def test_clipped_and_resized(nifti, checkpoints, tmp_path):
    values, path = nifti
    options = ['--clip', 0, 1, '--normalize', 'none', '--resize', '--patch-size', 22, 18]
    assert segment(path, '--checkpoint', checkpoints / 'images.pth', '--out', tmp_path, *options) == 0
    labels = np.asarray(nibabel.load(tmp_path / 'brain_labels.nii.gz').dataobj)
    agree = labels == values.clip(0, 1).round()
    assert labels.max() == 1 and agree.mean() > 0.8


def test_resampled_to_a_spacing_and_back(checkpoints, tmp_path):
    """Half a volume of 2 mm, seen at 1 mm: the boundary stays where it was."""
    values = np.zeros((6, 6, 8), np.float32)
    values[3:] = 3
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 2, 2, 1])), tmp_path / 'half.nii')
    common = ['--model', 'quantizer_3d', '--checkpoint', checkpoints / 'volumes.pth', '--normalize', 'none']
    assert segment(tmp_path / 'half.nii', *common, '--spacing', 1, 1, 1, '--out', tmp_path) == 0
    labels = np.asarray(nibabel.load(tmp_path / 'half_labels.nii.gz').dataobj)
    assert (labels[[0, 1, 4, 5]] == values[[0, 1, 4, 5]]).all() and labels.shape == values.shape
    assert (labels[2] < labels[3]).all()


def test_dicom_series(checkpoints, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4, (5, 9, 10), dtype=np.uint16)
    uid = write_series(tmp_path / 'study/ct', pixels, slope=1.0, intercept=0.0)
    write_series(tmp_path / 'study/scout', pixels[:1])
    common = ['--model', 'quantizer_3d', '--checkpoint', checkpoints / 'volumes.pth', '--normalize', 'none']
    assert segment(tmp_path / 'study', *common, '--series', uid, '--out', tmp_path) == 0
    image = nibabel.load(tmp_path / 'study_labels.nii.gz')
    assert (np.asarray(image.dataobj) == pixels.transpose(2, 1, 0)).all()
    assert nibabel.aff2axcodes(image.affine) == ('L', 'P', 'S')


def test_folder_of_images(checkpoints, tmp_path, capsys):
    folder = tmp_path / 'images'
    (folder / 'more').mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (21, 13, 3), dtype=np.uint8)
    for name in ('b.png', 'more/b.png'):
        Image.fromarray(pixels).save(folder / name)
    assert segment(folder, '--checkpoint', checkpoints / 'images.pth', '--out', tmp_path / 'out') == 0
    out = capsys.readouterr().out
    share = ((pixels.mean(-1) / 255).round() == 1).mean()
    assert 'more/b_overlay.png' in out and f'a {100 * share:.2g} %' in out
    for name in ('b', 'more/b'):
        labels = np.asarray(Image.open(tmp_path / f'out/{name}_labels.png'))
        assert (labels == (pixels.mean(-1) / 255).round()).all() and labels.dtype == np.uint8


def test_grey_images_and_many_classes(tmp_path):
    torch.save(create(2, 1, 300).state_dict(), tmp_path / 'c.pth')
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    options = ['--in-chans', '1', '--num-classes', '300', '--out', tmp_path]
    assert segment(tmp_path / 'a.png', '--model', 'quantizer_2d', '--checkpoint', tmp_path / 'c.pth', *options) == 0
    labels = np.asarray(Image.open(tmp_path / 'a_labels.png'))
    assert labels.dtype == np.uint16 and (labels == (pixels > 127)).all()


def test_one_logit_names_two_classes(tmp_path, capsys):
    model = create(2, num_classes=1)
    nn.init.ones_(model.head.weight)
    nn.init.constant_(model.head.bias, -1.5)
    torch.save(model.state_dict(), tmp_path / 'c.pth')
    Image.new('RGB', (9, 9), 'white').save(tmp_path / 'a.png')
    options = ['--num-classes', '1', '--out', tmp_path, '--json']
    assert segment(tmp_path / 'a.png', '--model', 'quantizer_2d', '--checkpoint', tmp_path / 'c.pth', *options) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert [item['share'] for item in result['shares']] == [0, 1]


IMAGE = ['{image}', '--checkpoint', '{checkpoints}/images.pth']
VOLUME = ['{volume}', '--model', 'quantizer_3d', '--checkpoint', '{checkpoints}/volumes.pth']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere.png', *IMAGE[1:]], 'no file or folder nowhere.png'),
        (['{empty}', *IMAGE[1:]], 'no image, NIfTI volume or DICOM series in'),
        (['{text}', *IMAGE[1:]], 'unknown kind'),
        (['{slice}', *IMAGE[1:]], 'give the folder of its series'),
        (['{broken}', *IMAGE[1:]], 'cannot read the image'),
        (['{twins}', *IMAGE[1:]], 'would be written to one file'),
        (['{image}', '--checkpoint', 'nowhere.pth'], 'nowhere.pth'),
        (['{image}', '--checkpoint', '{checkpoints}/volumes.pth'], 'add --model NAME'),
        (['{image}', *VOLUME[1:]], 'the model takes volumes'),
        (['{image}', *VOLUME[1:2], 'quantizer_2d', *VOLUME[3:]], 'shapes differ'),
        ([*IMAGE, '--num-classes', '2'], '4 → 2 classes, kept as initialised in the model; give those'),
        ([*VOLUME, '--in-chans', '2'], 'shapes differ'),
        (['{channels}', *VOLUME[1:]], 'it has 2 channels, but the model takes 1'),
        ([*IMAGE, '--clip', '0', '1'], 'are for volumes'),
        ([*VOLUME, '--clip', '1', '1'], 'brain.nii.gz: clip is the lowest'),
        ([*VOLUME, '--spacing', '1', '0', '1'], 'above 0'),
        ([*VOLUME, '--patch-size', '8', '8'], '3 sides for this model'),
        ([*IMAGE, '--overlap', '1'], 'overlap is a share'),
        ([*IMAGE, '--device', 'nonsense'], 'the device nonsense is not available'),
        (
            ['{image}', '--model', 'vmamba_nano', '--checkpoint', '{classifier}'],
            'is a model for classification, not for segmentation',
        ),
    ],
)
def test_errors(nifti, checkpoints, tmp_path, capsys, arguments, message):
    places = dict(checkpoints=checkpoints, volume=nifti[1])
    for name in ('empty', 'twins', 'series'):
        (tmp_path / name).mkdir()
        places[name] = tmp_path / name
    places |= {name: tmp_path / f'{name}.png' for name in ('image', 'broken')} | dict(text=tmp_path / 'a.txt')
    for path in (places['image'], places['twins'] / 'a.png', places['twins'] / 'a.jpg'):
        Image.new('RGB', (9, 9)).save(path)
    places['broken'].write_bytes(b'no picture')
    places['text'].write_text('no volume')
    places['channels'] = tmp_path / 'channels.nii'
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 2), np.float32), np.eye(4)), places['channels'])
    write_series(tmp_path / 'series', np.zeros((1, 4, 4), np.uint16), names=['slice'])
    places['slice'] = tmp_path / 'series/slice'
    if '{classifier}' in arguments:
        import timm

        places['classifier'] = tmp_path / 'classifier.pth'
        torch.save(timm.create_model('vmamba_nano').state_dict(), places['classifier'])
        arguments = [*arguments, '--patch-size', '32']
    assert segment(*(argument.format(**places) for argument in arguments), '--out', tmp_path / 'out') == 1
    assert message in capsys.readouterr().err


def test_missing_package_is_named_with_its_extra(nifti, checkpoints, tmp_path, capsys, monkeypatch):
    arguments = [nifti[1], '--model', 'quantizer_3d', '--checkpoint', checkpoints / 'volumes.pth', '--out', tmp_path]
    for package in ('nibabel', 'matplotlib'):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert segment(*arguments) == 1
        err = capsys.readouterr().err
        assert package in err and 'pip install "vmzoo[medical]"' in err
