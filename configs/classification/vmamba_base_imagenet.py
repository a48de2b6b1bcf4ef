"""vmamba_base_s2l15 and vmamba_v0_base on ImageNet-1k, published with 83.9 and 83.7 top-1."""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='vmamba_base_s2l15', drop_path_rate=0.6)
