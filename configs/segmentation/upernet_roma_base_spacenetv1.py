"""UPerNet with RoMA-B on the buildings of SpaceNet v1, published with 79.50 mF1.

Published: 384x384, AdamW with 6e-5, learning rates by layer, 160,000 iterations, testing in windows; the mean and the
deviation of the images. Usual: 16 images, warm-up, weight decay, augmentation. The data, as PNG files:
data/spacenetv1/{images,labels}/{train,val}, where a label is 0 (background) or 1 (building). The authors' weights are
on the Hugging Face hub (see the model card): model.backbone.init_cfg.checkpoint=FILE.
"""

_base_ = '../_base_/upernet_ade20k.py'

crop_size = (384, 384)
model = dict(
    data_preprocessor=dict(size=crop_size, mean=[121.826, 106.528, 78.372], std=[56.717, 44.517, 40.452]),
    backbone=dict(model_name='roma_base_dense', img_size=384, init_cfg=None),
    decode_head=dict(in_channels=[768, 768, 768, 768], num_classes=2),
    auxiliary_head=dict(in_channels=768, num_classes=2),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(256, 256)),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.9))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=crop_size, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
dataset = dict(
    _delete_=True,
    type='BaseSegDataset',
    data_root='data/spacenetv1',
    metainfo=dict(classes=('background', 'building'), palette=[[0, 0, 0], [240, 240, 240]]),
    img_suffix='.png',
    seg_map_suffix='.png',
)
train_dataloader = dict(
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/train', seg_map_path='labels/train'),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(**dataset, data_prefix=dict(img_path='images/val', seg_map_path='labels/val'), pipeline=test_pipeline)
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU', 'mFscore'])
test_evaluator = val_evaluator
