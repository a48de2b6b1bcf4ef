"""Mask R-CNN with EfficientVMamba-T on COCO, 12 epochs: the published recipe, stochastic depth of the classifier."""

_base_ = '../_base_/mask_rcnn_1x_coco.py'

model = dict(
    backbone=dict(
        model_name='efficientvmamba_tiny',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='efficientvmamba_tiny.in1k'),
    ),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
