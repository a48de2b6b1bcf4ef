"""DICOM series: volumes with a file for each slice."""

from pathlib import Path
from typing import Any

import numpy as np

from ._extra import require
from .volume import Volume

SAME = ('Rows', 'Columns', 'PixelSpacing', 'ImageOrientationPatient')  # in all slices of a volume
UNEVEN = 0.05  # by which share of the usual step one between slices may differ
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

Slice = tuple[Path, Any]  # a file and pydicom's Dataset of its header


def find_dicom(folder: str | Path) -> list[Path]:
    """The DICOM files in a folder and the folders in it, by name; directories of media (DICOMDIR) left out."""
    paths = sorted(path for path in Path(folder).rglob('*') if path.is_file() and path.name != 'DICOMDIR')
    return [path for path in paths if is_dicom(path)]


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's preamble."""
    with path.open('rb') as file:
        return file.read(132)[128:] == b'DICM'


def read_dicom(folder: str | Path, series: str | None = None) -> Volume:
    """Reads a series of slices, sorted by position, with rescale slope and intercept applied.

    Args:
        folder: Folder of the files, which may lie in further folders; other files are left alone.
        series: SeriesInstanceUID to read, where the folder holds several.

    Returns:
        The volume in the common orientation, with values float32 (Hounsfield units, for CT).

    Raises:
        FileNotFoundError: There is no such folder, or no DICOM image in it.
        ValueError: The files are no single series of evenly spaced slices of one size; the message says why not.
    """
    pydicom = require('pydicom', 'reading DICOM series')
    slices = _choose_series(_read_headers(pydicom, folder), folder, series)
    for path, header in slices:
        _check_slice(path, header)
        _check_same(slices[0], (path, header))

    first = slices[0][1]
    along_row, along_column = np.asarray(first.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    slices.sort(key=lambda item: float(normal @ np.asarray(item[1].ImagePositionPatient, dtype=np.float64)))
    positions = np.asarray([header.ImagePositionPatient for _, header in slices], dtype=np.float64)  # [K, 3]
    if len(slices) > 1:
        _check_steps([path for path, _ in slices], positions)
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
    else:
        step = normal * float(first.get('SpacingBetweenSlices') or first.get('SliceThickness') or 1)

    between_rows, between_columns = (float(value) for value in first.PixelSpacing)
    affine = np.eye(4)
    affine[:3] = np.stack([along_row * between_columns, along_column * between_rows, step, positions[0]], axis=1)
    values = np.empty((first.Columns, first.Rows, len(slices)), np.float32)  # [I, J, K]
    for k, (path, _) in enumerate(slices):
        values[:, :, k] = _read_pixels(pydicom, path).T
    return Volume.from_file_axes(values, LPS_TO_RAS @ affine, source=str(folder))


def _read_headers(pydicom: Any, folder: str | Path) -> list[Slice]:
    """Headers of the images in a folder; reports, contours and the like have no rows."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'there is no folder {folder}')
    headers = [(path, _read(pydicom, path, stop_before_pixels=True)) for path in find_dicom(folder)]
    images = [(path, header) for path, header in headers if 'Rows' in header]
    if not images:
        raise FileNotFoundError(f'there is no DICOM image in {folder}')
    return images


def _read(pydicom: Any, path: Path, **kwargs: Any) -> Any:
    try:
        return pydicom.dcmread(path, **kwargs)
    except (pydicom.errors.InvalidDicomError, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise ValueError(f'cannot read the DICOM file {path}: {error}') from error


def _choose_series(slices: list[Slice], folder: str | Path, series: str | None) -> list[Slice]:
    found: dict[str, list[Slice]] = {}
    for item in slices:
        found.setdefault(str(item[1].get('SeriesInstanceUID', '')), []).append(item)
    if series is None and len(found) == 1:
        return slices
    if series in found:
        return found[series]
    lines = [
        f'  {uid}: {len(items)} images, {items[0][1].get("SeriesDescription", "no description")}'
        for uid, items in found.items()
    ]
    problem = f'has no series {series}' if series is not None else f'holds {len(found)} series'
    raise ValueError('\n'.join([f'{folder} {problem}; name one by its SeriesInstanceUID:', *lines]))


def _check_slice(path: Path, header: Any) -> None:
    if int(header.get('NumberOfFrames') or 1) > 1:
        raise ValueError(f'{path} holds several frames; convert it with dcm2niix, and use the NIfTI file')
    if int(header.get('SamplesPerPixel') or 1) != 1:
        raise ValueError(f'{path} is a colour picture, no slice of a volume; save it as PNG')
    missing = [name for name in (*SAME, 'ImagePositionPatient') if not header.get(name)]
    if missing:
        raise ValueError(f'{path} does not say where its slice lies: it lacks {", ".join(missing)}')


def _check_same(first: Slice, other: Slice) -> None:
    for name in SAME:
        wanted, value = first[1][name].value, other[1][name].value
        if not np.allclose(np.asarray(wanted, np.float64), np.asarray(value, np.float64), rtol=0, atol=1e-4):
            raise ValueError(
                f'the series is mixed: {name} is {value} in {other[0]}, but {wanted} in {first[0]}; '
                'keep the slices of one volume (no localizer) in the folder'
            )


def _check_steps(paths: list[Path], positions: np.ndarray) -> None:
    steps = np.diff(positions, axis=0)  # [K - 1, 3]
    for index, step in enumerate(steps):
        if np.linalg.norm(step) < 1e-3:
            raise ValueError(
                f'{paths[index]} and {paths[index + 1]} are at one place: the series holds several volumes (times, '
                'echoes, phases); keep the files of one in the folder'
            )
    usual = np.median(steps, axis=0)
    uneven = np.linalg.norm(steps - usual, axis=1) > UNEVEN * np.linalg.norm(usual)
    if uneven.any():
        index = int(uneven.argmax())
        raise ValueError(
            f'the slices are not evenly spaced: from {paths[index]} to {paths[index + 1]} it is '
            f'{np.linalg.norm(steps[index]):.3f} mm, elsewhere {np.linalg.norm(usual):.3f} mm; is a file missing?'
        )


def _read_pixels(pydicom: Any, path: Path) -> np.ndarray:
    """Values of a slice [rows, columns], rescaled."""
    dataset = _read(pydicom, path)
    try:
        return pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
    except (AttributeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f'cannot decode the pixels of {path}: {error} (compressed ones need: '
            'pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg)'
        ) from error
