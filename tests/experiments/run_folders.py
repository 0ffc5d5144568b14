"""Run folders as training and evaluation write them, made by hand; and how to read a report."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from experiments.reporting.blocks import slug

MakeRun = Callable[..., Path]
ENV = "dmc/cartpole-swingup"


def run_maker(folder: Path) -> MakeRun:
    """Return a function that writes one run folder below `folder`."""

    def make(
        agent: str = "sgqn",
        seed: int = 1,
        *,
        clean: list[float] | None = None,
        hard: list[float] | None = None,
        metrics: bool = True,
        **env: object,
    ) -> Path:
        env_id = str(env.get("id", ENV))
        run = folder / ("" if env_id == ENV else slug(env_id)) / f"{agent}-{seed}"
        run.mkdir(parents=True)
        config = {
            "schema": 1,
            "agent": agent,
            "env": {"id": ENV, "size": 48, "action_repeat": 8, "quality": "fast", "seed": 70 + seed}
            | env,
            "train": {"steps": 2000, "num_envs": 1, "seed": seed},
            "configs": {"SACConfig": {"batch_size": 128}},
        }
        (run / "config.json").write_text(json.dumps(config))
        (run / "command.txt").write_text(f"python -m experiments.train --agent {agent}\n")
        system = {"commit": "c0ffee1", "hardware": "two cores", "gl_renderer": "llvmpipe"}
        (run / "system.json").write_text(json.dumps({**system, "versions": {"numpy": "2.4"}}))
        if metrics:
            write_metrics(run, [(s, seed * s / 100) for s in range(100, 2001, 100)])
        if clean is not None:
            results = {"clean": {"returns": clean, "success": None, "lengths": [125] * len(clean)}}
            if hard is not None:
                results["video_hard"] = {**results["clean"], "returns": hard}
            write_evaluation(run, "20260101-000000", results)
        return run

    return make


def write_metrics(
    run: Path, points: list[tuple[int, float]], tag: str = "train/episode_return"
) -> None:
    lines = ["agent_steps,env_frames,gradient_updates,wall_seconds,tag,value"]
    lines += [f"{step},{8 * step},{step // 2},{step / 10},{tag},{value}" for step, value in points]
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")


def write_evaluation(run: Path, stamp: str, results: dict, **changed: object) -> None:
    folder = run / "evaluations" / stamp
    folder.mkdir(parents=True)
    content = {
        "agent_steps": 2000,
        "env_frames": 16000,
        "gradient_updates": 1000,
        "seed": 7,
        "checkpoint": "step-000002000",
        "split": "test",
        "results": results,
        "random_policy": {"returns": [18.0, 20.0, 22.0, 24.0]},
        **changed,
    }
    folder.with_suffix(".json").write_text(json.dumps(content))
    Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / "clean_saliency.png")
    (folder / "clean.mp4").write_bytes(b"a short film")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def text_of(page: Path) -> str:
    """Return what a reader sees, without tags and embedded data."""
    content = re.sub(r"<style>.*?</style>", "", page.read_text(), flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", content).split())
