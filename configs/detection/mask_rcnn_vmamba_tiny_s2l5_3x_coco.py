"""Mask R-CNN with VMamba-T (s2l5) on COCO, 36 epochs, published with 48.9 box AP and 43.7 mask AP."""

_base_ = '../_base_/mask_rcnn_3x_coco.py'

model = dict(
    backbone=dict(
        model_name='vmamba_tiny_s2l5',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='vmamba_tiny_s2l5.in1k'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
