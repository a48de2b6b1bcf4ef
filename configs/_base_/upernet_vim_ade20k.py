"""What UPerNet with Vim on ADE20K shares.

Published: 60,000 iterations with 32 images (4 GPUs with 8 each) of 512x512, warm-up and decay as usual, testing in
windows. The published rule for learning rates by layer overlooks Vim's blocks, so that all of them learn at the last
one's rate; here it holds.
"""

_base_ = 'upernet_slide_ade20k.py'

max_iters = 60_000
train_dataloader = dict(batch_size=8)
train_cfg = dict(max_iters=max_iters, val_interval=6_000)
default_hooks = dict(checkpoint=dict(interval=6_000))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=max_iters),
]
