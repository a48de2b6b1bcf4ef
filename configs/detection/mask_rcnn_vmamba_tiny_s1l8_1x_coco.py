"""Mask R-CNN with VMamba-T (s1l8) on COCO, 12 epochs, published with 47.3 box AP and 42.7 mask AP."""

_base_ = '../_base_/mask_rcnn_1x_coco.py'

model = dict(
    backbone=dict(
        model_name='vmamba_tiny_s1l8',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='vmamba_tiny_s1l8.in1k'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
