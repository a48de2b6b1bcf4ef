"""NIfTI volumes and DICOM series: geometry there and back, values, and what is refused."""

import gzip
import itertools
import sys

import numpy as np
import pytest
from dicom_series import write_series

from vmzoo.io import find_dicom, normalize_intensity, read_dicom, read_nifti, write_nifti_labels

nibabel = pytest.importorskip('nibabel')
apply_affine = nibabel.affines.apply_affine

SHAPE = (4, 5, 6)
ROTATED = np.array([[0.96, -0.28, 0.02], [0.28, 0.95, 0.1], [-0.05, -0.09, 0.99]])
ORIENTATIONS = [''.join(codes) for codes in itertools.product('LR', 'AP', 'IS')] + ['SAR', 'PIL', 'ASL']


def affine_of(codes, spacing=(0.7, 1.1, 2.5)):
    """Affine of axes in these directions, with a different spacing for each direction in space."""
    affine = np.eye(4)
    affine[:3, 3] = -11.5, 7.25, 30.125
    affine[:3, :3] = 0
    for column, code in enumerate(codes):
        axis = next(i for i, pair in enumerate(('LR', 'PA', 'IS')) if code in pair)
        affine[axis, column] = spacing[axis] * (1 if code in 'RAS' else -1)
    return affine


def save(path, values, affine, **codes):
    image = nibabel.Nifti1Image(values, affine)
    for kind, code in codes.items():
        getattr(image, f'set_{kind}')(affine, code)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize('codes', ORIENTATIONS)
def test_orientation_there_and_back(tmp_path, codes):
    labels = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    affine = affine_of(codes)
    path = save(tmp_path / 'a.nii.gz', labels, affine)
    volume = read_nifti(path, labels=True)
    assert volume.spacing == pytest.approx((2.5, 1.1, 0.7))
    z, y, x = np.meshgrid(*map(np.arange, volume.values.shape[1:]), indexing='ij')
    # The place of each voxel in space follows from its index alone: left, back and up as indices rise.
    place = np.stack([x * -0.7, y * -1.1, z * 2.5], -1)
    indices = np.stack(np.unravel_index(volume.values[0], SHAPE), -1)
    difference = apply_affine(nibabel.load(path).affine, indices) - place
    np.testing.assert_allclose(difference, np.broadcast_to(difference[0, 0, 0], difference.shape), atol=1e-4)

    write_nifti_labels(tmp_path / 'b.nii.gz', volume.values[0], volume)
    before, after = nibabel.load(path), nibabel.load(tmp_path / 'b.nii.gz')
    assert (after.affine == before.affine).all() and nibabel.aff2axcodes(after.affine) == tuple(codes)
    assert after.get_data_dtype() == np.uint8 and (np.asarray(after.dataobj) == labels).all()


@pytest.mark.parametrize(
    'codes', [dict(sform=0, qform=0), dict(sform=1, qform=0), dict(sform=0, qform=2), dict(sform=4)]
)
def test_both_forms_of_a_header_are_kept(tmp_path, codes):
    affine = affine_of('RAS', (1.0, 1.0, 1.5))
    affine[:3, :3] = ROTATED @ affine[:3, :3]
    path = save(tmp_path / 'a.nii', np.random.default_rng(0).normal(size=SHAPE).astype(np.float32), affine, **codes)
    volume = read_nifti(path)
    write_nifti_labels(tmp_path / 'b.nii', (volume.values[0] > 0).astype(np.int64), volume)
    before, after = nibabel.load(path), nibabel.load(tmp_path / 'b.nii')
    assert (after.affine == before.affine).all()
    for name in ('qform_code', 'sform_code', 'quatern_b', 'qoffset_x', 'srow_z', 'pixdim'):
        assert (after.header[name] == before.header[name]).all(), name
    assert (np.asarray(after.dataobj) == (np.asarray(before.dataobj) > 0)).all()


def test_values_of_labels_are_exact(tmp_path):
    labels = np.array([-1, 0, 255, 256, 70000, 2**30]).reshape(1, 2, 3).astype(np.int32)
    volume = read_nifti(save(tmp_path / 'a.nii', labels, np.eye(4)), labels=True)
    write_nifti_labels(tmp_path / 'b.nii', volume.values[0], volume)
    again = nibabel.load(tmp_path / 'b.nii')
    assert (np.asarray(again.dataobj) == labels).all() and again.get_data_dtype() == np.int32


