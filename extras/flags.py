"""Flags of every script that say how a run is started, whatever its method is."""

from dataclasses import dataclass


@dataclass
class StartFlags:
    """Flags of every script."""

    stop_after = ""  # a flag of training scripts alone; without an annotation it is no field

    config: str = ""
    """file with flags: YAML, or the args.json of a run of the same script. A flag that is typed wins over it."""
    smoke: bool = False
    """smallest sizes: the whole script in a short run on the embedded model and data. A flag that is typed wins over them."""
    deterministic: bool = False
    """let torch use deterministic algorithms alone: on a GPU a rerun gives the same bytes, and is slower (docs/usage.md)."""


@dataclass
class TrainingFlags(StartFlags):
    """Flags of every training script."""

    stop_after: str = ""
    """end after the phase of this name, the next one that is trained or sampled; --resume goes on from there."""
