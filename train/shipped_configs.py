"""The configurations that come with nha_jax, by name: `nha train quickstart`."""

import difflib
from pathlib import Path

from train.errors import ConfigError
from train.paths import shorten, user_path


def find_config(text: str) -> Path:
    """Finds a configuration: a file, or else one of `configs/` by its name without ".yaml".

    Raises:
        ConfigError: no file can have this name, or there is neither a file nor a configuration of
            this name; the line says which there are.
    """
    path = user_path(text, "CONFIG")
    if path.exists() or "/" in text or path.suffix in (".yaml", ".yml"):
        return path
    shipped = shipped_configs()
    if text not in shipped:
        close = difflib.get_close_matches(text, shipped, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(shipped)}"
        raise ConfigError(f"{shorten(text)}: no such file, nor a configuration by name; {hint}")
    return shipped[text]


def shipped_configs() -> dict[str, Path]:
    """The files by name; a wheel has them inside this package, a clone beside it."""
    inside = Path(__file__).parent / "configs"
    folder = inside if inside.is_dir() else Path(__file__).parent.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
