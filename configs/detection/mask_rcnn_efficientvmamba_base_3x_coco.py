"""Mask R-CNN with EfficientVMamba-B on COCO, 36 epochs: the published recipe, stochastic depth of the classifier."""

_base_ = '../_base_/mask_rcnn_3x_coco.py'

model = dict(
    backbone=dict(
        model_name='efficientvmamba_base',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='efficientvmamba_base.in1k'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
