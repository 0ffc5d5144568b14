"""Datasets in Minari's format, which keep the simulator's scenes beside the observations.

    <root>/<id>/data/metadata.json, main_data.hdf5           Minari's own: any of its readers takes them
    <root>/<id>/data/scenes/episode-0.json, .safetensors     what `Environment.show_scene` takes, step by step

Scenes lie in the folder that Minari copies and counts. Observations are stored as they were, not as JPEG. A dataset
appears under its name when it is whole. Loading runs no code: HDF5, JSON and safetensors only.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import envs
from agents.core.errors import UserError
from agents.core.fields import camera_names, join_cameras
from agents.core.trees import load_tree, save_tree
from experiments.data.columns import from_columns, to_columns
from experiments.running.runs import LOCK

SCHEMA = 1
"""Version of what `KEY` holds."""
KEY = "sightline"
"""Our entry in metadata.json: settings of the environment, source, imports, commit."""
_SCENES = "scenes"
_WRITING = ".writing-"
"""How the folder of a dataset begins that is not whole."""
_MISSING = (
    "datasets need Minari, which is not installed: "
    "python -m pip install --constraint constraints.txt --editable '.[data]'"
)


@dataclass(frozen=True)
class Episode:
    """One episode of T agent steps.

    Attributes:
        seed: of its reset.
        observations: T + 1, as the environment gave them.
        actions: T.
        rewards: float [T].
        terminations: bool [T].
        truncations: bool [T].
        infos: by name, T + 1 values each (the first is the reset's).
        scenes: T + 1 as columns, see `to_columns`.
    """

    seed: int
    observations: Sequence[Any]
    actions: Sequence[Any]
    rewards: Sequence[float]
    terminations: Sequence[bool]
    truncations: Sequence[bool]
    infos: Mapping[str, Sequence[Any]]
    scenes: dict[str, Any]


def import_minari() -> Any:
    """Return the package, which is an optional extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        import h5py  # noqa: F401 - Minari imports without it and fails later
        import minari
    except ImportError as error:
        raise UserError(_MISSING) from error
    return minari


def root_folder(root: Path | None) -> Path:
    """Return where datasets are kept: `root`, else where Minari looks for them."""
    if root is not None:
        return root
    own = os.environ.get("MINARI_DATASETS_PATH")
    return Path(own) if own else Path.home() / ".minari" / "datasets"


class DatasetWriter:
    """Writes a new dataset; a context that leaves nothing behind when it is left by an exception.

    Args:
        root: folder of all datasets, see `root_folder`.
        dataset: its id, `namespace/name-v0`.
        env: whose spaces and settings the dataset has.
        about: goes into metadata.json beside the settings, as JSON can hold it.

    Raises:
        UserError: the id is malformed or taken, a part of observations has a name that files cannot have, the folder
            cannot be written, or Minari is missing.
    """

    def __init__(
        self, root: Path, dataset: str, env: envs.Environment, about: dict[str, Any]
    ) -> None:
        minari = import_minari()
        from minari.dataset.minari_storage import MinariStorage

        for part in getattr(env.observation_space, "spaces", {}):
            if "/" in part:  # HDF5 would make a folder of it, which Minari does not read
                raise UserError(
                    f"datasets cannot hold an observation's part '{part}'; give the camera by its number"
                )
        self._root, self._dataset = root, dataset
        self.path = new_path(root, dataset)
        self._unfinished = self.path.with_name(f"{_WRITING}{os.getpid()}-{self.path.name}")
        data = self._unfinished / "data"
        remove_stale(self.path.parent)
        try:
            (data / _SCENES).mkdir(parents=True)
            self._lock = (self._unfinished / LOCK).open("a")
        except OSError as error:
            raise UserError(f"cannot create '{self.path}': {error.strerror}") from error
        with suppress(OSError):  # without locks nobody removes it
            # The kernel lets go of it however this process ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._storage = MinariStorage.new(  # it takes the size of files of relative paths wrongly
            data.resolve(), env.observation_space, env.action_space, env.spec, jpeg_encoding=False
        )
        entry = {"schema": SCHEMA, "settings": env.settings, **about}
        self._storage.update_metadata(
            {"dataset_id": dataset, "minari_version": minari.__version__, KEY: entry}
        )
        self._episodes = 0

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                new_path(self._root, self._dataset)  # another process may have been faster
                (self._unfinished / LOCK).unlink()
                self._unfinished.rename(self.path)
        finally:
            shutil.rmtree(self._unfinished, ignore_errors=True)
            self._lock.close()

    def add(self, episode: Episode) -> None:
        """Append an episode."""
        from minari.data_collector.episode_buffer import EpisodeBuffer

        save_tree(self._unfinished / "data" / _SCENES, f"episode-{self._episodes}", episode.scenes)
        buffer = EpisodeBuffer(
            seed=episode.seed,
            observations=_stacked(episode.observations),
            actions=np.stack(list(episode.actions)),
            rewards=np.asarray(episode.rewards, np.float64),
            terminations=np.asarray(episode.terminations, bool),
            truncations=np.asarray(episode.truncations, bool),
            infos={name: np.asarray(values) for name, values in episode.infos.items()},
        )
        self._storage.update_episodes([buffer])
        self._episodes += 1


