"""UPerNet with MambaOut-S on ADE20K.

The authors' hints: Swin's recipe, a norm on every map, a learning rate of 1e-4, stochastic depth of 0.3 to 0.4.
"""

_base_ = '../_base_/upernet_ade20k.py'

model = dict(
    backbone=dict(
        model_name='mambaout_small',
        drop_path_rate=0.4,
        out_norms=True,
        init_cfg=dict(checkpoint='mambaout_small.in1k'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 576]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
