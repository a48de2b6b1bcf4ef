"""RetinaNet with EfficientVMamba-S on COCO, 12 epochs; the recipe is the usual one."""

_base_ = '../_base_/retinanet_1x_coco.py'

model = dict(
    backbone=dict(
        model_name='efficientvmamba_small',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='efficientvmamba_small.in1k'),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
