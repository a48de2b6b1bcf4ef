"""shufflemamba_base on ImageNet-1k, published with 82.6 top-1.

Published: 2,048 images in bfloat16 and all below. Usual: colour jitter. Left out: repeated augmentation.
"""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='shufflemamba_base', drop_path_rate=0.5, model_kwargs=dict(shuffle_rate=0.5))
train_dataloader = dict(batch_size=256)
optim_wrapper = dict(
    optimizer=dict(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1),
    clip_grad=dict(max_norm=3.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=2.5e-4, begin=0, end=30, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=5e-6, begin=30, T_max=270, convert_to_iter_based=True),
]
