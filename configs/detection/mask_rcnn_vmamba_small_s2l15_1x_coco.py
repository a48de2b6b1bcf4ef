"""Mask R-CNN with VMamba-S on COCO, 12 epochs, published with 48.7 box AP and 43.7 mask AP."""

_base_ = '../_base_/mask_rcnn_1x_coco.py'

model = dict(
    backbone=dict(
        model_name='vmamba_small_s2l15',
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint='vmamba_small_s2l15.in1k'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
