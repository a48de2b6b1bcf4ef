"""UPerNet with EfficientVMamba-B on ADE20K, published with 46.5 mIoU; usual recipe, the classifier's drop path."""

_base_ = '../_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(
        model_name='efficientvmamba_base',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='efficientvmamba_base.in1k'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
