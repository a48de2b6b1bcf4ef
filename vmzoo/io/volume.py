"""Volumes in one orientation, which is undone in what is written."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ._extra import require

CANONICAL = 'LPS'  # that of DICOM: rising indices lead to the patient's left, back and head


@dataclass
class Volume:
    """A volume as DICOM and radiologists see it, with what it takes to write labels as its file has it.

    Rising indices lead Z to the head, Y to the back and X to the patient's left: a slice [Y, X] shows the nose above.
    Oblique volumes are not resampled: their axes are the closest ones.

    Attributes:
        values: [C, Z, Y, X].
        spacing: Millimetres between voxels along Z, Y, X.
        affine: float64 [4, 4], from indices in the file to millimetres towards right, front and head.
        header: The NIfTI header; None for other files.
        source: File or folder, for messages.
    """

    values: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    header: Any = field(default=None, repr=False)
    source: str = ''

    @classmethod
    def from_file_axes(cls, values: np.ndarray, affine: np.ndarray, header: Any = None, source: str = '') -> 'Volume':
        """Turns an array as a file has it into the common orientation.

        Args:
            values: [I, J, K], or with channels [I, J, K, C].
            affine: [4, 4], from indices to millimetres towards right, front and head.
            header: The NIfTI header.
            source: File or folder.

        Raises:
            ValueError: The affine is no placement in space.
        """
        affine = np.asarray(affine, dtype=np.float64)
        if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine) < 4:
            raise ValueError(f'{source}: its affine places no volume in space: {affine.tolist()}')
        orientations = _orientations()
        transform = orientations.ornt_transform(*_axes(affine))
        turned = orientations.apply_orientation(values, transform)  # [X, Y, Z] or [X, Y, Z, C]
        turned_affine = affine @ orientations.inv_ornt_aff(transform, values.shape[:3])
        spacing = np.linalg.norm(turned_affine[:3, :3], axis=0)[::-1]
        turned = (turned[..., None] if turned.ndim == 3 else turned).transpose(3, 2, 1, 0)
        return cls(np.ascontiguousarray(turned), tuple(spacing.tolist()), affine, header, source)

    def to_file_axes(self, labels: np.ndarray) -> np.ndarray:
        """Turns a map [Z, Y, X] of this volume back to the axes of the file, [I, J, K].

        Raises:
            ValueError: The map has another shape than the volume.
        """
        if labels.shape != self.values.shape[1:]:
            raise ValueError(f'the volume is {self.values.shape[1:]}, but the labels are {labels.shape}')
        orientations = _orientations()
        transform = orientations.ornt_transform(*reversed(_axes(self.affine)))
        return orientations.apply_orientation(labels.transpose(2, 1, 0), transform)


def _orientations() -> Any:
    return require('nibabel.orientations', 'reorienting volumes')


def _axes(affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """nibabel's orientations of a file's axes and of the common ones, each [3, (axis, direction)]."""
    orientations = _orientations()
    return orientations.io_orientation(affine), orientations.axcodes2ornt(CANONICAL)
