"""NIfTI files."""

import zlib
from pathlib import Path

import numpy as np

from ._extra import require
from .volume import Volume

NIFTI_SUFFIXES = ('.nii', '.nii.gz')


def read_nifti(path: str | Path, labels: bool = False) -> Volume:
    """Reads a NIfTI file in the common orientation.

    Args:
        path: A .nii or .nii.gz file of one volume, or of several as channels (4-D, or vectors in 5-D).
        labels: Whether the values are labels, which must be integers.

    Returns:
        The volume, with values float32, or int32 for labels.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, of another kind, holds no real numbers, or labels that are no integers.
    """
    nibabel = require('nibabel', 'reading NIfTI files')
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'there is no file {path}')
    try:
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise ValueError(f'it is a {type(image).__name__}')
        if image.get_data_dtype().kind not in 'iuf':
            raise ValueError(f'its values are {image.get_data_dtype()}, not real numbers')
        values = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise ValueError(f'cannot read the NIfTI file {path}: {error}') from error
    shape = values.shape
    if len(shape) == 5 and shape[3] == 1:  # vectors
        values = values.reshape(*shape[:3], shape[4])
    elif len(shape) == 2:
        values = values.reshape(*shape, 1)
    if values.ndim not in (3, 4) or 0 in shape:
        raise ValueError(f'{path} holds an array of {shape}; volumes have three axes, and a fourth for channels')
    if labels and not (np.isfinite(values).all() and (values == np.round(values)).all()):
        raise ValueError(f'{path} holds no label map: its values are not integers')
    values = values.astype(np.int32 if labels else np.float32)
    return Volume.from_file_axes(values, image.affine, image.header, str(path))


def write_nifti_labels(path: str | Path, labels: np.ndarray, like: Volume) -> None:
    """Writes a label map [Z, Y, X] with the axes and geometry of the file that the volume was read from.

    Texts and extensions of that file's header, which may name the patient, are left out.

    Raises:
        ValueError: The labels have another shape than the volume, or are no integers.
    """
    nibabel = require('nibabel', 'writing NIfTI files')
    if labels.dtype.kind not in 'iub':
        raise ValueError(f'labels are integers, got {labels.dtype}')
    small = labels.min() >= 0 and labels.max() <= 255
    array = like.to_file_axes(labels).astype(np.uint8 if small else np.int32)
    if like.header is None:
        image = nibabel.Nifti1Image(array, like.affine, dtype=array.dtype)
        image.header.set_xyzt_units('mm')
        image.set_qform(like.affine, 'scanner')
        image.set_sform(like.affine, 'scanner')
    else:
        header = like.header.copy()
        header.extensions.clear()
        for text in ('descrip', 'aux_file'):
            header[text] = b''
        header['cal_min'] = header['cal_max'] = 0
        header.set_data_dtype(array.dtype)
        # The affine is that of the header, which therefore stays as it is.
        image = nibabel.Nifti1Image(array.reshape(header.get_data_shape()[:3]), like.affine, header)
    image.header.set_intent('label')
    nibabel.save(image, path)
