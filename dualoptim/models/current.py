"""Hold the one model that a run needs at the moment."""

from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache

from dualoptim.config.args import CommonArgs
from dualoptim.models.load import load_model
from dualoptim.models.loaded import LoadedModel, Loading, Use
from dualoptim.models.measured import chosen


class Current:
    """Holds one model at a time, and loads it anew where it lies in another way than what is needed next.

    Whoever asks for a model keeps it no longer than until the next one is asked for, or two of them need memory.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        """Begin with none."""
        self._accelerator = accelerator
        self._loaded: LoadedModel | None = None
        self._name = ""
        self._use: Use = "train"

    def get(self, args: CommonArgs, use: Use) -> LoadedModel:
        """Give the model of `args`, loaded for a use."""
        if self._loaded is None or self._name != args.model or self._loading(args, use) != self._loading(args, self._use):
            self.drop()
            self._loaded, self._name, self._use = load_model(args, self._accelerator, use), args.model, use
        return self._loaded

    def _loading(self, args: CommonArgs, use: Use) -> Loading:
        assert self._loaded is not None
        how = Loading.of(args, self._accelerator, use, self._loaded.stored)
        return chosen(how, args, self._accelerator, self._loaded.model) if use == "measure" else how

    def became(self, name: str) -> None:
        """Take note that the model that is held has been trained, and is now that of `name`."""
        self._name = name

    def drop(self) -> None:
        """Free the model that is held, and what it took of the device, for the next one."""
        self._loaded = None
        clear_device_cache(garbage_collection=True)
