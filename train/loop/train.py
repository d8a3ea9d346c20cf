"""The training loop: from a configuration to a run folder with a trained model."""

import signal
import sys

import jax
from jax.sharding import Mesh

from nha_jax import ModelConfig
from nha_jax.tokenizer.interface import Tokenizer
from train.checkpoint.checkpoints import Checkpoints
from train.config import TrainConfig
from train.data.corpus import Corpus, load_corpus
from train.devices import processes
from train.devices.compilation_cache import use_compilation_cache
from train.devices.mesh import make_mesh
from train.errors import ConfigError, explain_refusal
from train.loop.extra_files import check_tokenizer, write_extra_files
from train.loop.interruption import Interruption
from train.loop.memory import explain_memory
from train.loop.profiling import check_profile
from train.loop.tasks import task_sequences
from train.loop.trainer import Trainer
from train.phases import phases_of
from train.report.goodput import Times
from train.report.wandb_reporter import check_wandb
from train.step.phase_functions import ever_trained, functions_of
from train.storage.initial_model import InitialModel
from train.storage.result import Result
from train.storage.run_folder import RECORD_FILE, RunFolder


def train(config: TrainConfig) -> int:
    """Trains, resumes, or says that the run is finished.

    Args:
        config: the whole configuration.

    Returns:
        The exit code: 0, or 128 + the signal that stopped the run (130 Ctrl-C, 143 SIGTERM).

    Raises:
        ConfigError: the corpus, the devices, the run folder, the initial model, the implementation,
            the sample's prompt, the profile or wandb do not fit the configuration; nothing was
            written.
        TrainingError: the loss stays non-finite, memory runs out, or a file cannot be written.
        CheckpointError: all checkpoints are damaged, or none can be saved.
    """
    check_wandb(config.logging.wandb)
    use_compilation_cache(config.compilation_cache)
    processes.join(config)
    try:
        return _train(config)
    except Exception as error:
        if jax.process_count() > 1:
            processes.leave_after(error)
        raise


def _train(config: TrainConfig) -> int:
    """Does what `train` does, once this process has joined the others."""
    times = Times()
    corpus = load_corpus(config.data)
    corpus.check_vocabulary(config.model.vocab_size)
    mesh = make_mesh(config)
    ever_trained(phases_of(config))
    _check_implementation(config, mesh)
    _check_sample(config.sample.prompt, corpus.tokenizer)
    task_sequences(config, corpus.tokenizer)
    folder = RunFolder(config.run)
    check_profile(config.logging.profile, folder.profile)
    initial = _initial_model(config, corpus, folder)
    with (
        folder.open(config, corpus.fingerprint),
        jax.set_mesh(mesh),
        Checkpoints(
            folder.checkpoints,
            config.checkpoint,
            {RECORD_FILE: folder.record},
            before_save=folder.before_save,
            on_saved=folder.on_saved,
        ) as checkpoints,
    ):
        if initial is not None:
            processes.on_first(lambda: initial.remember(folder.path))
        if processes.is_first():
            _warn_of_lost_updates(config.model)
            write_extra_files(folder, config, corpus, initial)
        done, spent = checkpoints.latest_step or 0, None
        result = Result.read(folder.result)
        if done < config.steps or result is None or result.step != done:
            with explain_memory(config, mesh):
                trainer = Trainer(config, corpus, mesh, folder, checkpoints, times, initial)
                with Interruption() as interruption:
                    number = trainer.run(interruption)
            if number is not None:
                if processes.is_first():
                    name = signal.Signals(number).name
                    print(f"Stopped by {name} at step {trainer.progress.step}.")
                    print("Everything is saved; the same command resumes.")
                return 128 + number
            with explain_memory(config, mesh):
                result = trainer.finish()
            spent = trainer.spent
        elif processes.is_first():
            print(_finished(done, config.steps))
    if processes.is_first():
        print(result)
        if spent is not None:
            print(f"\nGoodput: {spent}")
        print(f"\nIn {folder.location}: loss.png, slot_weight.png, metrics.jsonl,")
        averaged = ", model_ema" if config.optimizer.ema_decay is not None else ""
        adapter = ", adapter" if config.adapter is not None else ""
        print(f"tensorboard, checkpoints, model{averaged}{adapter}")
    return 0


def _warn_of_lost_updates(model: ModelConfig) -> None:
    if model.param_dtype != "float32":
        print(
            f"nha: model.param_dtype = {model.param_dtype}: parameters and moments of so few "
            "bits lose small updates, the norms' nearly all of them; float32 keeps them",
            file=sys.stderr,
        )


def _finished(done: int, steps: int) -> str:
    if done > steps:
        return f"This run is finished: {done} steps are done; steps = {steps} takes none back."
    return f"This run is finished: {done} of {steps} steps; raise steps to go on."


def _check_sample(prompt: str, tokenizer: Tokenizer) -> None:
    """Raises ConfigError if the text to continue has no token."""
    if not len(tokenizer.encode_prompt(prompt)):
        raise ConfigError(
            f"sample.prompt = {prompt!r}: the tokenizer of data.corpus makes no token of it; "
            "choose another text"
        )


def _check_implementation(config: TrainConfig, mesh: Mesh) -> None:
    """Raises ConfigError if an implementation is named that cannot serve step or evaluation."""
    if config.model.implementation is not None:
        phases = phases_of(config)
        with jax.set_mesh(mesh), explain_refusal():
            for phase in phases:
                functions = functions_of(phase, phases, mesh)
                functions.trace_update()
                functions.trace_evaluate()


def _initial_model(config: TrainConfig, corpus: Corpus, folder: RunFolder) -> InitialModel | None:
    """Opens the model that the run starts or learns from; None if none is needed any more."""
    name = config.initial_model
    has_teacher = any(phase.config.loss.has_teacher for phase in phases_of(config))
    if name is None or (folder.has_checkpoint and not has_teacher):
        return None
    initial = InitialModel.open(name)
    initial.source(config.model)
    check_tokenizer(initial, corpus.tokenizer, corpus.name)
    return initial
