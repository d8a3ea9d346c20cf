"""A run in progress: its steps, evaluations and saves."""

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

import nha_jax
from nha_jax.storage.folder import extra_files_of
from train.checkpoint.checkpoints import Checkpoints, Progress
from train.config import TrainConfig
from train.data.batches import Sequences, training_batches
from train.data.corpus import Corpus
from train.devices import processes
from train.devices.mesh import rows_of_process, single_device_mesh
from train.errors import TrainingError, do_without
from train.loop.interruption import Interruption
from train.loop.profiling import Profiler
from train.loop.spikes import Spike, SpikeFinder
from train.loop.tasks import task_sequences
from train.loop.watchdog import Watchdog
from train.phases import Phase, phase_at, phases_of
from train.report.goodput import Spent, Times
from train.report.metrics import Row
from train.report.reporting import Reporting, fetch, plot_run, row_without_evaluation
from train.step.evaluation import HeldOut, gzip_references, measure_held_out
from train.step.phase_functions import ever_trained, functions_of
from train.step.update import TrainState
from train.storage.initial_model import InitialModel
from train.storage.result import Result
from train.storage.run_folder import RunFolder
from train.text.continuation import complete

Metrics = dict[str, jax.Array]
"""The scalars that an update returns, still on the devices."""


class _UndoError(Exception):
    """A spike of the loss that is to be undone."""

    def __init__(self, spike: Spike):
        super().__init__(str(spike))
        self.spike = spike


