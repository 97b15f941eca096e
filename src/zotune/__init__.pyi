"""The public names as type checkers and editors see them; `__init__.py` loads each when it is first used."""

from zotune import config as _config
from zotune import data as _data
from zotune import models as _models
from zotune.config import Config as Config
from zotune.data import BatchOrder as BatchOrder
from zotune.dryrun import DryRun as DryRun
from zotune.dryrun import dry_run as dry_run
from zotune.errors import StopRun as StopRun
from zotune.errors import ZotuneError as ZotuneError
from zotune.evaluate import Evaluation as Evaluation
from zotune.evaluate import Metrics as Metrics
from zotune.export import apply_journal as apply_journal
from zotune.export import export_run as export_run
from zotune.journal.branches import rollback as rollback
from zotune.journal.replay import replay as replay
from zotune.objectives import CandidateCrossEntropy as CandidateCrossEntropy
from zotune.objectives import CompletionNLL as CompletionNLL
from zotune.optimizer import Method as Method
from zotune.optimizer import Optimizer as Optimizer
from zotune.presets import PRESETS as PRESETS
from zotune.progress import TerminalReporter as TerminalReporter
from zotune.reporters import Reporter as Reporter
from zotune.reporters import SilentReporter as SilentReporter
from zotune.rows import Candidate as Candidate
from zotune.rows import Example as Example
from zotune.rows import Row as Row
from zotune.runtimes.embedded import EmbeddedRuntime as EmbeddedRuntime
from zotune.train import Summary as Summary
from zotune.train import evaluate_run as evaluate_run
from zotune.train import resume as resume
from zotune.train import start as start
from zotune.watching import report as _report
from zotune.watching import sweep as _sweep
from zotune.watching.overlays import overlay as overlay
from zotune.watching.plots import plot as plot

load_config = _config.load
parse_config = _config.parse
write_report = _report.write
read_sweep = _sweep.read
run_sweep = _sweep.run
summarise_sweep = _sweep.summarise
load_data = _data.load
load_model = _models.load
