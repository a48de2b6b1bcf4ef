"""Semantic FPN with EfficientViM-M4 on ADE20K, published with 41.3 mIoU.

Published: 40,000 iterations of 32 images (8 GPUs with 4 each), AdamW with 2e-4 and a weight decay of 1e-4.
"""

_base_ = '../_base_/fpn_ade20k.py'

model = dict(
    backbone=dict(model_name='efficientvim_m4', init_cfg=dict(checkpoint='efficientvim_m4.e450_in1k')),
    neck=dict(in_channels=[224, 320, 512]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=0.9, by_epoch=False, begin=0, end=40_000)]
train_cfg = dict(max_iters=40_000, val_interval=4_000)
default_hooks = dict(checkpoint=dict(interval=4_000))
