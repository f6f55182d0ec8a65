"""A study's folder with numbers that were made up, and the page of its report, for tests of the report."""

import dataclasses
import html.parser
import itertools
import json
import struct

from jaxmoe.evaluation.records import make_record, write_records
from jaxmoe.storage import write_json

STEPS, TOKENS_PER_STEP = 20, 1000
CONFIG_HASH = "0123456789abcdef"


@dataclasses.dataclass
class Run:
    """One run of a synthetic study; `recall` and `solved` are its final accuracies."""

    name: str
    arm: str
    total: int
    recall: float = 0.5
    solved: float = 0.5
    loss: float = 2.0
    seed: int = 0
    slices: tuple = ("main",)
    learning_rate: float = 0.01
    corruption: float = 0.2
    reached: int = STEPS
    experts: int = 2


def write_study(directory, runs, *, sources=("knowledge", "reasoning"), slices=None, notes=()):
    """A study's folder as `experiments.run` leaves it, evaluated at half time and at the end."""
    members = []
    for run in runs:
        summary = {
            "name": run.name, "arm": run.arm, "seed": run.seed, "slices": list(run.slices),
            "total_parameters": run.total, "active_parameters": 100, "flops_per_token": 600,
            "tokens": STEPS * TOKENS_PER_STEP, "tokens_per_parameter": STEPS * TOKENS_PER_STEP / run.total,
            "sparsity": 1 - 2 / run.experts,
            "num_experts": run.experts, "experts_per_token": 2, "learning_rate": run.learning_rate,
            "config_hash": CONFIG_HASH,
        }  # fmt: skip
        members.append(summary)
        if run.reached:
            write_run(directory / run.name, run, summary, sources)
    study = {
        "name": "synthetic", "title": "A <synthetic> study", "held_fixed": {"active_parameters": 0.1, "tokens": 0.0},
        "varies": ["total_parameters"], "notes": list(notes), "headline": runs[0].slices[0],
        "slices": slices or {}, "members": members, "command": "python -m experiments.run --config=mine.py",
    }  # fmt: skip
    write_json(directory / "study.json", study)
    return directory


def write_run(folder, run, summary, sources):
    kinds = {"knowledge": {"kind": "knowledge"}, "reasoning": {"kind": "reasoning", "corruption": run.corruption}}
    config = {
        "name": run.name, "seed": run.seed, "train": {"steps": STEPS, "learning_rate": run.learning_rate},
        "data": {"sources": {source: kinds.get(source, {"kind": "text"}) for source in sources}},
    }  # fmt: skip
    write_json(folder / "config.json", config)
    by_source = {f"loss/{source}": run.loss for source in sources}
    logs = {"metrics": {"loss": run.loss, **by_source, "skipped": 1},
            "throughput": {"step_seconds": 0.6, "tokens_per_second": 100.0}}  # fmt: skip
    for name, numbers in logs.items():
        lines = [json.dumps({"step": step, **numbers}) + "\n" for step in range(1, run.reached + 1)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for step in (STEPS // 2, STEPS):
        if step <= run.reached:
            write_records(folder, records(run, summary, sources, step))
    if run.reached == STEPS:
        write_json(folder / "DONE", {"step": STEPS, "loss": run.loss, "config_hash": CONFIG_HASH})


def records(run, summary, sources, step):
    identity = {name: value for name, value in summary.items() if name != "name"}
    identity |= {
        "study": "synthetic", "member": run.name, "slices": ",".join(run.slices), "step": step,
        "tokens": step * TOKENS_PER_STEP, "init_std": 0.02, "device": "cpu x1",
        "version_jax": "0.10.2", "dropped_fraction": 0.0,
    }  # fmt: skip
    part = step / STEPS

    def record(evaluation, source, split, **numbers):
        return make_record({**identity, "evaluation": evaluation, "source": source, "split": split}, numbers)

    load = [[0.75] + [0.25 / (run.experts - 1)] * (run.experts - 1)] * 2
    numbers = {"dead_experts": 0, "load_max_over_mean": 1.5, "skipped_steps": 1}
    yield record("training", "all", "train", loss=run.loss / part, expert_load=load, **numbers)
    for source in sources:
        for split, worse in (("train", 0.0), ("test", 0.25)):
            yield record("validation", source, split, loss=run.loss + worse, standard_error=0.001)
    scores = {
        ("knowledge", "train"): run.recall, ("knowledge", "test"): 0.004, ("reasoning", "train"): 0.9 * run.solved,
        ("reasoning", "train_clean"): 0.95 * run.solved, ("reasoning", "test"): run.solved,
    }  # fmt: skip
    for (source, split), accuracy in scores.items():
        if source in sources:
            yield record(
                "task", source, split, bits_per_token=(2 - accuracy) / part, bits_per_token_standard_error=0.01,
                bits_per_byte=1.0, loss=1.0, accuracy=accuracy * part, accuracy_standard_error=0.01,
                accuracy_kind="value_recall" if source == "knowledge" else "exact_match", chance_accuracy=0.004,
                examples=100,
            )  # fmt: skip


FAMILY = [
    Run("E2", "E2", 1_000, recall=0.10, solved=0.75, loss=3.9, experts=2),
    Run("E8", "E8", 2_000, recall=0.21, solved=0.81, loss=3.4, experts=8),
    Run("E64", "E64", 16_000, recall=0.65, solved=0.74, loss=1.7, experts=64),
]


def seeds(runs, spread=0.1):
    """Each run with seeds 0 and 1, which differ by `spread` in what they solve."""
    for run, seed in itertools.product(runs, (0, 1)):
        solved = run.solved + spread * (seed - 0.5)
        yield dataclasses.replace(run, name=f"{run.arm}-seed{seed}", seed=seed, solved=solved)


class Page(html.parser.HTMLParser):
    """Links, images and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.images, self.sources, self.anchors, self.words = [], [], [], set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors |= {attributes.get("id")}
        if tag == "a":
            self.links.append(attributes["href"])
        if tag in ("img", "source"):
            (self.images if tag == "img" else self.sources).append(attributes)
        assert tag not in ("script", "link"), "the page needs nothing but its images"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def png_size(path):
    return struct.unpack(">II", path.read_bytes()[16:24])
