"""Head of Mamba-YOLO: decoupled, anchor-free, with distributions for the distances to a box's sides."""

import math
from collections.abc import Sequence

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.task_modules.prior_generators import MlvlPointGenerator
from mmdet.structures.bbox import bbox2distance, distance2bbox
from mmdet.utils import reduce_mean
from mmengine.dist import get_world_size
from mmengine.registry import MODELS, TASK_UTILS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from vmzoo.layers import ConvBnAct


@MODELS.register_module()
class MambaYOLOHead(BaseDenseHead):
    """YOLOv8's head: classification and box branches of three convolutions, of their own at each level.

    A box is four distances from a point to its sides, in units of the stride; each is the mean of a distribution over
    `reg_max` bins. Losses are sums over the batch, as in the published trainings, whose learning rate belongs to that.

    Args:
        num_classes: Classes of objects.
        in_channels: Channels of each level.
        strides: Strides of the levels.
        reg_max: Bins of a distance.
        image_size: Side of the images for which the bias of the scores is initialised, at five objects each.
        loss_cls: Binary cross entropy of scores and target scores.
        loss_bbox: Loss of boxes.
        loss_dfl: Loss of the distributions of distances.
        train_cfg: `assigner`: config of the assigner.
        test_cfg: As for mmdet's dense heads: `score_thr`, `nms_pre`, `nms`, `max_per_img`.
        init_cfg: As in mmengine; weights start as the published ones do without it.

    Raises:
        ValueError: `in_channels` and `strides` differ in length.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        strides: Sequence[int] = (8, 16, 32),
        reg_max: int = 16,
        image_size: int = 640,
        loss_cls: dict | None = None,
        loss_bbox: dict | None = None,
        loss_dfl: dict | None = None,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if len(in_channels) != len(strides):
            raise ValueError(f'in_channels {tuple(in_channels)} and strides {tuple(strides)} differ in length.')
        self.num_classes = self.cls_out_channels = num_classes
        self.use_sigmoid_cls = True
        self.reg_max = reg_max
        self.image_size = image_size
        self.train_cfg = train_cfg
        self.test_cfg = test_cfg
        self.prior_generator = MlvlPointGenerator(strides, offset=0.5)
        self.bbox_coder = TASK_UTILS.build(dict(type='mmdet.DistancePointBBoxCoder'))
        self.loss_cls = MODELS.build(loss_cls or dict(type='mmdet.CrossEntropyLoss', use_sigmoid=True, loss_weight=0.5))
        self.loss_bbox = MODELS.build(loss_bbox or dict(type='mmdet.CIoULoss', loss_weight=7.5))
        self.loss_dfl = MODELS.build(loss_dfl or dict(type='mmdet.DistributionFocalLoss', loss_weight=1.5))
        assigner = (train_cfg or {}).get('assigner') or dict(type='CenterFirstAssigner')
        self.assigner = TASK_UTILS.build(assigner)

        reg_dim = max(16, in_channels[0] // 4, 4 * reg_max)
        cls_dim = max(in_channels[0], min(num_classes, 100))
        self.reg_convs = nn.ModuleList(_branch(dim, reg_dim, 4 * reg_max) for dim in in_channels)
        self.cls_convs = nn.ModuleList(_branch(dim, cls_dim, num_classes) for dim in in_channels)
        self._init_biases()

    def _init_biases(self) -> None:
        for reg, cls, (stride, _) in zip(self.reg_convs, self.cls_convs, self.prior_generator.strides):
            nn.init.ones_(reg[-1].bias)
            nn.init.constant_(cls[-1].bias, math.log(5 / self.num_classes / (self.image_size / stride) ** 2))

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps [B, C_i, H_i, W_i] -> of each level, logits of classes [B, num_classes, H_i, W_i] and of the bins of the
        distances [B, 4 * reg_max, H_i, W_i]."""
        cls_scores = [conv(x) for conv, x in zip(self.cls_convs, maps)]
        return cls_scores, [conv(x) for conv, x in zip(self.reg_convs, maps)]

    def distances(self, bbox_preds: Sequence[Tensor]) -> list[Tensor]:
        """Logits of bins [B, 4 * reg_max, H, W] -> distances to left, top, right and bottom [B, 4, H, W], in pixels."""
        out = []
        for logits, (stride, _) in zip(bbox_preds, self.prior_generator.strides):
            bins = torch.arange(self.reg_max, device=logits.device, dtype=logits.dtype)
            probabilities = logits.unflatten(1, (4, self.reg_max)).softmax(dim=2)
            out.append((probabilities * bins[:, None, None]).sum(dim=2) * stride)
        return out

    def decode(self, cls_scores: Sequence[Tensor], bbox_preds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """All predictions, without a selection.

        Args:
            cls_scores: Logits of classes of each level, as `forward` returns them.
            bbox_preds: Logits of bins of each level.

        Returns:
            Corners of boxes [B, A, 4] in pixels, and probabilities of classes [B, A, num_classes], both in float32 at
            least.
        """
        cls_scores, bbox_preds = _at_least_float32(cls_scores), _at_least_float32(bbox_preds)
        points, _ = self._points(cls_scores)
        return distance2bbox(points, _flatten(self.distances(bbox_preds))), _flatten(cls_scores).sigmoid()

    def _points(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Points of all levels [A, 2], in pixels, and the stride of each [A, 1]."""
        priors = self.prior_generator.grid_priors(
            [tuple(x.shape[2:]) for x in maps], dtype=maps[0].dtype, device=maps[0].device, with_stride=True
        )
        priors = torch.cat(priors)
        return priors[:, :2], priors[:, 2:3]

    def loss_by_feat(
        self,
        cls_scores: Sequence[Tensor],
        bbox_preds: Sequence[Tensor],
        batch_gt_instances: Sequence[InstanceData],
        batch_img_metas: Sequence[dict],
        batch_gt_instances_ignore: Sequence[InstanceData] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch, in float32 at least.

        Args:
            cls_scores: Logits of classes of each level.
            bbox_preds: Logits of bins of each level.
            batch_gt_instances: `bboxes` [G, 4] and `labels` [G] of the objects of each image.
            batch_img_metas: Not looked at.
            batch_gt_instances_ignore: Not looked at.

        Returns:
            `loss_cls`, `loss_bbox` and `loss_dfl`.
        """
        cls_scores, bbox_preds = _at_least_float32(cls_scores), _at_least_float32(bbox_preds)
        points, strides = self._points(cls_scores)
        boxes, probabilities = self.decode(cls_scores, bbox_preds)
        logits, bins = _flatten(cls_scores), _flatten(bbox_preds)
        targets = [
            self._targets(points, boxes[i].detach(), probabilities[i].detach(), gt)
            for i, gt in enumerate(batch_gt_instances)
        ]
        target_scores, target_boxes, positive = (torch.stack(parts) for parts in zip(*targets))
        weight = target_scores.sum(dim=-1)[positive]
        total = reduce_mean(target_scores.sum()).clamp(min=1)

        loss_cls = self.loss_cls(logits.flatten(0, 1), target_scores.flatten(0, 1), avg_factor=total)
        if len(weight):
            points, strides = (x.expand(len(logits), -1, -1)[positive] for x in (points, strides))
            wanted = target_boxes[positive]
            loss_bbox = self.loss_bbox(boxes[positive], wanted, weight, avg_factor=total)
            distances = bbox2distance(points / strides, wanted / strides, max_dis=self.reg_max - 1, eps=0.01)
            loss_dfl = self.loss_dfl(
                bins[positive].view(-1, self.reg_max),
                distances.flatten(),
                weight.repeat_interleave(4),
                avg_factor=4 * total,
            )
        else:  # nothing to learn of boxes, but every parameter has a gradient
            loss_bbox = loss_dfl = 0 * bins.sum()
        batch = len(logits) * get_world_size()
        return dict(loss_cls=batch * loss_cls, loss_bbox=batch * loss_bbox, loss_dfl=batch * loss_dfl)

    def _targets(
        self, points: Tensor, boxes: Tensor, scores: Tensor, gt: InstanceData
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of one image: target scores [A, num_classes], target boxes [A, 4], and which predictions have one [A]."""
        gt = InstanceData(bboxes=gt.bboxes.to(boxes), labels=gt.labels)
        assigned = self.assigner.assign(InstanceData(priors=points, bboxes=boxes, scores=scores), gt)
        positive = assigned.gt_inds > 0
        target_scores, target_boxes = torch.zeros_like(scores), torch.zeros_like(boxes)
        target_scores[positive, assigned.labels[positive]] = assigned.assign_metrics[positive]
        target_boxes[positive] = gt.bboxes[assigned.gt_inds[positive] - 1]
        return target_scores, target_boxes, positive

    def predict_by_feat(
        self, cls_scores: Sequence[Tensor], bbox_preds: Sequence[Tensor], *args, **kwargs
    ) -> list[InstanceData]:
        """Objects of each image: `bboxes`, `scores` and `labels` after suppression.

        Args:
            cls_scores: Logits of classes of each level.
            bbox_preds: Logits of bins of each level.
            *args: Further arguments of mmdet's `BaseDenseHead.predict_by_feat`.
            **kwargs: The same.
        """
        cls_scores, bbox_preds = _at_least_float32(cls_scores), _at_least_float32(bbox_preds)
        return super().predict_by_feat(cls_scores, self.distances(bbox_preds), *args, **kwargs)


def _branch(in_dim: int, dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(ConvBnAct(in_dim, dim, 3), ConvBnAct(dim, dim, 3), nn.Conv2d(dim, out_dim, 1))


def _at_least_float32(maps: Sequence[Tensor]) -> list[Tensor]:
    """Half precision does not tell neighbouring pixels of an image apart."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in maps]


def _flatten(maps: Sequence[Tensor]) -> Tensor:
    """[B, C, H_i, W_i] of each level -> [B, A, C]."""
    return torch.cat([x.flatten(2) for x in maps], dim=2).mT
