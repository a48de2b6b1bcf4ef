"""vmamba_tiny_s1l8, _s2l5, _0220 and vmamba_v0_tiny on ImageNet-1k, published with 82.6, 82.5, 82.5 and 82.2 top-1."""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='vmamba_tiny_s1l8', drop_path_rate=0.2)
