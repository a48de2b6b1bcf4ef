"""What trainings on ImageNet-1k share: the recipe of Swin, which VMamba and most others follow.

Published and usual: 300 epochs with 1,024 images (8 GPUs with 128 each), AdamW with 1e-3 and a weight decay of 0.05,
20 epochs of warm-up from 1e-6, a cosine to 1e-5, gradients clipped at 5, mixed precision, averaged weights,
RandAugment, mixup and cutmix, smoothed labels, erasing. With another batch, scale the learning rate.

The data: data/imagenet/{train,val}/<class>/*.JPEG. A config serves the models that its first line names:
`vmzoo train vmamba_tiny_imagenet --model vmamba_tiny_s2l5`. Input size and normalisation are the model's.
"""

_base_ = 'classification.py'

epochs, warmup = 300, 20

model = dict(
    type='VMZooClassifier',
    num_classes=1000,
    label_smoothing=0.1,
    data_preprocessor=dict(
        type='ImagePreprocessor',
        mean=None,
        std=None,
        mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0),
        random_erasing=0.25,
    ),
)

loader = dict(num_workers=8, batch_size=128, collate_fn=dict(type='collate_readable'))
dataset = dict(type='ImageFolderDataset', root='data/imagenet', input_size=None)
train_dataloader = dict(
    **loader,
    dataset=dict(**dataset, split='train', augment=dict(color_jitter=0.4, auto_augment='rand-m9-mstd0.5-inc1')),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    **loader, dataset=dict(**dataset, split='val'), sampler=dict(type='DefaultSampler', shuffle=False)
)
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=epochs)
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    constructor='VMZooOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=warmup, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=warmup, T_max=epochs - warmup, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=100))
custom_hooks = [*_base_.custom_hooks, dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=1e-4)]
