"""What UPerNet on ADE20K shares: the recipe of Swin, which VMamba and most others follow.

Published and usual: 160,000 iterations with 16 images of 512x512 (8 GPUs with 2 each), AdamW with 6e-5 and a weight
decay of 0.01, 1,500 iterations of warm-up, then linearly to zero; 512 channels, an auxiliary FCN head on the third map,
SyncBN, whole images for testing. Where the published optimisers leave out norms only, this one decays no biases and
nothing that a scan is sensitive to either. A backbone starts from its published classifier, `init_cfg`.
"""

_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['vmzoo.mm'], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type='VMZooBackbone', init_cfg=dict(type='Pretrained')))
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='VMZooOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
)
