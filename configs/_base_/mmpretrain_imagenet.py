"""What trainings on ImageNet-1k with mmpretrain share: its recipe of Swin, which is that of `imagenet.py`.

A norm on the last map, its mean and a linear layer are VMamba's classifier. 1,024 images: 16 GPUs with 64 each.
"""

_base_ = [
    'mmpretrain::_base_/models/swin_transformer/tiny_224.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['vmzoo.mm'], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type='VMZooBackbone', out_indices=(-1,), out_norms=True), init_cfg=None)
optim_wrapper = dict(
    constructor='VMZooOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True),
    clip_grad=dict(max_norm=5.0),
)
custom_hooks = [dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=1e-4, priority='ABOVE_NORMAL')]
