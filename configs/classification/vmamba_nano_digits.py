"""vmamba_nano on scikit-learn's 1,797 handwritten digits: minutes on a CPU, nothing to download."""

_base_ = ['../_base_/classification.py']

model = dict(
    type='VMZooClassifier',
    model_name='vmamba_nano',
    num_classes=10,
    label_smoothing=0.1,
    data_preprocessor=dict(type='ImagePreprocessor', mean=(0.305,) * 3, std=(0.376,) * 3),
)

loader = dict(num_workers=0, collate_fn=dict(type='collate_readable'))
train_dataloader = dict(
    **loader,
    batch_size=64,
    drop_last=True,
    dataset=dict(type='DigitsDataset', split='train', input_size=(3, 32, 32), augment=True),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    **loader,
    batch_size=120,
    dataset=dict(type='DigitsDataset', split='val', input_size=(3, 32, 32)),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = dict(
    **loader,
    batch_size=120,
    dataset=dict(type='DigitsDataset', split='test', input_size=(3, 32, 32)),
    sampler=dict(type='DefaultSampler', shuffle=False),
)

train_cfg = dict(max_epochs=30)
# The average of the weights follows them closely at first, then over about 500 steps.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='EMAHook', ema_type='MomentumAnnealingEMA', momentum=0.002, gamma=10),
]
optim_wrapper = dict(
    constructor='VMZooOptimWrapperConstructor',
    optimizer=dict(type='adamw', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=2, T_max=28, convert_to_iter_based=True),
]

# Images this small are not worth sharing between cores: two threads wait for each other most of the time.
env_cfg = dict(num_threads=1)
