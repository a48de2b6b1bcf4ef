"""RetinaNet with EfficientVMamba-B on COCO, 12 epochs; the recipe is the usual one."""

_base_ = '../_base_/retinanet_1x_coco.py'

model = dict(
    backbone=dict(
        model_name='efficientvmamba_base',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='efficientvmamba_base.in1k'),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
