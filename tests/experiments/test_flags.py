"""The --config flag: files found, completed with defaults, selected from, and unknown keys refused."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from experiments.flags import _let_members_override, _refuse_unknown_overrides, find_config_file, load_config
from jaxmoe.config import ConfigError
from jaxmoe.scaling.study import Study

REPOSITORY = pathlib.Path(__file__).parents[2]


def test_a_packaged_file_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config_file("experiments/configs/quickstart.py").name == "quickstart.py"
    assert find_config_file("quickstart").name == "quickstart.py"


def test_a_missing_file_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no such experiment file\. Did you mean 'micro_study\.py'\?"):
        load_config("configs/micro_stdy.py")


def test_a_file_without_get_config_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="has no function get_config"):
        load_config(str(tmp_path / "empty.py"))


def test_an_argument_that_a_file_does_not_take_is_refused(tmp_path):
    (tmp_path / "plain.py").write_text("def get_config():\n    return {'model': 3}\n")
    with pytest.raises(ConfigError, match=r"get_config of .*plain.py is given what follows the colon"):
        load_config(f"{tmp_path / 'plain.py'}:headline")


def test_what_is_no_section_is_told_as_such(tmp_path):
    (tmp_path / "plain.py").write_text("def get_config():\n    return {'study': {'name': 's'}, 'model': 3}\n")
    config = load_config(str(tmp_path / "plain.py"))
    config.unlock()
    config.members = {"a": {}}
    with pytest.raises(ConfigError, match=r"model=3; a section with vocab_size, .* is needed"):
        Study.from_config_dict(config)


def test_every_default_can_be_overridden():
    config = load_config("quickstart.py")
    assert config.train.clip_norm == 1.0
    assert config.train.get_type("checkpoint_every") is int
    assert config.data.sources.knowledge.attributes == 13
    assert config.model.moe.score_order == "topk_then_softmax"


def test_the_argument_selects_slices_and_members():
    assert set(load_config("quickstart.py:E2+E64").members) == {"E2", "E64"}
    assert set(load_config("micro_study.py:topk").members) == {"E8-k1", "E16", "E32-k4"}
    with pytest.raises(ConfigError, match="neither a slice nor a member. Did you mean 'headline'"):
        load_config("micro_study.py:headlin")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.train.stepz=1", "unknown key --config.train.stepz. Did you mean 'steps'?"),
        ("--config.modell.width=1", "unknown key --config.modell. Did you mean 'model'?"),
        ("--config.train.steps.more=1", "unknown key --config.train.steps.more"),
    ],
)
def test_an_unknown_override_names_the_nearest_key(flag, message):
    with pytest.raises(ConfigError) as caught:
        _refuse_unknown_overrides(load_config("quickstart.py"), ["run", flag])
    assert message in str(caught.value)


def test_none_switches_off_what_a_number_switches_on():
    values, argv = flags.FlagValues(), ["run", "--c.train.clip_norm=None", "--c.train.checkpoint_every=None"]
    holder = config_flags.DEFINE_config_dict("c", load_config("quickstart.py"), flag_values=values, sys_argv=argv)
    values(argv)
    study = Study.from_config_dict(holder.value)
    assert study.member("E2").config.train.clip_norm is None
    assert config_flags.get_override_values(values["c"]) == {"train.clip_norm": None, "train.checkpoint_every": None}


def test_a_path_that_is_not_there_does_not_fall_back_to_a_packaged_file(tmp_path):
    with pytest.raises(ConfigError, match="no such experiment file"):
        find_config_file(str(tmp_path / "quickstart.py"))


def test_a_member_takes_an_override_of_any_key():
    config = load_config("quickstart.py")
    _let_members_override(config, ["run", "--config.members.E64.train.steps=3"])
    assert config.members.E64.train.steps == config.train.steps
    assert "train" not in config.members.E8


_LEAVING = """
import atexit, threading, time
from experiments.flags import leave
class Never:
    def __del__(self): print("taken down")
never = Never()
atexit.register(print, "exit function")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("end")
leave(3)
"""


def test_a_command_leaves_after_its_threads_and_exit_functions_with_the_interpreter_standing():
    done = subprocess.run([sys.executable, "-c", _LEAVING], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split("\n")) == (3, ["end", "thread", "exit function", ""])


def test_output_that_cannot_be_written_is_a_failure():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from experiments.flags import leave; print('lost'); leave(0)"],
            cwd=REPOSITORY, env={**os.environ, "PYTHONUNBUFFERED": ""}, stdout=full, stderr=subprocess.PIPE, text=True,
            check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "what was printed cannot be written" in done.stderr


def test_an_error_of_a_command_is_shown_and_a_failure():
    program = "from experiments.flags import run_command; run_command(lambda _: {}['missing'], ['command'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'missing'\n")
