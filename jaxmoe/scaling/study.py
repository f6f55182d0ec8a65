"""A study: members that differ in what is under study, and are checked to be equal in what is held fixed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.config import ConfigError, RunConfig, config_hash, from_dict, nearest
from jaxmoe.scaling.matching import check_study
from jaxmoe.scaling.quantities import QUANTITIES, experts_per_token, num_experts

DEFAULT_SLICE = "main"
HEADLINE_SLICE = "headline"
_PUBLISHED = (
    "total_parameters", "active_parameters", "flops_per_token", "tokens", "tokens_per_parameter", "sparsity",
)  # fmt: skip
SECTIONS = ("model", "data", "train", "evaluation", "mesh", "grpo", "start_from")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED_NAMES = ("report", "cache", "logs", "study.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """One run of a study.

    Attributes:
      name: its folder in the study's: the arm, or `ARM-seedN` in a study of several seeds.
      arm: what it is apart from the seed; members of one arm differ in nothing else.
      slices: the comparisons it belongs to.
      seed: of initialization, data and order.
      config: complete.
    """

    name: str
    arm: str
    slices: tuple[str, ...]
    seed: int
    config: RunConfig

    def summary(self) -> dict[str, Any]:
        """The member in numbers, as plain JSON values; needs no device."""
        from jaxmoe import accounting

        model, train = self.config.model, self.config.train
        update = dataclasses.replace(train, batch_size=self.config.rows_per_update)
        memory, count = accounting.memory_bytes(model, update), accounting.parameter_count(model)
        one_sequence = dataclasses.replace(train, batch_size=1, gradient_accumulation=1)
        return {
            "name": self.name,
            **{name: QUANTITIES[name](self.config) for name in _PUBLISHED},
            "seed": self.seed,
            "arm": self.arm,
            "slices": list(self.slices),
            "steps": train.steps,
            "batch_size": train.batch_size,
            "sequence_length": train.sequence_length,
            "learning_rate": train.learning_rate,
            "init_std": model.init_std,
            "num_experts": num_experts(self.config),
            "experts_per_token": experts_per_token(self.config),
            "expert_hidden": model.moe.expert_hidden if model.num_moe_layers else 0,
            "width": model.width,
            "num_layers": model.num_layers,
            "non_embedding_total_parameters": QUANTITIES["non_embedding_total_parameters"](self.config),
            "non_embedding_active_parameters": QUANTITIES["non_embedding_active_parameters"](self.config),
            "matmul_flops_per_token": QUANTITIES["matmul_flops_per_token"](self.config),
            "training_flops": QUANTITIES["training_flops"](self.config),
            "approximate_training_flops": QUANTITIES["approximate_training_flops"](self.config),
            "components": dict(count.components),
            "active_components": dict(count.active_components),
            "weights_bytes": memory.weights,
            "optimizer_bytes": memory.optimizer,
            "activation_bytes_per_sequence": accounting.memory_bytes(model, one_sequence).activations,
            "state_bytes": int(memory.weights + memory.optimizer),
            "memory_bytes": int(memory.total),
            "config_hash": config_hash(self.config),
            **self._post_training(),
        }

    def _post_training(self) -> dict[str, Any]:
        """Where the member starts from, and its rollouts; nothing for one that has neither."""
        run, grpo = self.config, self.config.grpo
        start = {} if run.start_from is None else {"start_from": run.start_from}
        if grpo is None:
            return start
        rollouts = {
            "prompts_per_step": run.train.batch_size,
            "group_size": grpo.group_size,
            "responses_per_step": run.train.batch_size * grpo.group_size,
            "updates_per_step": grpo.updates_per_step,
            "responses_per_update": grpo.responses_per_update(run.train),
            "max_prompt_tokens": grpo.max_prompt_tokens,
            "max_response_tokens": grpo.max_response_tokens,
            "reward": grpo.reward,
        }
        return {**start, "grpo": rollouts}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Members, what they have in common, and what varies.

    Attributes:
      name: a short identifier.
      title: for people.
      held_fixed: quantity -> largest relative difference, 0.1 being 10 %, from the member of a slice that has the
        fewest total parameters. A quantity is one of `jaxmoe.scaling.quantities.QUANTITIES` or a dotted key of the
        configuration.
      varies: quantities that differ between the members of the headline slice.
      members: in the order in which they are trained.
      notes: what a reader of the results must know; the report shows them beside the figures.
      slice_notes: slice -> any of `title`, `x` (the quantity that varies in it) and `note`, for the report.
      selected: the slice that `select` kept, None for all.
    """

    name: str
    title: str
    members: tuple[Member, ...]
    held_fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)
    varies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    slice_notes: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    selected: str | None = None

    @classmethod
    def from_config_dict(cls, config: Any) -> Study:
        """Resolves an experiment's configuration into complete members.

        Args:
          config: an `ml_collections.ConfigDict` or nested mappings, with `study` (name, title, held_fixed, varies,
            notes, and `slices` for `slice_notes`), `seeds`, the sections `model`, `data`, `train`, `evaluation`,
            `mesh` and `grpo`, `start_from`, in which `{member}` stands for a member's name, and `members`: by arm, each
            with `slices`, `seeds` and values that replace those of the sections, merged key by key, and with `name`
            where the arm's is not its key (a key has no dots). Members keep their order; a ConfigDict has none, so its
            are taken headline first, then by name with numbers counted.

        Raises:
          ConfigError: an unknown key (the nearest known one is given) or a value that is refused; the message starts
            with the dotted path.
        """
        values = _plain(config)
        if hasattr(config, "copy_and_resolve_references"):
            values["members"] = _natural_order(values.get("members", {}))
        _only_known(values, ("study", "seeds", "members", *SECTIONS), "")
        header = _mapping(values.get("study", {}), "study")
        _only_known(header, ("name", "title", "held_fixed", "varies", "notes", "slices"), "study.")
        name = _identifier(header.get("name"), "study.name")
        base = {section: values[section] for section in SECTIONS if section in values}
        arms = _mapping(values.get("members", {}), "members")
        if not arms:
            raise ConfigError("members is empty; name at least one, for example members.base = {}.")
        default_seeds = _seeds(values.get("seeds", (0,)), "seeds")

        entries = [(key, *_entry(key, override, default_seeds)) for key, override in arms.items()]
        single = len({seed for _, _, seeds, *_ in entries for seed in seeds}) == 1
        members = []
        for key, arm, seeds, slices, override in entries:
            for seed in seeds:
                member_name = arm if single else f"{arm}-seed{seed}"
                run = _resolve(base, override, key=key, name=member_name, seed=seed)
                members.append(Member(name=member_name, arm=arm, slices=slices, seed=seed, config=run))
        return cls(
            name=name,
            title=str(header.get("title", name)),
            members=tuple(members),
            held_fixed=_tolerances(header.get("held_fixed", {})),
            varies=_strings(header.get("varies", ()), "study.varies"),
            notes=_strings(header.get("notes", ()), "study.notes"),
            slice_notes=_slice_notes(header.get("slices", {})),
        )

    @property
    def slices(self) -> tuple[str, ...]:
        """Slices to compare within, in order of first appearance: the selected one, or all."""
        if self.selected is not None:
            return (self.selected,)
        return tuple(dict.fromkeys(name for member in self.members for name in member.slices))

    @property
    def headline(self) -> str:
        """The slice whose members `varies` is about: `headline`, or the first."""
        return HEADLINE_SLICE if HEADLINE_SLICE in self.slices else self.slices[0]

    def members_of(self, slice_name: str) -> tuple[Member, ...]:
        """Members of one slice, in order.

        Raises:
          ConfigError: no such slice; the message gives the nearest.
        """
        if slice_name not in self.slices:
            raise ConfigError(f"unknown slice {slice_name!r}.{nearest(slice_name, self.slices)}")
        return tuple(member for member in self.members if slice_name in member.slices)

    def select(self, slice_name: str) -> Study:
        """The study of one slice's members.

        Raises:
          ConfigError: no such slice; the message gives the nearest.
        """
        return dataclasses.replace(self, members=self.members_of(slice_name), selected=slice_name)

    def member(self, name: str) -> Member:
        """The member of that name, or the only one whose name goes on after it with a hyphen.

        Raises:
          ConfigError: none; the message gives the nearest.
        """
        exact = [member for member in self.members if member.name == name]
        found = exact or [member for member in self.members if member.name.startswith(f"{name}-")]
        if len(found) == 1:
            return found[0]
        names = [member.name for member in self.members]
        raise ConfigError(f"unknown member {name!r}.{nearest(name, names, count=3)}")

    def check(self) -> None:
        """Refuses a family that is not matched.

        Raises:
          ConfigError: names the member, the quantity, its number, the reference's number and the tolerance; or says
            which quantity of `varies` does not vary, or which names collide.
        """
        check_study(self)

    def summary(self) -> dict[str, Any]:
        """The study as plain JSON values, with the summary of every member."""
        return {
            "name": self.name,
            "title": self.title,
            "held_fixed": dict(self.held_fixed),
            "varies": list(self.varies),
            "notes": list(self.notes),
            "headline": self.headline,
            "slices": {name: dict(self.slice_notes.get(name, {})) for name in self.slices},
            "members": [member.summary() for member in self.members],
        }

    def describe(self) -> str:
        """The study as tables for people: what is held fixed, what varies, and every member in numbers."""
        from jaxmoe.scaling.description import describe

        return describe(self)


