"""Evaluate a run under distractions that it never saw.

    python -m experiments.evaluate runs/dmc-cartpole-swingup/sgqn-seed1
    python -m experiments.evaluate RUN --distractions clean video_hard --episodes 100 --checkpoint best
    python -m experiments.evaluate RUN --videos ~/DAVIS/JPEGImages --workers 2
    python -m experiments.evaluate model.zip --env gym/CartPole-v1 --observation state

Writes evaluations/<name>.json into the run folder, with a video and saliency pictures for every distraction: returns,
and how much of the agent's saliency falls on the foreground (energy, IoU, pointing game; `area` is the foreground's
share of the picture, which a look at random would score). The foreground is all but sky, floor, walls and, in
Meta-World, the table. Colors and videos come from the test split, which training cannot draw from. Stopped in between,
the same command goes on with the distractions that are left.
A zip that Stable-Baselines3 saved is evaluated alike, on the task that flags name; its result is written beside it as
<zip>-<name>.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from tqdm import tqdm

import envs
from agents import Policy
from agents.core.agent import as_observation
from agents.core.errors import UserError
from agents.core.imports import import_modules
from agents.core.seeding import spawn_seeds
from agents.policy import read_config
from envs.vector import VectorEnv
from experiments.evaluating.acting import read_acting
from experiments.evaluating.baseline_policy import (
    add_baseline_flags,
    is_zip,
    load_zip,
    refuse_baseline_flags,
)
from experiments.evaluating.rollouts import Episodes, random_policy, run_episodes
from experiments.evaluating.unfinished import MEDIA, Unfinished, unfinished, weights_of
from experiments.evaluating.videos import PROCEDURAL, add_videos_flag, videos_of
from experiments.running.arguments import Parser, check_out, run_command, terminate_as_interrupt
from experiments.running.imports import add_import_flag, import_for_run
from experiments.running.runs import describe_system, file_stem, git_commit, uses_gl
from experiments.running.settings import check_device
from experiments.sessions.bases import digests
from wrappers.distraction.presets import make_distraction

RANDOM = "random policy"
"""What a result begins with, before the distractions."""

DISTRACTIONS = ("clean", "color_hard", "video_easy", "video_hard")


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.evaluate", description=__doc__)
    p.add_argument(
        "run", type=Path, help="run folder that training wrote, or a zip of Stable-Baselines3"
    )
    add_import_flag(p)
    p.add_argument(
        "--distractions", nargs="+", default=list(DISTRACTIONS), metavar="NAME",
        help=f"what to evaluate under [{' '.join(DISTRACTIONS)}]",
    )  # fmt: skip
    p.add_argument("--episodes", type=int, default=10, help="episodes per distraction [10]")
    p.add_argument("--seed", type=int, default=0, help="seed of the episodes [0]")
    p.add_argument(
        "--checkpoint", default="latest", help="latest, best or a checkpoint's name [latest]"
    )
    p.add_argument("--split", default="test", choices=("train", "validation", "test"),
                   help="which colors and videos [test]")  # fmt: skip
    add_videos_flag(p)
    p.add_argument("--num-envs", type=int, default=5, help="parallel environments [5]")
    p.add_argument(
        "--workers", type=int, default=2, help="worker processes; results do not depend on them [2]"
    )
    p.add_argument("--device", default="cpu", help="where the policy acts [cpu]")
    p.add_argument(
        "--acting", nargs="+", default=[], metavar="NAME=VALUE",
        help="act otherwise than in training, for policies that denoise: start_noise=0, denoising_steps=4",
    )  # fmt: skip
    p.add_argument("--media", action="store_true", default=True, help="write videos and saliency")
    p.add_argument("--no-media", dest="media", action="store_false", help="numbers only")
    p.add_argument("--name", help="name of the result [step-..-<split>-seed..]")
    p.add_argument(
        "--overwrite", action="store_true", help="replace an evaluation of the same name"
    )
    p.add_argument(
        "--out", type=Path, metavar="FILE.json",
        help="where the result goes [the run's folder evaluations, or beside the zip]",
    )  # fmt: skip
    add_baseline_flags(p)
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    terminate_as_interrupt()
    if arguments.episodes < 1 or arguments.num_envs < 1 or arguments.workers < 0:
        raise UserError("--episodes and --num-envs must be at least 1, --workers at least 0")
    protocol = {
        "distractions": arguments.distractions,
        "episodes": arguments.episodes,
        "seed": arguments.seed,
        "split": arguments.split,
        "videos": arguments.videos,
        "num_envs": arguments.num_envs,
        "workers": arguments.workers,
        "media": arguments.media,
        "name": arguments.name,
        "overwrite": arguments.overwrite,
        "imports": arguments.imports,
        "out": arguments.out,
    }
    device = check_device(arguments.device)
    if is_zip(arguments.run):
        import_modules(arguments.imports)
        if arguments.acting:
            raise UserError("--acting is for run folders, not for a zip of Stable-Baselines3")
        policy = load_zip(arguments.run, vars(arguments), device=device)
        file = evaluate_policy(policy, arguments.run, **protocol)
    else:
        refuse_baseline_flags(vars(arguments))
        file = evaluate_run(
            arguments.run,
            checkpoint=arguments.checkpoint,
            device=device,
            acting=arguments.acting,
            **protocol,
        )
    print(f"wrote {file}")
    return 0


def evaluate_run(
    run: Path,
    *,
    checkpoint: str = "latest",
    device: str = "cpu",
    imports: Sequence[str] = (),
    acting: Sequence[str] = (),
    **protocol: Any,
) -> Path:
    """Evaluate a run folder, write evaluations/<name>.json, and return that file.

    Args:
        run: the folder.
        checkpoint: see `Policy.load`.
        device: where the policy acts.
        imports: modules that register tasks and agents, besides those that the run remembers.
        acting: NAME=VALUE of settings that only say how the agent acts; reports leave such results out.
        **protocol: the other arguments of `evaluate_policy`.

    Raises:
        UserError: no run there, a module that it needs is missing, an unknown distraction, or a result of that name
            exists.
    """
    config = read_config(run)
    imports = import_for_run(config, imports, folder=run)
    changes = read_acting(config["agent"], acting)
    policy = Policy.load(run, checkpoint=checkpoint, device=check_device(device), acting=changes)
    return evaluate_policy(policy, run, imports=imports, acting=changes, **protocol)


def evaluate_policy(
    policy: Policy,
    source: Path,
    *,
    distractions: Sequence[str] = DISTRACTIONS,
    episodes: int = 10,
    seed: int = 0,
    split: str = "test",
    videos: str | None = None,
    num_envs: int = 5,
    workers: int = 2,
    media: bool = True,
    name: str | None = None,
    overwrite: bool = False,
    imports: Sequence[str] = (),
    out: Path | None = None,
    acting: Mapping[str, Any] | None = None,
) -> Path:
    """Evaluate a policy on its own task under distractions; write its result, and return that file.

    Raises:
        UserError: an unknown distraction, or a result of that name exists.
    """
    task = policy.config["env"]
    counts = policy.progress
    name = name or "-".join(
        [f"step-{counts['agent_steps']:09d}-{split}-seed{seed}"]
        + [f"{setting}={value}" for setting, value in (acting or {}).items()]
    )
    if Path(name).name != name:
        raise UserError(f"--name is '{name}'; give a name without folders")
    beside = source.with_name(f"{source.stem}-{name}.json")
    check_out(out, overwrite=overwrite)
    if out is not None and out.suffix != ".json":  # media get a folder of that name without it
        raise UserError(f"--out {out}: give a file that ends in .json")
    file = out or (beside if is_zip(source) else source / "evaluations" / f"{name}.json")
    if file.exists() and not overwrite:
        raise UserError(
            f"'{file}' exists; use --overwrite, or another --{'out' if out else 'name'}"
        )
    videos = videos_of(videos, task)
    for distraction in distractions:  # all of them, before the first takes its minutes
        make_distraction(distraction, split=split, videos=videos)  # type: ignore[arg-type]
    num_envs = min(num_envs, episodes)
    media = media and task["observation"] != "state"  # a state needs no GL
    about = {
        **counts,
        "checkpoint": policy.checkpoint,
        "seed": seed,
        "split": split,
        "videos": videos or PROCEDURAL,
        "foreground": envs.get_spec(task["id"]).foreground,
        "num_envs": num_envs,
        "episodes_per_distraction": episodes,
        **({"acting": dict(acting)} if acting else {}),
    }
    keywords = {**task, "split": split, "videos": videos, "seed": seed}
    key = {**about, "env": keywords, "weights": weights_of(policy), "commit": git_commit()}
    names = (RANDOM, *dict.fromkeys(distractions))
    with unfinished(file, key) as kept:
        rows = {name: kept.row(name, media=media and name != RANDOM) for name in names}
        if done := [name for name, row in rows.items() if row is not None]:
            print(f"going on with an evaluation that was stopped: done are {', '.join(done)}")
        bar = tqdm(total=episodes * len(rows), unit="episode", disable=None, leave=False)
        try:
            for name in [name for name, row in rows.items() if row is None]:
                bar.set_description(name)
                before = bar.n
                with closing(
                    envs.make_vec(
                        num_envs=num_envs,
                        workers=min(workers, num_envs),
                        imports=imports,
                        **keywords | {"distraction": None if name in (RANDOM, "clean") else name},
                    )
                ) as vector:
                    seen = _episodes(
                        None if name == RANDOM else policy,
                        vector,
                        episodes,
                        seed,
                        record=media,
                        progress=lambda count, start=before: bar.update(start + count - bar.n),
                    )
                rows[name] = _keep(kept, name, seen, policy)
        except KeyboardInterrupt:
            left = [name for name, row in rows.items() if row is None]
            raise KeyboardInterrupt(
                f"stopped; to do are {', '.join(left)}: the same command goes on there"
            ) from None
        finally:
            bar.close()
        result = {
            **about,
            "weights": digests(policy.agent),
            "results": {name: rows[name] for name in names[1:]},
        }
        result["random_policy"] = rows[RANDOM]
        result["system"] = describe_system(gl=uses_gl(task))
        kept.publish(result)
    print(summary(result))
    return file


def _keep(kept: Unfinished, name: str, seen: Episodes, policy: Policy) -> dict[str, Any]:
    """Keep what an evaluation saw under a distraction, and return its row."""
    row = _row(seen)
    if seen.frames:
        _write_media(kept.folder, name, seen, policy)
    kept.add(name, row)
    return row


def _episodes(
    policy: Policy | None, vector: VectorEnv, episodes: int, seed: int, **keywords: Any
) -> Episodes:
    """Run the episodes of a policy, or of random actions for None; those are neither filmed nor looked at."""
    children = spawn_seeds(seed)[1]
    if policy is None:
        act = random_policy(vector, children["exploration"])
        keywords["record"] = False
        return run_episodes(act, vector, episodes, seed=children["evaluation"], **keywords)
    policy.agent.seed_actions(children["exploration"])
    look = None if policy.config["env"]["observation"] == "state" else policy.saliency
    keywords |= {"look": look, "begin": policy.begin}
    return run_episodes(policy.act, vector, episodes, seed=children["evaluation"], **keywords)


def _row(seen: Episodes) -> dict[str, Any]:
    """Return what the result says of some episodes."""
    row = {"returns": seen.returns, "success": seen.success or None, "lengths": seen.lengths}
    return {**row, "saliency": seen.looks} if seen.looks else row


def summary(result: dict[str, Any]) -> str:
    """Return the table that a person reads after an evaluation."""
    rows = {RANDOM: result["random_policy"], **result["results"]}
    width = max(map(len, rows))
    lines = [
        f"{result['agent_steps']:,} agent steps, {result['env_frames']:,} environment frames, "
        f"{result['gradient_updates']:,} gradient updates; "
        f"{result['episodes_per_distraction']} episodes each, {result['split']} split",
        f"{'':>{width}}  {'mean':>7}  {'std':>6}  {'min':>6}  {'max':>6}  success  saliency on foreground (its area)",
    ]
    for name, row in rows.items():
        r = np.asarray(row["returns"])
        rate = f"{np.mean(row['success']):7.0%}" if row["success"] else "      -"
        lines.append(
            f"{name:>{width}}  {r.mean():7.1f}  {r.std():6.1f}  {r.min():6.1f}  {r.max():6.1f}  {rate}"
            f"  {_looks(row)}".rstrip()
        )
    return "\n".join(lines)


def _looks(row: dict[str, Any]) -> str:
    """Return the share of saliency on the foreground, and the share of the picture that this is."""
    scores = row.get("saliency", {})
    means = [_mean(scores.get(name, [])) for name in ("energy", "area")]
    return "" if None in means else f"{means[0]:.2f} ({means[1]:.2f})"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _write_media(folder: Path, distraction: str, seen: Episodes, policy: Policy) -> None:
    """Write <distraction>.mp4 and <distraction>_saliency.png, whose names `file_stem` keeps short enough."""
    stem = file_stem(distraction)
    frames = enlarge(np.stack(seen.frames))
    iio.imwrite(folder / MEDIA[0].format(stem), frames, fps=25, macro_block_size=2)
    if not seen.observations:
        return
    device = policy.device
    batches = [as_observation(observation, device) for observation in seen.observations[:4]]
    observation = {key: torch.cat([batch[key][:1] for batch in batches]) for key in batches[0]}
    action, _, _ = policy.agent.act(observation, explore=False)
    pictures = policy.agent.images(observation, torch.as_tensor(action, device=device))
    if "saliency" in pictures:
        picture = enlarge(pictures["saliency"][None])[0]
        iio.imwrite(folder / MEDIA[1].format(stem), picture)


def enlarge(frames: np.ndarray, side: int = 192) -> np.ndarray:
    """Repeat pixels of [T, H, W, 3] until the width of one square is about `side`; sides stay even."""
    factor = max(2, side // min(frames.shape[1:3]))
    factor += factor % 2
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


if __name__ == "__main__":
    raise SystemExit(main())
