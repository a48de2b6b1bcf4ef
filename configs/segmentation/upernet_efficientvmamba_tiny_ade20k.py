"""UPerNet with EfficientVMamba-T on ADE20K; usual recipe, the classifier's drop path."""

_base_ = '../_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(
        model_name='efficientvmamba_tiny',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='efficientvmamba_tiny.in1k'),
    ),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192),
)