class Trainer:
    """A run in progress.

    Attributes:
        state: parameters and optimizer, on the devices.
        progress: how far the run has come.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        mesh: Mesh,
        folder: RunFolder,
        checkpoints: Checkpoints,
        times: Times,
        initial: InitialModel | None = None,
    ):
        """Restores the newest checkpoint or, if there is none, makes the first state.

        Args:
            config: the run's configuration.
            corpus: the text to learn and to measure on.
            mesh: the devices.
            folder: the run's folder, open.
            checkpoints: the run's checkpoints, open.
            times: where this session's time goes.
            initial: the model to start from, and to learn from if a term of the loss compares;
                None: the parameters are drawn by the seed, or come from a checkpoint.
        """
        self._config = config
        self._corpus = corpus
        self._folder = folder
        self._checkpoints = checkpoints
        self._times = times
        self._training = Sequences(corpus.training, config.data.sequence_length)
        self._held_out = Sequences(corpus.held_out, config.data.sequence_length)
        self._questions = task_sequences(config, corpus.tokenizer)
        self._rows = rows_of_process(mesh, config.batch_size)
        self._initial = initial
        self._mesh = mesh
        self._phases = phases_of(config)
        self._phase = self._phases[0]
        self._functions = functions_of(self._phase, self._phases, mesh)
        self._teacher: nnx.State | None = None
        self.state: TrainState
        self._restore()
        self._vote = processes.StopVote(mesh)
        self._skipped_in_row = 0
        self.spent: Spent | None = None
        if processes.is_first():
            self._print_header()

    def run(self, interruption: Interruption) -> int | None:
        """Trains up to the last step or an interruption; the state is then on disk.

        Args:
            interruption: open; a signal it notes stops the run after a step.

        Returns:
            The signal that stopped this process or another of the run; None at the last step.
        """
        while True:
            try:
                return self._run(interruption)
            except _UndoError as error:
                self._undo(error.spike)

    def _restore(self) -> None:
        """Holds the state of the newest checkpoint or, if there is none, the first one."""
        restored = self._checkpoints.restore_stage(self._placed_state)
        if restored is None:
            initial, model = self._initial, self._config.model
            self._phase = self._phases[0]
            self._functions = functions_of(self._phase, self._phases, self._mesh)
            source = None if initial is None else initial.source(model)
            restored = self._functions.initial_state(source), Progress()
        self.state, self.progress = restored
        self._finder = SpikeFinder(self._config.spike, self.progress.losses)
        self._read_teacher()

    def _undo(self, spike: Spike) -> None:
        """Goes back to the newest checkpoint, all of which are from before the spike.

        What a kill in between makes it do again comes to the same end, as the checkpoint has all
        that the decision hangs on.
        """
        self._checkpoints.wait()
        next_batch, undone = self.progress.next_batch, self.progress.undone + 1
        jax.tree.map(lambda array: array.delete(), self.state)
        self._restore()
        self.progress = self.progress._replace(next_batch=next_batch, undone=undone)
        self._skipped_in_row = 0
        self._times = Times()
        if processes.is_first():
            print(
                f"nha: {spike}; back to step {self.progress.step}, and on with batch {next_batch} "
                f"(undone {undone} of spike.undo = {self._config.spike.undo})",
                file=sys.stderr,
                flush=True,
            )

    def _run(self, interruption: Interruption) -> int | None:
        """Does what `run` does, up to a spike that is to be undone."""
        config, first = self._config, self.progress.step
        missing, caught_up = self._catch_up(interruption)
        if missing is not None and caught_up is None:
            return self._vote.last(interruption.signal)
        after = first if missing is None else first - 1
        left_out = self.progress.next_batch - first
        per_target = lambda n: self._corpus.training.bytes_per_target_at(n + left_out)  # noqa: E731
        batches = training_batches(
            self._training, config.batch_size, config.seed, self.progress.next_batch, self._rows
        )
        times = self._times
        with (
            Reporting(config, self._folder, self._mesh, after, per_target, times) as reporting,
            Profiler(config.logging.profile, self._folder.profile) as profiler,
            Watchdog(config.watchdog, times, self._folder.write_now) as watchdog,
        ):
            reporting.more = watchdog.slowest
            if missing is not None and caught_up is not None:
                reporting.complete(missing, caught_up)
            unreported: dict[int, Metrics] = {}
            update_kind = "compiling"
            times.turn_to("steps")
            for step in range(first + 1, config.steps + 1):
                if step > self._phase.last:
                    self._report_steps(unreported, reporting)
                    unreported = {}
                    self._enter(phase_at(self._phases, step))
                    reporting.clock.stop()
                    update_kind = "compiling"
                profiler.before(step)
                with times.spending("data"):
                    batch = next(batches)
                with times.spending(update_kind):
                    self.state, metrics = self._functions.update(self.state, batch, self._teacher)
                profiler.after(step, metrics)
                update_kind = "steps"
                # The metrics of the step before are fetched while the devices work on this one.
                self._report_steps(unreported, reporting)
                unreported = {step: metrics}
                stop = self._vote.cast(interruption.signal) is not None or step == config.steps
                evaluate = self._has_evaluation(step)
                save = self._checkpoints.is_due(step) or stop
                held_out = None
                if evaluate or save:
                    jax.block_until_ready(metrics)
                    with reporting.clock.paused(), times.spending("evaluation"):
                        if evaluate:
                            held_out = self._evaluate(config.evaluation.sequences, interruption)
                    given_up = evaluate and held_out is None
                    stop, save = stop or given_up, save or given_up
                    self._report_steps(unreported, reporting, held_out, given_up)
                    unreported = {}
                if save:
                    with reporting.clock.paused(), times.spending("checkpoints"):
                        loss = held_out.bits_per_byte if held_out else None
                        self._checkpoints.save(self.state, self.progress, loss)
                watchdog.step(step)
                if stop:
                    break
            with times.spending("checkpoints"):
                self._checkpoints.wait()
            self.spent = reporting.end_session(self.progress.step)
        if processes.is_first():
            plot_run(self._folder, self._references)
        return self._vote.last(interruption.signal)

    def _placed_state(self, step: int) -> tuple[TrainState, TrainState]:
        """Turns to the phase of a step; gives its state's shapes and dtypes, and its shardings."""
        phase = phase_at(self._phases, step)
        if phase is not self._phase:
            self._phase, self._functions = phase, functions_of(phase, self._phases, self._mesh)
        return self._functions.abstract_state, self._functions.shardings

    def _enter(self, phase: Phase) -> None:
        """Goes on to the next phase; what a stage leaves behind are the parameters alone."""
        before, functions = self._phase, self._functions
        self._phase, self._functions = phase, functions_of(phase, self._phases, self._mesh)
        if phase.stage != before.stage:
            self.state = self._functions.begin(functions.evaluated(self.state))
        self._read_teacher()

    def _read_teacher(self) -> None:
        """Holds the teacher's parameters if the phase has one, and lets go of them if not."""
        config = self._phase.config
        if not config.loss.has_teacher:
            self._teacher = None
        elif self._teacher is None and self._initial is not None:
            self._teacher = self._functions.read_teacher(self._initial.source(config.model))

    def finish(self) -> Result | None:
        """Saves the finished model for `nha_jax.load`, measures it, and lets it write a sample.

        What comes later cannot cost what came before: the sample may fail.

        Returns:
            The result, in the first process; if there are others, they only help to measure, and
            have None.
        """
        states = self._functions.evaluated(self.state), self._functions.averaged(self.state)
        if jax.process_count() == 1:
            model = self._save_models(*states)
            return self._write_result(self._final_evaluation(), model)
        held_out = self._final_evaluation()
        everywhere = processes.replicate(states, self._mesh)
        if not processes.is_first():
            return None
        # The other processes take no part any more.
        with jax.set_mesh(single_device_mesh(jax.local_devices()[0])):
            local = jax.tree.map(lambda array: array.addressable_data(0), everywhere)
            return self._write_result(held_out, self._save_models(*local))

    def _final_evaluation(self) -> HeldOut:
        held_out = self._evaluate(self._config.evaluation.final_sequences)
        assert held_out is not None  # no signal is listened to that would stop it
        return held_out

    def _save_models(self, evaluated: Any, averaged: Any) -> nha_jax.Model:
        """Saves the model, merged, its adapter and its moving average; returns the model."""
        model = self._save_model(self._folder.model, evaluated)
        if self._config.adapter is not None:
            whole = ever_trained(self._phases).whole
            nha_jax.save_adapter(self._folder.adapter, model, whole=whole, overwrite=True)
        if averaged is not None:
            self._save_model(self._folder.model_ema, averaged)
        return model

    def _save_model(self, folder: Path, model_state: Any) -> nha_jax.Model:
        model = self._functions.model(model_state)
        files = extra_files_of(self._folder.path)
        nha_jax.save(folder, model, overwrite=True, files=files)
        return model

    def _write_result(self, held_out: HeldOut, model: nha_jax.Model) -> Result:
        ema = held_out.ema
        result = Result(
            self.progress.step,
            held_out.bits_per_byte,
            held_out.perplexity,
            self._references,
            self._config.sample.prompt,
            sample=None,
            held_out_ema_bits_per_byte=None if ema is None else ema.bits_per_byte,
        )
        result.write(self._folder.result)
        with do_without("sample"):
            result = dataclasses.replace(result, sample=self._sample(model))
            result.write(self._folder.result)
        return result

    def _sample(self, model: nha_jax.Model) -> str:
        sample = self._config.sample
        # What training names may not serve decode steps; the sample takes what does.
        return complete(
            model.with_implementation(None),
            self._corpus.tokenizer,
            sample.prompt,
            nha_jax.SamplingOptions(
                max_new_tokens=sample.max_new_tokens,
                temperature=sample.temperature,
                seed=self._config.seed,
            ),
        )

    def _has_evaluation(self, step: int) -> bool:
        return step % self._config.evaluation.every == 0 or step == self._config.steps

    def _catch_up(self, interruption: Interruption) -> tuple[Row | None, HeldOut | None]:
        """Makes the evaluation of the last step, if a signal kept the run from it.

        Returns:
            The step's row in the metrics and the evaluation, or None for the first if it is not
            missing, and for the second if a signal has come again.
        """
        first = self.progress.step
        if not first or not self._has_evaluation(first):
            return None, None
        row = processes.on_first(lambda: row_without_evaluation(self._folder, first))
        if row is None:
            return None, None
        return row, self._evaluate(self._config.evaluation.sequences, interruption)

    def _report_steps(
        self,
        steps: dict[int, Metrics],
        reporting: Reporting,
        held_out: HeldOut | None = None,
        always: bool = False,
    ) -> None:
        """Waits for the metrics of steps (at most one), counts them and reports them.

        Raises:
            TrainingError: too many updates in a row were skipped.
        """
        for step, arrays in steps.items():
            metrics = fetch(arrays)
            skipped = metrics["skipped"] > 0
            spike = self._finder.look(step, metrics.get("loss", math.nan))
            before = self.progress
            self.progress = before._replace(
                step=step,
                next_batch=before.next_batch + 1,
                skipped=before.skipped + skipped,
                losses=tuple(self._finder.losses),
            )
            if spike is not None and before.undone < self._config.spike.undo:
                reporting.end_session(step)
                raise _UndoError(spike)
            if spike is not None and processes.is_first():
                print(f"\nnha: {spike}", file=sys.stderr, flush=True)
            self._skipped_in_row = self._skipped_in_row + 1 if skipped else 0
            reporting.step(step, metrics, self.progress.skipped, held_out, always)
            self._stop_if_lost(metrics)

    def _stop_if_lost(self, metrics: Mapping[str, float]) -> None:
        if self._skipped_in_row < self._config.optimizer.max_skipped_updates:
            return
        raise TrainingError(
            f"stopped at step {self.progress.step}: the last {self._skipped_in_row} updates were "
            f"not finite and were skipped (loss {metrics.get('loss')}, gradient norm "
            f"{metrics['gradient_norm']}); try a lower optimizer.learning_rate, a longer "
            "optimizer.warmup_steps or model.dtype=float32 in another run folder"
        )

    def _evaluate(self, count: int, interruption: Interruption | None = None) -> HeldOut | None:
        """Measures `count` held-out sequences; None if `interruption` noted a signal meanwhile.

        The moving average of the parameters, if there is one, is measured as well.
        """

        def stopped() -> bool:
            return interruption is not None and self._vote.cast(interruption.signal) is not None

        def measure(model_state: Any, sequences: Sequences, count: int) -> HeldOut | None:
            size, rows = self._config.batch_size, self._rows
            return measure_held_out(
                self._functions, model_state, sequences, size, count, rows, stopped
            )

        evaluated = self._functions.evaluated(self.state)
        held_out = measure(evaluated, self._held_out, count)
        for name, sequences in self._questions.items():
            task = held_out and measure(evaluated, sequences, len(sequences))
            held_out = held_out and task and held_out.with_task(name, task)
        averaged = self._functions.averaged(self.state)
        if held_out is None or averaged is None:
            return held_out
        ema = measure(averaged, self._held_out, count)
        return ema and dataclasses.replace(held_out, ema=ema)

    @functools.cached_property
    def _references(self) -> dict[str, float]:
        with do_without("gzip's bits per byte"):
            return gzip_references(self._corpus.held_out)
        return {}

    def _print_header(self) -> None:
        model, data = self._config.model, self._config.data
        flops = nha_jax.flops_per_token(model, data.sequence_length)
        shape = " ".join(f"{axis}={size}" for axis, size in self._mesh.shape.items())
        print(f"run      {self._folder.location}")
        parameters = nha_jax.num_parameters(model)
        dtype = f"trained and saved in {model.param_dtype}"
        print(f"model    {parameters:,} parameters, {dtype}, {flops / 1e6:.2f} MFLOPs a token")
        if self._initial is not None:
            changes = "; ".join(self._initial.changes(model)) or "as it is"
            print(f"from     {self._initial.folder}: {changes}")
        if self._functions.num_trained < parameters:
            print(f"trained  {self._functions.num_trained:,} parameters")
        for name, part in (
            ("training", self._corpus.training),
            ("held out", self._corpus.held_out),
        ):
            amount = f"{part.num_tokens:,} tokens in {part.num_documents:,} documents"
            if part.has_mask:
                amount += f" ({part.num_targets:,} tokens to learn)"
            print(f"{name} {amount} of {data.corpus}")
        if self._config.stages:
            stages = (f"{stage.name} {stage.steps} steps" for stage in self._config.stages)
            print(f"stages   {', '.join(stages)}")
        print(f"devices  {self._mesh.devices.flat[0].device_kind}, {shape}")
        if self.progress.step >= self._config.steps:
            print(f"trained  {self.progress.step} steps: only the result is missing")
        elif self.progress.step:
            print(f"resuming after step {self.progress.step} of {self._config.steps}")
        print(flush=True)
