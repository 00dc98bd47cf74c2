"""How good is an expert of how many bytes, and what does it take to find it? Score against bytes up to the 16-bit delta; the authors' grid.

For full fine-tunes and LoRA adapters of the encoder (benchmarks/experts.py has trained them) and a fine-tune and a LoRA of the causal language model:

    curve     densities from .0001 to 1 under two allocations, and residual planes, each at its best scale by the search's own climb; the frontier
    grid      the authors' fixed grid: k in 5, 10, 20, 30, 50 %, alpha in .5, 1, 2, 3, 4, 5, 6, 8, 10: 45 evaluations of plain ComPEFT
    search    `sterna.search` with at most 15 evaluations: the best under the bytes of the grid's best, and the smallest that is as good as it
    formula   the closed form, of the same bytes, without any evaluation
    controls  other ways to store the same task vector (sterna.scoring.controls) at the searched density

All choices are made on validation rows; test rows are looked at once for what is shown. Evaluations are kept in the cache, so a second call goes on:

    python benchmarks/frontier.py                     hours on a core; subject by subject
    python benchmarks/frontier.py --only computers/full --parts curve grid search
    python benchmarks/frontier.py --tables            prints the tables of what is there
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import experts
import harness
from machine import machine
from rendering import markdown
from sterna.demo.assets import cache_folder
from sterna.demo.causal_lm import causal_lm_folder
from sterna.writing import whole_file

RESULT = harness.RESULTS / "frontier.json"
PARTS = ("curve", "grid", "search", "formula", "controls")
SELECTION, TEST, BLOCKS = 300, 500, 48
"""Rows at most; of the causal language model, blocks of 64 tokens."""
DENSITIES = (0.0001, 0.0005, 0.002, 0.005, 0.015, 0.05, 0.15, 0.4, 1.0)
ANCHORS = (0.05, 0.4)
"""Densities whose scale is climbed to, before the others are tried at the scale that is then expected."""
PLANES = ((2, 0.1), (3, 0.3))
GRID = tuple((k, alpha) for k in (0.05, 0.1, 0.2, 0.3, 0.5) for alpha in (0.5, 1, 2, 3, 4, 5, 6, 8, 10))
GRIDDED = ("computers/full", "computers/lora", "tweets/full", "dialogue/full")
"""Subjects of the grid and of what is held against it."""
THIRD = 15
NOISE = 0.5
"""What the second search may lose against the tuned model: points, or 1 % of a perplexity."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One tuned model and its rows. `data` gives the arguments of open_bench for selection and test."""

    name: str
    base: Callable[[], Path]
    tuned: Callable[[], Path]
    data: Callable[[], tuple[dict[str, Any], dict[str, Any]]]


def _encoder(task: str, method: str) -> Subject:
    one = experts.Trained(task, method)
    common = {"task": "classification", "max_length": 64}

    def data() -> tuple[dict[str, Any], dict[str, Any]]:
        return (
            {"data": one.data / "validation.csv", "rows": SELECTION, **common},
            {"data": one.data / "test.csv", "rows": TEST, **common},
        )

    return Subject(f"{task}/{method}", experts.base, lambda: one.tuned, data)


def _dialogue() -> tuple[dict[str, Any], dict[str, Any]]:
    """Episodes of season 9 to choose on, of season 10 as the test; neither was trained on."""
    from sterna.demo.assets import asset_path
    from sterna.demo.data import read_tab

    seasons: dict[str, list[str]] = {"09": [], "10": []}
    for cells in read_tab(asset_path("texts") / "friends-transcripts.tab", quoted=True):
        if len(cells) > 5 and cells[0] in seasons:
            seasons[cells[0]].append(f"{cells[4].strip()}: {cells[5].strip()}")
    rows = {season: [{"text": "\n".join(lines)}] for season, lines in seasons.items()}
    common = {"task": "causal-lm", "metric": "perplexity", "max_length": 64, "batch": 8, "rows": None}
    return {"data": rows["09"], **common}, {"data": rows["10"], **common}


