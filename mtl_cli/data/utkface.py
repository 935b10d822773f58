"""UTKFace: faces whose file names carry age, gender and race (Zhang et al., CVPR 2017).

Names are ``[age]_[gender]_[race]_[date].jpg.chip.jpg``. Three of the released ones lack the race:
the face is kept and its race is missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtl_cli.data.archive import ENDINGS, unpack
from mtl_cli.data.base import Source, Table
from mtl_cli.data.cache import Progress
from mtl_cli.data.files import ENVIRONMENT, identity, places
from mtl_cli.data.images import find, load
from mtl_cli.data.labels import class_values, listed
from mtl_cli.errors import ConfigError, DataError, nearest

GENDERS = ("male", "female")
RACES = ("White", "Black", "Asian", "Indian", "Other")
NAME = re.compile(r"(\d{1,3})_([01])_(?:([0-4])_)?\d{8,}")
_WANTED = ("UTKFace", "utkface", *(f"UTKFace{ending}" for ending in ENDINGS))
_HOME = "https://susanqq.github.io/UTKFace"


class UTKFace(Source):
    """The aligned and cropped faces, from a folder or the original archive.

    Args:
        root: folder of images, a folder that holds UTKFace or UTKFace.tar.gz, or the archive; None
            looks in $MTL_DATA, then ./data.

    Raises:
        DataError: nothing found; says what to type.
    """

    name = "utkface"

    def __init__(self, root: str | None = None) -> None:
        self.root = root
        self.folder = Path()
        self.files: list[str] = []
        self.skipped: list[str] = []

    def prepare(self, cache_dir: Path | None, progress: Progress | None = None) -> None:
        """Find the faces, unpacking the archive where that is what lies there."""
        place = self._locate()
        self.folder = unpack(place, cache_dir, progress) if place.is_file() else place
        names = find(self.folder)
        self.files = [name for name in names if NAME.match(Path(name).name)]
        self.skipped = [name for name in names if not NAME.match(Path(name).name)]
        if not self.files:
            raise DataError(self._absent([f"{place} ({len(names)} images, none named so)"]))

    def table(self, outputs: Mapping[str, Mapping[str, Any]]) -> Table:
        """Labels from the names.

        Raises:
            ConfigError: an output asks for something else than age, gender or race.
        """
        fields = [_parse(name) for name in self.files]
        rows = [str(self.folder / name) for name in self.files]
        table = Table(list(self.files), rows, {}, notes=self._notes(fields))
        columns: dict[str, list[str | None]] = {
            "gender": [GENDERS[gender] for _, gender, _ in fields],
            "race": [None if race is None else RACES[race] for *_, race in fields],
        }
        for output, spec in outputs.items():
            column = str(spec.get("column") or output)
            if column == "age":
                ages = [float(age) for age, *_ in fields]
                table.labels[output] = torch.tensor(ages, dtype=torch.float64)
            elif column in columns:
                classes = [str(c) for c in spec.get("classes") or ()]
                table.labels[output], unknown = class_values(columns[column], output, classes)
                table.problems += unknown
            else:
                known = ("age", *columns)
                raise ConfigError(
                    f"outputs.{output}: UTKFace has no '{column}' (expected one of "
                    f"{', '.join(known)}){nearest(column, known)}; name it with column"
                )
        return table

    def image(self, row: int, size: int, resize: str = "crop") -> np.ndarray:
        """Decode one face."""
        return load(self.folder / self.files[row], size, resize)

    def identity(self) -> str:
        """Names, sizes and times of all faces."""
        return identity(self.folder, self.files)

    def _locate(self) -> Path:
        looked = []
        for label, base in places(self.root):
            inside = [base / name for name in _WANTED] if base.is_dir() else []
            for place in (*inside, base):
                if place.is_file() and place.name.lower().endswith(ENDINGS):
                    return place
                if place.is_dir() and (place != base or self.root or _holds_faces(base)):
                    return place
            looked.append(f"{label} = {base}" + ("" if base.exists() else ", which is not there"))
        raise DataError(self._absent(looked))

    def _absent(self, looked: Sequence[str]) -> str:
        unset = [] if self.root else [f"${ENVIRONMENT}, ./data"]
        return (
            f"utkface: no faces found (looked at {'; '.join([*looked] or unset)}; expected images "
            "named like 26_1_3_20170104235432567.jpg.chip.jpg)\n"
            f"get UTKFace.tar.gz, 'Aligned&Cropped Faces', from {_HOME} and type one of\n"
            "  mtl train task=utkface data.root=PATH/UTKFace.tar.gz\n"
            f"  export {ENVIRONMENT}=PATH    # the folder that holds UTKFace.tar.gz or UTKFace/\n"
            "  mkdir -p data && mv UTKFace.tar.gz data/"
        )

    def _notes(self, fields: Sequence[tuple[int, int, int | None]]) -> list[str]:
        notes = []
        nameless = [n for n, (*_, race) in zip(self.files, fields, strict=True) if race is None]
        if nameless:
            notes.append(f"{len(nameless)} files have no race in their name: masked "
                         f"({listed(nameless, 3)})")  # fmt: skip
        if self.skipped:
            notes.append(f"{len(self.skipped)} images are not named like UTKFace: left out "
                         f"({listed(self.skipped, 3)})")  # fmt: skip
        return notes


def _parse(name: str) -> tuple[int, int, int | None]:
    found = NAME.match(Path(name).name)
    assert found is not None, name
    age, gender, race = found.groups()
    return int(age), int(gender), None if race is None else int(race)


def _holds_faces(folder: Path) -> bool:
    return any(NAME.match(p.name) for p in folder.iterdir() if p.suffix.lower() == ".jpg")
