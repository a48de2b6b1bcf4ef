"""mambaout_femto and _kobe on ImageNet-1k, published with 78.9 and 80.0 top-1.

Published: 4,096 images, no averaged weights, and all below.
"""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='mambaout_femto', drop_path_rate=0.025)
train_dataloader = dict(batch_size=512)
optim_wrapper = dict(optimizer=dict(lr=4e-3), clip_grad=None)
param_scheduler = [
    dict(type='LinearLR', start_factor=2.5e-4, begin=0, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=20, T_max=280, convert_to_iter_based=True),
]
custom_hooks = [hook for hook in _base_.custom_hooks if hook.type != 'EMAHook']
