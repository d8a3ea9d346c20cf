"""The commands that the documents show: which of them the tests run, and whether all parse."""

import re
import shlex
import tomllib

import pytest

from tests.support.documents import groups_and_extras
from tests.support.paths import ROOT
from train.cli import main
from train.commands import COMMANDS
from train.commands.train import parse_overrides
from train.load_config import load_config

# Commands that run in the tests, on a small untrained model, with what makes them cheap.
RUN = {
    "uv run nha data prepare corpora/source '**/*.py' --held-out-fraction 0.1": "",
    "uv run nha data questions data/questions.jsonl needle keys:4 copy --length 512 "
    "--count 20000": "--count 9",
    "uv run nha data prepare data/questions data/questions.jsonl --prompt-field prompt "
    "--completion-field completion": "--workers 1",
    'uv run nha generate runs/quickstart --prompt "class Parser" --top-p 0.95 --stop "class"': (
        "--max-new-tokens 4"
    ),
    'uv run nha generate runs/quickstart --windows 16,16,none --prompt "def "': (
        "--windows 16 --max-new-tokens 4"
    ),
    'uv run nha generate runs/quickstart --prompt "class Parser"': "--max-new-tokens 4",
    "uv run nha export runs/quickstart exported/quickstart --format transformers": "",
    "uv run nha inspect runs/quickstart --text README.md": "--max-tokens 64",
    "uv run nha train --help": "",
}

