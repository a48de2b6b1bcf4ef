"""efficientvim_m1 to _m4 on ImageNet-1k, published with 72.9, 75.4, 77.6 and 79.4 top-1.

Published: 300 epochs and 10 at the lowest rate, 2,048 images, and all below. Left out: the loss against the averaged
weights from a quarter of the training on, and for the _dist models the teacher.
"""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='efficientvim_m1')
train_cfg = dict(max_epochs=310)
train_dataloader = dict(batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=0.02))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=2e-5, begin=20, end=300, T_max=280, convert_to_iter_based=True),
]
custom_hooks = [*_base_.custom_hooks[:-1], dict(_base_.custom_hooks[-1], momentum=5e-4)]
