# SPDX-License-Identifier: Apache-2.0
r"""Images of a data set's rows: in the column `image`, or in the file that the column `url` names.

    python -m blip3.evaluation.harness.row_images yerevann/coco-karpathy --split test train \
        --output DATA/yerevann/coco-karpathy

The command writes a copy of such a data set with the images inside, for a machine without network: lmms-eval, started
in DATA, takes the folder before the Hub. Give the same command again after an interruption: complete files are kept.
Files of other rows in the folder are refused, since they would be read together with the new ones.
"""

import argparse
import io
import re
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from ...data.images import ImageSource
from ...files import only_writer_in, write_text, writing
from .few_shot import Place, Row, load_place

IMAGE, URL = "image", "url"
FETCHED_AT_ONCE = 8
ROWS_OF_A_FILE = 1000
_SECONDS = 60  # for a server to answer


def image_of(row: Row) -> Image.Image:
    """Open the image of a row.

    Args:
        row: with `image` as `datasets` gives it, or with `url`.

    Raises:
        ValueError: if it has neither, or the file is no image.
        OSError: if the file cannot be fetched.
    """
    if row.get(IMAGE) is not None:
        return row[IMAGE]
    return ImageSource(data=read_url(_url_of(row))).open()


def read_url(url: str) -> bytes:
    """Read an image's file: `http://`, `https://`, `file://`, or a path without any of them.

    Raises:
        OSError: if it cannot be read.
    """
    try:
        if "://" not in url:
            return Path(url).read_bytes()
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            return answer.read()
    except OSError as error:
        raise OSError(
            f"The image {url} is named by a row but cannot be read ({error}). There is probably no network here, or "
            "the file was moved: write a copy of the data set with its images inside where there is network (python "
            "-m blip3.evaluation.harness.row_images)."
        ) from error


def check_has_images(rows: Any, place: Place) -> None:
    """Refuse a data set whose rows have no images.

    Args:
        rows: of `datasets`.
        place: they are from.

    Raises:
        ValueError: naming its columns.
    """
    if not {IMAGE, URL} & set(rows.features):
        raise ValueError(
            f"{place.path} has the columns {', '.join(rows.features)} but neither {IMAGE} nor {URL}. It probably "
            "holds the questions alone: name a data set with images."
        )


def copy_with_images(place: Place, output: str | Path, rows_of_a_file: int = ROWS_OF_A_FILE) -> list[Path]:
    """Write a split with a column of images beside its own columns.

    Args:
        place: of rows with `url`.
        output: folder, made if need be.
        rows_of_a_file: of parquet.

    Returns:
        the files.

    Raises:
        OSError: naming the first image that cannot be read; complete files stay.
        ValueError: if the rows hold images already, a file is no image, or the folder has the split with other rows.
    """
    rows, output = load_place(place), Path(output)
    if IMAGE in rows.features or URL not in rows.features:
        raise ValueError(
            f"{place.path} has the columns {', '.join(rows.features)}, but a column {URL} and no column {IMAGE} are "
            "expected. It probably holds its images already: fetch it with hf download."
        )
    starts = range(0, len(rows), rows_of_a_file)
    names = [f"{place.split}-{number:05d}-of-{len(starts):05d}.parquet" for number in range(len(starts))]
    parts = [rows.select(range(start, min(start + rows_of_a_file, len(rows)))) for start in starts]
    _check_is_copy(output, place, dict(zip(names, parts, strict=True)))
    output.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(rows), desc=place.split, unit="image", disable=None)
    for name, part in zip(names, parts, strict=True):
        if not (output / name).exists():
            _write(part, output / name)
        bar.update(len(part))
    bar.close()
    write_text(output / "README.md", _card(output))
    return [output / name for name in names]


def _write(part: Any, path: Path) -> None:
    import datasets

    with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
        files = list(pool.map(_checked, part[URL]))
    images = [{"bytes": data, "path": None} for data in files]
    whole = part.to_dict() | {IMAGE: images}
    features = datasets.Features(part.features | {IMAGE: datasets.Image()})
    with writing(path) as unfinished:
        datasets.Dataset.from_dict(whole, features=features).to_parquet(str(unfinished))


def _checked(url: str) -> bytes:
    """Read an image's file, and be sure that it is one: servers send pages in its place."""
    data = read_url(url)
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
    except Exception as error:  # decoders raise whatever a broken file makes them meet
        raise ValueError(
            f"The image {url} has {len(data)} bytes that are no image ({error}). Its server probably sent a page "
            "instead: open it in a browser, then give the same command again."
        ) from error
    return data


def _check_is_copy(output: Path, place: Place, parts: Mapping[str, Any]) -> None:
    """Refuse a folder that has the split with other rows, or in another number of files: both would be read.

    Args:
        output: the folder.
        place: of the rows.
        parts: the rows of each file by its name.

    Raises:
        ValueError: naming the first such file.
    """
    of_split = re.compile(rf"{re.escape(place.split)}-\d+-of-\d+\.parquet")
    for path in sorted(path for path in output.glob("*.parquet") if of_split.fullmatch(path.name)):
        part = parts.get(path.name)
        if part is None or not _has_rows(path, part):
            raise ValueError(
                f"{path} is in the folder, but {place.path} has other rows for the split {place.split} ({len(parts)} "
                f"files, {sum(map(len, parts.values()))} rows). The folder is probably the copy of another data set, "
                "or the data set was changed since: name another folder, or remove the split's files in it."
            )


def _has_rows(path: Path, part: Any) -> bool:
    """Whether a file that was written holds certain rows, beside the images."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path, columns=[name for name in parquet.read_schema(path).names if name != IMAGE])
    except pyarrow.ArrowException:
        return False
    return repr(table.to_pydict()) == repr(part.to_dict())  # in words, since no NaN equals another


def _card(folder: Path) -> str:
    """Give the head of a data set's card, where `datasets` looks for splits."""
    splits = sorted({path.name.rsplit("-", 3)[0] for path in folder.glob("*-of-*.parquet")})
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in splits:
        lines += [f"  - split: {split}", f"    path: {split}-*.parquet"]
    return "\n".join([*lines, "---", "", "A copy with the images that its rows name.", ""])


def _url_of(row: Row) -> str:
    if not row.get(URL):
        raise ValueError(
            f"A row has the columns {', '.join(row)} but no image and no {URL}. Its image was probably never stored: "
            "name another data set, or drop the row."
        )
    return str(row[URL])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m blip3.evaluation.harness.row_images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", help="a folder, or owner/name on the Hub")
    parser.add_argument("--split", nargs="+", required=True, help="to copy")
    parser.add_argument("--name", help="of the configuration")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="continued if there")
    given = parser.parse_args(arguments)
    try:
        with only_writer_in(given.output):
            for split in given.split:
                copy_with_images(Place(given.data, split, given.name), given.output)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
