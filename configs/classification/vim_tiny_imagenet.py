"""vim_tiny_patch16_224 on ImageNet-1k, published with 76.1 top-1.

Published: all below, without mixed precision. Left out: repeated augmentation.
"""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='vim_tiny_patch16_224')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=1e-3, weight_decay=0.1), clip_grad=None)
train_dataloader = dict(dataset=dict(augment=dict(color_jitter=0.3)))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=5, T_max=295, convert_to_iter_based=True),
]
custom_hooks = [*_base_.custom_hooks[:-1], dict(_base_.custom_hooks[-1], momentum=4e-5)]