def remove_stale(folder: Path) -> None:
    """Remove what killed processes were writing into a folder of datasets; what one still writes stays."""
    for unfinished in sorted(folder.glob(f"{_WRITING}*")):
        if not (unfinished / LOCK).is_file():
            continue  # it is just being begun, or by an older version
        with (unfinished / LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # held by its writer, or a file system without locks
                continue
            shutil.rmtree(unfinished, ignore_errors=True)
        print(f"removed {unfinished}, which a killed process left")


def new_path(root: Path, dataset: str) -> Path:
    """Return the folder of a dataset that is not there yet.

    Raises:
        UserError: the id is malformed or taken.
    """
    import_minari()
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset)
    except (ValueError, TypeError):  # TypeError where the version is missing
        raise UserError(
            f"'{dataset}' is no dataset id; give one of the form name-v0 or namespace/name-v0, "
            "of letters, digits, - and _, the namespace of at least two"
        ) from None
    path = root / dataset
    if path.exists():
        raise UserError(f"dataset '{path}' exists; choose another version, or delete it")
    return path


class Dataset:
    """A dataset of ours, read episode by episode.

    Attributes:
        about: our entry in metadata.json.

    Raises:
        UserError: there is no such dataset, it was not collected by Sightline, or Minari is missing.
    """

    def __init__(self, root: Path, dataset: str) -> None:
        minari = import_minari()
        data = root / dataset / "data"
        if not (data / "metadata.json").is_file():
            known = (file.parent.parent for file in root.glob("**/data/metadata.json"))
            names = [str(p.relative_to(root)) for p in known if not p.name.startswith(_WRITING)]
            raise UserError.unknown("dataset", dataset, names)
        self._minari = minari.MinariDataset(data)
        self._scenes = data / _SCENES
        self.about = self._minari.storage.metadata.get(KEY)
        if not isinstance(self.about, dict) or not isinstance(self.about.get("settings"), dict):
            raise UserError(
                f"dataset '{dataset}' holds no simulator states: it was not collected by Sightline"
            )
        schema = self.about.get("schema", SCHEMA)
        if schema > SCHEMA:
            raise UserError(
                f"dataset '{dataset}' has schema {schema}, this version reads {SCHEMA}: upgrade"
            )

    def __len__(self) -> int:
        return self._minari.total_episodes

    @property
    def total_steps(self) -> int:
        """Actions of all episodes."""
        return int(self._minari.total_steps)

    def steps(self, index: int) -> int:
        """Return the actions of an episode, without reading it."""
        (own,) = self._minari.storage.get_episode_metadata([index])
        return int(own["total_steps"])

    def __getitem__(self, index: int) -> Episode:
        """Return an episode; `observations` is as Minari gives it (arrays over time)."""
        return self.read(index)

    def read(self, index: int, *, scenes: bool = True, side_by_side: bool = False) -> Episode:
        """Return an episode as `__getitem__` does.

        Args:
            index: its number.
            scenes: without them that is faster.
            side_by_side: several cameras are one picture, as agents see them.
        """
        data = self._minari[index]
        cameras = camera_names(self.about["settings"]) if side_by_side else ()
        (own,) = self._minari.storage.get_episode_metadata([index])
        columns = load_tree(self._scenes, f"episode-{index}") if scenes else {}
        return Episode(
            own["seed"],
            join_cameras(data.observations, cameras),
            data.actions,
            data.rewards,
            data.terminations,
            data.truncations,
            data.infos or {},
            columns,
        )


def play(env: envs.Environment, act: Any, seed: int) -> Episode:
    """Run an episode and keep all of it.

    Args:
        env: where to act.
        act: from the observation and the scene to an action.
        seed: of the reset.
    """
    observation, _ = env.reset(seed=seed)
    observations, scenes = [observation], [env.get_scene()]
    actions: list[Any] = []
    rewards: list[float] = []
    terminations: list[bool] = []
    truncations: list[bool] = []
    success: list[float] = []
    ended = False
    while not ended:
        actions.append(act(observation, scenes[-1]))
        observation, reward, terminated, truncated, info = env.step(actions[-1])
        ended = terminated or truncated
        observations.append(observation)
        scenes.append(env.get_scene())
        rewards.append(reward)
        terminations.append(terminated)
        truncations.append(truncated)
        if "success" in info:
            success.append(info["success"])
    infos = {"success": [0.0, *success]} if success else {}
    columns = to_columns(scenes)
    return Episode(seed, observations, actions, rewards, terminations, truncations, infos, columns)


def redraw(env: envs.Environment, episode: Episode) -> Episode:
    """Return the episode as `env` would have shown it: same scenes, actions and rewards, other observations."""
    observations = [
        env.show_scene(from_columns(episode.scenes, i), seed=None if i else episode.seed)
        for i in range(len(episode.rewards) + 1)
    ]
    return Episode(**{**vars(episode), "observations": observations})


def _stacked(observations: Sequence[Any]) -> Any:
    """Return observations as arrays over time, by name where they are dicts."""
    if isinstance(observations[0], dict):
        return {name: np.stack([seen[name] for seen in observations]) for name in observations[0]}
    return np.stack(list(observations))