# Commands that do not, by the reason.
NOT_RUN = {
    "it trains for minutes or hours": (
        "pip install -q uv && uv run nha train configs/quickstart.yaml",
        "uv run nha train configs/quickstart.yaml",
        "uv run nha train configs/quickstart.yaml --run runs/wide "
        "--model.window_size='[64, null, 64]'",
        "uv run nha train configs/quickstart.yaml --run runs/source --data.corpus=corpora/source",
        "uv run nha train configs/quickstart.yaml --run runs/full "
        "--model.window_size=null --steps=1500",
        "uv run nha train configs/quickstart.yaml --run runs/muon --optimizer.name=muon",
        "uv run nha train configs/quickstart.yaml --run runs/muon-1450 --optimizer.name=muon "
        "--steps=1450",
        "uv run nha train configs/quickstart.yaml --run runs/mup --model.mup_base_width=128 "
        "--model.hidden_size=512 --model.num_query_heads=8",
        "uv run python benchmarks/hybridize.py",
        "uv run python benchmarks/recall.py",
        "uv run nha train configs/mqar.yaml",
        "uv run nha train configs/mqar.yaml --run runs/mqar-32 --data.corpus=mqar:pairs=32 "
        "--data.sequence_length=256",
    ),
    "it takes what a longer run of another command has made": (
        "uv run nha eval runs/mqar --tasks mqar --lengths 64,128 --loads 4,8,16",
        "uv run nha eval runs/quickstart --tasks extrapolate",
        "uv run nha eval runs/quickstart --tasks needle,copy --lengths 256,512 --limit 16",
        'uv run nha generate runs/quickstart --prompt "class " --prompt "def " '
        "--top-p 0.95 --seed 1",
        "nha generate runs/llama-3-8b-chat --chat",
        'nha generate runs/llama-3-8b-chat --chat --system "Answer in one sentence."',
        "cat questions.txt | nha generate runs/llama-3-8b-chat --chat --json",
        "uv run nha generate runs/quickstart --prompt-file FILE --max-new-tokens 100",
        "uv run nha search runs/quickstart --base 32 --full-layers 1",
        "uv run nha search runs/full --base 32 --full-layers 1",
        'uv run nha generate runs/full --windows runs/full/search.json --prompt "def "',
        'uv run nha generate runs/quickstart --prompt "def a" --prompt-file README.md --json',
        "cat README.md | uv run nha generate runs/quickstart --max-new-tokens 500",
        "uv run nha inspect runs/quickstart --text FILE",
        "uv run nha status runs/quickstart",
    ),
    "it installs packages": (
        "uv sync --extra data && source .venv/bin/activate",
        "uv sync --extra eval && source .venv/bin/activate",
        "uv sync --extra cloud --extra data && source .venv/bin/activate",
        'pip install "nha_jax[cloud]"',
    ),
    "it needs a bucket of one's own": (
        "nha data prepare gs://bucket/data/web 's3://other/web/*.jsonl.zst' "
        "--tokenizer tokenizer.json",
        "nha train configs/nha-340m.yaml --run gs://bucket/runs/340m "
        "--data.corpus gs://bucket/data/web",
        "nha generate gs://bucket/runs/340m --prompt 'Once upon a time'",
        "nha train configs/nha-340m.yaml --run gs://bucket/runs/next "
        "--initial_model gs://bucket/runs/340m",
    ),
    "it needs an account with a cloud, a cluster, or Docker's service": (
        "gcloud storage buckets create gs://bucket --location us-central1",
        "nha data prepare gs://bucket/data/slimpajama 'SlimPajama-627B/train/chunk1/*.jsonl.zst' "
        "--tokenizer tokenizer.json",
        "nha doctor gs://bucket/runs",
        "nha status gs://bucket/runs/340m --watch 60",
        "tensorboard --logdir gs://bucket/runs",
        "sbatch examples/launch/slurm.sh",
        "docker build -f examples/launch/Dockerfile --target tpu "
        "-t us-docker.pkg.dev/project/images/nha .",
        "docker push us-docker.pkg.dev/project/images/nha",
        "gcloud compute tpus tpu-vm create pod --zone us-west4-a "
        "--accelerator-type v5litepod-16 --version v2-alpha-tpuv5-lite",
        "gcloud compute tpus tpu-vm ssh pod --zone us-west4-a --worker=0 "
        '--command "tail -c 2000 nha_jax/log.txt"',
        "gcloud compute tpus tpu-vm ssh pod --zone us-west4-a --worker=all --command "
        '"cd nha_jax && nohup examples/launch/until-done.sh nha train configs/nha-340m.yaml '
        "--run gs://bucket/runs/340m --data.corpus gs://bucket/data/slimpajama "
        '--distributed=true --mesh.fsdp=16 >log.txt 2>&1 &"',
        "gcloud compute tpus tpu-vm ssh pod --zone us-west4-a --worker=all --command "
        "\"git clone REPOSITORY nha_jax && pip install './nha_jax[tpu,cloud,data]'\"",
        "kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=nha-340m,"
        "batch.kubernetes.io/job-completion-index=0",
        "xpk workload create --cluster CLUSTER --workload nha-340m --tpu-type v5litepod-16 "
        "--num-slices 2 --docker-image us-docker.pkg.dev/project/images/nha --max-restarts 100 "
        '--command "nha train nha-340m --run gs://bucket/runs/340m '
        "--data.corpus gs://bucket/data/slimpajama --distributed=true --mesh.data=2 "
        '--mesh.fsdp=16 --batch_size=512"',
        "kubectl apply -f examples/launch/gke-jobset.yaml",
    ),
    "it needs servers of object stores, which are no part of the default environment": (
        "uv run --isolated --group stores pytest -m slow tests/nha_jax/storage/test_stores.py "
        "tests/train/storage/test_lease.py tests/train/loop/test_run_in_store.py "
        "tests/train/data/test_store_files.py tests/train/data/test_prepare_in_store.py "
        "tests/train/commands/test_import.py",
    ),
    "it needs lm-eval, which is no part of the default environment": (
        "nha eval runs/quickstart --tasks lambada_openai,arc_easy",
        "nha eval runs/quickstart --tasks my_task --include-path my_tasks",
        "python -m train.text.harness --model nha "
        "--model_args path=runs/quickstart,batch_size=16 --tasks wikitext",
        "uv run --isolated --extra eval pytest -m slow tests/train/text/test_harness.py",
    ),
    "it takes a download: a corpus, or a pretrained model": (
        "nha data prepare data/slimpajama 'SlimPajama-627B/train/chunk1/*.jsonl.zst' "
        "--tokenizer tokenizer.json",
        "nha data prepare data/code 'code/*.parquet' --tokenizer tokenizer.json --text-key content",
        "nha data prepare data/fineweb 'fineweb10B/fineweb_train_*.bin' "
        "--tokenizer gpt2/tokenizer.json",
        "nha data prepare data/c4 'c4/*.array_record' --record-format example "
        "--tokenizer tokenizer.json",
        "nha import downloads/Meta-Llama-3-8B models/llama-3-8b",
        "nha data prepare data/slimpajama-llama-3 'SlimPajama-627B/train/chunk1/*.jsonl.zst' "
        "--tokenizer models/llama-3-8b",
        "nha import downloads/Meta-Llama-3-8B-Instruct models/llama-3-8b-instruct",
        "nha data prepare data/chats chats.jsonl --chat --tokenizer models/llama-3-8b-instruct "
        "--max-tokens 4096",
        "nha data prepare data/answers answers.parquet --prompt-field question "
        "--completion-field answer",
        'nha generate models/llama-3-8b --prompt "The capital of France is"',
        "nha search models/llama-3-8b --base 64 --full-layers 4 "
        "--corpus data/slimpajama-llama-3 --sequence-length 2048 --sequences 64",
        "nha inspect runs/llama-3-8b-hybrid --text FILE",
        "nha export runs/llama-3-8b-hybrid exported/llama-hybrid --format transformers",
        "nha export runs/llama-3-8b-hybrid exported/llama-nha",
        "nha export runs/llama-3-8b-hybrid exported/llama --windows none",
        "nha export runs/llama-3-8b-lora exported/llama-lora --format transformers",
        "nha export runs/llama-3-8b-lora exported/llama-adapter --format peft",
        "nha export models/llama-3-8b exported/llama-base --format transformers "
        "--windows 64,64,64,64,64,64,64,none",
        'nha generate runs/llama-3-8b-hybrid --prompt "The capital of France is"',
    ),
    "it trains on many chips": (
        "nha train configs/nha-340m.yaml",
        "nha train configs/nha-340m.yaml --data.corpus='{data/slimpajama: 0.8, data/code: 0.2}'",
        "nha train configs/nha-340m.yaml --data.corpus='{data/slimpajama: 0.8, data/code: 0.2}' "
        "--data.mixture_schedule='{0: {data/slimpajama: 1}, "
        "5000: {data/slimpajama: 0.6, data/code: 0.4}}'",
        "nha train configs/hybridize.yaml",
        "nha train CONFIG --mesh.data=1 --mesh.fsdp=-1 --mesh.tensor=2 --mesh.context=8",
        "nha train configs/hybridize.yaml --run=runs/searched "
        "--model.window_size=models/search.json",
        "nha train configs/sft.yaml",
        "nha train configs/sft.yaml --run=runs/llama-3-8b-chat-lora --adapter.rank=16 "
        "--frozen_dtype=bfloat16 --optimizer.learning_rate=1e-4",
        "nha train configs/sft.yaml --run=runs/llama-3-8b-hybrid-chat "
        "--initial_model=runs/llama-3-8b-hybrid",
        "nha train configs/hybridize.yaml --run=runs/llama-3-8b-distilled --loss.distillation=1.0",
        "nha train configs/hybridize.yaml --run=runs/llama-3-8b-lora --adapter.rank=16",
        "nha train configs/hybridize-staged.yaml",
        "nha train configs/hybridize-staged.yaml --run=runs/shrinking "
        "--model.window_schedule='{0: 512, 700: 256, 1400: 64}'",
    ),
    "it needs libtpu, which is no part of the default environment": (
        "uv sync --extra tpu --extra data && source .venv/bin/activate",
        "nha plan configs/nha-340m.yaml --topology v5e:4x4",
        "nha plan configs/sft.yaml --topology v5p:2x2x4 --model.preset=llama-3-8b",
        "uv run --extra tpu nha plan configs/nha-340m.yaml --topology v5e:4x4",
        "uv run --extra tpu nha plan configs/nha-340m.yaml --topology '2*v5e:4x4' --mesh.data=2 "
        "--mesh.fsdp=16",
        "uv run --extra tpu nha plan configs/nha-340m.yaml --topology '2*v5e:4x4' --mesh.data=2 "
        "--mesh.fsdp=16 --batch_size=512",
        "uv run --extra tpu nha plan configs/nha-1.3b.yaml --topology '2*v5p:2x2x2' "
        "--model.num_query_heads=16 --mesh.data=2 --mesh.fsdp=8 --batch_size=2048",
        "uv run --extra tpu nha plan configs/nha-1.3b.yaml --topology v5e:4x4",
        "uv run --extra tpu nha plan configs/nha-1.3b.yaml --topology v5e:4x4 "
        "--model.implementation=xla",
        "uv run --extra tpu nha plan configs/nha-1.3b.yaml --topology v5p:2x2x2 "
        "--model.num_query_heads=16",
        "uv run --extra tpu nha plan configs/nha-1.3b-long.yaml --topology v5p:4x4x4",
        "uv run --extra tpu nha plan configs/hybridize.yaml --topology v5p:2x2x4 "
        "--model.preset=llama-3-8b",
        "uv run --extra tpu nha plan configs/sft.yaml --topology v5p:2x2x4 "
        "--model.preset=llama-3-8b",
        "uv run --extra tpu nha plan configs/hybridize.yaml --topology v5e:2x4 "
        "--model.preset=llama-3-8b --adapter.rank=16 --micro_batches=16",
        "uv run --extra tpu nha plan configs/hybridize.yaml --topology v6e:2x4 "
        "--model.preset=llama-3-8b --adapter.rank=16 --micro_batches=8",
        "uv run --extra tpu python benchmarks/tpu_static.py",
        "uv run --extra tpu python benchmarks/tpu_static.py --kernel-only --segments",
        "uv run --extra tpu python benchmarks/tpu_static.py --kernel-only --passes both "
        "--chips v5e v5p v6e tpu7x --shapes T=2048,H=4,K=512",
        "uv run --extra tpu python benchmarks/tpu_static.py --kernel-only --passes both "
        "--chips v5e --shapes T=2048,H=4,K=512,G=4",
        "uv run --extra tpu python benchmarks/tpu_decode_static.py",
        "uv run --extra tpu python benchmarks/tpu_static.py --kernel-only --chips v5e",
        "uv run --extra tpu python benchmarks/tpu_decode_static.py --chips v5e",
        "JAX_PLATFORMS=cpu uv run --isolated --extra tpu pytest -n 2 --dist=load "
        "-m tpu_aot tests/pallas/tpu",
        "JAX_PLATFORMS=cpu uv run --isolated --extra tpu pytest -n 2 --dist=load "
        "-m full tests/pallas/tpu/test_compile.py",
    ),
    "it needs CUDA's libraries, which are no part of the default environment": (
        "uv run --extra cuda nha plan configs/hybridize.yaml --topology cuda:8xH200 "
        "--model.preset=llama-3-8b",
        "uv run --extra cuda nha plan configs/hybridize.yaml --topology cuda:1xH200 "
        "--model.preset=llama-3-8b --adapter.rank=16 --micro_batches=16",
        "uv run --extra cuda python benchmarks/gpu_static.py --groups 1",
        "uv run --extra cuda python benchmarks/gpu_decode_static.py",
        "JAX_PLATFORMS=cpu uv run --isolated --extra cuda pytest -m gpu_aot tests/pallas/gpu",
    ),
    "it needs a Hopper GPU": (
        "benchmarks/gpu_check.sh",
        "uv run --extra cuda python benchmarks/operator_gpu.py",
        "uv run --extra cuda python benchmarks/decode.py --dtype bfloat16 "
        "--implementation pallas_gpu",
    ),
    "it installs the package anew, which tests/test_package.py does": (
        'pip install "path/to/nha_jax[data]" && nha train quickstart',
    ),
    "it compiles for minutes": ("uv run python -m tests.support.ops.transforms",),
    "it stops and starts whole runs": ("uv run pytest -m slow tests/train/loop/test_watchdog.py",),
    "they are tests of the default run": ("uv run pytest tests/test_launch.py tests/test_docs.py",),
    "it measures for minutes": (
        "uv run python benchmarks/operator_cpu.py --seconds 5",
        "uv run python benchmarks/decode.py --seconds 5",
        "uv run python benchmarks/prefixes.py",
        "JAX_PLATFORMS=cpu uv run python benchmarks/first_call.py",
        'uv run python benchmarks/loop.py --turns 7 --steps 30 --only "quick start"',
        "uv run python benchmarks/optimizers.py --turns 9 --steps 8 --only muon",
        "uv run python benchmarks/coordinate_check.py",
        "uv run python benchmarks/data.py --only prepare --megabytes 20 --seconds 1",
        "uv run python benchmarks/data.py --only kinds --megabytes 20 --turns 5",
        "uv run --group stores python benchmarks/data.py --only store --megabytes 200 --turns 3",
        "uv run --isolated --group hf python benchmarks/in_transformers.py --turns 7",
    ),
    "it runs tests, or what tests run": (
        "uv run pytest -n 2 --dist=load tests/pallas",
        'uv run pytest -m "slow or not slow" tests/train/step/test_optimizers.py '
        "tests/train/loop/test_optimizers_in_runs.py",
        "uv run pytest tests/pallas/tpu",
        "uv run pytest -m full tests/pallas/tpu/test_kernels.py tests/pallas/tpu/test_decode.py",
        "uv run pytest tests/pallas/gpu",
        "uv run pytest -m full tests/pallas/gpu",
        "NPROC=16 JAX_PLATFORMS=cpu uv run python -m tests.support.gpu.interpreted 0",
        "NPROC=16 JAX_PLATFORMS=cpu uv run python -m tests.support.gpu.slot_token_gradients 0 1",
        "pip install -q uv && uv run pytest -n 2",
        "uv run pytest -s tests/train/commands/test_import.py -k larger_than",
        "uv run pytest -m slow tests/train",
        "uv run pytest -m slow tests/train/commands/test_fuzz.py",
        "uv run pytest -n 2 -m slow tests",
        "uv run pytest -n 2 --dist=load -m full tests/pallas/gpu tests/pallas/tpu/test_kernels.py "
        "tests/pallas/tpu/test_decode.py",
        "JAX_PLATFORMS=cpu uv run --isolated --extra tpu pytest -n 2 --dist=load -m tpu_aot tests",
        "JAX_PLATFORMS=cpu uv run --isolated --extra tpu pytest -n 2 --dist=load "
        "-m full tests/pallas/tpu tests/train/plan",
        "JAX_PLATFORMS=cpu uv run --isolated --extra cuda pytest -m gpu_aot tests",
        "uv run --extra cuda pytest -m gpu -n 12 tests/pallas/gpu",
        "uv run --isolated --group hf pytest -m hf tests/nha_jax/hf",
        "uv run --isolated --group hf --with peft pytest -m hf tests/nha_jax/hf/test_peft.py",
        "uv run --isolated --group notebooks pytest -n 2 -m slow tests/test_notebooks.py",
        "uv run --isolated --group qwix pytest -m slow tests/nha_jax/test_qwix.py",
        'uv run pytest -m "slow or not slow" tests/train/devices/test_mesh.py '
        "tests/nha_jax/ops/test_sharding.py",
    ),
    "it serves pages until it is stopped": (
        "uv run --isolated --only-group docs python -m zensical serve",
        "uv run --with jupyterlab jupyter lab examples/first_steps.ipynb",
    ),
}


