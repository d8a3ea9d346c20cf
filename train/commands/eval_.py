"""`nha eval`: a model on tasks that are made here, and on those of lm-evaluation-harness."""

import argparse
import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data.questions import NOISE, QUESTION_KINDS, QuestionKind, describe_kinds
from train.errors import ConfigError
from train.paths import user_path
from train.storage.run_in_store import local_run, results_folder

if TYPE_CHECKING:
    from nha_jax import Model

RECALL, EXTRAPOLATE = "mqar", "extrapolate"

_DESCRIPTION = """\
Measures a model on tasks, prints tables, and writes the numbers as JSON.

Some tasks are made here, need no download, and draw a picture beside the JSON. extrapolate is the
held-out bits per byte of a run by position, up to 16 times the length that it was trained with. All
others are grids of --lengths, in tokens, and --loads:
  mqar       multi-query associative recall, by pairs of a key and a value; for models that were
             trained with data.corpus=mqar
{questions}
Of the latter an answer is right if greedy decoding would write it.

All other tasks are those of lm-evaluation-harness (the extra eval). The harness's own take
downloads; those of --include-path need none if their data is local: a folder of YAML files in the
harness's format.
All other options of the harness are those of its own command:
python -m train.text.harness --model nha --help."""


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "eval",
        help="measure a model: recall, long texts, tasks of lm-evaluation-harness",
        usage="nha eval RUN --tasks TASK,... [options]",
        description=_DESCRIPTION.format(questions=describe_kinds()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", metavar="RUN", help="folder of a run or of a saved model")
    add("--tasks", required=True, metavar="TASK,...", help="names of tasks, or of groups of them")
    add("--include-path", metavar="DIR", help="a folder with tasks of one's own")
    add("--num-fewshot", type=int, metavar="N", help="examples before each (default: the task's)")
    add(
        "--limit",
        type=int,
        metavar="N",
        help="only N examples of each task (default: all; of those made here 64, of mqar 256)",
    )
    add("--chat", action="store_true", help="put examples into the model's chat template")
    add(
        "--read-twice", action="store_true",
        help="let the model read each prompt a second time before it answers",
    )  # fmt: skip
    add(
        "--lengths", metavar="N,...",
        help="tokens of a text (default: 512,1024,2048,4096; of mqar 64,128,256,512)",
    )  # fmt: skip
    add(
        "--loads", metavar="N,...",
        help="how much a text holds, see above (default: some for each task; those that fit are "
        "measured)",
    )  # fmt: skip
    add(
        "--haystack", metavar="FILE",
        help="a text whose sentences hide what is asked (default: five that say nothing)",
    )  # fmt: skip
    add("--windows", metavar="WINDOWS", help="other windows than the model's, e.g. 32,32,none")
    add("--batch-size", type=int, default=8, metavar="N", help="rows at once (default: 8)")
    add("--output", metavar="FILE.json", help="where the numbers go (default: eval.json in RUN)")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    for name in ("batch_size", "limit"):
        value = getattr(options, name)
        if value is not None and not 1 <= value < 2**31:
            raise ConfigError(
                f"--{name.replace('_', '-')} = {value}: must be at least 1 and below 2**31"
            )
    if options.read_twice and options.chat:
        raise ConfigError("--read-twice: not with --chat, whose prompts are whole dialogues")
    if options.num_fewshot is not None and not 0 <= options.num_fewshot < 2**31:
        raise ConfigError(f"--num-fewshot = {options.num_fewshot}: must be at least 0")
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not tasks:
        raise ConfigError(f"--tasks = {options.tasks!r}: expected names of tasks")
    folder = local_run(options.folder, "RUN")
    if not folder.is_dir():
        raise ConfigError(f"{options.folder}: no such folder; expected a run or a saved model")
    results = results_folder(options.folder, folder)
    output = user_path(options.output, "--output") if options.output else results / "eval.json"
    if not output.parent.is_dir():
        raise ConfigError(f"--output = {options.output!r}: there is no folder {output.parent}")

    made_here = {RECALL: _measure_recall, EXTRAPOLATE: _measure_extrapolation}
    made_here |= {
        name: functools.partial(_measure_answers, kind) for name, kind in QUESTION_KINDS.items()
    }
    others = [name for name in tasks if name not in made_here]
    numbers: dict[str, Any] = {"model": options.folder}
    # The harness says first what it does not know, before anything is measured.
    measure = _harness(others, folder, options) if others else None
    for name in dict.fromkeys(tasks):
        if name in made_here:
            picture = output.with_name(f"{output.stem}_{name}.png")
            numbers[name] = made_here[name](folder, picture, options)
    if measure is not None:
        numbers |= measure()
    from train.storage.atomic import write_atomically

    write_atomically(output, (json.dumps(numbers, indent=2, default=str) + "\n").encode())
    print(output)
    return 0


def _measure_recall(folder: Path, picture: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Prints how often a model recalls, draws it, and returns the numbers."""
    given = options.lengths or "64,128,256,512"
    lengths = _read_numbers(given, "--lengths", even=True)
    pairs = _read_numbers(options.loads or "4,8,16,32,64", "--loads")
    if all(4 * number > length for length in lengths for number in pairs):
        raise ConfigError(
            f"--lengths = {given!r}: expected one of at least {4 * min(pairs)}, 4 tokens for each "
            "pair of --loads"
        )
    from train.text.grid import as_table, draw
    from train.text.loading import load_tokenizer_of
    from train.text.recall_grid import measure_recall, task_of

    task = task_of(load_tokenizer_of(folder))
    model = _load_model(folder, options)
    count = 256 if options.limit is None else options.limit
    found = measure_recall(model, task, lengths, pairs, count, options.batch_size)
    print(f"{as_table(found, 'pairs')}\n")
    draw(found, RECALL, "pairs", picture)
    print(picture)
    return {"vocabulary": task.vocabulary, "examples": count, "accuracy": found}


def _measure_answers(
    kind: QuestionKind, folder: Path, picture: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Prints how often a model answers questions of a kind, draws it, and returns the numbers."""
    lengths = _read_numbers(options.lengths or "512,1024,2048,4096", "--lengths")
    loads = kind.loads
    if options.loads is not None:
        loads = tuple(_read_numbers(options.loads, "--loads", least=0))
    noise = NOISE if options.haystack is None else _read_sentences(options.haystack)
    from tqdm import tqdm

    from train.text.answers import measure_answers
    from train.text.grid import as_table, draw
    from train.text.loading import load_tokenizer_of

    tokenizer, model = load_tokenizer_of(folder), _load_model(folder, options)
    count = 64 if options.limit is None else options.limit
    with tqdm(desc=kind.name, unit=" questions", total=count * len(lengths) * len(loads)) as bar:
        found = measure_answers(
            model, tokenizer, kind, lengths, loads, count, options.batch_size, noise,
            options.read_twice, bar.update,
        )  # fmt: skip
    print(f"{kind.name}: {kind.about}; answers that are right\n")
    print(f"{as_table(found.whole, kind.load)}\n")
    print(f"and tokens of answers\n\n{as_table(found.tokens, kind.load)}\n")
    draw(found.whole, kind.name, kind.load, picture)
    print(picture)
    grids = {"accuracy": found.whole, "token_accuracy": found.tokens, "bits_per_token": found.bits}
    return {"load": kind.load, "examples": count, "read_twice": options.read_twice} | grids


def _read_sentences(name: str) -> list[str]:
    """Reads the sentences of a text file; a line ends one."""
    path = user_path(name, "--haystack")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"--haystack = {name!r}: {reason}") from None
    sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text)]
    found = [part for part in sentences if part]
    if not found:
        raise ConfigError(f"--haystack = {name!r}: there is no text in it")
    return found


