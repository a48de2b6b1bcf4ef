"""Mask R-CNN with EfficientViM-M4 on COCO, 12 epochs, published with 39.7 box AP and 36.4 mask AP."""

_base_ = '../_base_/mask_rcnn_mobile_coco.py'

model = dict(
    backbone=dict(
        model_name='efficientvim_m4',
        init_cfg=dict(checkpoint='efficientvim_m4.e450_in1k'),
    ),
    neck=dict(in_channels=[224, 320, 512]),
)
