"""vmamba_base_s1l20 on ImageNet-1k, published with 83.8 top-1."""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='vmamba_base_s1l20', drop_path_rate=0.5)
