"""mambaout_small on ImageNet-1k, published with 84.1 top-1."""

_base_ = 'mambaout_imagenet.py'

model = dict(model_name='mambaout_small', drop_path_rate=0.4)
