"""One run in progress: its steps, evaluations and saves."""

from collections.abc import Mapping

import jax
from jax.sharding import Mesh

import nha_jax
from train.checkpoint import Checkpoints, Progress
from train.config import TrainConfig
from train.corpus import Corpus
from train.data import Windows, training_batches
from train.errors import TrainingError
from train.evaluation import HeldOut, gzip_references, measure_held_out
from train.interruption import Interruption
from train.profiling import Profiler
from train.reporting import Reporting, fetch, plot_run
from train.result import Result
from train.run_folder import RunFolder
from train.step import Steps, TrainState
from train.text import complete

Metrics = dict[str, jax.Array]
"""What an update returns beside the state, still on the devices."""

BYTES_PER_TARGET = 1.0
"""The tokens are bytes."""


class Trainer:
    """One run in progress.

    Attributes:
        state: parameters and optimizer, on the devices.
        progress: where the run stands.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        mesh: Mesh,
        folder: RunFolder,
        checkpoints: Checkpoints,
    ):
        """Restores the newest checkpoint, or starts afresh."""
        self._config = config
        self._corpus = corpus
        self._folder = folder
        self._checkpoints = checkpoints
        self._training = Windows(corpus.training, config.data.sequence_length)
        self._held_out = Windows(corpus.held_out, config.data.sequence_length)
        self._steps = Steps(config, mesh)
        self.state: TrainState
        restored = checkpoints.restore(self._steps.abstract_state, self._steps.shardings)
        self.state, self.progress = restored or (self._steps.initial_state(), Progress())
        self._mesh = mesh
        self._skipped_in_row = 0
        self._print_header()

    def run(self, interruption: Interruption) -> None:
        """Trains up to the last step or an interruption; the state is then on disk."""
        config, first = self._config, self.progress.step
        batches = training_batches(
            self._training, config.batch_size, config.seed, self.progress.next_batch
        )
        with (
            Reporting(config, self._folder, self._mesh, first, BYTES_PER_TARGET) as reporting,
            Profiler(config.logging.profile, self._folder.profile) as profiler,
        ):
            unreported: dict[int, Metrics] = {}
            for step in range(first + 1, config.steps + 1):
                profiler.before(step)
                self.state, metrics = self._steps.update(self.state, next(batches))
                profiler.after(step, metrics)
                # The step before is fetched while the devices work on this one.
                self._report_steps(unreported, reporting)
                unreported = {step: metrics}
                stop = step == config.steps or interruption.signal is not None
                evaluate = step % config.evaluation.every == 0 or step == config.steps
                save = self._checkpoints.is_due(step) or stop
                if evaluate or save:
                    jax.block_until_ready(metrics)
                    with reporting.clock.paused():
                        held_out = self._evaluate(config.evaluation.windows) if evaluate else None
                    self._report_steps(unreported, reporting, held_out)
                    unreported = {}
                if save:
                    with reporting.clock.paused():
                        self._checkpoints.save(self.state, self.progress)
                if stop:
                    break
            self._checkpoints.wait()
        plot_run(self._folder, self._references())

    def finish(self) -> Result:
        """Measures the finished model, saves it for `nha_jax.load`, lets it write."""
        config = self._config
        model = self._steps.model(self.state.model)
        held_out = self._evaluate(config.evaluation.final_windows)
        sample = complete(
            model,
            config.sample.prompt,
            nha_jax.SamplingOptions(
                max_new_tokens=config.sample.max_new_tokens,
                temperature=config.sample.temperature,
                seed=config.seed,
            ),
        )
        nha_jax.save(self._folder.model, model, overwrite=True)
        step, references = self.progress.step, self._references()
        result = Result(
            step,
            held_out.bits_per_byte,
            held_out.perplexity,
            references,
            config.sample.prompt,
            sample,
        )
        result.write(self._folder.result)
        return result

    def _report_steps(
        self, steps: dict[int, Metrics], reporting: Reporting, held_out: HeldOut | None = None
    ) -> None:
        """Fetches the metrics of steps (at most one), waiting for it; counts and reports."""
        for step, arrays in steps.items():
            metrics = fetch(arrays)
            skipped = metrics["skipped"] > 0
            self.progress = Progress(step, step, self.progress.skipped + skipped)
            self._skipped_in_row = self._skipped_in_row + 1 if skipped else 0
            reporting.step(step, metrics, self.progress.skipped, held_out)
            self._stop_if_lost(metrics)

    def _stop_if_lost(self, metrics: Mapping[str, float]) -> None:
        if self._skipped_in_row < self._config.optimizer.max_skipped_updates:
            return
        raise TrainingError(
            f"stopped at step {self.progress.step}: the last {self._skipped_in_row} updates were "
            f"not finite and were skipped (loss {metrics['loss']}, gradient norm "
            f"{metrics['gradient_norm']}); try a lower optimizer.learning_rate, a longer "
            "optimizer.warmup_steps or model.dtype=float32 in another run folder"
        )

    def _evaluate(self, windows: int) -> HeldOut:
        return measure_held_out(
            self._steps,
            self.state.model,
            self._held_out,
            self._config.batch_size,
            windows,
            BYTES_PER_TARGET,
        )

    def _references(self) -> dict[str, float]:
        return gzip_references(self._corpus.held_out.text)

    def _print_header(self) -> None:
        model, data = self._config.model, self._config.data
        flops = model.flops_per_token(data.sequence_length)
        shape = " ".join(f"{axis}={size}" for axis, size in self._mesh.shape.items())
        print(f"run      {self._folder.path}")
        print(f"model    {model.num_parameters:,} parameters, {flops / 1e6:.2f} MFLOPs a token")
        for name, part in (
            ("training", self._corpus.training),
            ("held out", self._corpus.held_out),
        ):
            print(f"{name} {len(part.tokens):,} bytes in {len(part.names)} files of {data.corpus}")
        print(f"devices  {self._mesh.devices.flat[0].device_kind}, {shape}")
        if self.progress.step:
            print(f"resuming after step {self.progress.step} of {self._config.steps}")
        print(flush=True)
