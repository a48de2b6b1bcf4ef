"""`vmzoo predict`: classify images, and draw what came out."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import nn

from vmzoo.images import IMAGE_SUFFIXES, read_image

from .model import load_model

SHOWN = 12
BATCH = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = 'Classify images: prints the five best classes and writes pictures.'
    parser.epilog = (
        'examples: vmzoo predict --model vmamba_tiny_s1l8 cat.jpg | '
        'vmzoo predict --checkpoint work_dirs/image_folder/best.pth data/val (a folder of class folders also gives the '
        'accuracy and a confusion matrix)'
    )
    parser.add_argument('images', nargs='+', help='image files, or folders of them')
    parser.add_argument(
        '--model', metavar='NAME', help='a model with its published weights; or the one of --checkpoint'
    )
    parser.add_argument(
        '--checkpoint', metavar='FILE', help='weights, such as best.pth of a training, which names its model'
    )
    parser.add_argument(
        '--out', default='outputs/predict', metavar='DIR', help='where pictures go (default: %(default)s)'
    )
    parser.add_argument('--json', action='store_true', help='print JSON with all images instead of a table')


@dataclass
class Classifier:
    """A model with what is needed to feed it and to read its answers."""

    model: nn.Module
    classes: list[str]
    data: dict[str, Any]  # input_size, mean, std, interpolation, crop_pct


@dataclass
class Prediction:
    """The five best classes of an image, best first; `target` is known where the image lies in a folder of a class."""

    path: Path
    best: list[int]
    probabilities: list[float]
    target: int | None


def load_classifier(model_name: str | None, checkpoint: str | None) -> Classifier:
    """A published model by its name, or a trained one from its checkpoint.

    Raises:
        CheckpointError: The checkpoint is damaged or of another model, or a download failed.
        ValueError: Neither says which model, or it is unknown or has no weights.
    """
    if not (model_name or checkpoint):
        raise ValueError('say which model: --model NAME with published weights, or --checkpoint FILE of a training')
    model, meta, report = load_model(model_name, checkpoint, tasks=('classification', 'backbone'))
    if not getattr(model, 'num_classes', 0):
        raise ValueError(f'{model_name or meta["model_name"]} gives feature maps, not classes')
    if report and report.head:
        raise ValueError(f'{checkpoint} does not say its classes: {report.head}')
    classes = meta.get('classes')
    if classes is None:
        info = ImageNetInfo() if model.num_classes == 1000 else None
        classes = [info.index_to_description(i).split(',')[0] if info else str(i) for i in range(model.num_classes)]
    return Classifier(model, classes, meta.get('data') or resolve_data_config(model=model))


def list_images(arguments: list[str]) -> list[Path]:
    """Files as given, and all images in folders.

    Raises:
        FileNotFoundError: There is no such file, or no image in a folder.
    """
    paths = []
    for argument in map(Path, arguments):
        found = [argument]
        if argument.is_dir():
            found = sorted(p for p in argument.rglob('*') if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found or not found[0].exists():
            raise FileNotFoundError(
                f'there is no image {argument}' if not argument.is_dir() else f'no image in {argument}'
            )
        paths.extend(found)
    return paths


@torch.inference_mode()
def predict(classifier: Classifier, paths: list[Path]) -> list[Prediction]:
    """Classify image files in batches, on the GPU if there is one.

    Raises:
        ValueError: A file is no readable image; the message names it.
    """
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = classifier.model.to(device)
    transform = create_transform(**classifier.data)
    in_chans = classifier.data['input_size'][0]
    index = {name: i for i, name in enumerate(classifier.classes)}
    predictions = []
    for start in range(0, len(paths), BATCH):
        chunk = paths[start : start + BATCH]
        images = torch.stack([transform(read_image(path, in_chans)) for path in chunk])  # [B, C, H, W]
        probabilities, best = model(images.to(device)).float().softmax(-1).topk(min(5, len(index)))
        for path, p, b in zip(chunk, probabilities.tolist(), best.tolist()):
            predictions.append(Prediction(path, b, p, index.get(path.parent.name)))
    return predictions


def scan_of(model: nn.Module) -> str | None:
    """Name of the routes by which a model scans its maps; None for a model that does not scan."""
    from vmzoo_kernels import route_names

    names = (getattr(module, attribute, None) for module in model.modules() for attribute in ('scan', 'routes'))
    return next((name for name in names if isinstance(name, str) and name in route_names()), None)


def draw(classifier: Classifier, predictions: list[Prediction], out: Path) -> list[Path]:
    """Write the pictures and return their files."""
    from . import pictures

    out.mkdir(parents=True, exist_ok=True)
    written = [pictures.draw_predictions(predictions, classifier.classes, out / 'predictions.png')]
    labelled = [p for p in predictions if p.target is not None]
    if labelled:
        written.append(pictures.draw_confusion(labelled, classifier.classes, out / 'confusion_matrix.png'))
    scan = scan_of(classifier.model)
    if scan:
        reductions = [info['reduction'] for info in classifier.model.feature_info]
        size = classifier.data['input_size'][1:]
        written.append(pictures.draw_routes(predictions[0].path, scan, size, reductions, out / 'scan_routes.png'))
    return written


def print_predictions(predictions: list[Prediction], classes: list[str]) -> None:
    from .output import print_table

    columns = ['image', '1st', '2nd', '3rd', '4th', '5th'][: 1 + len(predictions[0].best)]
    step = max(1, len(predictions) // SHOWN)
    rows = [
        (str(p.path), *(f'{classes[i]} {100 * q:.1f} %' for i, q in zip(p.best, p.probabilities)))
        for p in predictions[::step][:SHOWN]
    ]
    print_table(columns, rows)
    if len(predictions) > len(rows):
        print(f'{len(rows)} of {len(predictions)} images shown; --json prints all')


def run(args: argparse.Namespace) -> int:
    """Print predictions and write pictures.

    Raises:
        CheckpointError, FileNotFoundError, ImportError, ValueError: See the functions above.
    """
    try:
        import matplotlib  # noqa: F401  asked for now, not after all images have been classified
    except ModuleNotFoundError as error:
        raise ImportError(f'drawing needs {error.name}; run: pip install "vmzoo[train]"') from error
    paths = list_images(args.images)
    classifier = load_classifier(args.model, args.checkpoint)
    predictions = predict(classifier, paths)
    written = draw(classifier, predictions, Path(args.out))
    labelled = [p for p in predictions if p.target is not None]
    right = sum(p.best[0] == p.target for p in labelled)
    if args.json:
        images = [
            dict(
                image=str(p.path),
                top5=[
                    dict(name=classifier.classes[i], index=i, probability=q) for i, q in zip(p.best, p.probabilities)
                ],
                target=None if p.target is None else classifier.classes[p.target],
            )
            for p in predictions
        ]
        accuracy = right / len(labelled) if labelled else None
        print(json.dumps(dict(images=images, accuracy=accuracy, pictures=[str(path) for path in written]), indent=2))
        return 0
    print_predictions(predictions, classifier.classes)
    if labelled:
        print(f'accuracy: {100 * right / len(labelled):.2f} % ({right} of {len(labelled)} images)')
    print('pictures: ' + ', '.join(map(str, written)))
    return 0
