"""What RSMamba's trainings share, for scenes seen from above.

Published: 500 epochs from random weights with 16 images a GPU in the configs (1,024 in the paper), AdamW with 5e-4, 10
epochs of warm-up, a cosine to 1e-5, both flips, AutoAugment, mixup and cutmix; no averaged weights, no stochastic
depth. Their optimiser decays all parameters, this one no norms, biases and nothing that a scan is sensitive to.

The data: DIR/{train,val}/<class>/*.jpg by the authors' lists. Classes are in alphabetical order, in the published heads
they are not.
"""

_base_ = 'imagenet.py'

epochs, warmup = 500, 10

model = dict(
    data_preprocessor=dict(random_erasing=0.0),
)
train_dataloader = dict(
    batch_size=16,
    dataset=dict(augment=dict(scale=(0.4, 1.0), vflip=0.5, color_jitter=0.0, auto_augment='original')),
)
train_cfg = dict(max_epochs=epochs)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=5e-4), clip_grad=None)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=warmup, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=warmup, T_max=epochs - warmup, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=10))
custom_hooks = [hook for hook in _base_.custom_hooks if hook.type != 'EMAHook']
