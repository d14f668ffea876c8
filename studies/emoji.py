"""Make a folder of color images by class of one of npm's packages emoji-datasource-google or emoji-datasource-twitter.

    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    python studies/emoji.py package --output runs/data/emoji [--size 32]
    flowback train --data.name folder --data.path runs/data/emoji …

Some 3,700 images of 9 classes, on white: `emoji.json` tells their categories, skin tones count as images of their own. The
images of -google are under the Apache License 2.0, those of -twitter under CC BY 4.0, which asks for credit.
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from flowback.core.files import new_folder

LEFT_OUT = "Component"  # a category of five parts of others


def listed(package: Path) -> list[tuple[str, str]]:
    """Class and file name of every image, in the order of emoji.json."""
    found = []
    for entry in json.loads((package / "emoji.json").read_text("utf-8")):
        if entry["category"] != LEFT_OUT:
            name = entry["category"].lower().replace(" & ", "_").replace(" ", "_")
            found += [(name, each["image"]) for each in (entry, *entry.get("skin_variations", {}).values())]
    return found


def main() -> None:
    """Make the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked package, which has emoji.json and img/")
    parser.add_argument("--output", type=Path, default=Path("runs/data/emoji"), help="a new or empty folder")
    parser.add_argument("--size", type=int, default=32, help="side of the images, pixels")
    o = parser.parse_args()
    images = next(iter(sorted(o.package.glob("img/*/64"))), None)
    if images is None or not (o.package / "emoji.json").is_file():
        sys.exit(f"{o.package} has no emoji.json and img/*/64; expected an unpacked package of emoji-datasource")
    count = 0
    with new_folder(o.output) as inside:
        for name, file in listed(o.package):
            if (images / file).is_file():
                image = Image.open(images / file).convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
                (inside / name).mkdir(exist_ok=True)
                image.resize((o.size, o.size), Image.Resampling.LANCZOS).save(inside / name / file)
                count += 1
    print(f"{count} images of {o.size}x{o.size} pixels in {o.output}")


if __name__ == "__main__":
    main()
