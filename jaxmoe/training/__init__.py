"""Training: optimizer, step, loop, checkpoints, logs."""

from jaxmoe.exclusive import check_unused
from jaxmoe.run_files import CHECKPOINT_DIRECTORY
from jaxmoe.training.allocator import reuse_freed_memory
from jaxmoe.training.checkpoints import Checkpoints, Storage
from jaxmoe.training.context import EvaluationContext, Resumed, averaging_window, evaluation_context
from jaxmoe.training.description import check_format
from jaxmoe.training.errors import (
    BufferOverflowError,
    CheckpointError,
    EvaluationStopped,
    LossSpikeError,
    NonFiniteLossError,
    NoSpaceLeftError,
    TrainingError,
)
from jaxmoe.training.loop import TrainResult, train
from jaxmoe.training.method import Method, PreTraining, StepStoppedError
from jaxmoe.training.metrics import METRICS_FILE, THROUGHPUT_FILE
from jaxmoe.training.optimizer import decay_mask, make_optimizer
from jaxmoe.training.policies import Retention
from jaxmoe.training.progress import ProgressReporter
from jaxmoe.training.schedule import learning_rate_schedule
from jaxmoe.training.signals import StopRequest
from jaxmoe.training.start import check_start, read_parameters, read_start, state_with_parameters, write_start
from jaxmoe.training.state import TrainState, abstract_state, init_state
from jaxmoe.training.step import make_train_step
from jaxmoe.training.watchdog import Watchdog
from jaxmoe.training.workdir import CONFIG_FILE, DONE_FILE, check_directory, claim_directory

__all__ = [
    "CHECKPOINT_DIRECTORY",
    "CONFIG_FILE",
    "DONE_FILE",
    "METRICS_FILE",
    "THROUGHPUT_FILE",
    "BufferOverflowError",
    "CheckpointError",
    "Checkpoints",
    "EvaluationContext",
    "EvaluationStopped",
    "LossSpikeError",
    "Method",
    "NoSpaceLeftError",
    "NonFiniteLossError",
    "PreTraining",
    "ProgressReporter",
    "Resumed",
    "Retention",
    "StepStoppedError",
    "StopRequest",
    "Storage",
    "TrainResult",
    "TrainState",
    "TrainingError",
    "Watchdog",
    "abstract_state",
    "averaging_window",
    "check_directory",
    "check_format",
    "check_start",
    "check_unused",
    "claim_directory",
    "decay_mask",
    "evaluation_context",
    "init_state",
    "learning_rate_schedule",
    "make_optimizer",
    "make_train_step",
    "read_parameters",
    "read_start",
    "reuse_freed_memory",
    "state_with_parameters",
    "train",
    "write_start",
]
