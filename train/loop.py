"""The training loop: from a configuration to a run folder with a trained model."""

import contextlib
import math
import signal
from typing import Any

import jax
from jax.sharding import Mesh

import nha_jax
from train import processes
from train.checkpoint import Checkpoints, Progress
from train.clock import Clock
from train.config import TrainConfig
from train.corpus import Corpus, load_corpus
from train.data import Windows, training_batches
from train.errors import TrainingError
from train.evaluation import gzip_references, held_out_bits_per_byte
from train.interruption import Interruption
from train.mesh import MESH_AXES, make_mesh, rows_of_process
from train.metrics import MetricsLog, ProgressBar, Row, plot_loss_curve, read_rows
from train.result import Result
from train.run_folder import RunFolder, write_atomically
from train.step import Steps, TrainState
from train.text import complete


def train(config: TrainConfig) -> int:
    """Trains, or resumes, or says that the run is finished.

    Returns:
        The exit code: 0, or 128 + the signal that stopped the run (130 Ctrl-C, 143 SIGTERM).

    Raises:
        ConfigError: corpus, devices or run folder do not fit; nothing was written.
        TrainingError: the loss stays non-finite, or a file cannot be written.
        CheckpointError: no checkpoint is whole, or none can be saved.
    """
    processes.join(config)
    try:
        return _train(config)
    except Exception as error:
        if jax.process_count() > 1:
            processes.leave_after(error)
        raise


