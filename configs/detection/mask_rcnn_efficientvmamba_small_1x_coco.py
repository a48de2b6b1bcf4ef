"""Mask R-CNN with EfficientVMamba-S on COCO, 12 epochs: the published recipe, stochastic depth of the classifier."""

_base_ = '../_base_/mask_rcnn_1x_coco.py'

model = dict(
    backbone=dict(
        model_name='efficientvmamba_small',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='efficientvmamba_small.in1k'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
