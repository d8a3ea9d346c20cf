"""`nha generate`: a trained model continues texts."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from train.errors import ConfigError
from train.storage.run_in_store import local_run

if TYPE_CHECKING:
    import numpy as np

    from nha_jax import Engine, Model, SamplingOptions
    from nha_jax.tokenizer.interface import Tokenizer
    from train.data.chat_template import ChatTemplate
    from train.text.continuation import Prompted

SAMPLING = {
    "max_new_tokens": "how many tokens to write at most",
    "temperature": "divides the logits; 0 takes the likeliest token always",
    "top_k": "draws from the K likeliest tokens only",
    "top_p": "draws from the likeliest tokens that together have this probability",
    "min_p": "draws from tokens with at least this share of the likeliest one's probability",
    "repetition_penalty": "divides the positive logits of tokens that occurred before, multiplies "
    "the negative ones; 1 changes nothing",
    "seed": "seed of the random numbers; each prompt gets its own from it",
}
"""The options of `nha_jax.SamplingOptions` that the command has, and their help."""

DEFAULTS = {"max_new_tokens": 256, "temperature": 0.8, "repetition_penalty": 1.0, "seed": 0}

_PREFIX_BYTES = 2**30

_DESCRIPTION = """\
Prints what the model writes after each prompt. Of one prompt the text appears as it is written; a
--prompt is repeated before its text, but not with --chat.

Prompts come from --prompt, --prompt-file and --prompt-tokens, each of which may be given several
times, or else from standard input. With --chat and none of these it holds a conversation: each line
of standard input is what the user says next, blank ones are passed over, and its end ends it.

Tokens are drawn as the options say; where they say nothing, as
RUN's generation_config.json says; and else by the defaults."""


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "generate",
        help="let a trained model continue texts",
        usage="nha generate RUN [--prompt TEXT ...] [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("folder", metavar="RUN", help="folder of a run or of a saved model")
    add = parser.add_argument
    add("--prompt", dest="prompts", action=_Prompt, metavar="TEXT", help="a text to continue")
    add(
        "--prompt-file", dest="prompts", action=_Prompt, metavar="FILE",
        help="a file with a text to continue; - is standard input",
    )  # fmt: skip
    add(
        "--prompt-tokens", dest="prompts", action=_Prompt, metavar="TOKENS",
        help="tokens to continue, as numbers, e.g. '100 101 102'",
    )  # fmt: skip
    kinds = {"max_new_tokens": int, "top_k": int, "seed": int}
    letters = {"max_new_tokens": "N", "top_k": "K", "seed": "N"}
    for name, text in SAMPLING.items():
        option = f"--{name.replace('_', '-')}"
        shown = f"{text} (default: {DEFAULTS[name]})" if name in DEFAULTS else text
        add(option, type=kinds.get(name, float), metavar=letters.get(name, "X"), help=shown)
    add(
        "--chat", action="store_true", default=False,
        help="take each prompt as what a user says, and put it into the model's chat template; "
        "without a prompt, hold a conversation",
    )  # fmt: skip
    add("--system", metavar="TEXT", help="with --chat, what the system says first")
    add(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end a text where TEXT occurs; may be given several times",
    )  # fmt: skip
    add(
        "--stop-token", action="append", type=int, default=[], metavar="N",
        help="end a text at this token; may be given several times",
    )  # fmt: skip
    add(
        "--json", action="store_true", default=False,
        help="print a JSON line for each prompt, with its tokens and their natural "
        "log-probabilities",
    )  # fmt: skip
    add(
        "--windows", metavar="WINDOWS",
        help="other windows than the model's, e.g. 32,32,none, or a result of nha search",
    )  # fmt: skip
    add(
        "--implementation", metavar="NAME",
        help="implementation of the operator and its decode steps, whatever the model was trained "
        "with (default: the fastest that serves)",
    )  # fmt: skip
    add(
        "--batch-size", type=int, default=8, metavar="N",
        help="how many prompts are continued at once (default: 8)",
    )  # fmt: skip
    add(
        "--prefill-chunk", type=int, metavar="N",
        help="how many tokens of a prompt are read at once (default: up to 512)",
    )  # fmt: skip
    add(
        "--prefix-bytes", type=int, metavar="N",
        help="how much memory may keep what prompts begin with, for prompts that begin alike "
        f"(default: {_PREFIX_BYTES} if all of several prompts share a chunk, and else 0)",
    )  # fmt: skip
    add(
        "--max-length", type=int, metavar="N",
        help="how many tokens of prompt and text layers with full attention have room for "
        "(default: as many as needed, rounded up)",
    )  # fmt: skip


