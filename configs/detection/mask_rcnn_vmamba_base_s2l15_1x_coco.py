"""Mask R-CNN with VMamba-B on COCO, 12 epochs, published with 49.2 box AP and 44.1 mask AP."""

_base_ = '../_base_/mask_rcnn_1x_coco.py'

model = dict(
    backbone=dict(
        model_name='vmamba_base_s2l15',
        drop_path_rate=0.6,
        init_cfg=dict(checkpoint='vmamba_base_s2l15.in1k'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
