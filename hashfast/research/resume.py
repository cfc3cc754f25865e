"""The layers that an interrupted training has finished, on disk."""
import json
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hashfast.common import UserError, atomic_path


class Partial:
    """One file per finished layer in OUT.partial, with the settings that its result depends on."""

    def __init__(self, out: Path, settings: dict, resume: bool) -> None:
        """UserError where a run's layers are there and `resume` is not wanted: they may be hours of work."""
        self.folder = out.with_name(out.name + ".partial")
        self.settings = json.loads(json.dumps(settings))  # as a file gives them back
        if not resume and self.folder.exists():
            raise UserError(f"{self.folder} holds the finished layers of an interrupted run; give --resume to go on from them, "
                            "or delete it")

    def load(self, layer: int) -> tuple[dict[str, Tensor], dict] | None:
        """What `save` was given for this layer; None where the run had not come so far."""
        path = self.folder / f"{layer}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["hashfast"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            before = about["settings"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it") from error
        for name, here in self.settings.items():
            if before.get(name) != here:
                raise UserError(f"--resume: {self.folder} is of a run with {name} {before.get(name)}, not {here}; "
                                "give the same arguments, or delete it")
        return tensors, about["found"]

    def save(self, layer: int, tensors: dict[str, Tensor], found: dict) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_path(self.folder / f"{layer}.safetensors") as beside:
            save_file(tensors, beside, metadata={"hashfast": json.dumps({"settings": self.settings, "found": found})})

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
