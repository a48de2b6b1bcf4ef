"""What every classification training shares: loops, validation, logging, hooks."""

custom_imports = dict(imports=['vmzoo.mm'], allow_failed_imports=False)
default_scope = 'mmengine'

train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)
val_cfg = {}
test_cfg = {}
val_evaluator = dict(type='ClassificationMetric')
test_evaluator = dict(type='ClassificationMetric', with_confusion=True)

# mmengine's own checkpoint hook is replaced by BestAndLastHook.
default_hooks = dict(logger=dict(type='LoggerHook', interval=10), checkpoint=None)
custom_hooks = [
    dict(type='StepSeedHook'),
    dict(type='NonFiniteLossHook'),
    dict(type='BestAndLastHook', metric='top1'),
    dict(type='ProgressHook'),
]

visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')])
env_cfg = dict(cudnn_benchmark=True, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
randomness = dict(seed=0)
