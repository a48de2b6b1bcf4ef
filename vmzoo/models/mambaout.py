"""MambaOut.

Paper: `MambaOut: Do We Really Need Mamba for Vision?` - https://arxiv.org/abs/2405.07992 (CVPR 2025)
Weights: https://github.com/yuweihao/MambaOut (Apache-2.0)

Mamba blocks without the scan: gated CNN blocks in four stages, the baseline that shows what a scan adds. timm has the
family (`timm/models/mambaout.py`) and the authors' weights, and beside them variants that timm trained itself
(`mambaout_*_rw`). So nothing is registered here: this file lists timm's models as the zoo's, with what timm's cfgs do
not say, and takes over timm's conversion of the authors' files.
"""

from typing import Any

from timm.models.mambaout import checkpoint_filter_fn

__all__ = ['checkpoint_filter_fn', 'timm_cfgs']


def _cfg(file: str = '', **kwargs: Any) -> dict[str, Any]:
    return {
        'url': f'https://github.com/yuweihao/MambaOut/releases/download/model/{file}' if file else '',
        'origin_url': 'https://github.com/yuweihao/MambaOut',
        'paper_name': 'MambaOut: Do We Really Need Mamba for Vision?',
        'paper_ids': 'arXiv:2405.07992',
        **kwargs,
    }


def _timm_cfg() -> dict[str, Any]:
    return _cfg(origin_url='https://github.com/huggingface/pytorch-image-models')


timm_cfgs = {
    'mambaout_femto.in1k': _cfg('mambaout_femto.pth'),
    'mambaout_kobe.in1k': _cfg('mambaout_kobe.pth'),
    'mambaout_tiny.in1k': _cfg('mambaout_tiny.pth'),
    'mambaout_small.in1k': _cfg('mambaout_small.pth'),
    'mambaout_base.in1k': _cfg('mambaout_base.pth'),
    'mambaout_small_rw.sw_e450_in1k': _timm_cfg(),
    'mambaout_base_short_rw.sw_e500_in1k': _timm_cfg(),
    'mambaout_base_tall_rw.sw_e500_in1k': _timm_cfg(),
    'mambaout_base_wide_rw.sw_e500_in1k': _timm_cfg(),
    'mambaout_base_plus_rw.sw_e150_in12k_ft_in1k': _timm_cfg(),
    'mambaout_base_plus_rw.sw_e150_r384_in12k_ft_in1k': _timm_cfg(),
    'mambaout_base_plus_rw.sw_e150_in12k': _timm_cfg(),
}
