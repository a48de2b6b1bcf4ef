"""vmamba_small_s2l15, _s1l20 and vmamba_v0_small on ImageNet-1k, published with 83.6, 83.3 and 83.5 top-1."""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='vmamba_small_s2l15', drop_path_rate=0.3)
