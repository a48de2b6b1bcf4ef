"""lbvim_tiny, _300 and _small on ImageNet-1k.

Published: all below, without mixed precision. Left out: repeated augmentation.
"""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='lbvim_tiny', drop_path_rate=0.05)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=2e-3), clip_grad=None)
train_dataloader = dict(dataset=dict(augment=dict(color_jitter=0.3)))
param_scheduler = [
    dict(type='LinearLR', start_factor=5e-4, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=5, T_max=295, convert_to_iter_based=True),
]
custom_hooks = [*_base_.custom_hooks[:-1], dict(_base_.custom_hooks[-1], momentum=4e-5)]
