"""hrvmamba_base and _small on ImageNet-1k, published with 84.2 and 81.3 top-1."""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='hrvmamba_base', drop_path_rate=0.2)
