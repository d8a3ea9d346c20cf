"""Reporting to Weights & Biases, for those who have it installed and ask for it."""

import importlib.util
import secrets
from pathlib import Path
from typing import Any

from train.errors import ConfigError
from train.report.metrics import Row, scalars
from train.storage.atomic import write_atomically


def check_wandb(project: str | None) -> None:
    """Raises ConfigError if `logging.wandb` names a project and wandb is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb = {project!r}: wandb is not installed; `pip install wandb`, or leave "
            "the key out"
        )


class WeightsAndBiases:
    """A `train.report.metrics.Reporter`; a resumed run goes on under the name it has there.

    wandb ignores steps that it has seen: after a kill they come a second time, and are the same.
    """

    def __init__(self, project: str, folder: Path, run: Path, config: dict[str, Any]):
        """Opens or continues the run.

        Args:
            project: the project to report to.
            folder: where wandb's files go and, in `id`, the run's identity.
            run: the run's folder, after which it is named.
            config: the values that are shown with the run.
        """
        import wandb

        folder.mkdir(exist_ok=True)
        identity = folder / "id"
        if not identity.exists() or not identity.read_bytes():
            write_atomically(identity, secrets.token_hex(8))
        self._run = wandb.init(
            project=project,
            name=run.name,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=config,
        )

    def write(self, row: Row) -> None:
        self._run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()
