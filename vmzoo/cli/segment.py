"""`vmzoo segment`: label maps of images and volumes of any size."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vmzoo.images import IMAGE_SUFFIXES, read_image
from vmzoo.inference import predict_labels
from vmzoo.io import (
    NIFTI_SUFFIXES,
    Volume,
    find_dicom,
    is_dicom,
    normalize_intensity,
    read_dicom,
    read_nifti,
    write_nifti_labels,
)

from .model import load_model

LINEAR = {2: 'bilinear', 3: 'trilinear'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Segment an image, a NIfTI volume, a folder with a DICOM series, or all images and NIfTI volumes in a folder: '
        'writes label maps with the geometry of their source, and pictures.'
    )
    parser.epilog = (
        'examples: vmzoo segment brain.nii.gz --checkpoint best.pth --patch-size 128 --mirror | '
        'vmzoo segment series/ --model vmunet_synapse --checkpoint organs.pth --clip -125 275 --normalize none --resize'
    )
    parser.add_argument('input', help='image, .nii or .nii.gz file, or a folder')
    parser.add_argument('--checkpoint', required=True, metavar='FILE', help='weights of the whole network')
    parser.add_argument('--model', metavar='NAME', help='the network, if the checkpoint does not name it')
    parser.add_argument('--num-classes', type=int, metavar='N', help='classes, if the checkpoint does not say')
    parser.add_argument('--in-chans', type=int, metavar='N', help='channels, if the checkpoint does not say')
    parser.add_argument(
        '--patch-size', type=int, nargs='+', metavar='N', help="window, one side or all (default: the model's input)"
    )
    parser.add_argument('--overlap', type=float, default=0.5, help='share that windows overlap (default: %(default)s)')
    parser.add_argument(
        '--resize', action='store_true', help='resize images to the patch size instead of sliding a window over them'
    )
    parser.add_argument(
        '--spacing', type=float, nargs=3, metavar=('Z', 'Y', 'X'), help='resample volumes to these millimetres'
    )
    parser.add_argument('--mirror', action='store_true', help='average over all reflections: better, but slower')
    parser.add_argument(
        '--clip', type=float, nargs=2, metavar=('LOW', 'HIGH'), help='map this range of a volume to 0..1, as for CT'
    )
    parser.add_argument(
        '--normalize',
        choices=['zscore', 'minmax', 'none'],
        help="zscore: mean 0, deviation 1, the default for volumes; minmax: 0..1, then the model's mean and std; "
        'none: those alone, the default for images',
    )
    parser.add_argument('--series', metavar='UID', help='the DICOM series, if the folder holds several')
    parser.add_argument('--batch-size', type=int, default=1, metavar='N', help='windows at once')
    parser.add_argument('--device', default='auto', help='cpu, cuda, cuda:1, ... (default: a GPU if there is one)')
    parser.add_argument('--out', default='outputs/segment', metavar='DIR', help='where files go (default: %(default)s)')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')


@dataclass
class Segmentor:
    """A network with what is needed to feed it and to name its labels."""

    model: nn.Module
    classes: list[str]
    in_chans: int
    patch_size: tuple[int, ...]
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device


@dataclass
class View:
    """What a picture shows of an image or volume: grey [H, W] or RGB [H, W, 3] in 0..1, with labels [H, W]."""

    title: str
    image: np.ndarray
    labels: np.ndarray
    aspect: float = 1.0  # height of a pixel divided by its width


@dataclass
class Result:
    """Files that were written for an input, and the share of each label."""

    source: Path
    labels: Path
    overlay: Path
    shares: list[float]


def load_segmentor(args: argparse.Namespace) -> Segmentor:
    """Builds the network, loads its weights and resolves the patch size.

    Raises:
        CheckpointError: The checkpoint is damaged or of another model.
        FileNotFoundError: There is no such checkpoint.
        ValueError: The checkpoint is for other classes or channels, or the patch size does not fit the model.
    """
    device = find_device(args.device)
    overrides = {key: value for key in ('num_classes', 'in_chans') if (value := getattr(args, key)) is not None}
    model, meta, report = load_model(args.model, args.checkpoint, tasks=('segmentation',), **overrides)
    if not getattr(model, 'num_classes', 0):
        raise ValueError(f'{args.model or meta["model_name"]} gives feature maps, not labels')
    if report.head or report.stem:
        raise ValueError(
            f'{args.checkpoint} is for other classes or channels: {report.head or report.stem}; '
            'give those of the checkpoint by --num-classes or --in-chans'
        )
    cfg = {**model.pretrained_cfg, **(meta.get('data') or {})}
    sides = len(cfg['input_size']) - 1
    patch_size = tuple(args.patch_size or cfg['input_size'][1:])
    patch_size = patch_size * sides if len(patch_size) == 1 else patch_size
    if len(patch_size) != sides:
        raise ValueError(f'--patch-size takes {sides} sides for this model, or one for all; got {len(patch_size)}')
    in_chans = getattr(model, 'in_chans', None) or args.in_chans or meta.get('in_chans') or cfg['input_size'][0]
    mean, std = (
        cfg[key] if len(cfg[key]) == in_chans else (sum(cfg[key]) / len(cfg[key]),) * in_chans
        for key in ('mean', 'std')
    )
    labels = max(2, model.num_classes)  # one logit separates two classes
    classes = meta.get('classes') or ()
    if len(classes) != labels:
        classes = ['background', *(f'label {index}' for index in range(1, labels))]
    return Segmentor(model.to(device), list(classes), in_chans, patch_size, mean, std, device)


def find_device(name: str) -> torch.device:
    """The device of this name; 'auto' is a GPU if there is one.

    Raises:
        ValueError: There is no such device.
    """
    try:
        device = torch.device(('cuda' if torch.cuda.is_available() else 'cpu') if name == 'auto' else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition('\n')[0]
        raise ValueError(f'the device {name} is not available: {reason}; --device cpu always is') from error
    return device


def list_inputs(argument: Path) -> list[Path]:
    """The files to segment; a folder stands for the DICOM series in it.

    Raises:
        FileNotFoundError: There is nothing to segment.
        ValueError: The file is of an unknown kind.
    """
    if argument.is_dir():
        suffixes = IMAGE_SUFFIXES + NIFTI_SUFFIXES
        found = sorted(p for p in argument.rglob('*') if p.name.lower().endswith(suffixes) and p.name[0] != '.')
        if not found and find_dicom(argument):
            return [argument]
        if not found:
            raise FileNotFoundError(f'no image, NIfTI volume or DICOM series in {argument}')
        return found
    if not argument.exists():
        raise FileNotFoundError(f'there is no file or folder {argument}')
    if not argument.name.lower().endswith(IMAGE_SUFFIXES + NIFTI_SUFFIXES):
        if is_dicom(argument):
            raise ValueError(f'{argument} is one slice; give the folder of its series')
        raise ValueError(f'{argument} is of an unknown kind; known are {", ".join(IMAGE_SUFFIXES + NIFTI_SUFFIXES)}')
    return [argument]


def output_stem(path: Path, root: Path, out: Path) -> Path:
    """Where the files of an input go, without what each appends; folders inside the input folder are kept."""
    name = path.resolve().name
    if path.is_file():
        name = name[: -len(next(s for s in (*NIFTI_SUFFIXES[::-1], path.suffix) if name.lower().endswith(s.lower())))]
    return out / (path.parent.relative_to(root) if path != root and root.is_dir() else Path()) / name


def segment_array(segmentor: Segmentor, values: np.ndarray, args: argparse.Namespace, progress: str) -> np.ndarray:
    """Labels [*size] of an image [C, H, W] with values in 0..1, or of a volume [C, Z, Y, X].

    Raises:
        ValueError: It does not fit the model.
    """
    is_volume = values.ndim == 4
    if len(segmentor.patch_size) == 3 and not is_volume:
        raise ValueError('the model takes volumes; give a NIfTI file or a DICOM series')
    if len(values) != segmentor.in_chans:
        if len(values) > 1:
            raise ValueError(f'it has {len(values)} channels, but the model takes {segmentor.in_chans}')
        values = np.broadcast_to(values, (segmentor.in_chans, *values.shape[1:]))  # grey as colour
    method = args.normalize or ('zscore' if is_volume else 'none')
    shift = {} if method == 'zscore' else dict(mean=segmentor.mean, std=segmentor.std)
    image = torch.from_numpy(normalize_intensity(values, method, args.clip if is_volume else None, **shift))
    if args.resize:
        model, window = _resizing(segmentor.model, segmentor.patch_size), image.shape[-len(segmentor.patch_size) :]
    else:
        model, window = segmentor.model, segmentor.patch_size
    try:
        labels = predict_labels(
            model,
            image,
            window,
            overlap=args.overlap,
            mirror=range(len(window)) if args.mirror else (),
            batch_size=args.batch_size,
            device=segmentor.device,
            progress=progress,
        )
    except torch.OutOfMemoryError as error:
        raise ValueError('the GPU has too little memory; use a smaller --patch-size or --batch-size') from error
    return labels.numpy()


def _resizing(model: Callable[[Tensor], Tensor], size: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """The model on images that are resized to `size`; its logits are resized back."""

    def forward(x: Tensor) -> Tensor:
        resize = dict(mode=LINEAR[len(size)], align_corners=False)
        logits = model(F.interpolate(x, size, **resize))
        return F.interpolate(logits, x.shape[2:], **resize) if getattr(logits, 'ndim', 0) == x.ndim else logits

    return forward


def segment_volume(segmentor: Segmentor, volume: Volume, args: argparse.Namespace, progress: str) -> np.ndarray:
    """Labels [Z, Y, X]; with --spacing, those of the resampled volume, resampled back."""
    if args.spacing is None:
        return segment_array(segmentor, volume.values, args, progress)
    size = volume.values.shape[1:]
    if min(args.spacing) <= 0:
        raise ValueError(f'--spacing is in millimetres above 0, got {args.spacing}')
    new_size = [max(1, round(n * old / new)) for n, old, new in zip(size, volume.spacing, args.spacing)]
    values = F.interpolate(torch.from_numpy(volume.values)[None], new_size, mode='trilinear', align_corners=False)[0]
    labels = torch.from_numpy(segment_array(segmentor, values.numpy(), args, progress))
    return F.interpolate(labels[None, None].float(), size, mode='nearest-exact')[0, 0].to(labels.dtype).numpy()


def segment_file(segmentor: Segmentor, path: Path, stem: Path, args: argparse.Namespace, progress: str) -> Result:
    """Segments an image, a NIfTI file or a folder with a DICOM series, and writes labels and overlay.

    Raises:
        FileNotFoundError, ValueError: It is not readable or does not fit the model; the message names it.
    """
    from . import pictures

    stem.parent.mkdir(parents=True, exist_ok=True)
    is_image = path.suffix.lower() in IMAGE_SUFFIXES
    if is_image:
        if args.clip or args.spacing:
            raise ValueError(f'{path} is no volume: --clip and --spacing are for volumes')
        pixels = np.asarray(read_image(path, segmentor.in_chans), dtype=np.float32) / 255
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]  # [H, W, C]
    else:
        volume = read_dicom(path, args.series) if path.is_dir() else read_nifti(path)
    try:
        if is_image:
            labels = segment_array(segmentor, pixels.transpose(2, 0, 1), args, progress)
        else:
            labels = segment_volume(segmentor, volume, args, progress)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    if is_image:
        target = stem.with_name(f'{stem.name}_labels.png')
        Image.fromarray(labels if labels.dtype == np.uint8 else labels.astype(np.uint16)).save(target)
        views = [View(path.name, pixels[..., :3] if pixels.shape[2] > 1 else pixels[..., 0], labels)]
    else:
        target = stem.with_name(f'{stem.name}_labels.nii.gz')
        write_nifti_labels(target, labels, volume)
        views = planes(volume, labels)
    counts = sum(np.bincount(part.ravel(), minlength=len(segmentor.classes)) for part in labels)
    shares = (counts / labels.size).tolist()
    overlay = stem.with_name(f'{stem.name}_overlay.png')
    return Result(path, target, pictures.draw_segmentation(views, segmentor.classes, shares, overlay), shares)


def planes(volume: Volume, labels: np.ndarray) -> list[View]:
    """Through each axis of a volume, the plane with most labelled voxels; the middle one if nothing is labelled."""
    low, high = np.percentile(volume.values[0], (1, 99))
    grey = ((volume.values[0] - low) / max(high - low, 1e-8)).clip(0, 1)
    z, y, x = volume.spacing
    views = []
    for axis, (name, aspect) in enumerate([('axial', y / x), ('coronal', z / x), ('sagittal', z / y)]):
        counts = np.count_nonzero(labels, axis=tuple(other for other in range(3) if other != axis))
        index = int(counts.argmax()) if counts.any() else labels.shape[axis] // 2
        image, plane = grey.take(index, axis), labels.take(index, axis)
        if axis:  # the head above
            image, plane = image[::-1], plane[::-1]
        views.append(View(f'{name}, slice {index}', image, plane, aspect))
    return views


def run(args: argparse.Namespace) -> int:
    """Segments every input, and prints what was written.

    Raises:
        CheckpointError, FileNotFoundError, ImportError, ValueError: See the functions above.
    """
    try:
        import matplotlib  # noqa: F401  asked for now, not after the work
    except ModuleNotFoundError as error:
        raise ImportError(f'drawing needs {error.name}; run: pip install "vmzoo[medical]"') from error
    root = Path(args.input)
    paths = list_inputs(root)
    stems = [output_stem(path, root, Path(args.out)) for path in paths]
    if len(set(stems)) < len(stems):
        again = next(stem for stem in stems if stems.count(stem) > 1)
        names = [str(path) for path, stem in zip(paths, stems) if stem == again]
        raise ValueError(f'{" and ".join(names)} would be written to one file; rename one')
    segmentor = load_segmentor(args)
    results = [
        segment_file(segmentor, path, stem, args, f'[{number}/{len(paths)}] {path.name}')
        for number, (path, stem) in enumerate(zip(paths, stems), 1)
    ]
    if args.json:
        print(json.dumps([_record(result, segmentor.classes) for result in results], indent=2))
    else:
        print_results(results, segmentor.classes)
    return 0


def _record(result: Result, classes: list[str]) -> dict[str, Any]:
    return dict(
        source=str(result.source),
        labels=str(result.labels),
        overlay=str(result.overlay),
        shares=[dict(name=name, share=share) for name, share in zip(classes, result.shares)],
    )


def print_results(results: list[Result], classes: list[str]) -> None:
    from .output import print_table

    rows = []
    for result in results:
        found = sorted(zip(result.shares[1:], classes[1:]), reverse=True)[:3]
        labels = ', '.join(f'{name} {100 * share:.2g} %' for share, name in found if share)
        rows.append((str(result.source), str(result.labels), str(result.overlay), labels or 'background only'))
    print_table(['input', 'label map', 'picture', 'most frequent labels'], rows)
