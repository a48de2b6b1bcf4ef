"""Model families, one file each. Importing this package registers their models with timm, which has some itself."""

from . import efficientvim, mambaout
from .a2mamba import A2Mamba
from .efficientvmamba import EfficientVMamba
from .groupmamba import GroupMamba
from .hrvmamba import HRVMamba, HRVMambaBranches, HRVMambaPose, HRVMambaPyramid
from .hymamba import HyMamba
from .lbmamba import LBVim, LBVimBackbone
from .lightmunet import LightMUNet
from .mambamim import MambaMIM
from .mambayolo import MambaYOLO
from .mhsvm import MHSUNet
from .mobilemamba import MobileMamba
from .msvmunet import MSVMUNet
from .resvmamba import ResVMamba
from .roma import RoMA, RoMADense
from .rsmamba import RSMamba
from .shufflemamba import MambaMlp, MambaReg, ShuffleMamba, ShuffleMambaBackbone
from .vim import VisionMamba, VisionMambaPyramid
from .vmamba import VMamba
from .vmunet import VMUNet
from .xlstmunet import XLSTMUNet

__all__ = [
    'A2Mamba',
    'EfficientVMamba',
    'GroupMamba',
    'HRVMamba',
    'HRVMambaBranches',
    'HRVMambaPose',
    'HRVMambaPyramid',
    'HyMamba',
    'LBVim',
    'LBVimBackbone',
    'LightMUNet',
    'MHSUNet',
    'MSVMUNet',
    'MambaMIM',
    'MambaMlp',
    'MambaReg',
    'MambaYOLO',
    'MobileMamba',
    'RSMamba',
    'ResVMamba',
    'RoMA',
    'RoMADense',
    'ShuffleMamba',
    'ShuffleMambaBackbone',
    'VMUNet',
    'VMamba',
    'VisionMamba',
    'VisionMambaPyramid',
    'XLSTMUNet',
    'efficientvim',
    'mambaout',
]
