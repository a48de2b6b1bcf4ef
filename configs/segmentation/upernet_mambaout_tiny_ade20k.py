"""UPerNet with MambaOut-T on ADE20K, published with 47.4 mIoU.

The authors' hints: Swin's recipe, a norm on every map, a learning rate of 1e-4, stochastic depth of 0.3.
"""

_base_ = '../_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(
        model_name='mambaout_tiny',
        drop_path_rate=0.3,
        out_norms=True,
        init_cfg=dict(checkpoint='mambaout_tiny.in1k'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 576]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
