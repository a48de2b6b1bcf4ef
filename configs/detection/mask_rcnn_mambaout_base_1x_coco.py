"""Mask R-CNN with MambaOut-B on COCO, 12 epochs.

The authors' hints: Swin's recipe, a norm on every map, a learning rate of 1e-4, stochastic depth of 0.6.
"""

_base_ = '../_base_/mask_rcnn_1x_coco.py'

model = dict(
    backbone=dict(
        model_name='mambaout_base',
        drop_path_rate=0.6,
        out_norms=True,
        init_cfg=dict(checkpoint='mambaout_base.in1k'),
    ),
    neck=dict(in_channels=[128, 256, 512, 768]),
)
