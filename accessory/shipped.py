"""The files that come with the package: Hydra's groups and the JSONs that describe models, both under configs/."""

from __future__ import annotations

from pathlib import Path

import yaml

_HERE = Path(__file__).resolve().parent
CONFIG_DIR = next((d for d in (_HERE / "configs", _HERE.parent / "configs") if d.is_dir()), _HERE.parent / "configs")


def find_file(path: str) -> Path:
    """A JSON file as it is named, or the one that is shipped under that name (configs/model/…)."""
    file = Path(path).expanduser()
    shipped = CONFIG_DIR.parent / path
    return shipped if not file.exists() and shipped.is_file() else file


def group_options(group: str) -> list[str]:
    """What may stand after `group=`."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def groups_of(command: str) -> list[str]:
    """The groups that a command's settings are composed of."""
    defaults = yaml.safe_load((CONFIG_DIR / f"{command}.yaml").read_text())["defaults"]
    return sorted(name for entry in defaults if isinstance(entry, dict) for name in entry if group_options(name))
