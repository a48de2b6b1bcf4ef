"""Medical images: NIfTI volumes, DICOM series, and data sets for segmentation."""

from .datasets import ArrayDataset, MaskFolderDataset, acdc, isic, synapse
from .dicom import find_dicom, is_dicom, read_dicom
from .intensity import normalize_intensity
from .nifti import NIFTI_SUFFIXES, read_nifti, write_nifti_labels
from .volume import Volume

__all__ = [
    'NIFTI_SUFFIXES',
    'ArrayDataset',
    'MaskFolderDataset',
    'Volume',
    'acdc',
    'find_dicom',
    'is_dicom',
    'isic',
    'normalize_intensity',
    'read_dicom',
    'read_nifti',
    'synapse',
    'write_nifti_labels',
]
