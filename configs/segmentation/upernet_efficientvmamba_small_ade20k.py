"""UPerNet with EfficientVMamba-S on ADE20K; usual recipe, the classifier's drop path."""

_base_ = '../_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(
        model_name='efficientvmamba_small',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='efficientvmamba_small.in1k'),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