# ------------------------------------------------------------------------------------------- resolving


def _plain(value: Any) -> Any:
    """ConfigDicts, at any depth, as dicts; references in them are resolved."""
    if hasattr(value, "copy_and_resolve_references"):
        value = value.copy_and_resolve_references().to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    return value


def _natural_order(members: Any) -> Any:
    """Members of the headline slice first, then by name: E2, E8, E64."""
    if not isinstance(members, Mapping):
        return members

    def key(item: tuple[str, Any]) -> tuple[bool, list[tuple[bool, int, str]]]:
        name, override = item
        slices = override.get("slices", ()) if isinstance(override, Mapping) else ()
        parts = [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]
        return HEADLINE_SLICE not in slices, parts

    return dict(sorted(members.items(), key=key))


def _merge(base: Any, override: Any) -> Any:
    """`override` over `base`, mapping by mapping; a source of another `kind` replaces the old one whole."""
    if not isinstance(base, Mapping) or not isinstance(override, Mapping):
        return override
    if "kind" in override and "kind" in base and override["kind"] != base["kind"]:
        return override
    merged = dict(base)
    for key, value in override.items():
        merged[key] = _merge(base[key], value) if key in base else value
    return merged


def _resolve(base: Mapping[str, Any], override: Mapping[str, Any], *, key: str, name: str, seed: int) -> RunConfig:
    """The complete configuration of one member; an error is located in the member only if it arises there."""
    identity = {"name": name, "seed": seed}
    path = f"members.{key}"
    try:
        values = _merge(base, override)
        start = values.get("start_from")
        if isinstance(start, str):
            values = {**values, "start_from": start.replace("{member}", name)}
        return from_dict(RunConfig, {**values, **identity}, path)
    except ConfigError as error:
        try:
            from_dict(RunConfig, {**base, **identity})
        except ConfigError as base_error:
            if str(error).replace(f"{path}.", "").replace(f"{path}: ", "") == str(base_error):
                raise base_error from None
        raise


