"""lm-evaluation-harness's own command line, with the model `hashfast` beside its models.

    python -m hashfast lm-eval run --model hashfast --model_args pretrained=FOLDER,signatures=FILE,sparsity=16 --tasks hellaswag
"""
import importlib

from hashfast.common import UserError


def main() -> None:
    try:  # this registers the model, as lm_eval 0.4.13 reads no entry points
        importlib.import_module("hashfast.integrations.lm_eval")
    except ImportError as error:
        raise UserError(f"a package that lm-eval needs is missing ({error}); pip install 'lm-eval[hf]'") from error
    importlib.import_module("lm_eval.__main__").cli_evaluate()
