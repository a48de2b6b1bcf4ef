"""Which predictions answer for which object."""

import torch
from mmdet.models.task_modules.assigners import AssignResult, BaseAssigner
from mmengine.registry import TASK_UTILS
from mmengine.structures import InstanceData
from torch import Tensor
from torchvision.ops import complete_box_iou


@TASK_UTILS.register_module()
class CenterFirstAssigner(BaseAssigner):
    """Task-aligned assignment as the YOLO family has it (TOOD, https://arxiv.org/abs/2108.07755).

    An object goes to the `topk` predictions with the greatest `score**alpha * overlap**beta`. Two things differ from
    mmdet's `TaskAlignedAssigner`: only predictions from inside the object are candidates, so that small objects do not
    lose their places to points outside of them, and overlaps are complete IoUs.

    Args:
        topk: Predictions for each object, at most.
        alpha: Exponent of the score.
        beta: Exponent of the overlap.
    """

    def __init__(self, topk: int = 10, alpha: float = 0.5, beta: float = 6.0) -> None:
        self.topk = topk
        self.alpha = alpha
        self.beta = beta

    @torch.no_grad()
    def assign(
        self, pred_instances: InstanceData, gt_instances: InstanceData, gt_instances_ignore: InstanceData | None = None
    ) -> AssignResult:
        """Assign predictions to objects.

        Args:
            pred_instances: `priors` (points) [A, 2], `bboxes` [A, 4] and `scores` (probabilities) [A, num_classes].
            gt_instances: `bboxes` [G, 4] and `labels` [G].
            gt_instances_ignore: Not looked at.

        Returns:
            For each prediction its object, counted from 1, or 0; its class, or -1; its overlap; and as
            `assign_metrics` the score [A] that it should have: the alignment, scaled so that the best prediction for
            an object should reach its greatest overlap.
        """
        priors, gt_bboxes, gt_labels = pred_instances.priors, gt_instances.bboxes, gt_instances.labels
        num_priors, num_gts = len(priors), len(gt_bboxes)
        if not num_priors or not num_gts:
            return _result(num_gts, priors.new_zeros(num_priors, dtype=torch.long), priors.new_zeros(num_priors), None)

        overlaps = complete_box_iou(pred_instances.bboxes, gt_bboxes).clamp(min=0)  # [A, G]
        overlaps = overlaps * _inside(priors, gt_bboxes)
        alignment = pred_instances.scores[:, gt_labels] ** self.alpha * overlaps**self.beta
        best = alignment.topk(min(self.topk, num_priors), dim=0).indices
        candidates = torch.zeros_like(alignment, dtype=torch.bool).scatter_(0, best, True) & (alignment > 0)

        # of several objects, a prediction goes to the one that it overlaps most
        overlap, gt = overlaps.where(candidates, -1.0).max(dim=1)
        assigned = gt[:, None] == torch.arange(num_gts, device=gt.device)
        assigned &= (overlap >= 0)[:, None]
        alignment, overlaps = alignment * assigned, overlaps * assigned
        target = alignment / (alignment.amax(dim=0) + 1e-9) * overlaps.amax(dim=0)
        gt_inds = torch.where(overlap >= 0, gt + 1, 0)
        labels = torch.where(gt_inds > 0, gt_labels[gt], -1)
        return _result(num_gts, gt_inds, overlap.clamp(min=0), labels, target.amax(dim=1))


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Which points [A, 2] lie in which boxes [G, 4]: [A, G]."""
    distances = torch.cat((points[:, None] - boxes[:, :2], boxes[:, 2:] - points[:, None]), dim=-1)
    return distances.amin(dim=-1) > 1e-9


def _result(
    num_gts: int, gt_inds: Tensor, overlaps: Tensor, labels: Tensor | None, target: Tensor | None = None
) -> AssignResult:
    labels = torch.full_like(gt_inds, -1) if labels is None else labels
    result = AssignResult(num_gts, gt_inds, overlaps, labels=labels)
    result.assign_metrics = torch.zeros_like(overlaps) if target is None else target
    return result
