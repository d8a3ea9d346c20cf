"""`nha data`: text becomes a folder of tokens to train on."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train.data.questions import Questions, describe_kinds
from train.errors import ConfigError
from train.paths import user_location, user_path

if TYPE_CHECKING:
    from train.data.prepared_folder import PreparedFolder

_DESCRIPTION = """\
Turns raw files into a folder of tokens to train on, which is then data.corpus of a configuration.

INPUT is a file, a folder or a glob (** goes through all folders below); there may be several:
  .jsonl .json .ndjson   JSON lines, with the text under --text-key
  .parquet .arrow        a table, with the text in the column --text-key; also a folder that
                         datasets.Dataset.save_to_disk wrote
  .array_record          ArrayRecord, with --record-format (also .arrayrecord)
  .bin                   tokens that are there already, those of --tokenizer: Megatron's, with
                         their .idx beside them, or llm.c's
  .tar                   files of text and JSON lines
  any other              UTF-8 text, one document a file
With --chat a record is a dialogue, and with --prompt-field and --completion-field a prompt and what
follows it: both are read of JSON lines and tables, and only answers are learned.
Text, JSON lines and archives may be packed as .gz or .zst. Empty documents and files are left out.
OUT and INPUT may be in object stores, gs://bucket/name or s3://bucket/name.
A packed file, a table or an archive that is cut stops the command, whatever the options.

Each document is followed by the end token, and preceded by what the tokenizer puts before a text,
such as <|begin_of_text|>.

