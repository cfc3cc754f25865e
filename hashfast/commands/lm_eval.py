"""lm-evaluation-harness's own command line, with the model `hashfast` beside its models.

    python -m hashfast lm-eval run --model hashfast --model_args pretrained=FOLDER,signatures=FILE,sparsity=16 --tasks hellaswag
"""
from lm_eval.__main__ import cli_evaluate

import hashfast.integrations.lm_eval  # noqa: F401 (registers the model; lm_eval 0.4.13 reads no entry points)


def main() -> None:
    cli_evaluate()
