"""groupmamba_tiny, _small and _base on ImageNet-1k, published with 83.3, 83.9 and 84.5 top-1.

Published beside the base's: stochastic depth, and a second classifier that learns from RegNetY-16GF. Teacher and second
classifier are left out.
"""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='groupmamba_tiny', drop_path_rate=0.05, model_kwargs=dict(distillation=False))