def test_texts_that_may_name_a_patient_are_left_out(tmp_path):
    image = nibabel.Nifti1Image(np.ones(SHAPE, np.float32), np.eye(4))
    image.header['descrip'] = b'Jane Doe'
    image.header['aux_file'] = b'Jane Doe'
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension('comment', b'Jane Doe'))
    nibabel.save(image, tmp_path / 'a.nii')
    volume = read_nifti(tmp_path / 'a.nii')
    write_nifti_labels(tmp_path / 'b.nii', np.zeros(volume.values.shape[1:], np.uint8), volume)
    assert b'Jane' in (tmp_path / 'a.nii').read_bytes() and b'Jane' not in (tmp_path / 'b.nii').read_bytes()


@pytest.mark.parametrize(('shape', 'channels'), [((4, 5), 1), ((4, 5, 6), 1), ((4, 5, 6, 3), 3), ((4, 5, 6, 1, 2), 2)])
def test_channels(tmp_path, shape, channels):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    volume = read_nifti(save(tmp_path / 'a.nii', values, np.diag([-1.0, -1, 1, 1])))
    assert volume.values.shape == (channels, *(6, 5, 4)[(len(shape) == 2 and 2) or 0 :]) or volume.values.shape[1] == 1
    write_nifti_labels(tmp_path / 'b.nii', np.zeros(volume.values.shape[1:], np.uint8), volume)
    assert nibabel.load(tmp_path / 'b.nii').shape == shape[:3]


@pytest.mark.parametrize('content', ['missing', b'', b'no volume', 'truncated', 'complex', 'fraction', 'flat', 'long'])
def test_unreadable_nifti_is_named(tmp_path, content):
    path = tmp_path / 'broken.nii.gz'
    values = np.random.default_rng(0).normal(size=SHAPE)
    if content == 'truncated':
        save(path, values, np.eye(4))
        path.write_bytes(path.read_bytes()[:-300])
    elif content == 'complex':
        save(path, values.astype(np.complex64), np.eye(4))
    elif content == 'fraction':
        save(path, values, np.eye(4))
    elif content == 'flat':
        image = nibabel.Nifti1Image(values, None)
        image.header['sform_code'], image.header['qform_code'] = 1, 0
        with gzip.open(path, 'wb') as file:
            file.write(image.to_bytes())
    elif content == 'long':
        save(path, np.zeros((2, 2, 2, 2, 2)), np.eye(4))
    elif content != 'missing':
        path.write_bytes(content)
    with pytest.raises(FileNotFoundError if content == 'missing' else ValueError, match=r'broken\.nii\.gz'):
        read_nifti(path, labels=True)


def test_labels_of_another_shape_are_not_written(tmp_path):
    volume = read_nifti(save(tmp_path / 'a.nii', np.zeros(SHAPE), np.eye(4)))
    with pytest.raises(ValueError, match='but the labels are'):
        write_nifti_labels(tmp_path / 'b.nii', np.zeros(SHAPE, np.uint8), volume)
    with pytest.raises(ValueError, match='integers'):
        write_nifti_labels(tmp_path / 'b.nii', np.zeros(volume.values.shape[1:]), volume)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 3000, (5, 6, 7), dtype=np.uint16)


def test_series_is_sorted_and_rescaled(tmp_path, pixels):
    write_series(tmp_path / 'ct', pixels)
    (tmp_path / 'ct/readme.txt').write_text('no slice')
    (tmp_path / 'ct/DICOMDIR').write_bytes(bytes(128) + b'DICM')
    volume = read_dicom(tmp_path / 'ct')
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.6))
    np.testing.assert_array_equal(volume.values[0], pixels * 2.0 - 1024)


def test_slices_from_head_to_foot_and_turned_axes(tmp_path, pixels):
    """Positions that fall, rows that lead backwards: the same space, differently stored."""
    write_series(tmp_path / 'ct', pixels)
    write_series(
        tmp_path / 'turned',
        np.ascontiguousarray(pixels[::-1].transpose(0, 2, 1)),
        ImagePositionPatient=lambda k: [-12.5, 20.0, 100.0 + 2.5 * (4 - k)],
        ImageOrientationPatient=[0, 1, 0, 1, 0, 0],
        PixelSpacing=[0.6, 0.8],
    )
    one, other = read_dicom(tmp_path / 'ct'), read_dicom(tmp_path / 'turned')
    np.testing.assert_array_equal(one.values, other.values)
    assert one.spacing == pytest.approx(other.spacing)