class _Prompt(argparse.Action):
    """Keeps the prompts in the order given, with the option that each came from."""

    def __call__(self, parser, namespace, values, option_string=None):
        prompts = [*getattr(namespace, self.dest, []), (option_string, values)]
        setattr(namespace, self.dest, prompts)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if "" in options.stop:
        raise ConfigError("--stop='': expected at least one character")
    system = getattr(options, "system", None)
    if system is not None and not options.chat:
        raise ConfigError(f"--system={system!r}: expected --chat with it")
    prompts = getattr(options, "prompts", None)
    converses = options.chat and not prompts
    given = prompts or ([] if converses else [("--prompt-file", "-")])

    from nha_jax.argument_checks import check_prompt
    from train.data.chat_template import ChatTemplate
    from train.text.continuation import Prompted
    from train.text.loading import load_model, load_tokenizer_of
    from train.windows import read_windows

    options.folder = local_run(options.folder, "RUN")
    tokenizer = load_tokenizer_of(options.folder)
    template = ChatTemplate.of(options.folder) if options.chat else None
    read = [
        (option, value, _read_prompt(option, value, tokenizer, template, system))
        for option, value in given
    ]
    given_windows = getattr(options, "windows", None)
    windows = None if given_windows is None else read_windows(given_windows, "--windows")
    model = load_model(options.folder)
    try:
        model = model.with_implementation(getattr(options, "implementation", None))
        if given_windows is not None:
            model = model.with_windows(windows)
        prompts = [
            Prompted(
                option,
                value,
                check_prompt(tokens, model.config.vocab_size, option),
                repeated=option == "--prompt" and not options.chat,
            )
            for option, value, tokens in read
        ]
        chosen = _choose_sampling(options, tokenizer, template, model.config.vocab_size)
        if template is not None and converses:
            _converse(options, model, tokenizer, template, chosen)
            return 0
        engine = _make_engine(options, model, [prompt.tokens for prompt in prompts], chosen)
        _write(engine, tokenizer, prompts, chosen, options)
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(str(error)) from None
    return 0


def _make_engine(
    options: argparse.Namespace, model: "Model", prompts: "list[np.ndarray]",
    sampling: "SamplingOptions",
) -> "Engine":  # fmt: skip
    """Makes the engine for prompts whose tokens are given, with what the options say of it."""
    from nha_jax import Engine
    from nha_jax.generation.prefixes import shared_length
    from nha_jax.prompt_lengths import SHORTEST_CHUNK, chunk_for

    longest = max(map(len, prompts))
    # The last token of a prompt is read in any case.
    shared = shared_length([tokens[:-1] for tokens in prompts]) if len(prompts) > 1 else 0
    most = max(SHORTEST_CHUNK, 1 << (longest - 1).bit_length())  # a chunk for all of a prompt
    chunk = min(getattr(options, "prefill_chunk", chunk_for(longest, shared)), most)
    return Engine(
        model,
        batch_size=min(options.batch_size, len(prompts)),
        max_length=_max_length(options, model, longest, sampling.max_new_tokens),
        prefill_chunk=chunk,
        prefix_bytes=getattr(options, "prefix_bytes", _PREFIX_BYTES if shared >= chunk else 0),
    )


def _max_length(
    options: argparse.Namespace, model: "Model", longest: int, max_new_tokens: int
) -> int:
    """Returns --max-length, or room for what the longest prompt and its text need."""
    from nha_jax.prompt_lengths import room_for

    needed = longest + max_new_tokens
    given = getattr(options, "max_length", room_for(needed))
    if given < needed and None in model.config.windows:
        raise ConfigError(
            f"--max-length={given}: a prompt of {longest} tokens and "
            f"--max-new-tokens={max_new_tokens} need {needed}"
        )
    return given


def _choose_sampling(
    options: argparse.Namespace, tokenizer: "Tokenizer", template: "ChatTemplate | None",
    vocab_size: int,
) -> "SamplingOptions":  # fmt: skip
    """Takes what the options say, or else the model's authors, and prints what is theirs.

    An answer also ends as the template ends its turn; where that is a text, it joins --stop.
    """
    from nha_jax import SamplingOptions
    from train.text.conversation import ends_of_turn
    from train.text.generation_defaults import GenerationDefaults

    for token in options.stop_token:
        if not 0 <= token < vocab_size:
            raise ConfigError(f"--stop-token={token}: expected a token within [0, {vocab_size})")
    defaults = GenerationDefaults.of(options.folder, vocab_size)
    given = {name: vars(options)[name] for name in SAMPLING if name in vars(options)}
    shown = [f"{name}={x}" for name, x in defaults.sampling.items() if name not in given]
    if defaults.stop_tokens:
        shown.append(f"stop tokens {', '.join(map(str, defaults.stop_tokens))}")
    if shown:
        print(f"from generation_config.json: {', '.join(shown)}", file=sys.stderr)
    stop = [*defaults.stop_tokens, *options.stop_token]
    if tokenizer.end_token < vocab_size:  # else the model cannot write it
        stop = [tokenizer.end_token, *stop]
    if template is not None:
        tokens, texts = ends_of_turn(template, tokenizer)
        stop += [token for token in tokens if token < vocab_size]
        options.stop = [*options.stop, *texts]
    sampling: dict[str, Any] = {**DEFAULTS, **defaults.sampling, **given}
    return SamplingOptions(**sampling, stop_tokens=stop)


