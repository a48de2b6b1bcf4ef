"""Sliding windows: blending, borders, reflections, slabs and their memory."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from vmzoo.inference import blend_weights, predict_labels, predict_logits, sliding_window, window_starts


def conv(ndim, in_chans=2, classes=3):
    cls = {2: nn.Conv2d, 3: nn.Conv3d}[ndim]
    return cls(in_chans, classes, 3, padding=1).eval()


def reference(model, image, window, overlap):
    """Weighted mean of all windows in float64, with whole maps of logits and weights."""
    model = model.double()
    size = image.shape[1:]
    bells = [torch.exp(-0.5 * ((torch.arange(w).double() - (w - 1) / 2) / (w / 8)) ** 2) for w in window]
    weight = bells[0]
    for bell in bells[1:]:
        weight = weight[..., None] * bell
    logits, total = 0, torch.zeros(size).double()
    for start in itertools.product(*(window_starts(n, w, overlap) for n, w in zip(size, window))):
        place = tuple(slice(s, s + w) for s, w in zip(start, window))
        out = model(image[(slice(None), *place)][None].double())[0]
        if isinstance(logits, int):
            logits = torch.zeros(len(out), *size).double()
        logits[(slice(None), *place)] += out * weight
        total[place] += weight
    model.float()
    return logits / total


@pytest.mark.parametrize(
    ('size', 'window', 'overlap'),
    [((37, 50), (16, 24), 0.5), ((16, 51), (16, 16), 0.25), ((20, 17, 23), (8, 8, 12), 0.5), ((9, 8, 8), (8, 8, 8), 0)],
)
def test_equals_a_plain_weighted_mean(size, window, overlap):
    model, image = conv(len(size)), torch.randn(2, *size)
    with torch.no_grad():
        expected = reference(model, image, window, overlap)
    for batch_size in (1, 5):
        logits = predict_logits(model, image, window, overlap=overlap, batch_size=batch_size)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)
        labels = predict_labels(model, image, window, overlap=overlap, batch_size=batch_size)
        assert labels.dtype == torch.uint8 and (labels == expected.argmax(0)).all()


@pytest.mark.parametrize('size', [(16, 24), (8, 12, 10)])
@torch.no_grad()
def test_one_window_is_the_plain_forward(size):
    model, image = conv(len(size)), torch.randn(2, *size)
    assert (predict_logits(model, image, size) == model(image[None])[0]).all()


@pytest.mark.parametrize('size', [(5, 37), (1, 1), (40, 40), (3, 30, 9)])
def test_a_constant_stays_constant(size):
    """Also in the corners, where weights are small, and where the border had to be repeated."""
    logits = predict_logits(lambda x: torch.full_like(x[:, :1], 7.0), torch.randn(3, *size), (16, 16, 8)[: len(size)])
    assert logits.shape == (1, *size)
    torch.testing.assert_close(logits, torch.full_like(logits, 7.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(('size', 'window'), [(1, 8), (8, 8), (9, 8), (100, 8), (101, 16), (64, 1)])
@pytest.mark.parametrize('overlap', [0, 0.25, 0.5, 0.9])
def test_weights_sum_to_one_and_windows_overlap(size, window, overlap):
    starts = window_starts(size, window, overlap)
    assert starts[0] == 0 and starts[-1] == max(0, size - window) and starts == sorted(set(starts))
    assert all(b - a <= max(1, int(window * (1 - overlap))) for a, b in itertools.pairwise(starts))
    total = torch.zeros(size)
    for start, weight in zip(starts, blend_weights(starts, size, window)):
        assert (weight > 0).all()
        total[start : start + window] += weight
    torch.testing.assert_close(total, torch.ones(size), rtol=1e-6, atol=0)


def test_smaller_images_repeat_their_border():
    seen = []
    predict_logits(lambda x: seen.append(x) or x, torch.tensor([[[1.0, 2, 3]]]), (2, 6))
    assert seen[0][0, 0].tolist() == [[1, 1, 2, 3, 3, 3]] * 2


@torch.no_grad()
def test_reflections_are_averaged():
    model, image = conv(3), torch.randn(2, 6, 7, 8)
    expected = [
        model(image[None].flip(axes)).flip(axes)[0]
        for axes in ([], [2], [4], [2, 4])  # axes 0 and 2 of the window
    ]
    logits = predict_logits(model, image, (6, 7, 8), mirror=(0, 2))
    torch.testing.assert_close(logits, torch.stack(expected).mean(0))


@torch.no_grad()
def test_a_model_of_images_segments_a_volume_by_slices():
    model, volume = conv(2), torch.randn(2, 5, 16, 20)
    slabs = list(sliding_window(model, volume, (16, 20), batch_size=3))
    assert [start for start, _ in slabs] == [0, 1, 2, 3, 4]
    expected = model(volume.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(torch.cat([logits for _, logits in slabs], 1), expected)


def test_slabs_are_no_deeper_than_a_window():
    slabs = list(sliding_window(conv(2), torch.randn(2, 100, 12), (16, 12)))
    sizes = [logits.shape[1] for _, logits in slabs]
    assert max(sizes) <= 16 and sum(sizes) == 100
    assert [start for start, _ in slabs] == [sum(sizes[:i]) for i in range(len(sizes))]


def test_arrays_on_disk_are_read_and_written_in_windows(tmp_path):
    values = np.random.default_rng(0).normal(size=(2, 40, 24)).astype('>f4')
    path = tmp_path / 'image.npy'
    np.save(path, values)
    out = np.lib.format.open_memmap(tmp_path / 'labels.npy', 'w+', np.uint8, (40, 24))
    model = conv(2)
    assert predict_labels(model, np.load(path, mmap_mode='r'), (16, 16), out=out) is out
    expected = predict_labels(model, torch.tensor(values.astype(np.float32)), (16, 16))
    assert (np.load(tmp_path / 'labels.npy') == expected.numpy()).all() and len(expected.unique()) == 3


def test_one_logit_is_a_threshold_and_many_classes_need_wider_labels():
    image = torch.randn(1, 8, 8)
    assert (predict_labels(lambda x: x, image, (8, 8)) == (image[0] > 0)).all()
    labels = predict_labels(lambda x: torch.eye(300)[299].reshape(1, 300, 1, 1).expand(-1, -1, 8, 8), image, (8, 8))
    assert (labels == 299).all()


def test_progress_is_shown_on_demand(capsys, monkeypatch):
    monkeypatch.setenv('FORCE_COLOR', '1')  # as on a terminal
    predict_logits(conv(2), torch.randn(2, 8, 8), (8, 8))
    assert capsys.readouterr() == ('', '')
    predict_logits(conv(2), torch.randn(2, 8, 8), (8, 8), progress='[a].nii')
    out, err = capsys.readouterr()
    assert '[a].nii' in err and not out


@pytest.mark.parametrize(
    ('size', 'window', 'options', 'message'),
    [
        ((8,), (8, 8), {}, r'an image \[C, H, W\]'),
        ((8, 8), (8, 8, 8), {}, r'window of \(8, 8, 8\)'),
        ((8, 8), (8, 0), {}, 'at least 1'),
        ((8, 8), (8, 8), {'overlap': 1.0}, 'overlap'),
        ((8, 8), (8, 8), {'mirror': (2,)}, 'mirror'),
        ((8, 8), (8, 8), {'mirror': (0, 0)}, 'mirror'),
        ((8, 8), (8, 8), {'batch_size': 0}, 'batch_size'),
    ],
)
def test_arguments_that_do_not_fit(size, window, options, message):
    with pytest.raises(ValueError, match=message):
        predict_logits(conv(2), torch.randn(2, *size), window, **options)


@pytest.mark.parametrize('wrong', [lambda x: x.mean((2, 3)), lambda x: [x], lambda x: x[..., ::2]])
def test_a_model_of_another_kind_is_refused(wrong):
    with pytest.raises(ValueError, match='must return logits'):
        predict_logits(wrong, torch.randn(2, 8, 8), (8, 8))


def test_logits_that_are_not_finite_make_no_labels():
    with pytest.raises(FloatingPointError, match='not finite'):
        predict_labels(lambda x: x / 0, torch.randn(2, 8, 8), (8, 8))