def _entry(
    key: str, override: Any, seeds: tuple[int, ...]
) -> tuple[str, tuple[int, ...], tuple[str, ...], dict[str, Any]]:
    """Name, seeds, slices and overrides of one arm."""
    path = f"members.{_identifier(key, 'members')}"
    override = dict(_mapping(override, path))
    _only_known(override, ("name", "slices", "seeds", *SECTIONS), f"{path}.")
    arm = _identifier(override.pop("name", key), f"{path}.name")
    if "seeds" in override:
        seeds = _seeds(override.pop("seeds"), f"{path}.seeds")
    slices = _strings(override.pop("slices", (DEFAULT_SLICE,)), f"{path}.slices")
    if not slices:
        raise ConfigError(f"{path}.slices is empty; name at least one slice, or leave it out.")
    return arm, seeds, tuple(dict.fromkeys(slices)), override


def _only_known(values: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {prefix}{key}.{nearest(key, known)}")


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}={value!r}; a section of named entries is needed.")
    return value


def _strings(value: Any, path: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{path}={value!r}; a list of strings is needed.")
    return tuple(value)


def _identifier(value: Any, path: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value in _RESERVED_NAMES:
        raise ConfigError(
            f"{path}: {value!r} cannot name a folder; use letters, digits, '.', '_' and '-', starting with a letter "
            f"or digit, and none of {', '.join(_RESERVED_NAMES)}."
        )
    return value


def _seeds(value: Any, path: str) -> tuple[int, ...]:
    seeds = (value,) if isinstance(value, int) and not isinstance(value, bool) else value
    if (
        not isinstance(seeds, Sequence)
        or not seeds
        or not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
    ):
        raise ConfigError(f"{path}={value!r}; a list of integers that are not negative is needed.")
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"{path}={value!r} names a seed twice.")
    return tuple(seeds)


def _slice_notes(value: Any) -> dict[str, dict[str, str]]:
    notes = {}
    for name, entry in _mapping(value, "study.slices").items():
        _only_known(_mapping(entry, f"study.slices.{name}"), ("title", "x", "note"), f"study.slices.{name}.")
        for key, text in entry.items():
            if not isinstance(text, str):
                raise ConfigError(f"study.slices.{name}.{key}={text!r}; a string is needed.")
        notes[name] = dict(entry)
    return notes


def _tolerances(value: Any) -> dict[str, float]:
    tolerances = {}
    for name, tolerance in _mapping(value, "study.held_fixed").items():
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
            raise ConfigError(
                f"study.held_fixed.{name}={tolerance!r}; a relative tolerance 0 <= tolerance < 1 is needed, 0.1 being "
                "10 %."
            )
        tolerances[name] = float(tolerance)
    return tolerances
