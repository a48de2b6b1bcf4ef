"""mambaout_tiny on ImageNet-1k, published with 82.7 top-1."""

_base_ = 'mambaout_imagenet.py'

model = dict(model_name='mambaout_tiny', drop_path_rate=0.2)