def test_labels_of_a_series_lie_where_its_slices_do(tmp_path, pixels):
    write_series(tmp_path / 'ct', pixels)
    volume = read_dicom(tmp_path / 'ct')
    write_nifti_labels(tmp_path / 'b.nii.gz', (pixels > 1500).astype(np.uint8), volume)
    image = nibabel.load(tmp_path / 'b.nii.gz')
    assert (np.asarray(image.dataobj) == (pixels > 1500).transpose(2, 1, 0)).all()
    # DICOM counts towards left and back, NIfTI towards right and front.
    np.testing.assert_allclose(apply_affine(image.affine, (2, 3, 4)), (12.5 - 1.2, -20 - 2.4, 110), atol=1e-4)
    again = read_nifti(tmp_path / 'b.nii.gz', labels=True)
    assert (again.values[0] == (pixels > 1500)).all()


def test_one_slice_is_as_thick_as_it_says(tmp_path, pixels):
    write_series(tmp_path / 'ct', pixels[:1])
    assert read_dicom(tmp_path / 'ct').spacing == pytest.approx((3.0, 0.8, 0.6))


def test_one_of_several_series_is_chosen(tmp_path, pixels):
    write_series(tmp_path / 'study/a', pixels, SeriesDescription='thin')
    uid = write_series(tmp_path / 'study/b', pixels[:3], SeriesDescription='bone')
    with pytest.raises(ValueError, match=r'2 series[\s\S]*5 images, thin[\s\S]*3 images, bone'):
        read_dicom(tmp_path / 'study')
    assert read_dicom(tmp_path / 'study', uid).values.shape == (1, 3, 6, 7)
    with pytest.raises(ValueError, match=r'has no series 1\.2\.3'):
        read_dicom(tmp_path / 'study', '1.2.3')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(ImagePositionPatient=lambda k: [0, 0, 2.5 * (k + (k > 2))]), r'not evenly spaced.*5\.000 mm.*missing'),
        (dict(ImagePositionPatient=lambda k: [0, 0, 2.5 * (k // 2)]), 'several volumes'),
        (dict(ImageOrientationPatient=lambda k: [1, 0, 0, 0, 1, 0] if k else [0, 1, 0, 0, 0, 1]), 'series is mixed'),
        (dict(PixelSpacing=lambda k: [0.8, 0.6 + (k == 3)]), 'PixelSpacing is'),
        (dict(ImagePositionPatient=None), 'lacks ImagePositionPatient'),
        (dict(NumberOfFrames=4), 'several frames'),
        (dict(SamplesPerPixel=3), 'colour'),
        (dict(PixelData=bytes(10)), 'cannot decode the pixels'),
    ],
)
def test_series_that_are_no_volume(tmp_path, pixels, changes, message):
    write_series(tmp_path / 'ct', pixels, **changes)
    with pytest.raises(ValueError, match=message):
        read_dicom(tmp_path / 'ct')


def test_folders_without_a_series(tmp_path):
    (tmp_path / 'a.txt').write_text('no slice')
    with pytest.raises(FileNotFoundError, match='no DICOM image'):
        read_dicom(tmp_path)
    with pytest.raises(FileNotFoundError, match='no folder'):
        read_dicom(tmp_path / 'nowhere')
    assert find_dicom(tmp_path) == []


@pytest.mark.parametrize('package', ['nibabel', 'pydicom'])
def test_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / 'a.nii').touch()
    with pytest.raises(ImportError, match=rf'{package}; run: pip install "vmzoo\[medical\]"'):
        read_nifti(tmp_path / 'a.nii') if package == 'nibabel' else read_dicom(tmp_path)


def test_intensities():
    values = np.random.default_rng(0).normal(40, 300, (2, 8, 9)).astype(np.float32)
    scaled = normalize_intensity(values, 'zscore')
    np.testing.assert_allclose(scaled.mean((1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std((1, 2)), 1, rtol=1e-5)
    window = normalize_intensity(values, clip=(-125, 275))
    np.testing.assert_allclose(window, (values.clip(-125, 275) + 125) / 400, rtol=1e-5, atol=1e-6)
    shifted = normalize_intensity(values, 'minmax', mean=(0.5, 0.0), std=(0.5, 1 / 255))
    np.testing.assert_allclose(
        shifted[1] / 255, shifted[0] / 2 + 0.5 + (values[1] - values[0]) / np.ptp(values), atol=1e-5
    )
    assert (normalize_intensity(np.full((1, 4), 7.0), 'zscore') == 0).all()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(method='log'), 'one of none, minmax, zscore'),
        (dict(clip=(3, 3)), 'lowest'),
        (dict(mean=(0.5,)), '2 channels'),
    ],
)
def test_intensity_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        normalize_intensity(np.zeros((2, 3)), **options)
    with pytest.raises(ValueError, match='1 values are not finite'):
        normalize_intensity(np.array([[0, np.nan]]))