def _of_dialogue(name: str) -> Callable[[], Path]:
    def found() -> Path:
        from causal_lm_training import LORA, METHODS, STEPS

        version = torch.__version__.split("+")[0]
        if name == "full":
            return cache_folder() / "benchmarks" / f"smollm2-friends-24-4x64-3e-05-torch{version}"
        rate = METHODS[LORA][1][1]
        return cache_folder() / "benchmarks" / "causal-lm-training" / f"lora-r=9-query-and-value-{rate:g}-{STEPS}-4x64-torch{version}"

    return found


SUBJECTS = {
    subject.name: subject
    for subject in (
        _encoder("computers", "full"),
        _encoder("computers", "lora"),
        _encoder("tweets", "full"),
        _encoder("tweets", "lora"),
        Subject("dialogue/full", causal_lm_folder, _of_dialogue("full"), _dialogue),
        _encoder("science", "full"),
        _encoder("science", "lora"),
        Subject("dialogue/lora", causal_lm_folder, _of_dialogue("lora"), _dialogue),
        _encoder("policy", "full"),
        _encoder("policy", "lora"),
    )
}


class Work:
    """A subject made ready: its candidates, its rows, and its scores, which outlast the process."""

    def __init__(self, subject: Subject) -> None:
        from dataclasses import replace

        from sterna.compression import match
        from sterna.progress import silent
        from sterna.scoring.bench import open_bench
        from sterna.searching.candidates import Maker, Setting
        from sterna.searching.fisher import mean_fisher
        from sterna.searching.ledger import Ledger
        from sterna.searching.scores import OfRows, Scored

        self.subject, self.base, self.tuned = subject, subject.base(), subject.tuned()
        self.maker = Maker(match(self.base, self.tuned), "fast", fisher=lambda tuned, names: mean_fisher(self.bench, tuned, names))
        like = self.maker.expert(Setting(1e-9, 1.0))
        chosen, held = subject.data()
        bench = open_bench(self.base, chosen.pop("data"), like=like, **chosen)
        test = open_bench(self.base, held.pop("data"), like=like, **held)
        if bench.task == "causal-lm":
            bench, test = (found.rows(range(0, len(found), max(len(found) // BLOCKS, 1))) for found in (bench, test))
        self.bench, self.test = bench, replace(test, model=bench.model)
        self.sign = 1 if bench.metric.higher_is_better else -1
        self.folder = cache_folder() / "benchmarks" / "frontier" / subject.name.replace("/", "-")
        scorer = OfRows(self.bench, silent)
        ledger = Ledger.open(self.folder, {"made_of": self.maker.digest(), "coding": "fast", **scorer.about})
        self.problem = Scored(self.maker, scorer, ledger, self.sign)
        tested = OfRows(self.test, silent)
        self.tests = Scored(
            self.maker, tested, Ledger.open(self.folder, {"made_of": self.maker.digest(), "coding": "fast", **tested.about}), self.sign
        )

    def row(self, setting: Any) -> dict[str, Any]:
        """A setting with its bytes and both scores."""
        return {
            **setting.to_dict(),
            "bytes": self.problem.bytes(setting),
            "validation": self.sign * self.problem.score(setting),
            "test": self.sign * self.tests.score(setting),
        }


def curve(work: Work) -> dict[str, Any]:
    from sterna.searching.result import Evaluated, frontier
    from sterna.searching.search import families_of
    from sterna.searching.strategy import Explorer, Family

    families = families_of(work.maker)[:2]
    explorer = Explorer(work.problem, 10_000)
    for family in families:
        for density in ANCHORS:
            explorer.climb(family, density, math.inf)
        for density in DENSITIES:
            explorer.trial(explorer.expected(family, density)[0])
    if work.maker.of_whole_tensors:
        for planes, density in PLANES:
            explorer.trial(explorer.expected(Family("global", planes, families[0].head), density)[0])
    trials = [Evaluated(trial.setting, trial.bytes, work.sign * trial.score) for trial in explorer.trials.values()]
    best = frontier(trials, work.sign > 0)
    rows = [{**trial.to_dict(), "on_frontier": trial in best} for trial in trials]
    for row, trial in zip(rows, trials, strict=True):
        if trial in best:
            row["test"] = work.row(trial.setting)["test"]
    return {"trials": rows}


def grid(work: Work) -> dict[str, Any]:
    from sterna.searching.candidates import Setting

    found = []
    for density, alpha in GRID:
        setting = Setting(density, float(alpha))
        found.append({**setting.to_dict(), "bytes": work.problem.bytes(setting), "validation": work.sign * work.problem.score(setting)})
    best = max(found, key=lambda row: (work.sign * row["validation"], -row["bytes"]))
    return {"best": work.row(Setting(best["density"], best["alpha"])), "evaluations": len(found), "trials": found}


def searched(work: Work, grid_best: dict[str, Any]) -> dict[str, Any]:
    """The strategy alone, over the same cached scores: what `sterna.search` chooses from."""
    from sterna.searching.result import Goal
    from sterna.searching.search import choice, families_of
    from sterna.searching.strategy import Explorer, Spent

    made = {}
    allowed = NOISE if work.bench.metric.points else 0.01 * work.problem.tuned * work.sign
    as_good = work.problem.tuned - work.sign * grid_best["validation"]
    goals = {
        "under the grid's bytes": (Goal(max_bytes=grid_best["bytes"]), grid_best["bytes"]),
        "as good as the grid": (Goal(within=as_good), None),
        "within": (Goal(within=allowed), None),
    }
    for name, (goal, limit) in goals.items():
        explorer = Explorer(work.problem, THIRD)
        try:
            if limit is None:
                explorer.smallest(families_of(work.maker), work.problem.tuned - (goal.within or 0.0))
            else:
                explorer.best_under(families_of(work.maker), limit)
        except Spent:
            pass
        chosen, reached = choice(list(explorer.trials.values()), goal, limit, work.problem.tuned)
        made[name] = {**work.row(chosen.setting), "evaluations": len(explorer.trials), "reached": reached, "goal": goal.to_dict()}
    return made


def formula(work: Work, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The closed form under some sizes."""
    from dataclasses import replace

    from sterna.searching.allocation import closed_form_alpha
    from sterna.searching.search import families_of
    from sterna.searching.strategy import density_for

    rows = []
    for size in sizes:
        family = families_of(work.maker)[0]
        density = density_for(work.problem.bytes, family, size)
        if density is not None:
            plain = family.at(density, 0.0)
            rows.append(work.row(replace(plain, alpha=float(f"{closed_form_alpha(plain.density):.3g}"))))
    return rows


def controls(work: Work, density: float, alpha: float) -> Iterator[dict[str, Any]]:
    from sterna.scoring.controls import TunedVector
    from sterna.scoring.controls import controls as made

    def rank(expert: Any) -> float:
        return work.sign * work.bench.run(expert).value

    vector = TunedVector.of(work.base, work.tuned)
    with tempfile.TemporaryDirectory() as folder:
        for control in made(vector, folder, density=density, alpha=alpha, rank=rank):
            yield {"name": control.title, "bytes": control.bytes, "test": work.test.run(control.expert).value, **control.detail}


def run(subject: Subject, parts: Sequence[str], result: dict[str, Any], save: Callable[[], None]) -> None:
    wanted = set(parts) if subject.name in GRIDDED else set(parts) & {"curve"}
    if wanted <= set(result):
        return
    work = Work(subject)
    delta = 2 * work.maker.entries + work.maker.head_bytes
    result |= {
        "metric": work.bench.metric.name,
        "rows": {"validation": len(work.bench), "test": len(work.test)},
        "bytes_16bit": delta,
        "validation": {"base": work.sign * work.problem.base, "tuned": work.sign * work.problem.tuned},
        "test": {"base": work.sign * work.tests.base, "tuned": work.sign * work.tests.tuned},
    }
    save()
    steps: dict[str, Callable[[], Any]] = {
        "curve": lambda: curve(work),
        "grid": lambda: grid(work),
        "search": lambda: searched(work, result["grid"]["best"]),
        "formula": lambda: formula(work, [result["grid"]["best"]["bytes"], result["search"]["within"]["bytes"]]),
        "controls": lambda: list(controls(work, result["grid"]["best"]["density"], result["grid"]["best"]["alpha"])),
    }
    for part in PARTS:
        if part in parts and part not in result and (part == "curve" or subject.name in GRIDDED):
            harness.note(f"{subject.name}: {part}")
            result[part] = steps[part]()
            save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], choices=list(SUBJECTS))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there")
    options = parser.parse_args()
    if options.tables:
        print(tables())
        return
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"subjects": {}}
    for name in options.only or SUBJECTS:
        if not SUBJECTS[name].tuned().exists():
            harness.note(f"{name}: not trained; see benchmarks/experts.py and benchmarks/causal_lm_training.py")
            continue
        result = found["subjects"].setdefault(name, {})

        def save() -> None:
            found["machine"] = machine()
            with whole_file(RESULT) as file:
                file.write((json.dumps(found, indent=1) + "\n").encode())

        narrow = not name.startswith("dialogue")  # accuracies do not mind, and take a third of the time
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow, cache_enabled=False):  # cached weights would be those of an earlier candidate
            run(SUBJECTS[name], options.parts, result, save)


def tables() -> str:
    """What is there, as Markdown."""
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"subjects": {}}
    shown = [part for part in (_frontiers(found["subjects"]), _against_grid(found["subjects"]), _formulas(found["subjects"])) if part]
    if "machine" in found:
        made = f"commit {found['machine']['commit']}, {found['machine']['date']}"
        shown.append(f"Classifiers ran under bfloat16 autocast. Made by `python benchmarks/frontier.py`; {made}.")
    return "\n\n".join(shown)


def _score(value: float, metric: str) -> str:
    return f"{value:.1f}" if metric == "accuracy" else f"{value:.2f}"


def _frontiers(subjects: dict[str, Any]) -> str:
    rows = []
    for name, one in subjects.items():
        if "curve" not in one:
            continue
        base, tuned = (_score(one["test"][who], one["metric"]) for who in ("base", "tuned"))
        rows.append([name, one["metric"], "base alone", "", 0, _score(one["validation"]["base"], one["metric"]), base])
        for trial in sorted(one["curve"]["trials"], key=lambda trial: trial["bytes"]):
            if trial["on_frontier"]:
                how = f"density {trial['density']:g}, alpha {trial['alpha']:g}, {trial['allocation']}, head {trial['head']}"
                how += f", {trial['planes']} planes" if trial["planes"] > 1 else ""
                shares = f"{100 * trial['bytes'] / one['bytes_16bit']:.2g} %"
                rows.append(["", "", how, shares, trial["bytes"], *(_score(trial[key], one["metric"]) for key in ("score", "test"))])
        rows.append(["", "", "tuned model, as a 16-bit delta", "100 %", one["bytes_16bit"], _score(one["validation"]["tuned"], one["metric"]), tuned])
    columns = ("subject", "metric", "setting on the frontier", "of the 16-bit delta", "bytes", "validation", "test")
    return f"The efficient frontier (chosen on validation rows)\n\n{markdown(columns, rows)}" if rows else ""


def _against_grid(subjects: dict[str, Any]) -> str:
    rows = []
    for name, one in subjects.items():
        if "search" not in one:
            continue
        best = one["grid"]["best"]
        entries = [("the authors' grid, its best", {**best, "evaluations": one["grid"]["evaluations"]}), *one["search"].items()]
        for label, found in entries:
            shown = label if label != "within" else f"within {found['goal']['within']:.2g} of the tuned model"
            setting = f"{found['density']:g}, {found['alpha']:g}, {found['allocation']}"
            reached = "" if found.get("reached", True) else "not reached"
            scores = [_score(found[key], one["metric"]) for key in ("validation", "test")]
            rows.append([name if label == entries[0][0] else "", shown, setting, found["evaluations"], found["bytes"], *scores, reached])
    columns = ("subject", "how it was chosen", "density, alpha, allocation", "evaluations", "bytes", "validation", "test", "")
    return f"The search against the authors' fixed grid\n\n{markdown(columns, rows)}" if rows else ""


def _formulas(subjects: dict[str, Any]) -> str:
    rows = []
    for name, one in subjects.items():
        for found in one.get("formula", []):
            scores = [_score(found[key], one["metric"]) for key in ("validation", "test")]
            rows.append([name, found["bytes"], f"{found['density']:g}", f"{found['alpha']:g}", *scores])
        rows += [[name, found["bytes"], found["name"], "", "", _score(found["test"], one["metric"])] for found in one.get("controls", [])]
    columns = ("subject", "bytes", "density, or the control", "alpha", "validation", "test")
    return f"Without evaluations: the closed form; and the controls\n\n{markdown(columns, rows)}" if rows else ""


if __name__ == "__main__":
    main()
