"""A model under lm-evaluation-harness: scores and texts for the tasks of `lm_eval`.

The harness's own command knows the model by the name "nha" when this module starts it:

    python -m train.text.harness --model nha --model_args path=runs/quickstart --tasks lambada
"""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

import nha_jax
from nha_jax.prompt_lengths import chunk_for, room_for
from nha_jax.tokenizer.interface import Tokenizer
from train.data.chat_template import ChatTemplate
from train.data.questions import read_twice
from train.errors import ConfigError
from train.paths import user_path
from train.text.continuation import continue_texts
from train.text.loading import load_model, load_tokenizer_of
from train.windows import read_windows

Scored = tuple[float, bool]
"""What the harness takes of a continuation: its natural log-probability, and whether greedy
decoding would have written it."""

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("nha")
class HarnessModel(TemplateLM):
    """A trained model as the harness calls it.

    Contexts that several continuations share are read once, and texts of any length are read
    whole, in chunks: nothing is cut off and no window slides (see `nha_jax.score`).
    """

    def __init__(
        self,
        model: nha_jax.Model,
        tokenizer: Tokenizer,
        *,
        folder: Path,
        batch_size: int = 8,
        max_gen_toks: int = 256,
        read_twice: bool = False,
    ):
        """Takes a model and its tokenizer.

        Args:
            model: the model.
            tokenizer: the model's own.
            folder: where its chat template is, if it has one.
            batch_size: rows that are read or written at once.
            max_gen_toks: tokens to write at most, where a task does not say.
            read_twice: whether each context is read twice.
        """
        super().__init__()
        self.model, self._tokens, self._folder = model, tokenizer, folder
        self._size, self._most = batch_size, max_gen_toks
        self._twice = read_twice
        self._chats = False  # whether texts come from the template

    @classmethod
    def of(
        cls,
        path: str | Path,
        *,
        windows: str | None = None,
        implementation: str | None = None,
        **options: Any,
    ) -> Self:
        """Loads the model of a run or of a saved model.

        Args:
            path: the folder.
            windows: other windows than the model's, as `nha generate --windows` takes them.
            implementation: of the operator; None: the fastest that serves.
            options: batch_size, max_gen_toks, read_twice.

        Raises:
            ConfigError, DataError: the folder, its tokenizer or an option cannot be used.
        """
        tokenizer = load_tokenizer_of(path)
        model = load_model(path)
        try:
            model = model.with_implementation(implementation)
            if windows is not None:
                model = model.with_windows(read_windows(windows, "windows"))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return cls(model, tokenizer, folder=user_path(path, "path"), **options)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """Makes the model of --model_args, such as path=runs/quickstart,windows=64."""
        if "path" not in arg_dict:
            raise ConfigError("--model_args: expected path=FOLDER, of a run or of a saved model")
        size = (additional_config or {}).get("batch_size")
        arguments = {"batch_size": size, **arg_dict} if size is not None else dict(arg_dict)
        if not str(arguments.get("batch_size", 1)).isdigit():  # "auto"
            del arguments["batch_size"]
        if "batch_size" in arguments:
            arguments["batch_size"] = int(arguments["batch_size"])
        if isinstance(arguments.get("read_twice"), str):
            arguments["read_twice"] = arguments["read_twice"].lower() in ("1", "true", "yes")
        if "windows" in arguments:  # the harness reads 64 as a number
            arguments["windows"] = str(arguments["windows"])
        return cls.of(arguments.pop("path"), **arguments)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Self:
        """Does the same with a text, `key=value,key=value`."""
        pairs = (pair.partition("=") for pair in arg_string.split(",") if pair)
        return cls.create_from_arg_obj({key: value for key, _, value in pairs}, additional_config)

    @property
    def eot_token_id(self) -> int:
        """The token that ends documents."""
        return self._tokens.end_token

    @property
    def prefix_token_id(self) -> int:
        """The token before a document, after which a text without a context is scored."""
        return self._begin()[-1]

    def _begin(self) -> list[int]:
        """Lists the tokens before a document; the end of the one before, if it has none."""
        if self._tokens.begin_tokens:
            return [*self._tokens.begin_tokens]
        if self.eot_token_id >= self.model.config.vocab_size:
            raise ConfigError(
                f"{self._folder}: its vocabulary has no token that ends or begins a document, "
                "which scoring a text without a context needs"
            )
        return [self.eot_token_id]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encodes a text; unless told otherwise, it begins as the model's documents do."""
        if add_special_tokens is False:
            return self._tokens.encode(string).tolist()
        return self._tokens.encode_prompt(string, chat=self._chats).tolist()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return super()._encode_pair(self._read(context), continuation)

    def _read(self, context: str) -> str:
        """Returns what is read of a context: with read_twice it stands there twice."""
        return read_twice(context) if self._twice and context else context

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[Scored]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._score(pairs, disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Computes each text's log-probability, as a document."""
        begin = self._begin()
        texts = [self._tokens.encode(request.args[0]).tolist() for request in requests]
        found = self._score([(begin, text) for text in texts], disable_tqdm)
        return [log_probability for log_probability, _ in found]

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool
    ) -> list[Scored]:
        """Scores continuations; an empty one is certain."""
        real = [i for i, (_, continuation) in enumerate(pairs) if continuation]
        with tqdm(total=len(real), desc="Scoring", disable=disable_tqdm) as bar:
            scores = nha_jax.score(
                self.model,
                [pairs[i][0] or [self.prefix_token_id] for i in real],
                [pairs[i][1] for i in real],
                batch_size=self._size,
                progress=lambda done: bar.update(done - bar.n),
            )
        found: list[Scored] = [(0.0, True)] * len(pairs)
        for i, score in zip(real, scores, strict=True):
            found[i] = score.log_probability, score.is_greedy
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Writes what follows each context, up to a stop text or the end of the document."""
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items()))].append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="Writing", disable=disable_tqdm) as bar:
            for numbers in alike.values():
                contexts = [requests[i].args[0] for i in numbers]
                for i, text in self._write(contexts, requests[numbers[0]].args[1], bar):
                    texts[numbers[i]] = text
        return texts

    def _write(
        self, contexts: Sequence[str], options: Mapping[str, Any], bar: tqdm
    ) -> list[tuple[int, str]]:
        """Continues contexts that have the same options."""
        until = options.get("until") or []
        stop = [x for x in ([until] if isinstance(until, str) else until) if x]
        sampling = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
        if not options.get("do_sample", sampling.get("temperature", 0) > 0):
            sampling["temperature"] = 0
        most = int(options.get("max_gen_toks", self._most))
        prompts = [
            np.asarray(self.tok_encode(self._read(context)) or [self.prefix_token_id])
            for context in contexts
        ]
        longest = max(map(len, prompts))
        engine = nha_jax.Engine(
            self.model,
            batch_size=min(self._size, len(prompts)),
            max_length=room_for(longest + most),
            prefill_chunk=chunk_for(longest),
        )
        end = [self.eot_token_id] if self.eot_token_id < self.model.config.vocab_size else []
        chosen = nha_jax.SamplingOptions(max_new_tokens=most, stop_tokens=end, **sampling)
        texts = [""] * len(prompts)
        for token in continue_texts(engine, self._tokens, prompts, chosen, stop):
            texts[token.prompt] += token.text
            bar.update(token.finished is not None)
        return list(enumerate(texts))

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer, for the harness's cache of requests."""
        return self._tokens.name

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate.of(self._folder)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Gives the harness the template's text, which it keeps with the results."""
        return self._template.source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Writes a conversation as the model saw them in training.

        Raises:
            ConfigError: the model has no chat template.
        """
        self._chats = True
        return self._template.render_messages(
            chat_history, add_generation_prompt=add_generation_prompt
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
