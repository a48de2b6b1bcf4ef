"""RetinaNet with EfficientVMamba-T on COCO, 12 epochs, published with 37.5 AP; the recipe is the usual one."""

_base_ = '../_base_/retinanet_1x_coco.py'

model = dict(
    backbone=dict(
        model_name='efficientvmamba_tiny',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='efficientvmamba_tiny.in1k'),
    ),
    neck=dict(in_channels=[96, 192, 384]),
)
