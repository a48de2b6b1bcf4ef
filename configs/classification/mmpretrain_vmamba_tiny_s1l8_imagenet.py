"""vmamba_tiny_s1l8 on ImageNet-1k with mmpretrain, published with 82.6 top-1."""

_base_ = '../_base_/mmpretrain_imagenet.py'

model = dict(
    backbone=dict(model_name='vmamba_tiny_s1l8', drop_path_rate=0.2),
    head=dict(in_channels=768),
)
