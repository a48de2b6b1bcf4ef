"""Any model on a folder of images: vmzoo train image_folder --model NAME --data DIR --pretrained

DIR holds train/<class>/*.jpg and val/<class>/*.jpg, and test/<class>/*.jpg if there is a test set. Number of classes,
input size and normalisation come from the folder and the model. The settings suit fine-tuning published weights; from
random weights train longer (--epochs 100) with a higher rate (--cfg-options optim_wrapper.optimizer.lr=1e-3).
"""

_base_ = ['../_base_/classification.py']

model = dict(
    type='VMZooClassifier',
    model_name=None,
    num_classes=None,
    drop_path_rate=0.1,
    label_smoothing=0.1,
    data_preprocessor=dict(
        type='ImagePreprocessor',
        mean=None,
        std=None,
        mixup=dict(mixup_alpha=0.2, cutmix_alpha=1.0, prob=0.5),
        random_erasing=0.1,
    ),
)

loader = dict(num_workers=4, collate_fn=dict(type='collate_readable'))
train_dataloader = dict(
    **loader,
    batch_size=64,
    dataset=dict(
        type='ImageFolderDataset',
        root=None,
        split='train',
        input_size=None,
        augment=dict(scale=(0.3, 1.0), hflip=0.5, color_jitter=0.3, auto_augment='rand-m6-mstd0.5-inc1'),
    ),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    **loader,
    batch_size=64,
    dataset=dict(type='ImageFolderDataset', root=None, split='val', input_size=None),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = dict(
    **loader,
    batch_size=64,
    dataset=dict(type='ImageFolderDataset', root=None, split='test', input_size=None),
    sampler=dict(type='DefaultSampler', shuffle=False),
)

optim_wrapper = dict(
    constructor='VMZooOptimWrapperConstructor',
    optimizer=dict(type='adamw', lr=2e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=3, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=3, T_max=27, convert_to_iter_based=True),
]
