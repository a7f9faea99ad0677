"""A study of `evidence.yaml`: its arms and runs, and how many steps cost what those of sft cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from experiments import evidence_data
from selfgen_ds.checkpoint.export import export_checkpoint
from selfgen_ds.checkpoint.manifest import best_of, complete_checkpoints
from selfgen_ds.cli import recipe_of
from selfgen_ds.config import by_name, default_settings, flat
from selfgen_ds.pilot import budget, workers
from selfgen_ds.pilot.launching import Place
from selfgen_ds.pilot.runs import Arm, StudyRun, as_options

PLAN: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "evidence.yaml").read_text(encoding="utf-8"))
_PRESET = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
_PRESET |= {"max_position_embeddings": 128}
_MERGED = ("settings", "evaluation", "seeds", "arms")
"""Parts of the file of which a study gives only what differs."""
_OF_PLACE = {"output_dir", "resume", "model.name_or_path", "data.train", "data.eval", "data.date", "seed"}
_OF_PLACE |= {"--data", "--embedding_model"}
"""Settings that differ with the seed, the folder, the machine and the day."""
_WARM_UP = "warm-up"
_PROBED_STEPS = 8
_EVALUATIONS = 8
"""Evaluations of sft in the part `test`, among which the best checkpoint is; three times as many in `curves`."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One study, as `evidence.yaml` describes it."""

    name: str
    plan: dict[str, Any]
    """The file, with the study's own part in place of the common values."""
    folder: Path
    model: str
    """The pretrained model of studies that start from one."""
    embedding_model: str
    """What `{embedding_model}` stands for in `evidence.yaml`."""

    @property
    def data(self) -> str:
        """The built-in task or the data set."""
        return str(self.plan["data"])

    @property
    def pretrained(self) -> bool:
        """Whether the study starts from a pretrained model instead of a warm-up."""
        return bool(self.plan.get("pretrained"))

    @property
    def parts(self) -> list[str]:
        """The parts that the study has: a pretrained model is too slow for more than the test."""
        return ["test"] if self.pretrained else list(self.plan["seeds"])

    @staticmethod
    def split(part: str) -> str:
        """Return the rows on which a part evaluates its runs."""
        return "test" if part == "test" else "dev"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of all runs."""
        settings = self.plan["settings"] | {"data.train": str(self.folder / "train.jsonl")}
        if not self.pretrained:
            settings["model.preset"] = _PRESET | settings.get("model.preset", {})
        return settings

    def run(self, arm: Arm, seed: int, steps: int, split: str) -> StudyRun:
        """Return a run of an arm."""
        rows = {name: evidence_data.evaluated(self.data, name, self.folder) for name in ("dev", split)}
        during = {} if self.pretrained else {"eval.every": steps, "data.eval": rows["dev"]}
        settings = self.settings | during | arm.settings
        return StudyRun(
            arm=Arm(name=arm.name, settings=settings),
            seed=seed,
            folder=self.folder / split / f"{arm.name}-{seed}",
            recipe=self.plan["recipe"],
            steps=steps,
            evaluation=self._evaluation | {"data": rows[split]},
        )

    @property
    def _evaluation(self) -> dict[str, Any]:
        """The options of `selfgen-ds evaluate`, without the rows."""
        options = {
            name: self.embedding_model if value == "{embedding_model}" else value
            for name, value in self.plan["evaluation"].items()
        }
        return options | ({"as_chat": True} if self.pretrained else {})

    def warm_ups(self, seeds: list[int]) -> list[StudyRun]:
        """Return the runs that the other runs of their seeds start from."""
        arm = Arm(name=_WARM_UP, settings={"selfgen.method": "sft"})
        if self.pretrained:
            return []
        return [replace(self.run(arm, seed, self.plan["warm_up"], "dev"), evaluation=None) for seed in seeds]

    def arms(self, part: str) -> Iterator[Arm]:
        """Yield the arms of a part; sft is the first."""
        known, steps = self.plan["arms"], self.plan["steps"]
        evaluations = {"test": _EVALUATIONS, "curves": 3 * _EVALUATIONS}.get(part, 1)
        every = {} if self.pretrained else {"eval.every": max(1, steps // evaluations)}
        if part == "curves":
            every |= {"eval.sample_temperatures": self.plan["evaluation"]["sample_temperatures"]}
            yield self._arm("sft-curve", known["sft"], every)
            yield self._arm("scheduled_sampling-curve", known["scheduled_sampling"], every)
            return
        yield self._arm("sft", known["sft"], every)
        if part == "dev":
            yield from self._varied()
        else:
            for name in self.plan.get("run", known):
                if name != "sft":
                    yield self._arm(name, known[name])

    def _varied(self) -> Iterator[Arm]:
        """Yield a mixture, mixtures that differ from it in one setting, and arms to choose among."""
        base = {"method": "scheduled_sampling"} | self.plan["base"]
        yield self._arm("base", base)
        for name, values in self.plan["varied"].items():
            for value in values:
                if base[name] != value:
                    yield self._arm(f"{name}-{value}", base | {name: value})
        for name in self.plan.get("run_dev", ()):
            yield self._arm(name, self.plan["arms"][name])

    def _arm(self, name: str, described: dict[str, Any], further: dict[str, Any] | None = None) -> Arm:
        given = (self.plan["lead"] if described.get("lead") else {}) | described
        settings = {key if "." in key else f"selfgen.{key}": value for key, value in given.items() if key != "lead"}
        start = self.model if self.pretrained else str(self.folder / "dev" / "warm-up-{seed}" / "model")
        return Arm(name=name, settings={"model.name_or_path": start} | settings | (further or {}))

    def described(self, run: StudyRun) -> dict[str, Any]:
        """Return all settings of a run that are no defaults, but for the seed, and those of its evaluation."""
        recipe = by_name(recipe_of(["--config", run.recipe, *run.settings])[0])
        return _not_default(recipe) | _of_evaluation(run.evaluation or {})

    @property
    def start(self) -> dict[str, Any]:
        """What the settings of a run leave open: the model and rows that the study starts from, and its budget."""
        sizes = {name: self.plan[name] for name in ("rows", "warm_up", "steps") if name in self.plan}
        return {"start": self.settings.get("model.preset", "pretrained")} | sizes

    @staticmethod
    def made(run: StudyRun) -> dict[str, Any]:
        """Return the same of a finished run, as its files say."""
        config = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
        described = _not_default(config)
        if run.evaluation is not None:
            evaluated = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))["settings"]
            described |= _of_evaluation({name: evaluated.get(name) for name in run.evaluation})
        return described

    def steps(self, arm: Arm, seed: int, place: Place) -> int:
        """Return the steps of an arm that cost what those of sft cost, from probes that are made once.

        Args:
            seed: Seed whose warmed-up model is probed.
        """
        path = self.folder / "prices.json"
        costs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        key = json.dumps(arm.settings, sort_keys=True)
        sft = json.dumps(self._arm("sft", self.plan["arms"]["sft"]).settings, sort_keys=True)
        with workers.stopping() as stop:
            for name in dict.fromkeys((sft, key)):
                if name not in costs:
                    run = self.run(Arm(name="", settings=json.loads(name)), seed, _PROBED_STEPS, "dev")
                    probed = {"data.train": str(self.folder / "probe.jsonl"), "train.max_steps": _PROBED_STEPS}
                    own = run.arm.settings | probed | {"data.eval": None, "eval.every": None}
                    own |= {"eval.sample_temperatures": [], "eval.max_samples": 256}
                    own["model.name_or_path"] = self._start(run, seed)
                    options = ["--config", self.plan["recipe"], *as_options(own)]
                    costs[name] = budget.probe(options, _PROBED_STEPS, place, self.folder / "probe", stop)
                    path.write_text(json.dumps(costs, indent=1), encoding="utf-8")
        price = budget.price(costs[key], costs[sft])
        return budget.steps_within(price, self.plan["steps"], int(costs[sft]["rows_per_step"]), self.plan["rows"])

    @staticmethod
    def _start(run: StudyRun, seed: int) -> str:
        return str(run.arm.settings["model.name_or_path"]).replace("{seed}", str(seed))

    def has_best(self, arm: Arm, part: str) -> bool:
        """Return whether the best checkpoint of an arm's runs is evaluated beside the last."""
        return arm.name == "sft" and part == "test" and not self.pretrained

    def best(self, run: StudyRun) -> StudyRun:
        """Return the run whose model is the checkpoint of another run with the best loss on development rows."""
        name = f"{run.arm.name}-best"
        return replace(run, arm=replace(run.arm, name=name), folder=run.folder.with_name(f"{name}-{run.seed}"))

    def export_best(self, run: StudyRun) -> None:
        """Write the model of the best checkpoint of a run, with the lines of metrics up to it, into its own folder."""
        folder = self.best(run).folder
        if (folder / "model").exists():
            return
        found = best_of(complete_checkpoints(run.folder / "checkpoints"), "loss")
        assert found is not None
        folder.mkdir(exist_ok=True)
        shutil.copy(run.folder / "config.yaml", folder)
        lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[: found.step]), encoding="utf-8")
        export_checkpoint(found.path, folder / "model")


def _not_default(settings: dict[str, Any]) -> dict[str, Any]:
    default = default_settings()
    return {
        name: value for name, value in flat(settings).items() if value != default.get(name) and name not in _OF_PLACE
    }


def _of_evaluation(options: dict[str, Any]) -> dict[str, Any]:
    return {f"--{name}": value for name, value in options.items() if f"--{name}" not in _OF_PLACE}


def study_of(plan: dict[str, Any], name: str, folder: Path, model: str, embedding_model: str, scale: int = 1) -> Study:
    """Return a study of `evidence.yaml`; what it says itself comes before what the file says for all.

    Args:
        scale: How many times as many rows it has, to train and to evaluate on, and steps.
    """
    own = plan["studies"][name]
    merged = plan | own | {part: plan[part] | own.get(part, {}) for part in _MERGED}
    merged |= {size: scale * merged[size] for size in ("rows", "warm_up", "steps") if size in merged}
    if "max_samples" in merged["evaluation"]:
        merged["evaluation"] |= {"max_samples": scale * merged["evaluation"]["max_samples"]}
    merged.setdefault("data", merged.get("task", name))
    return Study(name=name, plan=merged, folder=folder, model=model, embedding_model=embedding_model)
