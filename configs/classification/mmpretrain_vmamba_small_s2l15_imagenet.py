"""vmamba_small_s2l15 on ImageNet-1k with mmpretrain, published with 83.6 top-1."""

_base_ = '../_base_/mmpretrain_imagenet.py'

model = dict(
    backbone=dict(model_name='vmamba_small_s2l15', drop_path_rate=0.3),
    head=dict(in_channels=768),
)
