"""Mask R-CNN with GroupMamba-T on COCO, 12 epochs; the authors published no recipe: this is the usual one."""

_base_ = '../_base_/mask_rcnn_1x_coco.py'

model = dict(
    backbone=dict(
        model_name='groupmamba_tiny',
        drop_path_rate=0.05,
        init_cfg=dict(checkpoint='groupmamba_tiny.dist_in1k'),
    ),
    neck=dict(in_channels=[64, 128, 348, 448]),
)
