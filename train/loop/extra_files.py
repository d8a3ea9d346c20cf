"""The files that go beside a trained model: its tokenizer, and what its initial model brought."""

import hashlib
import json
from collections.abc import Mapping

from nha_jax.storage.folder import extra_files_of
from nha_jax.storage.json_objects import parse_object
from nha_jax.tokenizer.files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from nha_jax.tokenizer.interface import Tokenizer
from train.config import TrainConfig
from train.data.chat_template import TEMPLATE_FILE
from train.data.corpus import Corpus
from train.data.tokenizers import tokenizer_errors
from train.errors import ConfigError
from train.storage.atomic import write_if_changed
from train.storage.initial_model import InitialModel
from train.storage.run_folder import RunFolder


def check_tokenizer(initial: InitialModel, tokenizer: Tokenizer, corpus: str) -> None:
    """Raises ConfigError if the initial model has another tokenizer than the corpus.

    Args:
        initial: the model to start from; one without a tokenizer fits any corpus.
        tokenizer: the corpus's.
        corpus: the corpus's name, for the message.
    """
    file = initial.folder / TOKENIZER_FILE
    if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() == tokenizer.name:
        return
    used = "bytes as tokens" if tokenizer.name == "bytes" else "another tokenizer"
    raise ConfigError(
        f"data.corpus = {corpus}: it has {used}, and initial_model = {initial.name!r} the one in "
        f"{file}; prepare it with --tokenizer {file}"
    )


def write_extra_files(
    folder: RunFolder, config: TrainConfig, corpus: Corpus, initial: InitialModel | None
) -> None:
    """Writes into the run's folder what `nha_jax.save` will put beside the finished model."""
    files: Mapping[str, bytes] = {}
    if initial is not None:
        files = merge_extra_files(initial, corpus.tokenizer)
    elif config.initial_model is None:  # otherwise they are there since the run began
        files = corpus.tokenizer.files
    if corpus.chat_template is not None:  # what it learns to answer in
        files = {**files, TEMPLATE_FILE: corpus.chat_template}
    for name, content in files.items():
        write_if_changed(folder.path / name, content)


def merge_extra_files(initial: InitialModel, tokenizer: Tokenizer) -> dict[str, bytes]:
    """The initial model's extra files and the corpus's tokenizer, as name -> content.

    Where both say something, such as how a text ends, the corpus's tokenizer counts.

    Raises:
        DataError: the folder's tokenizer_config.json is damaged.
    """
    files, name = extra_files_of(initial.folder), TOKENIZER_CONFIG_FILE
    both = [x[name] for x in (files, tokenizer.files) if name in x]
    files |= tokenizer.files
    if len(both) == 2:
        with tokenizer_errors():
            old, new = (parse_object(content, initial.folder / name) for content in both)
        files[name] = (json.dumps(old | new, indent=2, ensure_ascii=False) + "\n").encode()
    return files
