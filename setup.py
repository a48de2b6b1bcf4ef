"""Packaging of vmzoo: two import packages, `vmzoo` (the library) and `vmzoo_kernels` (the scan operators)."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def read_version() -> str:
    text = (ROOT / 'vmzoo' / '__init__.py').read_text(encoding='utf-8')
    match = re.search(r"^__version__ = ['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    if match is None:
        raise RuntimeError('vmzoo/__init__.py has no line of the form: __version__ = "1.2.3"')
    return match.group(1)


class BuildWithConfigs(build_py):
    """Puts configs/ into the wheel as vmzoo/.mim/configs, where mm tools look for it; a checkout uses it in place."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / 'configs', Path(self.build_lib) / 'vmzoo/.mim/configs', dirs_exist_ok=True)


# mmengine's Runner needs no compiled operator; classification therefore stays free of mmcv.
TRAIN = [
    'onedl-mmengine>=0.10.12,<0.11',
    'matplotlib>=3.8',
    # mmengine imports cv2 without declaring it; the headless build needs no system libraries.
    'opencv-python-headless>=4.9,<5',
    'pillow>=10',
    'scikit-learn>=1.4',
    'tensorboard>=2.16',
]

setup(
    name='vmzoo',
    version=read_version(),
    description='Vision backbones built on 2D selective scans: timm models, one scan kernel, published weights.',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='The vmzoo authors',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.10',
    packages=find_packages(include=['vmzoo', 'vmzoo.*'])
    + find_packages('kernels', include=['vmzoo_kernels', 'vmzoo_kernels.*']),
    package_dir={'vmzoo': 'vmzoo', 'vmzoo_kernels': 'kernels/vmzoo_kernels'},
    package_data={
        'vmzoo': ['models/*.json', 'weights/*.json'],
        'vmzoo_kernels': ['cuda/*.cu', 'cuda/*.cuh'],
    },
    cmdclass={'build_py': BuildWithConfigs},
    install_requires=[
        # Reading pickled weights is unsafe in older releases (CVE-2025-32434, CVE-2026-24747).
        'torch>=2.10',
        'timm>=1.0.31',
        'numpy>=1.26',
        'filelock>=3.12',
        'huggingface_hub>=0.25',
        'packaging>=23',
        'pillow>=10',
        'rich>=13',
        'safetensors>=0.4.5',
    ],
    extras_require={
        'train': TRAIN,
        'mm': [
            *TRAIN,
            # mmcv and mmseg ask for this build of OpenCV, which fills the same folder as the headless one: that works
            # if both are of one version.
            'opencv-python>=4.9,<5',
            'onedl-mmcv>=2.3.6,<2.4',
            'onedl-mmsegmentation>=1.4.2,<2',
            'onedl-mmdetection>=3.5.1,<4',
            'onedl-mmpretrain>=1.3.6,<2',
        ],
        'medical': [
            'h5py>=3.10',
            'matplotlib>=3.8',
            'nibabel>=5.2',
            'pydicom>=3',
        ],
        'dev': [
            'pytest>=8',
            'pytest-xdist>=3.5',
            'ruff>=0.9',
            'pre-commit>=3.5',
            'pyyaml',
            'setuptools>=70.1',
            # pictures that tests train on
            'nilearn>=0.11',
            'scikit-image>=0.22',
        ],
    },
    entry_points={'console_scripts': ['vmzoo = vmzoo.cli.main:main']},
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
)
