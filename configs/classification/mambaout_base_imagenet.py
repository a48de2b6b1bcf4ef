"""mambaout_base on ImageNet-1k, published with 84.2 top-1."""

_base_ = 'mambaout_imagenet.py'

model = dict(model_name='mambaout_base', drop_path_rate=0.6)
