"""An FCN that can be loaded from, and pushed to, the Hugging Face Hub.

    from fcn.inference.hub import FCN

    network = FCN.from_pretrained("runs/.../export/best")      # a folder of export.py, offline
    network = FCN.from_pretrained("user/fcn8s-voc2012")        # or the name of one on the hub
    logits = network(image)                                    # (N, 3, H, W) -> (N, K, H, W)
    network.class_names
    network.push_to_hub("user/fcn8s-voc2012")                  # after `hf auth login`

Files are read and written by fcn/checkpoint.py, as everywhere in this project: the hub's files are
those of export.py's folder, and none of them can hold code. Changes to the network, such as
`dropout=0.1`, are further arguments of `from_pretrained`.

This needs huggingface_hub: pip install -r requirements/hub.txt
"""

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fcn.checkpoint import (
    MODEL_FOLDER,
    find_checkpoint,
    read_checkpoint,
    settings_of,
    write_model_folder,
)
from fcn.errors import WeightsError, need_packages
from fcn.files import expanded
from fcn.inference.model_card import model_card
from fcn.module import SegmentationModule
from fcn.network import FCN as Network
from fcn.precision import best_layout

need_packages("huggingface_hub", extra="hub")
from huggingface_hub import PyTorchModelHubMixin, snapshot_download  # noqa: E402

# Arguments of `from_pretrained` that are for `huggingface_hub.snapshot_download`.
DOWNLOAD = ("revision", "cache_dir", "force_download", "local_files_only", "token")


class FCN(Network, PyTorchModelHubMixin):
    """`fcn.network.FCN` with `from_pretrained`, `save_pretrained` and `push_to_hub`.

    Attributes:
        settings: what a checkpoint holds besides weights, see fcn/checkpoint.py. None for a network
            that was not loaded.
        source: the file that it was loaded from; None as above.
    """

    settings: dict[str, Any] | None = None
    source: Path | None = None

    @property
    def class_names(self) -> list[str]:
        """The names of the K classes: "0", "1" and so on for a network that was not loaded."""
        return list(self._settings()["hyper_parameters"]["class_names"])

    def _settings(self) -> dict[str, Any]:
        if self.settings is not None:
            return self.settings
        names = [str(k) for k in range(self.score.out_channels)]
        # The mixin keeps the arguments that the constructor was called with.
        network = {**self._hub_mixin_config, "class_names": names}  # type: ignore[dict-item]
        empty = {"config": {}, "precision": "32-true", "global_step": 0}
        return settings_of({"hyper_parameters": network, **empty})

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> str | None:
        """Write the three files of export.py's folder, and with `push_to_hub` upload them, too.

        The mixin's own function would first remove any config.json that is in the folder.

        Args:
            save_directory: is made if it does not exist.
            repo_id: the name on the hub. None: the name of the folder.
            options: of the function `push_to_hub`, which calls this one with `config` and
                `model_card_kwargs`. These make no difference: config.json and README.md say what
                is known of this network.

        Raises:
            ConfigError: the folder cannot be made, or holds a README.md or a config.json of others.
            WriteError: a file cannot be written.
        """
        folder = expanded(save_directory)
        state = {f"network.{name}": value for name, value in self.state_dict().items()}
        settings = self._settings()
        if self.source is not None and _are_in(state, self.source):
            card = model_card(settings, self.source)
        else:  # other code has changed the weights: data, steps and scores are not known
            card = model_card(settings | {"config": {}, "global_step": 0}, None)
        write_model_folder(settings, state, folder, card)
        return self.push_to_hub(repo_id or folder.name, **options) if push_to_hub else None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: Any = "cpu",
        strict: bool = True,
        **options: Any,
    ) -> Self:
        """Open a folder, a checkpoint or a run of this machine, or download a folder of the hub.

        The settings are those in the weights' own file: config.json is for readers only.

        Args:
            pretrained_model_name_or_path: a path, or else a name on the hub.
            map_location: the device of the network. The hub's own class has this argument, and the
                next.
            strict: makes no difference, because every weight must always fit.
            options: those of DOWNLOAD; and changes to the arguments of the network.

        Raises:
            WeightsError: there is no checkpoint in it, or it is broken, not ours, or hostile.
        """
        place = expanded(pretrained_model_name_or_path)
        download = {name: options.pop(name) for name in DOWNLOAD if name in options}
        if not place.exists():
            name = str(pretrained_model_name_or_path)
            place = Path(snapshot_download(name, allow_patterns=list(MODEL_FOLDER), **download))
        path = find_checkpoint(place)
        checkpoint = read_checkpoint(path)
        module = SegmentationModule.load_from_checkpoint(path, checkpoint=checkpoint, **options)
        arguments = {k: v for k, v in module.hparams.items() if k in signature(Network).parameters}
        network = cls(**arguments)
        network.load_state_dict(module.network.state_dict())
        if "channels_last" not in options:
            layout = best_layout(torch.device(map_location or "cpu"), "32-true", backward=False)
            network.set_layout(layout)  # of this device, wherever it was trained
        network.settings = settings_of({**checkpoint, "hyper_parameters": dict(module.hparams)})
        network.source = path.absolute()  # the working directory may change
        return network.to(map_location).eval()


def _are_in(state: Mapping[str, Tensor], path: Path) -> bool:
    """Whether a checkpoint is still there and holds just these weights."""
    try:
        kept = read_checkpoint(path)["state_dict"]
    except WeightsError:  # it is gone, or another one is being written
        return False
    return kept.keys() == state.keys() and all(
        torch.equal(value.cpu(), kept[name].to(value.dtype)) for name, value in state.items()
    )
