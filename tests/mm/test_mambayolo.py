"""Mamba-YOLO for mmdet: assignment, losses, predictions, configs, and that it learns."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torchvision.ops import complete_box_iou

pytest.importorskip('mmdet')

from mmcv.transforms import Compose
from mmdet.datasets import CocoDataset
from mmdet.evaluation.functional import eval_map
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner, load_checkpoint
from mmengine.structures import InstanceData

from vmzoo.mm import config_folder
from vmzoo.mm.mambayolo import CenterFirstAssigner, MambaYOLOHead, MambaYOLOPAFPN

SIZES = ('tiny', 'base', 'large')
SMALL = dict(depths=(1, 1, 1, 1), embed_dim=(8, 8, 16, 24), d_state=2)
CHANNELS = (8, 16, 24)


@pytest.fixture(autouse=True)
def mmdet_scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def config(size: str = 'tiny', num_classes: int = 3, **backbone) -> Config:
    """A config of the zoo, with a network of the least width and depth."""
    cfg = Config.fromfile(config_folder() / f'detection/mambayolo_{size}_coco.py')
    cfg.model.backbone.update(SMALL, **backbone)
    cfg.model.neck.update(in_channels=CHANNELS, d_state=2)
    cfg.model.bbox_head.update(in_channels=CHANNELS, num_classes=num_classes)
    return cfg


def detector(*args, **kwargs) -> nn.Module:
    return MODELS.build(config(*args, **kwargs).model)


def objects(boxes=(), labels=()) -> InstanceData:
    return InstanceData(bboxes=torch.tensor(boxes).reshape(-1, 4).float(), labels=torch.tensor(labels).long())


def sample(gt: InstanceData, height: int = 64, width: int = 64) -> DetDataSample:
    shape = (height, width)
    data = DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0)))
    data.gt_instances = gt
    return data


SOME = ([[4, 8, 36, 40], [30, 20, 60, 60]], [0, 2])


# Assignment


def assign(assigner, boxes, scores, gt, points=None):
    points = (boxes[:, :2] + boxes[:, 2:]) / 2 if points is None else points
    return assigner.assign(InstanceData(priors=points, bboxes=boxes, scores=scores), gt)


def test_the_best_aligned_predictions_inside_are_taken():
    gt = objects([[0, 0, 40, 40], [60, 60, 90, 90]], [1, 0])
    points = torch.tensor([[20, 20], [10, 10], [30, 30], [39, 39], [50, 20], [75, 75]]).float()
    boxes = torch.cat((points - 18, points + 18), dim=1)
    scores = torch.full((6, 2), 0.5)
    scores[3] = 1e-3
    result = assign(CenterFirstAssigner(topk=3), boxes, scores, gt, points)
    assert result.gt_inds.tolist() == [1, 1, 1, 0, 0, 2]
    assert result.labels.tolist() == [1, 1, 1, -1, -1, 0]
    overlaps = complete_box_iou(boxes, gt.bboxes)
    torch.testing.assert_close(result.max_overlaps, overlaps.amax(1).where(result.gt_inds > 0, 0.0))
    # the best one of each object should reach its overlap, others less in proportion to their alignment
    metric = scores[:, [1, 0]].sqrt() * overlaps.clamp(min=0) ** 6
    want = metric[:3, 0] / metric[0, 0] * overlaps[0, 0]
    torch.testing.assert_close(result.assign_metrics[:3], want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.assign_metrics[5], overlaps[5, 1])
    assert not result.assign_metrics[3:5].any()


def test_a_place_is_not_lost_to_a_point_outside():
    gt = objects([[0, 0, 8, 8]], [0])
    points = torch.tensor([[4.0, 4.0], [12.0, 4.0]])
    boxes = torch.tensor([[0, 0, 16, 16], [0, 0, 8, 8]]).float()
    result = assign(CenterFirstAssigner(topk=1), boxes, torch.ones(2, 1), gt, points)
    assert result.gt_inds.tolist() == [1, 0]


def test_a_prediction_goes_to_the_object_that_it_overlaps_most():
    gt = objects([[0, 0, 20, 20], [5, 5, 25, 25]], [0, 0])
    boxes = torch.tensor([[4, 4, 24, 24], [0, 0, 19, 19]]).float()
    result = assign(CenterFirstAssigner(), boxes, torch.ones(2, 1), gt)
    assert result.gt_inds.tolist() == [2, 1]


@pytest.mark.parametrize(('priors', 'gts'), [(0, 2), (3, 0), (0, 0)])
def test_nothing_to_assign(priors, gts):
    gt = objects([[0, 0, 8, 8]] * gts, [0] * gts)
    result = assign(CenterFirstAssigner(), torch.rand(priors, 4), torch.ones(priors, 2), gt)
    assert result.gt_inds.tolist() == [0] * priors
    assert result.labels.tolist() == [-1] * priors
    assert result.assign_metrics.tolist() == [0] * priors


# Neck and head


def test_levels_keep_their_shapes():
    neck = MambaYOLOPAFPN(CHANNELS, num_scans=2, d_state=2).eval()
    maps = [torch.randn(2, dim, 3 * size, 5 * size) for dim, size in zip(CHANNELS, (4, 2, 1))]
    assert [y.shape for y in neck(maps)] == [x.shape for x in maps]
    assert len(neck.top_down[0].ss2d) == 2


def test_wrong_image_size_is_named():
    with pytest.raises(ValueError, match='pad_size_divisor=32'):
        detector()(torch.randn(1, 3, 64, 80))


def test_levels_and_strides_must_agree():
    with pytest.raises(ValueError, match='differ in length'):
        MambaYOLOHead(3, CHANNELS, strides=(8, 16))


@pytest.mark.parametrize(('channels', 'num_classes', 'want'), [((64, 128), 80, (64, 80)), ((320, 320), 3, (80, 320))])
def test_widths_of_the_branches_are_those_of_the_first_level(channels, num_classes, want):
    head = MambaYOLOHead(num_classes, channels, strides=(8, 16))
    for branches, dim in zip((head.reg_convs, head.cls_convs), want):
        assert [conv[1].conv.out_channels for conv in branches] == [dim, dim]


def test_initial_scores_expect_five_objects():
    head = MambaYOLOHead(4, CHANNELS)
    for conv, stride in zip(head.cls_convs, (8, 16, 32)):
        assert conv[-1].bias.exp().sum().item() * (640 / stride) ** 2 == pytest.approx(5, rel=1e-4)
    assert all((conv[-1].bias == 1).all() for conv in head.reg_convs)


def test_boxes_are_decoded_around_the_points():
    head = MambaYOLOHead(2, (8,), strides=(4,), reg_max=8)
    bins = torch.tensor([[1, 2, 3, 5]])  # left, top, right, bottom
    logits = nn.functional.one_hot(bins, 8).float().mul(100).view(1, 32, 1, 1).expand(1, 32, 2, 3)
    boxes, scores = head.decode([torch.zeros(1, 2, 2, 3)], [logits])
    assert scores.shape == (1, 6, 2)
    torch.testing.assert_close(boxes[0, 5], torch.tensor([10.0 - 4, 6 - 8, 10 + 12, 6 + 20]))


# Losses


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('gt', [SOME, ((), ())], ids=['objects', 'none'])
def test_every_parameter_learns(size, gt):
    model = detector(size, num_classes=4).train()
    losses = model.loss(torch.rand(2, 3, 64, 96), [sample(objects(*gt)), sample(objects(*SOME))])
    assert losses.keys() == {'loss_cls', 'loss_bbox', 'loss_dfl'}
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_images_without_objects():
    """Every score should be zero, and boxes do not matter."""
    model = detector().train()
    x = torch.rand(2, 3, 64, 64)
    maps = model.extract_feat(x)
    losses = model.bbox_head.loss(maps, [sample(objects())] * 2)
    scores = torch.cat([y.flatten() for y in model.bbox_head(maps)[0]])
    want = 2 * 0.5 * nn.functional.softplus(scores).sum()
    torch.testing.assert_close(losses['loss_cls'], want)
    assert losses['loss_bbox'] == losses['loss_dfl'] == 0
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_losses_are_the_stated_ones():
    head = MambaYOLOHead(3, CHANNELS).double()
    gt = [objects(*SOME), objects()]
    scores = [torch.randn(2, 3, 64 // s, 64 // s, dtype=torch.float64) for s in (8, 16, 32)]
    preds = [torch.randn(2, 64, 64 // s, 64 // s, dtype=torch.float64) for s in (8, 16, 32)]
    got = head.loss_by_feat(scores, preds, gt, [{}, {}])

    boxes, probabilities = head.decode(scores, preds)
    logits = torch.cat([y.flatten(2) for y in scores], 2).mT[0]
    bins = torch.cat([y.flatten(2) for y in preds], 2).mT[0].unflatten(-1, (4, 16)).log_softmax(-1)
    grid = [(x, y, s) for s in (8, 16, 32) for y, x in itertools.product(range(64 // s), repeat=2)]
    points = torch.tensor([((x + 0.5) * s, (y + 0.5) * s) for x, y, s in grid], dtype=torch.float64)
    first = InstanceData(bboxes=gt[0].bboxes.double(), labels=gt[0].labels)
    result = assign(CenterFirstAssigner(), boxes[0], probabilities[0], first, points)
    targets = torch.zeros_like(logits)
    box = dfl = 0
    for i, (index, label, weight) in enumerate(zip(result.gt_inds, result.labels, result.assign_metrics)):
        if index:
            targets[i, label] = weight
            wanted = first.bboxes[index - 1]
            iou = complete_box_iou(boxes[0, i : i + 1], wanted[None]).item()
            plain = torch.tensor([points[i, 0] - wanted[0], points[i, 1] - wanted[1]])
            distances = torch.cat((plain, wanted[2:] - points[i])) / grid[i][2]
            box += weight * (1 - iou)
            for side, distance in zip(bins[i], distances.clamp(0, 15 - 0.01).tolist()):
                left = int(distance)
                dfl -= weight / 4 * (side[left] * (left + 1 - distance) + side[left + 1] * (distance - left))
    total = max(targets.sum(), 1)
    everything = torch.cat([y.flatten() for y in scores])
    cls = nn.functional.softplus(everything).sum() - (targets * logits).sum()
    for key, want in (('cls', 0.5 * cls), ('bbox', 7.5 * box), ('dfl', 1.5 * dfl)):
        # below an IoU of one half, mmdet leaves out what the shape of a box adds
        rtol = 0.02 if key == 'bbox' else 1e-5
        torch.testing.assert_close(got[f'loss_{key}'], 2 * want / total, rtol=rtol, atol=1e-5)


def test_processes_train_as_one_with_the_whole_batch_does(monkeypatch):
    from vmzoo.mm.mambayolo import head as module

    head = MambaYOLOHead(3, CHANNELS)
    gt = [objects(*SOME), objects([[0, 0, 30, 60]], [1]), objects(), objects(*SOME)]
    scores = [torch.randn(4, 3, 64 // s, 64 // s) for s in (8, 16, 32)]
    preds = [torch.randn(4, 64, 64 // s, 64 // s) for s in (8, 16, 32)]
    for y in preds:
        y[:, 2::16] += 5  # boxes of about four strides, which some objects have
    totals = []
    monkeypatch.setattr(module, 'reduce_mean', lambda total: totals.append(total) or total)
    want = head.loss_by_feat(scores, preds, gt, [{}] * 4)
    assert totals[0] > 2
    monkeypatch.setattr(module, 'get_world_size', lambda: 2)
    monkeypatch.setattr(module, 'reduce_mean', lambda total: totals[0] / 2)
    halves = [
        head.loss_by_feat([y[half] for y in scores], [y[half] for y in preds], gt[half], [{}] * 2)
        for half in (slice(2), slice(2, 4))
    ]
    for key, value in want.items():
        torch.testing.assert_close((halves[0][key] + halves[1][key]) / 2, value)


def test_losses_of_half_precision_are_computed_in_float32():
    head = MambaYOLOHead(3, CHANNELS)
    scores = [torch.randn(1, 3, 64 // s, 64 // s).bfloat16() for s in (8, 16, 32)]
    preds = [torch.randn(1, 64, 64 // s, 64 // s).bfloat16() for s in (8, 16, 32)]
    losses = head.loss_by_feat(scores, preds, [objects(*SOME)], [{}])
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


# Predictions and deployment


@pytest.mark.parametrize(('channels', 'num_classes', 'size'), [(3, 3, (64, 96)), (1, 1, (32, 32)), (5, 7, (96, 64))])
def test_predictions_are_instances(channels, num_classes, size):
    model = detector(num_classes=num_classes, in_channels=channels).eval()
    for conv in model.bbox_head.cls_convs:
        nn.init.constant_(conv[-1].bias, -2)
    data = [sample(objects(), *size) for _ in range(2)]
    for data_sample in data:
        data_sample.set_metainfo(dict(scale_factor=(0.5, 0.5)))
    with torch.no_grad():
        out = model.predict(torch.rand(2, channels, *size), data)
    for item in out:
        found = item.pred_instances
        assert 0 < len(found) <= 300
        assert found.bboxes.shape == (len(found), 4)
        assert (found.bboxes >= 0).all()
        assert (found.bboxes <= 2 * torch.tensor([size[1], size[0]] * 2)).all()
        assert (found.bboxes[:, :2] <= found.bboxes[:, 2:]).all()
        assert (found.scores.diff() <= 0).all() and found.scores.min() > 0.001
        assert found.labels.min() >= 0 and found.labels.max() < num_classes


def test_half_precision_moves_no_box():
    head = MambaYOLOHead(2, (8,), strides=(8,))
    logits = torch.randn(1, 64, 4, 90).half()
    boxes, _ = head.decode([torch.zeros(1, 2, 4, 90).half()], [logits])
    want, _ = head.decode([torch.zeros(1, 2, 4, 90)], [logits.float()])
    torch.testing.assert_close(boxes, want)


def test_overlapping_boxes_of_a_class_are_suppressed():
    head = MambaYOLOHead(2, (8,), strides=(8,), test_cfg=config().model.test_cfg)
    logits = torch.zeros(1, 64, 4, 4)
    logits[:, 3::16] = 100  # all sides at three strides
    scores = torch.full((1, 2, 4, 4), -20.0)
    scores[0, :, 1, 1] = 2
    scores[0, 0, 1, 2] = 1  # beside it: an IoU of 5 / 7
    found = head.predict_by_feat([scores], [logits], batch_img_metas=[dict(img_shape=(100, 100))])[0]
    assert found.labels.tolist() == [0, 1]
    assert found.bboxes.tolist() == [[0, 0, 36, 36]] * 2


def test_deployed_detector_is_exported():
    model = detector()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    model.eval()
    x = torch.rand(2, 3, 64, 96)
    deployed = model.deploy()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    with torch.no_grad():
        boxes, scores = model.bbox_head.decode(*model(x))
        got = deployed(x)
        exported = torch.export.export(deployed, (x,)).module()(x)
    corners = torch.cat((got[:, :2] - got[:, 2:4] / 2, got[:, :2] + got[:, 2:4] / 2), dim=1).mT
    torch.testing.assert_close(corners, boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(got[:, 4:].mT, scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(exported, got, rtol=1e-4, atol=1e-4)


def test_own_weights_load_too():
    source, model = detector(), detector()
    model.load_state_dict(source.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values()))


# Learning


def pictures(size: int = 64) -> tuple[torch.Tensor, list[InstanceData]]:
    """Red and blue rectangles on noise."""
    found = [([[4, 6, 34, 30]], [0]), ([[20, 24, 58, 60]], [1]), ([[2, 34, 30, 62], [34, 4, 60, 26]], [0, 1])]
    images = 0.3 * torch.rand(len(found), 3, size, size)
    for image, (boxes, labels) in zip(images, found):
        for (left, top, right, bottom), label in zip(boxes, labels):
            image[2 * label, top:bottom, left:right] = 1
    return images, [objects(*gt) for gt in found]


def test_learns_three_pictures_by_heart():
    model = detector(num_classes=2).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # there are few steps to follow
    images, gt = pictures()
    data = [sample(instances) for instances in gt]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for _ in range(70):
        losses = model.loss(images, data)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.25 * history[0]
    with torch.no_grad():
        found = [item.pred_instances for item in model.eval().predict(images, data)]
    results = [
        [torch.cat((y.bboxes, y.scores[:, None]), 1)[y.labels == label].numpy() for label in range(2)] for y in found
    ]
    wanted = [dict(bboxes=instances.bboxes.numpy(), labels=instances.labels.numpy()) for instances in gt]
    score, _ = eval_map(results, wanted, iou_thr=0.5, logger='silent')
    assert score > 0.9


# Configs


@pytest.fixture(scope='module')
def coco(tmp_path_factory) -> Path:
    """Six pictures in COCO's format, one of them without objects."""
    import cv2

    root = tmp_path_factory.mktemp('coco')
    for split in ('train2017', 'val2017'):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(6):
            picture = np.full((60 + 8 * i, 90, 3), 60, dtype=np.uint8)
            images.append(dict(id=i, file_name=f'{i}.png', height=picture.shape[0], width=picture.shape[1]))
            if i:
                picture[10:50, 20:70] = 200
                box = dict(bbox=[20, 10, 50, 40], area=2000, category_id=1 + i % 2, iscrowd=0)
                annotations.append(dict(id=i, image_id=i, **box))
            cv2.imwrite(str(root / split / f'{i}.png'), picture)
        categories = [dict(id=1 + i, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'])]
        (root / 'annotations').mkdir(exist_ok=True)
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(content))
    return root


def on(coco: Path, cfg: Config) -> Config:
    """The config with these pictures for data, small batches, and no processes of their own for loading."""
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{coco}/'
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = f'{coco}/annotations/instances_val2017.json'
    return cfg


def test_pictures_go_through_both_pipelines(coco):
    cfg = on(coco, config(num_classes=80))
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(dataset) == 6  # those without objects too
    switch = next(hook for hook in cfg.custom_hooks if hook.type == 'PipelineSwitchHook')
    assert 'Mosaic' in str(cfg.train_pipeline) and 'Mosaic' not in str(switch.switch_pipeline)
    for pipeline in (dataset.pipeline, Compose(switch.switch_pipeline)):
        items = [pipeline(dataset.get_data_info(i % 6) | {'dataset': dataset}) for i in range(8)]
        assert {tuple(item['inputs'].shape) for item in items} == {(3, 640, 640)}
        assert sum(len(item['data_samples'].gt_instances) for item in items) > 4
    test = DATASETS.build(cfg.test_dataloader.dataset)[1]
    assert test['inputs'].shape == (3, 484, 640)
    data = MODELS.build(cfg.model.data_preprocessor)(dict(inputs=[test['inputs']], data_samples=[test['data_samples']]))
    assert data['inputs'].shape == (1, 3, 512, 640)
    assert data['inputs'][0, :, 500].unique().item() == pytest.approx(114 / 255)


def test_a_config_trains_and_evaluates(coco, tmp_path):
    """Two short epochs of the whole recipe, the second without mosaics: averages, warm-up, evaluation."""
    cfg = on(coco, config(num_classes=80))
    cfg.merge_from_dict(dict(work_dir=str(tmp_path), log_level='ERROR', train_cfg=dict(max_epochs=2, val_interval=2)))
    for pipeline in (cfg.train_dataloader.dataset.pipeline, cfg.custom_hooks[1].switch_pipeline):
        for transform in pipeline:
            for key in ('crop_size', 'img_scale', 'size', 'scale'):
                if key in transform:
                    transform[key] = (64, 64)
    cfg.custom_hooks[1].switch_epoch = 1
    cfg.val_dataloader.dataset.pipeline[1].scale = (64, 64)
    cfg.default_hooks.checkpoint.update(interval=1, save_best=None)
    cfg.model.test_cfg.score_thr = 0  # all that a network says that has learned nothing
    cfg.param_scheduler[0].end = cfg.param_scheduler[1].end = 1
    runner = Runner.from_cfg(cfg)
    groups = runner.build_optim_wrapper(cfg.optim_wrapper).optimizer.param_groups
    decayed = {id(p) for group in groups if group['weight_decay'] for p in group['params']}
    names = {name.rpartition('.')[2] for name, p in runner.model.named_parameters() if id(p) in decayed}
    assert names == {'weight', 'x_proj_weight', 'dt_projs_weight'}
    runner.train()
    scalars = runner.message_hub.log_scalars
    assert np.isfinite(scalars['train/loss'].data[0]).all()
    assert 0 <= scalars['val/coco/bbox_mAP'].data[0][-1] <= 1
    saved = load_checkpoint(MODELS.build(cfg.model), str(tmp_path / 'epoch_2.pth'), strict=True)
    bias = 'bbox_head.cls_convs.0.2.bias'
    assert not torch.equal(saved['state_dict'][bias], saved['ema_state_dict'][f'module.{bias}'])  # average and last


def test_metafile_lists_the_configs():
    root = config_folder().parent
    meta = yaml.safe_load((config_folder() / 'detection/metafile.yml').read_text(encoding='utf-8'))
    collections = {collection['Name'] for collection in meta['Collections']}
    models = {model['Name']: model for model in meta['Models']}
    assert {f'mambayolo_{size}_coco' for size in SIZES} <= models.keys()
    for name, model in models.items():
        assert model['In Collection'] in collections
        assert Path(model['Config']).stem == name
        assert (root / model['Config']).is_file()


@pytest.mark.parametrize('size', SIZES)
def test_metafile_has_the_size_and_the_config_the_widths(size):
    cfg = Config.fromfile(config_folder() / f'detection/mambayolo_{size}_coco.py')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    meta = yaml.safe_load((config_folder() / 'detection/metafile.yml').read_text(encoding='utf-8'))
    stated = next(m for m in meta['Models'] if m['Name'] == f'mambayolo_{size}_coco')
    assert sum(p.numel() for p in model.parameters()) == stated['Metadata']['Parameters']
    assert model.backbone.out_channels == model.neck.in_channels
    assert stated['Results'][0]['Metrics']['box AP'] == float(cfg.text.split(' AP')[0].split()[-1])
