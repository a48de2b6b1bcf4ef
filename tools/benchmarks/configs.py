"""Whole classifiers, segmentors and detectors from configs, on random images: nothing but the libraries is needed."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData

from vmzoo.mm import VMZooBackbone, VMZooClassifier
from vmzoo.mm.config import find_config, is_classifier
from vmzoo.mm.operators import complete_operators
from vmzoo.models._macs import count_macs

from .models import peak_memory
from .timing import Row, Setting

Size = tuple[int, int]
BOXES = 10


def benchmark_configs(
    setting: Setting,
    configs: Sequence[str],
    backbones: Sequence[str],
    img_size: Size,
    batch_size: int,
    train: bool,
    torchvision_ops: bool = False,
) -> Iterator[Row]:
    """One row a config and backbone, with times over those of the first.

    Inference is everything up to the choice of the results that are shown, whose number depends on weights: of a
    two-stage detector the heads run on the proposals. Preparing images is not part of it. Training is forward and
    backward pass, no optimizer.

    Args:
        setting: Device, dtype and time for each figure.
        configs: Files, names of shipped configs, or `library::path`; of the data they say nothing is read.
        backbones: Models of timm in place of the config's backbone; none leaves it.
        img_size: Height and width of the images.
        batch_size: Images of a step.
        train: Whether to time training too.
        torchvision_ops: RoIAlign and NMS of torchvision in any case.
    """
    first = None
    for config in configs:
        for backbone in backbones or [None]:
            row = {'config': Path(config).stem, 'backbone': backbone or '', 'batch': batch_size}
            row['size'] = '{}x{}'.format(*img_size)
            row |= time_config(setting, config, backbone, img_size, batch_size, train, torchvision_ops)
            first = first or row
            for phase in ('infer', 'train')[: 1 + train]:
                row[f'{phase} img/s'] = 1e3 * batch_size / row[f'{phase} ms']
                row[f'{phase} time / first'] = row[f'{phase} ms'] / first[f'{phase} ms']
            yield row


def time_config(
    setting: Setting,
    config: str,
    backbone: str | None,
    img_size: Size,
    batch_size: int,
    train: bool,
    torchvision_ops: bool,
) -> dict[str, float]:
    """Parameters, multiply-accumulates of an image, times and, on a GPU, peak memory."""
    setting.release_memory()
    model = build_model(config, backbone, img_size, torchvision_ops).to(setting.device).eval()
    autocast = partial(torch.autocast, setting.device.type, setting.dtype, enabled=setting.dtype != torch.float32)
    one, batch = (random_batch(model, size, img_size) for size in (1, batch_size))

    def infer():
        with torch.no_grad(), autocast():
            return model(**batch, mode='tensor')

    def step():
        with autocast():
            loss, _ = model.parse_losses(model(**batch, mode='loss'))
        loss.backward()
        model.zero_grad()

    figures = {
        'params M': sum(p.numel() for p in model.parameters()) / 1e6,
        'GMACs': count_macs(lambda: model(**one, mode='tensor')) / 1e9,
    }
    for phase, call in (('infer', infer), ('train', step))[: 1 + train]:
        model.train(phase == 'train')
        figures[f'{phase} first ms'], figures[f'{phase} ms'] = setting.measure(call)
        if setting.on_gpu:
            figures[f'{phase} peak GiB'] = peak_memory(setting, call) / 2**30
    return figures


def build_model(config: str, backbone: str | None, img_size: Size, torchvision_ops: bool) -> torch.nn.Module:
    """The config's model with random weights."""
    MMLogger.get_current_instance().setLevel('WARNING')  # not a line for each parameter
    cfg = Config.fromfile(str(find_config(config)))
    library = config.partition('::')[0] if '::' in config else 'mmengine'
    scope = cfg.get('default_scope') or library
    if scope == 'mmdet':
        complete_operators(force=torchvision_ops)
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    if is_classifier(cfg):
        cfg.model.update(pretrained=False, **(dict(model_name=backbone) if backbone else {}))
        cfg.model.setdefault('num_classes', 1000)
        for key in ('mean', 'std'):
            cfg.model.data_preprocessor[key] = cfg.model.data_preprocessor.get(key) or (0.5,) * 3
    elif backbone:
        change_backbone(cfg.model, backbone, img_size)
    else:
        forget_weights(cfg.model)
    with DefaultScope.overwrite_default_scope(scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        model.init_weights()
    return model


def forget_weights(model: dict) -> None:
    """Take random weights where the config would download some."""
    if 'pretrained' in model:
        model.pretrained = None
    model.backbone.init_cfg = None
    if model.backbone.get('pretrained'):
        model.backbone.pretrained = False


def change_backbone(model: dict, name: str, img_size: Size) -> None:
    """Put a model of timm in place of a config's backbone, and its channels into neck and heads.

    Raises:
        ValueError: Neck or heads take another number of maps.
    """
    channels, kwargs = channels_of(name, img_size)
    if 'pretrained' in model:
        model.pretrained = None
    model.backbone = dict(type='VMZooBackbone', model_name=name, **kwargs)
    if model.get('neck'):
        if len(model.neck.in_channels) != len(channels):
            raise ValueError(f'{name} has {len(channels)} maps, the neck takes {len(model.neck.in_channels)}')
        model.neck.in_channels = list(channels)
        return
    for key in ('decode_head', 'auxiliary_head'):
        heads = model.get(key) or []
        for head in heads if isinstance(heads, list) else [heads]:
            index = head.get('in_index', -1)
            head.in_channels = [channels[i] for i in index] if isinstance(index, (list, tuple)) else channels[index]


def channels_of(name: str, img_size: Size) -> tuple[tuple[int, ...], dict]:
    """Channels of the maps, and the arguments without which a model refuses images of this size.

    Raises:
        AssertionError: It does in any case.
    """
    for kwargs in ({}, dict(img_size=img_size)):
        backbone = VMZooBackbone(name, device='meta', **kwargs).eval()
        try:
            backbone(torch.empty(1, 3, *img_size, device='meta'))
        except AssertionError:
            if kwargs:
                raise
            continue
        return backbone.out_channels, kwargs


def random_batch(model: torch.nn.Module, batch_size: int, img_size: Size) -> dict:
    """Random images and targets, prepared and on the model's device: arguments of its forward pass."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch_size, 3, *img_size), dtype=torch.uint8, generator=generator)
    library = library_of(model)
    sample = TASKS.get(library)
    if sample is None:
        data = dict(inputs=images, targets=torch.arange(batch_size))
    else:
        data = dict(inputs=list(images), data_samples=[sample(model, img_size, generator) for _ in images])
    if library == 'mmseg':  # its own size is that of the config's crops
        model.data_preprocessor.size, model.data_preprocessor.size_divisor = img_size, None
    return model.data_preprocessor(data, training=True)


def library_of(model: torch.nn.Module) -> str:
    return '' if isinstance(model, VMZooClassifier) else type(model).__module__.partition('.')[0]


def segmentation_sample(model: torch.nn.Module, img_size: Size, generator: torch.Generator):
    """A label for each pixel."""
    from mmseg.structures import SegDataSample

    labels = torch.randint(model.decode_head.num_classes, (1, *img_size), generator=generator)
    return SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=_sizes(img_size))


def detection_sample(model: torch.nn.Module, img_size: Size, generator: torch.Generator):
    """Ten boxes, whose masks they fill."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    height, width = img_size
    corners = torch.rand(BOXES, 2, generator=generator) * torch.tensor([width, height]) * 0.7
    boxes = torch.cat([corners, corners + torch.tensor([width, height]) * 0.2], 1)
    rows, columns = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    left, top, right, bottom = boxes.view(BOXES, 4, 1, 1).unbind(1)
    masks = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    instances = InstanceData(
        bboxes=boxes, labels=torch.zeros(BOXES, dtype=torch.long), masks=BitmapMasks(masks.byte().numpy(), *img_size)
    )
    sample = DetDataSample(gt_instances=instances, metainfo=dict(_sizes(img_size), scale_factor=(1.0, 1.0)))
    sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=torch.zeros(0, dtype=torch.long))
    return sample


def classification_sample(model: torch.nn.Module, img_size: Size, generator: torch.Generator):
    """The first class."""
    from mmpretrain.structures import DataSample

    return DataSample(metainfo=_sizes(img_size)).set_gt_label(0)


def _sizes(img_size: Size) -> dict:
    return dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), img_size)


TASKS = dict(mmseg=segmentation_sample, mmdet=detection_sample, mmpretrain=classification_sample)
