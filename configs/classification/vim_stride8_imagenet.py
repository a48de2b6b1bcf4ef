"""vim_tiny_ and vim_small_patch16_stride8_224 on ImageNet-1k, published with 78.3 and 81.6 top-1.

Published: 30 epochs at a constant rate from the weights at stride 16, without mixed precision:
`--pretrained vim_t_midclstok_76p1acc.pth`. Left out: repeated augmentation.
"""

_base_ = '../_base_/imagenet.py'

model = dict(model_name='vim_tiny_patch16_stride8_224')
train_cfg = dict(max_epochs=30)
train_dataloader = dict(dataset=dict(augment=dict(color_jitter=0.3)))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=1e-5, weight_decay=1e-8), clip_grad=None)
param_scheduler = []
custom_hooks = [*_base_.custom_hooks[:-1], dict(_base_.custom_hooks[-1], momentum=4e-5)]
