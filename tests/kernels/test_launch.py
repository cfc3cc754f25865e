"""What launching decides: the path, dependent launch; and that importing decides nothing."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from conftest import DEVICE, GPU, gpu_only  # noqa: E402

from hashfast.kernels import launch  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_importing_needs_no_gpu_and_no_interpreter() -> None:
    names = [path.stem for path in (ROOT / "hashfast" / "kernels").glob("[a-z]*.py")]
    code = "; ".join(["import torch", *(f"import hashfast.kernels.{name}" for name in names),
                      "assert not torch.cuda.is_initialized() and not hashfast.kernels.launch.INTERPRETED"])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, check=True)


@pytest.mark.parametrize("value", [None, "", "0", "1"])
def test_path_is_read_at_each_launch(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HASHFAST_PORTABLE", raising=False)
    if value is not None:
        monkeypatch.setenv("HASHFAST_PORTABLE", value)
    assert launch.portable(torch.device(DEVICE)) == (not GPU or value == "1")


def test_a_cpu_has_neither() -> None:
    cpu = torch.device("cpu")
    assert not launch.supports_ptx(cpu) and launch.portable(cpu) and launch.pdl_options(cpu) == {"PDL": False}


@gpu_only
def test_dependent_launch_by_capability() -> None:
    device = torch.device("cuda", 0)
    assert launch.supports_pdl(device) == (torch.cuda.get_device_capability(device) >= (9, 0))


@pytest.mark.parametrize(("pieces", "target", "expected"), [(32, 8, 8), (33, 8, 9), (100, 9, 10), (5, 100, 5), (7, 0, 1)])
def test_balanced_splits(pieces: int, target: int, expected: int) -> None:
    assert launch.balanced_splits(pieces, target) == expected
