"""DICOM series for tests."""

import pytest

pydicom = pytest.importorskip('pydicom')


def write_series(folder, pixels, slope=2.0, intercept=-1024.0, names=None, **changes):
    """Writes uint16 [K, rows, columns] as files whose names are not in the order of their positions.

    Changes are attributes: of all files, or by a function of the slice's number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    uid = pydicom.uid.generate_uid()
    count = len(pixels)
    for k, values in enumerate(pixels):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
            pydicom.uid.CTImageStorage,
            pydicom.uid.generate_uid(),
        )
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        path = folder / (names[k] if names else f'{(k * 7 + 3) % count:03d}.dcm')
        dataset = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
        dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.CTImageStorage, meta.MediaStorageSOPInstanceUID
        dataset.SeriesInstanceUID, dataset.Modality = uid, 'CT'
        dataset.Rows, dataset.Columns = values.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, 'MONOCHROME2'
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 0
        dataset.PixelSpacing, dataset.SliceThickness = [0.8, 0.6], 3.0
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = [-12.5, 20.0, 100.0 + 2.5 * k]
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
        dataset.PixelData = values.tobytes()
        for name, change in changes.items():
            value = change(k) if callable(change) else change
            if value is None:
                delattr(dataset, name)
            else:
                setattr(dataset, name, value)
        dataset.save_as(path, enforce_file_format=True)
    return uid