def _measure_extrapolation(
    folder: Path, picture: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Prints held-out bits per byte by position, draws them, and returns the numbers."""
    from train.data.corpus import load_corpus
    from train.load_config import validate
    from train.storage.run_folder import RunFolder
    from train.text.extrapolation import (
        as_table,
        draw,
        find_long_texts,
        measure_by_position,
    )

    stored = RunFolder(str(folder)).config()
    if stored is None:
        raise ConfigError(f"--tasks=extrapolate: {folder} is no run, which would say the corpus")
    data = validate(stored).data
    corpus = load_corpus(data)
    texts = find_long_texts(corpus, data, 64 if options.limit is None else options.limit)
    model = _load_model(folder, options)
    count, tokens = texts.rows.shape
    print(f"{count} held-out documents, the first {tokens - 1} tokens of each\n", flush=True)
    parts = measure_by_position(model, texts, corpus.bytes_per_target, options.batch_size)
    print(f"{as_table(parts)}\n")
    draw(parts, texts.length, picture)
    print(picture)
    by_position = [part._asdict() for part in parts]
    return {"documents": count, "trained_length": texts.length, "by_position": by_position}


def _load_model(folder: Path, options: argparse.Namespace) -> "Model":
    """Loads the model, with what the options say of it."""
    from train.text.loading import load_model
    from train.windows import read_windows

    model = load_model(folder).with_implementation(None)
    if options.windows is None:
        return model
    try:
        return model.with_windows(read_windows(options.windows, "--windows"))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _read_numbers(text: str, option: str, *, least: int = 1, even: bool = False) -> list[int]:
    """Reads numbers such as 64,128."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(least <= n < 2**31 and not (even and n % 2) for n in numbers):
        raise ConfigError(
            f"{option} = {text!r}: expected {'even ' if even else ''}numbers, e.g. 64,128"
        )
    return numbers


def _harness(
    tasks: Sequence[str], folder: Path, options: argparse.Namespace
) -> Callable[[], dict[str, Any]]:
    """Finds tasks of lm-evaluation-harness; returns what runs them, prints and gives the numbers.

    Raises:
        ConfigError: the harness is not installed, or does not know a task.
    """
    include = options.include_path and user_path(options.include_path, "--include-path")
    if include and not include.is_dir():
        raise ConfigError(f"--include-path = {options.include_path!r}: no such folder")
    from train.extras import import_extra

    lm_eval = import_extra("lm_eval")
    manager = import_extra("lm_eval.tasks").TaskManager(
        include_path=str(include) if include else None
    )
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        made_here = ", ".join([RECALL, EXTRAPOLATE, *QUESTION_KINDS])
        raise ConfigError(
            f"--tasks: there is no task {', '.join(map(repr, unknown))}; `lm_eval ls tasks` lists "
            f"those of the harness, --include-path adds others, and {made_here} are made here"
        )

    def measure() -> dict[str, Any]:
        from train.text.harness import HarnessModel

        found = lm_eval.simple_evaluate(
            model=HarnessModel.of(
                folder,
                windows=options.windows,
                batch_size=options.batch_size,
                read_twice=options.read_twice,
            ),
            tasks=list(tasks),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.chat,
            task_manager=manager,
            log_samples=False,
        )
        print(import_extra("lm_eval.utils").make_table(found))
        kept = (
            "results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs"
        )  # fmt: skip
        return {name: found[name] for name in kept if name in found}

    return measure
