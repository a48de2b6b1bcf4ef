"""Optimisers by timm's names and rules, and mixed precision on any device."""

import torch
from mmengine.device import get_device
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from timm.optim import create_optimizer_v2


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmOptimWrapperConstructor:
    """Build the optimiser with `timm.optim.create_optimizer_v2`.

    `optimizer.type` is then any of timm's optimiser names ('adamw', 'sgd', 'lamb', 'muon', ...). One-dimensional
    parameters and those that the model lists in `no_weight_decay()` (A_log, D, dt bias) are not decayed.

    Args:
        optim_wrapper_cfg: Config of the wrapper with the optimiser's config under `optimizer`.
        paramwise_cfg: May hold `layer_decay`: each stage's learning rate is this factor times that of the next.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.wrapper = dict(optim_wrapper_cfg)
        self.optimizer = dict(self.wrapper.pop('optimizer'))
        self.layer_decay = (paramwise_cfg or {}).get('layer_decay')

    def __call__(self, model: torch.nn.Module) -> OptimWrapper:
        model = model.module if is_model_wrapper(model) else model
        options = dict(self.optimizer)
        optimizer = create_optimizer_v2(
            model.backbone, opt=options.pop('type'), layer_decay=self.layer_decay, **options
        )
        for group in optimizer.param_groups:
            # timm's schedulers apply lr_scale at each step; mmengine's scale each group's own learning rate.
            group['lr'] *= group.get('lr_scale', 1.0)
        self.wrapper.setdefault('type', 'OptimWrapper')
        return OPTIM_WRAPPERS.build(self.wrapper, default_args=dict(optimizer=optimizer))


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(AmpOptimWrapper):
    """`AmpOptimWrapper` that also runs on a CPU, and scales the loss only where float16 needs it.

    Args:
        dtype: 'bfloat16', 'float16', or 'auto': bfloat16 on every device that has it, else float16.
        **kwargs: Arguments of `OptimWrapper`.
    """

    def __init__(self, dtype: str = 'auto', **kwargs) -> None:
        OptimWrapper.__init__(self, **kwargs)  # AmpOptimWrapper's own refuses a CPU
        device = get_device()
        if dtype == 'auto':
            has_bfloat16 = device != 'cuda' or torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = 'bfloat16' if has_bfloat16 else 'float16'
        if device == 'cpu' and dtype != 'bfloat16':
            raise ValueError(f'mixed precision on a CPU is bfloat16, not {dtype}')
        self.cast_dtype = getattr(torch, dtype)
        self.loss_scaler = torch.amp.GradScaler(device, enabled=dtype == 'float16')
        self._scale_update_param = None
