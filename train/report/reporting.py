"""What people see of a run's steps: rows of metrics, a progress bar, the speed, pictures."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
from jax.sharding import Mesh

from train.config import TrainConfig
from train.devices import processes
from train.devices.chips import chip_of
from train.errors import do_without
from train.phases import phase_at, phases_of
from train.report.clock import Clock
from train.report.goodput import SessionLog, Spent, Times
from train.report.metrics import Dispensable, MetricsLog, ProgressBar, Reporter, Row, read_rows
from train.report.plots import plot_loss_curve, plot_slot_weight
from train.report.wandb_reporter import WeightsAndBiases
from train.step.evaluation import HeldOut
from train.step.flops import training_flops_per_token
from train.storage.run_folder import RunFolder, config_values


class Reporting:
    """Reports a run's steps while it is open; a context manager.

    If the run has several processes, only the first reports.

    Attributes:
        clock: measures the speed; to be paused during whatever is not training.
        more: gives further metrics for the rows.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        mesh: Mesh,
        after_step: int,
        bytes_per_target: Callable[[int], float],
        times: Times | None = None,
    ):
        """Opens the log to continue after a step.

        Args:
            config: the run's configuration.
            folder: the run's folder.
            mesh: the run's devices.
            after_step: the last step that counts as done.
            bytes_per_target: mean bytes of text that a target of batch n, from 0, stands for.
            times: where this session's time goes; None: it begins now.
        """
        self.clock = Clock(config.batch_size * config.data.sequence_length)
        self._config = config
        self._devices = mesh.devices.size
        self._chip = chip_of(mesh.devices.flat[0].device_kind)
        self._phases = phases_of(config)
        self._flops = {
            phase.after: training_flops_per_token(phase.config) for phase in self._phases
        }
        self._bytes_per_target = bytes_per_target
        more: list[Reporter] = []
        project = config.logging.wandb
        if project is not None and processes.is_first():
            values = config_values(config)
            make = lambda: WeightsAndBiases(project, folder.wandb, folder.path, values)  # noqa: E731
            more.append(Dispensable("logging.wandb", make))
        self._log: MetricsLog | None = None
        if processes.is_first():
            self._log = MetricsLog(folder.metrics, folder.tensorboard, after_step, more)
            self._sessions = SessionLog(folder.sessions, times or Times(), after_step)
        self.more: Callable[[], Mapping[str, float]] = dict
        self._bar = ProgressBar(config.steps, after_step, shown=processes.is_first())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.__exit__(*exception)
        if self._log is not None:
            self._log.__exit__(*exception)

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        skipped_updates: int,
        held_out: HeldOut | None,
        always: bool = False,
    ) -> None:
        """Shows a step, and logs it if it is due or has an evaluation.

        Args:
            step: its number.
            metrics: what `train.step.update.TrainingFunctions.update` returned, fetched.
            skipped_updates: how many updates were skipped so far.
            held_out: the evaluation after the step, if there was one.
            always: whether to log it in any case.
        """
        term = "loss" if "loss" in metrics else "attention_transfer"
        shown = {term: f"{metrics[term]:.3f}"}
        if held_out is not None:
            shown["held-out bits/byte"] = f"{held_out.bits_per_byte:.3f}"
            shown["perplexity"] = f"{held_out.perplexity:.4g}"
        if step % self._config.logging.every == 0 or held_out is not None or always:
            speed = self._speed(step)
            if speed:
                shown["tokens/s"] = f"{speed['tokens_per_second']:.0f}"
            if "mfu" in speed:
                shown["MFU"] = f"{speed['mfu']:.1%}"
            row = self._row(step, metrics, held_out)
            if self._log is not None:
                goodput = self._sessions.update(step, now=always)
                found = {"skipped_updates": skipped_updates, "goodput": goodput}
                self._log.write({**row, **found, **speed, **self.more()})
        self.clock.start_once(step)
        self._bar.advance(**shown)

    def end_session(self, step: int) -> Spent | None:
        """Writes down where the time went up to a step, the last; None but in the first process."""
        if self._log is None:
            return None
        self._sessions.update(step, now=True)
        return self._sessions.spent()

    def complete(self, row: Row, held_out: HeldOut) -> None:
        """Logs a step again, with the evaluation that was missing."""
        if self._log is not None:
            values = _held_out_values(held_out, self._config.data.corpus)
            self._log.write({**row, **values})

    def _row(self, step: int, metrics: Mapping[str, float], held_out: HeldOut | None) -> Row:
        row: Row = {"step": step}
        phase = phase_at(self._phases, step)
        if phase.stage is not None:
            row["stage"] = phase.stage
        if "loss" in metrics:
            bits = metrics["loss"] / math.log(2)
            row |= {
                "loss": metrics["loss"],
                "bits_per_byte": bits / self._bytes_per_target(step - 1),
            }
        names = ("z_loss", "slot_loss", "distillation", "attention_transfer")
        row |= {name: metrics[name] for name in names if name in metrics}
        row |= {name: metrics[name] for name in ("gradient_norm", "learning_rate")}
        if held_out is not None:
            row |= _held_out_values(held_out, self._config.data.corpus)
            if self._config.window_schedule is not None:
                row["window_size"] = list(phase.config.model.windows)
        return row

    def _speed(self, step: int) -> dict[str, float]:
        """Tokens a second and, where the chip's peak is known, model FLOPs utilisation."""
        rate = self.clock.tokens_per_second(step)
        if rate is None:
            return {}
        speed = {"tokens_per_second": rate, "tokens_per_second_per_chip": rate / self._devices}
        if self._chip is not None:
            flops = self._flops[phase_at(self._phases, step).after]
            speed["mfu"] = rate * flops / (self._devices * self._chip.flops)
        return speed


