"""The `nha` command, and `python -m nha_jax`, which is the same.

The one place that looks up to `train`: the name `nha_jax` is ours alone, so that what stands here
runs, and can say so, where another project's `train` or `pallas` comes first on Python's path.
"""

import sys

from nha_jax.shadowing import check_own_packages


def main() -> int:
    """Runs one command of `nha`; returns its exit code, or 1 where another package hides ours."""
    try:
        check_own_packages("train", "pallas")
    except ImportError as error:
        print(f"nha: {error}", file=sys.stderr)
        return 1

    from train.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
