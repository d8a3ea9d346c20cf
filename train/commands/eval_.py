"""`nha eval`: a model on the tasks of lm-evaluation-harness."""

import argparse
import json
from collections.abc import Sequence

from train.errors import ConfigError
from train.paths import user_path

_DESCRIPTION = """\
Runs tasks of lm-evaluation-harness (the extra eval) on a model, prints the harness's table, and
writes the numbers as JSON. The harness's own tasks take downloads; those of --include-path need
none if their data is local: a folder of YAML files in the harness's format. All other options of
the harness are those of its own command: python -m train.text.harness --model nha --help."""


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "eval",
        help="run a model on tasks of lm-evaluation-harness",
        usage="nha eval RUN --tasks TASK,... [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", metavar="RUN", help="folder of a run or of a saved model")
    add("--tasks", required=True, metavar="TASK,...", help="names of tasks, or of groups of them")
    add("--include-path", metavar="DIR", help="a folder with tasks of one's own")
    add("--num-fewshot", type=int, metavar="N", help="examples before each (default: the task's)")
    add("--limit", type=int, metavar="N", help="only the first N examples of each task")
    add("--chat", action="store_true", help="put examples into the model's chat template")
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
    if options.num_fewshot is not None and not 0 <= options.num_fewshot < 2**31:
        raise ConfigError(f"--num-fewshot = {options.num_fewshot}: must be at least 0")
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not tasks:
        raise ConfigError(f"--tasks = {options.tasks!r}: expected names of tasks")
    folder = user_path(options.folder, "RUN")
    if not folder.is_dir():
        raise ConfigError(f"{options.folder}: no such folder; expected a run or a saved model")
    include = options.include_path and user_path(options.include_path, "--include-path")
    if include and not include.is_dir():
        raise ConfigError(f"--include-path = {options.include_path!r}: no such folder")
    output = user_path(options.output, "--output") if options.output else folder / "eval.json"
    if not output.parent.is_dir():
        raise ConfigError(f"--output = {options.output!r}: there is no folder {output.parent}")

    from train.extras import import_extra

    lm_eval = import_extra("lm_eval")
    manager = import_extra("lm_eval.tasks").TaskManager(
        include_path=str(include) if include else None
    )
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"--tasks: there is no task {', '.join(map(repr, unknown))}; `lm_eval ls tasks` lists "
            "those of the harness, and --include-path adds others"
        )
    from train.storage.atomic import write_atomically
    from train.text.harness import HarnessModel

    model = HarnessModel.of(folder, windows=options.windows, batch_size=options.batch_size)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.chat,
        task_manager=manager,
        log_samples=False,
    )
    print(import_extra("lm_eval.utils").make_table(found))
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs")
    numbers = {"model": str(folder)} | {name: found[name] for name in kept if name in found}
    write_atomically(output, (json.dumps(numbers, indent=2, default=str) + "\n").encode())
    print(output)
    return 0
