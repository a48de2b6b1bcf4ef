"""RetinaNet with EfficientViM-M4 on COCO, 12 epochs, published with 38.8 AP."""

_base_ = '../_base_/retinanet_mobile_coco.py'

model = dict(
    backbone=dict(
        model_name='efficientvim_m4',
        init_cfg=dict(checkpoint='efficientvim_m4.e450_in1k'),
    ),
    neck=dict(in_channels=[224, 320, 512]),
)
