"""hrvmamba_nano and _tiny on ImageNet-1k, published with 74.8 and 78.6 top-1."""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='hrvmamba_nano', drop_path_rate=0.1)
