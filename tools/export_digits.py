"""Write scikit-learn's handwritten digits as a folder of PNG files: <out>/<split>/<digit>/<number>.png."""

import argparse
from pathlib import Path

from vmzoo.mm import DigitsDataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path)
    parser.add_argument('--splits', nargs='+', choices=['train', 'val', 'test'], default=['train', 'val', 'test'])
    args = parser.parse_args()
    for split in args.splits:
        dataset = DigitsDataset(split)
        for index, target, image in zip(dataset.indices, dataset.targets, dataset.images):
            folder = args.out / split / str(target)
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f'{index:04d}.png')
        print(f'{len(dataset)} images in {args.out / split}')


if __name__ == '__main__':
    main()
