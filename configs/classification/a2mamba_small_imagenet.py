"""a2mamba_small on ImageNet-1k, published with 84.7 top-1.

Published: all below, and from epoch 75 also a loss against the averaged weights (MESA), which is left out.
"""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='a2mamba_small', drop_path_rate=0.2)
train_dataloader = dict(batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=5e-4, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=5, T_max=295, convert_to_iter_based=True),
]
