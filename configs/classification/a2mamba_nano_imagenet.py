"""a2mamba_nano on ImageNet-1k, published with 78.7 top-1.

Published: all below.
"""

_base_ = '../_base_/imagenet.py'

model = dict(
    model_name='a2mamba_nano',
    data_preprocessor=dict(mixup=dict(mixup_alpha=0.1)),
)
train_dataloader = dict(batch_size=256, dataset=dict(augment=dict(color_jitter=0.0)))
optim_wrapper = dict(optimizer=dict(lr=8e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1.25e-4, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=5, T_max=295, convert_to_iter_based=True),
]
custom_hooks = [hook for hook in _base_.custom_hooks if hook.type != 'EMAHook']