def _read_prompt(
    option: str, value: str, tokenizer: "Tokenizer", template: "ChatTemplate | None",
    system: str | None,
) -> "np.ndarray | list[int]":  # fmt: skip
    from train.text.user_texts import read_text

    if option == "--prompt-tokens":
        if template:
            raise ConfigError("--prompt-tokens: expected text with --chat; give a --prompt")
        try:
            tokens = [int(token) for token in value.split()]
        except ValueError:
            tokens = []
        if not tokens:
            raise ConfigError(f"--prompt-tokens={value!r}: expected integers")
        return tokens
    text = read_text(value) if option == "--prompt-file" else value
    if not text:
        raise ConfigError("--prompt: the text is empty")
    chat = template is not None
    encoded = tokenizer.encode_prompt(
        template.render(text, system) if template else text, chat=chat
    )
    if not len(encoded):
        raise ConfigError(f"{option}={value!r}: the model's tokenizer makes no token of this text")
    return encoded


def _write(
    engine: "Engine", tokenizer: "Tokenizer", prompts: "list[Prompted]",
    sampling: "SamplingOptions", options: argparse.Namespace,
) -> None:  # fmt: skip
    """Prints one text as it is written, or several in the order of the prompts; then the speed."""
    from train.text.continuation import continue_texts

    streams = len(prompts) == 1 and not options.json
    compile_seconds = _warm_up(engine, sampling)
    before = engine.prefix_statistics
    printed, start, first = 0, time.perf_counter(), 0.0
    tokens = [prompt.tokens for prompt in prompts]
    for token in continue_texts(engine, tokenizer, tokens, sampling, options.stop):
        if not first:
            first = time.perf_counter() - start
            print(prompts[0].shown if streams else "", end="")
        prompts[token.prompt].add(token)
        if streams:
            print(token.text, end="", flush=True)
        while not streams and printed < len(prompts) and prompts[printed].finished:
            print(prompts[printed].show(printed, as_json=options.json), flush=True)
            printed += 1
    if streams:
        print()
    seconds, count = time.perf_counter() - start, sum(len(x.written) for x in prompts)
    after = engine.prefix_statistics
    kept = ""
    if after.snapshots:
        hits, saved = after.hits - before.hits, after.tokens_saved - before.tokens_saved
        kept = (
            f", {saved} of them kept from prompts before ({hits} of {len(prompts)} begin so; "
            f"{after.bytes / 2**20:.1f} MiB)"
        )
    print(
        f"compiled in {compile_seconds:.1f} s; {sum(map(len, tokens))} tokens to read{kept}, the "
        f"first written after {first:.2f} s; {count} written in {seconds - first:.2f} s more: "
        f"{count / max(seconds - first, 1e-6):.0f} tokens/s",
        file=sys.stderr,
    )


def _converse(
    options: argparse.Namespace, model: "Model", tokenizer: "Tokenizer",
    template: "ChatTemplate", sampling: "SamplingOptions",
) -> None:  # fmt: skip
    """Answers each line of standard input, with what the options say of the engine."""
    from train.text.conversation import CHUNK, Conversation, EngineOptions, converse
    from train.text.user_texts import read_turns

    conversation = Conversation(
        model,
        tokenizer,
        template,
        EngineOptions(
            prefill_chunk=getattr(options, "prefill_chunk", CHUNK),
            prefix_bytes=getattr(options, "prefix_bytes", _PREFIX_BYTES),
            max_length=getattr(options, "max_length", None),
        ),
        getattr(options, "system", None),
    )
    converse(conversation, read_turns(), sampling, options.stop, as_json=options.json)


def _warm_up(engine: "Engine", sampling: "SamplingOptions") -> float:
    """Compiles all that the texts need, by writing two tokens or one; returns the seconds."""
    start = time.perf_counter()
    count = min(2, sampling.max_new_tokens)  # no longer than the shortest of the texts
    engine.submit([0], dataclasses.replace(sampling, max_new_tokens=count, stop_tokens=()))
    for _ in engine.run():
        pass
    return time.perf_counter() - start
