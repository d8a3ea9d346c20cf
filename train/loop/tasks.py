"""What a run is asked at its evaluations besides its held-out text."""

from nha_jax.tokenizer.interface import Tokenizer
from train.config import TrainConfig
from train.data.batches import Sequences
from train.data.questions import Questions
from train.data.recall import EVALUATION, DrawnExamples
from train.data.token_source import Split
from train.errors import ConfigError


def task_sequences(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Sequences]:
    """Makes the sequences of a run's `evaluation.tasks`, by their names.

    Raises:
        ConfigError: a name is unknown, or its questions do not fit a sequence.
    """
    length, count, made = config.data.sequence_length, config.evaluation.task_examples, {}
    for name in config.evaluation.tasks:
        try:
            questions = Questions.parse(name, tokenizer)
            questions.write(length, EVALUATION, 0)
        except ConfigError as error:
            raise ConfigError(f"evaluation.tasks: {error}") from None
        source = DrawnExamples(questions, length, EVALUATION, count)
        made[str(questions)] = Sequences(Split((source,)), length)
    return made