def _train(config: TrainConfig) -> int:
    corpus = load_corpus(config.data)
    corpus.check_vocabulary(config.model.vocab_size)
    mesh = make_mesh(config)
    folder = RunFolder(config.run)
    with (
        folder.open(config, corpus.fingerprint),
        jax.set_mesh(mesh),
        Checkpoints(folder.checkpoints, config.checkpoint) as checkpoints,
    ):
        if jax.process_index() == 0:
            for name, content in corpus.tokenizer.files.items():
                write_atomically(folder.path / name, content)
        done = checkpoints.latest_step or 0
        result = Result.read(folder.result)
        if done < config.steps or result is None or result.step != done:
            trainer = Trainer(config, corpus, mesh, folder, checkpoints)
            with Interruption() as interruption:
                number = trainer.run(interruption)
            if number is not None:
                if processes.is_first():
                    name = signal.Signals(number).name
                    print(f"Stopped by {name} at step {trainer.progress.step}.")
                    print("Everything is saved; the same command resumes.")
                return 128 + number
            result = trainer.finish()
        elif processes.is_first():
            print(f"This run is finished: {done} of {config.steps} steps; raise steps to go on.")
    if processes.is_first():
        print(result)
        print(f"\nIn {folder.path}: loss.png, metrics.jsonl, tensorboard, checkpoints, model")
    return 0


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
        self._mesh = mesh
        self._rows = rows_of_process(mesh, config.batch_size)
        self._steps = Steps(config, mesh)
        self._vote = processes.StopVote(mesh)
        self.state: TrainState
        restored = checkpoints.restore(self._steps.abstract_state, self._steps.shardings)
        self.state, self.progress = restored or (self._steps.initial_state(), Progress())
        self._skipped_in_row = 0
        self._clock = Clock(config.batch_size * config.data.sequence_length)
        if processes.is_first():
            self._print_header(mesh)

    def run(self, interruption: Interruption) -> int | None:
        """Trains up to the last step or an interruption; the state is then on disk.

        Returns:
            The signal that stopped this process or another of the run; None at the last step.
        """
        config, first = self._config, self.progress.step
        batches = training_batches(
            self._training, config.batch_size, config.seed, self.progress.next_batch, self._rows
        )
        with (
            self._open_log(first) as log,
            ProgressBar(config.steps, first, shown=processes.is_first()) as bar,
        ):
            unreported: dict[int, dict[str, jax.Array]] = {}
            for step in range(first + 1, config.steps + 1):
                self.state, metrics = self._steps.update(self.state, next(batches))
                # The step before is fetched while the devices work on this one.
                self._report_steps(unreported, log, bar)
                unreported = {step: metrics}
                stop = self._vote.cast(interruption.signal) is not None or step == config.steps
                evaluate = step % config.evaluation.every == 0 or step == config.steps
                save = self._checkpoints.is_due(step) or stop
                held_out = None
                if evaluate or save:
                    jax.block_until_ready(metrics)
                    with self._clock.paused():
                        if evaluate:
                            held_out = self._evaluate(config.evaluation.windows)
                    self._report_steps(unreported, log, bar, held_out)
                    unreported = {}
                if save:
                    with self._clock.paused():
                        self._checkpoints.save(self.state, self.progress, held_out)
                if stop:
                    break
            self._checkpoints.wait()
        if processes.is_first():
            self._plot()
        return self._vote.last(interruption.signal)

    def _open_log(self, step: int) -> contextlib.AbstractContextManager[MetricsLog | None]:
        if not processes.is_first():
            return contextlib.nullcontext()
        return MetricsLog(self._folder.metrics, self._folder.tensorboard, step)

    def finish(self) -> Result | None:
        """Measures the finished model, saves it for `nha_jax.load`, lets it write.

        Of several processes all measure, and the first alone does the rest and has the result.
        """
        held_out = self._evaluate(self._config.evaluation.final_windows)
        if jax.process_count() == 1:
            return self._write_result(held_out, self.state.model)
        everywhere = processes.whole(self.state.model, self._mesh)
        if not processes.is_first():
            return None
        # A mesh of its own: the others take no part any more.
        here = jax.make_mesh((1,) * len(MESH_AXES), MESH_AXES, devices=jax.local_devices()[:1])
        with jax.set_mesh(here):
            local = jax.tree.map(lambda array: array.addressable_data(0), everywhere)
            return self._write_result(held_out, local)

    def _write_result(self, held_out: float, model_state: Any) -> Result:
        config = self._config
        model = self._steps.model(model_state)
        sample = complete(
            model,
            self._corpus.tokenizer,
            config.sample.prompt,
            nha_jax.SamplingOptions(
                max_new_tokens=config.sample.max_new_tokens,
                temperature=config.sample.temperature,
                seed=config.seed,
            ),
        )
        nha_jax.save(
            self._folder.model, model, overwrite=True, tokenizer=self._corpus.tokenizer.files
        )
        step, references = self.progress.step, self._references()
        result = Result(step, held_out, references, config.sample.prompt, sample)
        result.write(self._folder.result)
        return result

    def _report_steps(
        self,
        steps: dict[int, dict[str, jax.Array]],
        log: MetricsLog | None,
        bar: ProgressBar,
        held_out: float | None = None,
    ) -> None:
        """Fetches the metrics of steps (at most one), waiting for it; counts, shows, logs."""
        for step, arrays in steps.items():
            metrics = {name: float(array) for name, array in arrays.items()}
            skipped = metrics.pop("skipped") > 0
            self.progress = Progress(step, step, self.progress.skipped + skipped)
            self._skipped_in_row = self._skipped_in_row + 1 if skipped else 0
            shown = {"loss": f"{metrics['loss']:.3f}"}
            if held_out is not None:
                shown["held-out bits/byte"] = f"{held_out:.3f}"
            if step % self._config.logging.every == 0 or held_out is not None:
                row = self._row(step, metrics, held_out)
                if log is not None:
                    log.write(row)
                if "tokens_per_second" in row:
                    shown["tokens/s"] = f"{row['tokens_per_second']:.0f}"
            self._clock.start_once(step)
            bar.advance(**shown)
            self._stop_if_lost(metrics)

    def _row(self, step: int, metrics: dict[str, float], held_out: float | None) -> Row:
        row = {
            "step": step,
            "loss": metrics["loss"],
            "bits_per_byte": metrics["loss"] / math.log(2) / self._training.bytes_per_target,
            "gradient_norm": metrics["gradient_norm"],
            "learning_rate": float(self._steps.learning_rate(step - 1)),
            "skipped_updates": self.progress.skipped,
        }
        rate = self._clock.tokens_per_second(step)
        if rate is not None:
            row["tokens_per_second"] = rate
        if held_out is not None:
            row["held_out_bits_per_byte"] = held_out
        return row

    def _stop_if_lost(self, metrics: dict[str, float]) -> None:
        if self._skipped_in_row < self._config.optimizer.max_skipped_updates:
            return
        raise TrainingError(
            f"stopped at step {self.progress.step}: the last {self._skipped_in_row} updates were "
            f"not finite and were skipped (loss {metrics['loss']}, gradient norm "
            f"{metrics['gradient_norm']}); try a lower optimizer.learning_rate, a longer "
            "optimizer.warmup_steps or model.dtype=float32 in another run folder"
        )

    def _evaluate(self, windows: int) -> float:
        return held_out_bits_per_byte(
            self._steps,
            self.state.model,
            self._held_out,
            self._config.batch_size,
            windows,
            self._rows,
        )

    def _references(self) -> dict[str, float]:
        return gzip_references(self._corpus.held_out)

    def _plot(self) -> None:
        plot_loss_curve(read_rows(self._folder.metrics), self._references(), self._folder.curve)

    def _print_header(self, mesh: Mesh) -> None:
        model, data = self._config.model, self._config.data
        flops = model.flops_per_token(data.sequence_length)
        shape = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        print(f"run      {self._folder.path}")
        print(f"model    {model.num_parameters:,} parameters, {flops / 1e6:.2f} MFLOPs a token")
        for name, part in (
            ("training", self._corpus.training),
            ("held out", self._corpus.held_out),
        ):
            amount = f"{part.num_tokens:,} tokens in {part.num_documents:,} documents"
            print(f"{name} {amount} of {data.corpus}")
        print(f"devices  {mesh.devices.flat[0].device_kind}, {shape}")
        if self.progress.step:
            print(f"resuming after step {self.progress.step} of {self._config.steps}")
        print(flush=True)
