"""Mask R-CNN with VMamba-B of the first release on COCO, 12 epochs, published with 48.6 box AP and 43.3 mask AP."""

_base_ = '../_base_/mask_rcnn_1x_coco.py'

model = dict(
    backbone=dict(
        model_name='vmamba_v0_base',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='vmamba_v0_base.dp05_in1k'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
