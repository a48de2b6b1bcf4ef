"""An image classifier for mmengine's Runner around any timm model."""

import logging
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing


@MODELS.register_module()
class ImagePreprocessor(BaseDataPreprocessor):
    """Move a batch to the device, normalise it there and, while training, erase and mix images.

    Args:
        mean: Channel means of images in [0, 1].
        std: Channel standard deviations of images in [0, 1].
        num_classes: Number of classes; needed by mixup's soft targets.
        mixup: Arguments of `timm.data.Mixup` (mixup_alpha, cutmix_alpha, prob, ...); None turns mixing off.
        random_erasing: Probability that a rectangle of a training image is replaced by noise.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        num_classes: int | None = None,
        mixup: dict | None = None,
        random_erasing: float = 0.0,
    ) -> None:
        super().__init__(non_blocking=True)
        self.register_buffer('mean', 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)
        # Labels are smoothed once, by the loss, for mixed and unmixed targets alike.
        self.mixup = Mixup(**mixup, num_classes=num_classes, label_smoothing=0.0) if mixup else None
        self.random_erasing = random_erasing
        self._named: set[str] = set()

    def forward(self, data: dict, training: bool = False) -> dict:
        """Turn a collated batch into the classifier's arguments.

        Args:
            data: A batch of `collate_readable`.
            training: Whether to erase and mix.

        Returns:
            `inputs` float32 [B, C, H, W], `targets` int64 [B] or, after mixup, float32 [B, num_classes], and `paths`.

        Raises:
            ValueError: The batch holds a file that could not be read, and must not be skipped.
        """
        if data.get('errors'):
            raise ValueError(data['errors'][0])
        for path in data.get('broken', ()):
            if path not in self._named:
                self._named.add(path)
                print_log(f'skipped a file that is not a readable image: {path}', 'current', logging.WARNING)
        if 'inputs' not in data:
            raise ValueError('a whole batch of files is unreadable; the last of them is ' + path)
        data = self.cast_data(data)
        inputs, targets = data['inputs'], data['targets']
        inputs = (inputs.float() - self.mean) / self.std
        if training and self.random_erasing:
            inputs = RandomErasing(self.random_erasing, mode='pixel', device=inputs.device)(inputs)
        if training and self.mixup is not None and len(inputs) > 1:
            even = len(inputs) // 2 * 2  # mixup pairs image i with image B - 1 - i
            inputs, targets = self.mixup(inputs[:even], targets[:even])
        return dict(inputs=inputs, targets=targets, paths=data.get('paths'))


@MODELS.register_module()
class VMZooClassifier(BaseModel):
    """Any model of `timm.create_model`, with the losses and steps that mmengine's Runner asks for.

    Args:
        model_name: A name of `timm.list_models()`; vmzoo's families are among them.
        num_classes: Number of classes.
        pretrained: True for the published weights, or the path of a checkpoint file.
        in_chans: Number of image channels.
        drop_path_rate: Stochastic depth rate; 0 leaves the model's own default.
        label_smoothing: Share of the target spread evenly over all classes.
        model_kwargs: Further arguments of `timm.create_model`.
        data_preprocessor: Config of the preprocessor, normally an `ImagePreprocessor`.
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        pretrained: bool | str = False,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        label_smoothing: float = 0.0,
        model_kwargs: dict | None = None,
        data_preprocessor: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor=dict(data_preprocessor, num_classes=num_classes))
        kwargs = dict(model_kwargs or {}, pretrained=bool(pretrained), num_classes=num_classes, in_chans=in_chans)
        if isinstance(pretrained, str):
            kwargs['pretrained_cfg_overlay'] = dict(file=pretrained)
        self.backbone = self._create(model_name, drop_path_rate, kwargs)
        self.model_name = model_name
        self.model_kwargs = dict(model_kwargs or {})
        self.in_chans = in_chans
        self.label_smoothing = label_smoothing

    @staticmethod
    def _create(model_name: str, drop_path_rate: float, kwargs: dict) -> torch.nn.Module:
        if drop_path_rate:
            try:
                return timm.create_model(model_name, drop_path_rate=drop_path_rate, **kwargs)
            except TypeError as error:
                if 'drop_path_rate' not in str(error):
                    raise
            print_log(f'{model_name} has no stochastic depth: drop_path_rate is ignored', 'current', logging.WARNING)
        return timm.create_model(model_name, **kwargs)

    def init_weights(self) -> None:
        """Do nothing: timm initialised or loaded the weights, and mmengine would initialise them again."""

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor | None = None,
        paths: list[str] | None = None,
        mode: str = 'tensor',
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Classify images.

        Args:
            inputs: Normalised images [B, C, H, W].
            targets: Class indices [B] or class probabilities [B, num_classes]; needed for mode 'loss'.
            paths: Names of the images, for messages.
            mode: 'tensor' and 'predict' return logits, 'loss' the training loss.

        Returns:
            Logits [B, num_classes], or a dict with the scalar `loss`.
        """
        logits = self.backbone(inputs)
        if mode != 'loss':
            return logits.float()
        return dict(loss=F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing))

    def published(self, state_dict: dict[str, torch.Tensor], dataset) -> tuple[dict[str, torch.Tensor], dict]:
        """What best.pth holds: the backbone's weights, and what rebuilds it and prepares its images.

        Args:
            state_dict: Weights of this classifier.
            dataset: The validation dataset.

        Returns:
            The backbone's state dict, and a dict of plain values.
        """
        prefix = 'backbone.'
        weights = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        return weights, dict(
            model_name=self.model_name,
            model_kwargs=self.model_kwargs,
            num_classes=self.backbone.num_classes,
            in_chans=self.in_chans,
            classes=list(dataset.metainfo['classes']),
            data=dict(
                input_size=tuple(dataset.input_size),
                interpolation=dataset.interpolation,
                crop_pct=dataset.crop_pct,
                mean=(self.data_preprocessor.mean / 255).flatten().tolist(),
                std=(self.data_preprocessor.std / 255).flatten().tolist(),
            ),
        )
