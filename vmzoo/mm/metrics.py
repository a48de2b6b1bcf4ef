"""Accuracy and confusion matrix of a classifier."""

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from sklearn.metrics import confusion_matrix


@METRICS.register_module()
class ClassificationMetric(BaseMetric):
    """Top-1 and top-5 accuracy in per cent; top-5 is left out for five classes or fewer.

    Args:
        with_confusion: Whether to add the confusion matrix (rows: true classes) to the results.
    """

    default_prefix = ''

    def __init__(self, with_confusion: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        self.with_confusion = with_confusion
        self.num_classes = 0

    def process(self, data_batch: dict, data_samples: Sequence[torch.Tensor]) -> None:
        """Note targets and best classes of a batch; `data_samples` are rows of logits [num_classes]."""
        logits = torch.stack(list(data_samples))
        self.num_classes = logits.shape[1]
        best = logits.topk(min(5, self.num_classes)).indices.tolist()
        self.results.extend(zip(data_batch['targets'].tolist(), best))

    def compute_metrics(self, results: list[tuple[int, list[int]]]) -> dict:
        """Accuracy over all images that could be read."""
        metrics = dict(top1=100 * sum(target == best[0] for target, best in results) / len(results))
        if self.num_classes > 5:
            metrics['top5'] = 100 * sum(target in best for target, best in results) / len(results)
        if self.with_confusion:
            targets, predicted = zip(*((target, best[0]) for target, best in results))
            metrics['confusion'] = confusion_matrix(targets, predicted, labels=range(self.num_classes)).tolist()
        return metrics