def _by_corpus(held_out: HeldOut, corpus: Mapping[str, float]) -> Row:
    """Names what was measured on each part of a mixture."""
    return {
        f"held_out_bits_per_byte/{name}": bits
        for name, bits in zip(corpus, held_out.corpora, strict=True)
    }


def _held_out_values(held_out: HeldOut, corpus: str | dict[str, float]) -> Row:
    ema = held_out.ema
    return {
        "held_out_bits_per_byte": held_out.bits_per_byte,
        "held_out_perplexity": held_out.perplexity,
        "held_out_accuracy": held_out.accuracy,
        **{f"answers/{name}": task.whole for name, task in held_out.tasks.items()},
        **{f"answer_tokens/{name}": task.accuracy for name, task in held_out.tasks.items()},
        **({} if ema is None else {"held_out_ema_bits_per_byte": ema.bits_per_byte}),
        **(_by_corpus(held_out, corpus) if isinstance(corpus, dict) else {}),
        "slot_weight": list(held_out.slot_weight),
    }


def row_without_evaluation(folder: RunFolder, step: int) -> Row | None:
    """Finds the row of a run's last step, if that is `step` and has no evaluation."""
    rows = read_rows(folder.metrics)
    found = bool(rows) and rows[-1]["step"] == step and "slot_weight" not in rows[-1]
    return rows[-1] if found else None


def plot_run(folder: RunFolder, references: Mapping[str, float]) -> None:
    """Draws the run's pictures from its metrics; references as in `plot_loss_curve`.

    A picture that cannot be drawn costs a line on stderr.
    """
    with do_without(str(folder.curve)):
        plot_loss_curve(read_rows(folder.metrics), dict(references), folder.curve)
    with do_without(str(folder.slot_weight)):
        plot_slot_weight(read_rows(folder.metrics), folder.slot_weight)


def fetch(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    """Fetches scalars from the devices as numbers, all at once; waits for them."""
    return {name: value.item() for name, value in jax.device_get(dict(metrics)).items()}
