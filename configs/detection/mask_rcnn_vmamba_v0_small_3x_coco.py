"""Mask R-CNN with VMamba-S of the first release on COCO, 36 epochs, published with 49.7 box AP and 44.0 mask AP."""

_base_ = '../_base_/mask_rcnn_3x_coco.py'

model = dict(
    backbone=dict(
        model_name='vmamba_v0_small',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='vmamba_v0_small.in1k'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
