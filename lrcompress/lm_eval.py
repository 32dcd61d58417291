"""lm-eval's own command line, which then loads our checkpoints: `python -m lrcompress.lm_eval run --model hf ...`.

Its model `hf` is transformers, where importing this package has registered the stored formats.
"""

import os


def main() -> None:
    """All arguments are lm-eval's."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
