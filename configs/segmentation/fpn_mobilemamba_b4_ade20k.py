"""Semantic FPN with MobileMamba-B4 on ADE20K, published with 42.5 mIoU.

Published: AdamW with 1.2e-4 and a weight decay of 0.05, 160,000 iterations. Usual: 16 images, a decay of power 0.9.
"""

_base_ = '../_base_/fpn_ade20k.py'

model = dict(
    backbone=dict(model_name='mobilemamba_b4', drop_path_rate=0.03, init_cfg=dict(checkpoint='mobilemamba_b4.in1k')),
    neck=dict(in_channels=[200, 376, 448]),
)
