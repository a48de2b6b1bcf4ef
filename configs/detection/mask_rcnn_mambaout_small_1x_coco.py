"""Mask R-CNN with MambaOut-S on COCO, 12 epochs.

The authors' hints: Swin's recipe, a norm on every map, a learning rate of 1e-4, stochastic depth of 0.3 to 0.4.
"""

_base_ = '../_base_/mask_rcnn_1x_coco.py'

model = dict(
    backbone=dict(
        model_name='mambaout_small',
        drop_path_rate=0.4,
        out_norms=True,
        init_cfg=dict(checkpoint='mambaout_small.in1k'),
    ),
    neck=dict(in_channels=[96, 192, 384, 576]),
)
