"""What the registry-wide tests must know about a family, and where one departs from the contract, with the reason.

Keys are names of families (the module that defines the model) or of single models; a model's own entry comes last.
"""

# Arguments that make a model small enough to run in every test, with everything that its published size has.
SMALL = {
    'a2mamba': {
        'depths': (1, 1, 1, 1),
        'embed_dim': 16,
        'num_heads': 2,
        'window_size': (3, 3, 3, 1),
        'head_hidden_size': 32,
        'img_size': 64,
    },
    'groupmamba': {'stem_dim': 8, 'depths': (1, 1, 1, 1), 'embed_dim': (16, 16, 32, 48), 'mlp_ratio': (2, 2, 2, 2)},
    'hrvmamba': {'stage1_dim': 8, 'embed_dim': (8, 8, 16, 16), 'num_modules': (1, 1, 1), 'depth': 1},
    **{
        f'hrvmamba_{name}': {'neck_dims': (8, 8, 16, 16), 'num_features': 24}
        for name in ('nano', 'tiny', 'small', 'base', 'base_seg')
    },
    'vmamba': {'depths': (1, 1, 2, 1), 'embed_dim': 16},
    'efficientvmamba': {'depths': (1, 1, 1, 1), 'embed_dim': 16},
    'resvmamba': {'depths': (1, 1, 1, 1), 'embed_dim': 16},
    'mambayolo': {'depths': (1, 1, 1, 1), 'embed_dim': (8, 16, 16, 24), 'd_state': 4},
    'hymamba': {
        'stem_dim': 8,
        'embed_dim': (8, 8, 16, 24),
        'depths': (1, 1, 1, 1),
        'mlp_ratio': (2, 2, 2, 2),
        'token_depth': 2,
        'd_state': 4,
        'img_size': 32,
    },
    'lightmunet': {'depths': (0, 1, 0, 1), 'embed_dim': 8, 'd_state': 4},
    'xlstmunet': {'embed_dim': (8, 8, 16, 16, 32), 'strides': (1, 2, 2, 2, 2), 'img_size': 64},
    **{
        f'uxlstm_{form}_3d': {
            'embed_dim': (4, 8, 8, 32),
            'kernel_size': ((1, 3, 3), 3, 3, 3),
            'strides': (1, 2, 2, 2),
            'img_size': (16, 32, 32),
        }
        for form in ('bot', 'enc')
    },
    'vmunet': {'depths': (1, 1, 1, 1), 'decoder_depths': (1, 1, 1, 1), 'embed_dim': 16, 'd_state': 4},
    'msvmunet': {'depths': (1, 1, 1, 1), 'decoder_depths': (1, 1, 1), 'embed_dim': 16},
    'mhsvm': {'depths': (1, 1, 1, 1), 'decoder_depths': (1, 1, 1, 1), 'embed_dim': 24, 'd_state': 4},
    'mobilemamba': {'depths': (1, 1, 1), 'embed_dim': (48, 56, 64)},
    'vim': {'depth': 4, 'embed_dim': 32, 'img_size': 64},
    'roma': {'depth': 4, 'embed_dim': 32, 'img_size': 64, 'dynamic_img_size': True},
    'rsmamba': {'depth': 4, 'embed_dim': 32, 'img_size': 64, 'dynamic_img_size': True},
    'shufflemamba': {'depth': 4, 'embed_dim': 32, 'img_size': 64, 'dynamic_img_size': True},
    'shufflemamba_base_seg': {'block_indices': (0, 1, 2, 3)},
    'shufflemamba_large_seg': {'block_indices': (0, 1, 2, 3)},
    'lbmamba': {'depth': 4, 'embed_dim': 48, 'img_size': 64, 'dynamic_img_size': True},
    'lbvim_tiny_backbone': {'block_indices': (0, 1, 2, 3)},
    'lbvim_300_backbone': {'block_indices': (0, 1, 2, 3), 'out_dim': 32},
    'lbvim_small_backbone': {'block_indices': (0, 1, 2, 3)},
    'lbvim_528_backbone': {'block_indices': (0, 1, 2, 3), 'out_dim': 32},
    'vim_tiny_seg': {'block_indices': (0, 1, 2, 3)},
    'vim_small_seg': {'block_indices': (0, 1, 2, 3)},
}

# test -> family or model -> reason
_POSE = {
    f'hrvmamba_{size}_pose': 'the published form fuses all branches into the finest one and returns nothing else'
    for size in ('tiny', 'small', 'base')
}
EXEMPT = {
    'test_features_only': _POSE,
    'test_features_leave_no_parameter_without_gradient': _POSE,
    'test_forward_intermediates': _POSE,
    'test_pruning_keeps_the_features': {
        **_POSE,
        'roma_base_dense': 'every level is made of the last map, so that there is nothing to remove',
        'roma_large_dense': 'every level is made of the last map, so that there is nothing to remove',
    },
    'test_any_image_size': {
        'vim': 'the position embedding is made for one size; other sizes are an option that its own tests cover',
        **{
            f'uxlstm_enc_{size}': 'blocks over channels have weights for every position, as published'
            for size in ('2d', '2d_s8', '3d')
        },
    },
    'test_empty_batch': {
        'hymamba': "torch's instance norm takes no empty batch",
        'xlstmunet': "torch's instance norm takes no empty batch",
    },
    'test_forward_features_is_a_map': {
        'roma': 'isotropic: its features are tokens, and its maps come from forward_intermediates',
        'rsmamba': 'isotropic: its features are tokens, and its maps come from forward_intermediates',
        'shufflemamba': 'isotropic: its features are tokens, and its maps come from forward_intermediates',
        'lbmamba': 'isotropic: its features are tokens, and its maps come from forward_intermediates',
        'vim': 'isotropic: its features are tokens, and its maps come from forward_intermediates',
    },
}

# Parts of timm's own suite that no model here can meet:
#   TorchScript and FX tracing: the scan is a torch.library operator called from Python that builds its tables from the
#   size of the map; torch.compile and torch.export, which see through that, are tested instead.
#   output_stride: a scan has no dilated form, so any stride but the model's own is refused.
