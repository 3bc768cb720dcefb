"""Settings of conf/logger that depend on the run."""

import secrets
from pathlib import Path

from omegaconf import DictConfig, OmegaConf


def logger_settings(cfg: DictConfig, run: Path) -> DictConfig:
    """The group `logger`, ready to be built.

    An entry whose `save_dir` is null gets the run folder. One whose `id` is null gets a new one,
    which is written into `cfg` as well: config.yaml keeps it, so that a resumed run goes on under
    the same id.
    """
    group = cfg.get("logger") or OmegaConf.create()
    for entry in filter(OmegaConf.is_dict, group.values()):
        if "id" in entry:
            entry.id = entry.id or secrets.token_hex(4)
    settings = OmegaConf.create({"logger": group})  # a copy: a run folder may be moved later
    for entry in filter(OmegaConf.is_dict, settings.logger.values()):
        if "save_dir" in entry:
            entry.save_dir = entry.save_dir or str(run)
    return settings