Documents keep the order of the inputs. Whether one is held out for evaluation depends on a hash of
its text alone, so all copies of it are on the same side. If the command is stopped in any way, the
same command goes on. The folder is the same byte for byte with any number of workers."""

_EXAMPLES = """\
examples:
  nha data prepare corpora/books books/*.txt
  nha data prepare corpora/web --tokenizer tokenizer.json 'SlimPajama/train/**/*.jsonl.zst'
  nha data prepare corpora/code --tokenizer tokenizer.json --text-key content code/*.parquet
  nha data prepare corpora/chats --chat --tokenizer models/llama-3-8b chats.jsonl
then
  nha train CONFIG --data.corpus=corpora/web
  nha train CONFIG --data.corpus='{corpora/web: 0.8, corpora/code: 0.2}'"""


_QUESTIONS = """\
Writes questions about made-up texts as JSON lines with prompt and completion, of these kinds:
{kinds}
They are those of `nha eval --tasks`, with other words and numbers. Then
  nha data prepare OUT OUT.jsonl --prompt-field prompt --completion-field completion"""


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser("data", help="prepare text to train on")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    prepare = actions.add_parser(
        "prepare",
        help="turn text, JSON lines, tables or archives into a folder of tokens",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prepare.add_argument("out", metavar="OUT", help="the folder to make")
    prepare.add_argument("inputs", metavar="INPUT", nargs="+", help="what to read, see above")
    add = prepare.add_argument
    add(
        "--tokenizer", metavar="FILE",
        help="a Hugging Face tokenizer.json, or a folder with one and the files beside it, such "
        "as a run's or a model's (default: bytes are the tokens)",
    )  # fmt: skip
    add(
        "--end-token", metavar="NAME",
        help="the tokenizer's token that follows each document (default: the folder's eos_token, "
        "or else </s>, <|endoftext|>, <|end_of_text|> or <eos>)",
    )  # fmt: skip
    add(
        "--text-key",
        default="text",
        metavar="KEY",
        help="key or column of the text; a.b is b inside of a (default: text)",
    )
    add(
        "--record-format", choices=["text", "json", "example"],
        help="what the records of ArrayRecord files are: UTF-8 text, or JSON objects or "
        "tf.train.Examples with the text under --text-key",
    )  # fmt: skip
    add(
        "--chat", action="store_true",
        help="documents are dialogues: lists of messages with role and content, or with from and "
        "value, written by the model's chat template; what the assistant writes is learned",
    )  # fmt: skip
    add(
        "--messages-field", metavar="KEY",
        help="key or column of a dialogue's messages (default: messages)",
    )  # fmt: skip
    add(
        "--chat-template", metavar="FILE",
        help="the Jinja template that dialogues are written by (default: that of the folder "
        "--tokenizer)",
    )  # fmt: skip
    add("--prompt-field", metavar="KEY", help="key or column of a prompt, which is not learned")
    add("--completion-field", metavar="KEY", help="key or column of what follows it, which is")
    add(
        "--max-tokens", type=int, metavar="N",
        help="most tokens of a dialogue, or of a prompt and its completion (default: any number)",
    )  # fmt: skip
    add(
        "--too-long", choices=["cut", "drop"],
        help="what to do with longer dialogues: cut them behind an answer, and drop those whose "
        "first does not fit, or drop all (default: cut; a completion is dropped)",
    )  # fmt: skip
    add(
        "--held-out-fraction", type=float, default=0.005, metavar="SHARE",
        help="share of the documents kept for evaluation (default: 0.005)",
    )  # fmt: skip
    add(
        "--workers", type=int, metavar="N",
        help="how many processes work; the result does not depend on it (default: one a CPU core)",
    )  # fmt: skip
    add(
        "--shard-bytes", type=int, default=64 << 20, metavar="N",
        help="about how many bytes of text a shard holds, which is also what each worker loses at "
        "most if stopped; packed files, .arrow and .tar are never divided (default: 64 MiB)",
    )  # fmt: skip
    add(
        "--skip-bad", action="store_true",
        help="leave out and count documents that cannot be read (no JSON, no text under the key, "
        "not UTF-8), instead of stopping at the first",
    )  # fmt: skip

    _add_questions(actions)


def _add_questions(actions: "argparse._SubParsersAction") -> None:
    questions = actions.add_parser(
        "questions",
        help="write questions about made-up texts, to learn to answer them",
        description=_QUESTIONS.format(kinds=describe_kinds()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = questions.add_argument
    add("out", metavar="OUT.jsonl", help="the file to make")
    add("tasks", metavar="TASK[:LOAD]", nargs="+", help="see above; they take turns")
    add("--length", type=int, required=True, metavar="N", help="most tokens of a question")
    add("--count", type=int, required=True, metavar="N", help="how many questions")
    add(
        "--tokenizer", metavar="FILE",
        help="counts the tokens: a tokenizer.json, or a folder with one (default: bytes)",
    )  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the questions (default: 0)")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    return _write_questions(options) if options.action == "questions" else _prepare(options)


def _write_questions(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from train.data.recall import TRAINING
    from train.data.tokenizers import tokenizer_of_option
    from train.storage.atomic import replacing

    for name, least in (("length", 1), ("count", 1), ("seed", 0)):
        value = getattr(options, name)
        if not least <= value < 2**31:
            raise ConfigError(f"--{name} = {value}: must be at least {least} and below 2**31")
    out = user_path(options.out, "OUT.jsonl")
    tokenizer = tokenizer_of_option(options.tokenizer)
    tasks = [Questions.parse(name, tokenizer) for name in options.tasks]
    for task in tasks:
        task.write(options.length, TRAINING, options.seed, 0)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"OUT.jsonl = {options.out!r}: {error.strerror}") from None
    with replacing(out) as file:
        for number in tqdm(range(options.count), unit=" questions"):
            task = tasks[number % len(tasks)]
            written = task.write(options.length, TRAINING, options.seed, number).question
            record = {"prompt": written.prompt, "completion": written.answer}
            file.write(json.dumps(record).encode() + b"\n")
    print(f"{options.count:,} questions in {out}")
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from train.data.prepare.folder import prepare
    from train.data.prepare.in_store import prepare_in_store
    from train.data.prepare.options import PrepareOptions
    from train.data.prepared_folder import PreparedFolder

    fields = [field.name for field in dataclasses.fields(PrepareOptions)]
    try:
        chosen = PrepareOptions(**{name: getattr(options, name) for name in fields})
    except ValueError as error:
        raise ConfigError(str(error)) from None
    location = user_location(options.out, "OUT")
    if isinstance(location, Path):
        prepare(chosen)
    else:
        prepare_in_store(chosen, location)
    print(_summary(options.out, PreparedFolder.open(location)))
    return 0


def _summary(out: str, prepared: "PreparedFolder") -> str:
    totals, tokenizer = prepared.manifest.totals, prepared.tokenizer
    parts = (("training", prepared.training), ("held out", prepared.held_out))
    lines = [f"{name} {x.num_documents:,} documents, {len(x):,} tokens" for name, x in parts]
    if "targets" in totals:
        lines.append(f"targets  {totals['targets']:,} tokens, which are learned")
    per_token = totals["text_bytes"] / totals["tokens"]
    lines.append(
        f"tokens   of {tokenizer.vocabulary_size:,} (model.vocab_size: at least that), "
        f"{per_token:.2f} bytes of text each, {prepared.manifest.dtype}"
    )
    if totals["bad_documents"]:
        lines.append(f"left out {totals['bad_documents']:,} documents that cannot be read")
    if totals.get("cut_documents"):
        lines.append(f"cut      {totals['cut_documents']:,} documents longer than --max-tokens")
    if totals.get("dropped_documents"):
        lines.append(f"left out {totals['dropped_documents']:,} documents longer than --max-tokens")
    return "\n".join([*lines, f"\nIn {out} (data.corpus)"])
