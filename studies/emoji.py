"""Make a folder of color images by class of one of npm's packages emoji-datasource-google or emoji-datasource-twitter.

    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    python studies/emoji.py package --output runs/data/emoji [--size 32] [--holdout 0.25]
    flowback train --data.name folder --data.path runs/data/emoji …

Some 3,700 images of 9 classes, on white: `emoji.json` tells their categories, skin tones count as images of their own.
`--holdout` makes `train/` and `val/`: a motif is in one of them with all its genders, and `val/` has no skin tones. The
images of -google are under the Apache License 2.0, those of -twitter under CC BY 4.0, which asks for credit.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from flowback.core.files import new_folder

LEFT_OUT = "Component"  # a category of five parts of others
# code points that change a motif little: joiner, variation, female, male, right-facing, man, woman, person, skin tones
VARIANTS = {"200D", "FE0F", "2640", "2642", "27A1", "1F468", "1F469", "1F9D1", *(f"1F3F{n}" for n in "BCDEF")}


def listed(package: Path, holdout: float = 0.0) -> list[tuple[str, str]]:
    """Folder and file name of every image, in the order of emoji.json."""
    found = []
    for entry in json.loads((package / "emoji.json").read_text("utf-8")):
        if entry["category"] != LEFT_OUT:
            name = entry["category"].lower().replace(" & ", "_").replace(" ", "_")
            tones = entry.get("skin_variations", {}).values()
            if holdout and held_out(entry, holdout):
                name, tones = f"val/{name}", ()
            elif holdout:
                name = f"train/{name}"
            found += [(name, each["image"]) for each in (entry, *tones)]
    return found


def held_out(entry: dict[str, Any], share: float) -> bool:
    """Whether the motif of an emoji is among the share that is held out."""
    motif = "-".join(sorted(set(entry["unified"].split("-")) - VARIANTS))
    return int(hashlib.sha256(motif.encode()).hexdigest()[:8], 16) < share * 2**32


def main() -> None:
    """Make the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked package, which has emoji.json and img/")
    parser.add_argument("--output", type=Path, default=Path("runs/data/emoji"), help="a new or empty folder")
    parser.add_argument("--size", type=int, default=32, help="side of the images, pixels")
    parser.add_argument("--holdout", type=float, default=0.0, help="share of the motifs for val/, the others for train/")
    o = parser.parse_args()
    images = next(iter(sorted(o.package.glob("img/*/64"))), None)
    if images is None or not (o.package / "emoji.json").is_file():
        sys.exit(f"{o.package} has no emoji.json and img/*/64; expected an unpacked package of emoji-datasource")
    count = 0
    with new_folder(o.output) as inside:
        for name, file in listed(o.package, o.holdout):
            if (images / file).is_file():
                image = Image.open(images / file).convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
                (inside / name).mkdir(parents=True, exist_ok=True)
                image.resize((o.size, o.size), Image.Resampling.LANCZOS).save(inside / name / file)
                count += 1
    print(f"{count} images of {o.size}x{o.size} pixels in {o.output}")


if __name__ == "__main__":
    main()
