"""Mask R-CNN with MobileMamba-B1 on COCO, 12 epochs, published with 40.6 box AP and 37.4 mask AP.

Published beside the base's: gradients clipped at 0.1, a cosine over the second half.
"""

_base_ = '../_base_/mask_rcnn_mobile_coco.py'

model = dict(
    backbone=dict(
        model_name='mobilemamba_b1',
        drop_path_rate=0.03,
        init_cfg=dict(checkpoint='mobilemamba_b1.in1k'),
    ),
    neck=dict(in_channels=[200, 376, 448]),
)
optim_wrapper = dict(clip_grad=dict(max_norm=0.1))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='CosineAnnealingLR', eta_min=0.0, begin=6, end=12, T_max=6, convert_to_iter_based=True),
]
