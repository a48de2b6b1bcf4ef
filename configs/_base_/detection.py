"""What every detection training shares: loops by epochs, logging, hooks."""

_base_ = 'mmdet::_base_/default_runtime.py'
custom_imports = dict(imports=['vmzoo.mm'], allow_failed_imports=False)

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# mmengine's own checkpoint hook is replaced by BestAndLastHook.
default_hooks = dict(checkpoint=None)
custom_hooks = [
    dict(type='StepSeedHook'),
    dict(type='NonFiniteLossHook'),
    dict(type='BestAndLastHook', metric='coco/bbox_mAP'),
    dict(type='ProgressHook'),
]
vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
visualizer = dict(type='DetLocalVisualizer', vis_backends=vis_backends, name='visualizer')
randomness = dict(seed=0)
