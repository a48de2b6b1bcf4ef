"""mobilemamba_b1, _b2 and _b4 on ImageNet-1k, published with 79.9, 81.6 and 82.5 top-1."""

_base_ = 'mobilemamba_imagenet.py'

model = dict(model_name='mobilemamba_b1', drop_path_rate=0.03)