_LAUNCHERS = ("docker", "gcloud", "kubectl", "sbatch", "tensorboard", "xpk")


def check(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a program would not know its arguments, or does not exist."""
    program, *rest = arguments
    if program == "uv" and rest[0] in ("run", "sync"):
        _check_uv(rest, monkeypatch)
    elif program == "nha":
        _check_nha(rest, monkeypatch)
    elif program == "pytest":
        _check_pytest(rest)
    elif program == "python":
        _check_python(rest)
    elif program == "jupyter":
        assert rest[0] == "lab", rest
        assert (ROOT / rest[1]).is_file(), rest
    else:
        known = program in ("pip", "source", "cat", "export", "git", *_LAUNCHERS)
        assert known or (ROOT / program).is_file(), program
        for argument in rest:  # what a launcher is to start, as one argument
            if found := re.search(r"\b(nha (?:train|doctor) [^>&]*)", argument):
                _check_nha(shlex.split(found[1])[1:], monkeypatch)


def _check_uv(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    remaining = arguments[1:]
    while remaining and remaining[0].startswith("-"):
        option = remaining.pop(0)
        if option in ("--extra", "--group", "--only-group"):
            assert remaining.pop(0) in groups_and_extras(), arguments
        elif option == "--with":
            remaining.pop(0)
        else:
            assert option in ("-q", "--isolated", "--no-default-groups"), option
    if remaining:
        check(remaining, monkeypatch)


def _check_nha(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list = []
    for command in COMMANDS.values():
        monkeypatch.setattr(command, "run", lambda *given: parsed.extend(given) or 0)
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        return
    assert main(arguments) == 0
    options, rest = parsed
    if options.command in ("train", "plan"):
        path = "configs/quickstart.yaml" if options.config == "CONFIG" else options.config
        overrides = [(k, "64" if v.endswith(".json") else v) for k, v in parse_overrides(rest)]
        if "hybridize" in path or path == "configs/sft.yaml":  # their models are not there
            overrides.append(("model.preset", "llama-3-8b"))
        load_config(path, overrides)


def _check_pytest(arguments: list[str]) -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {marker.split(":")[0] for marker in options["markers"]}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "-m":
            names = set(re.findall(r"\w+", remaining.pop(0))) - {"or", "and", "not"}
            assert names <= markers, names - markers
        elif argument in ("-n", "-k"):
            remaining.pop(0)
        elif not argument.startswith("-"):
            assert (ROOT / argument.split("::")[0]).exists(), argument


def _check_python(arguments: list[str]) -> None:
    if arguments[0] in ("-m", "-c"):
        return
    script = (ROOT / arguments[0]).read_text()
    for argument in arguments[1:]:
        if argument.startswith("--"):
            option = argument.partition("=")[0]
            assert f'"{option}"' in script, f"{arguments[0]} has no {option}"
