"""Imports point down: the table of docs/architecture.md, held by reading every module's import statements."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.support.paths import ROOT

# From the bottom up; a module may import from its own row and the rows before it.
ROWS = (
    "dvi.settings dvi.software dvi.bundled dvi.key_names dvi.progress dvi.signals dvi.whole_files",
    "dvi.config dvi.records dvi.tenancy dvi.terminal dvi.distributed",
    "dvi.cli.arguments dvi.cli.starter",
    "dvi.decode.sampling dvi.telemetry dvi.decode.verification dvi.model.kv_cache dvi.model.ragged "
    "dvi.draft.costs dvi.model.cuda_graph dvi.traffic dvi.prompt_files dvi.model.context dvi.durable "
    "dvi.model.chat_templates dvi.model.gguf dvi.measured dvi.hardware dvi.seeds dvi.model.end_tokens",
    "dvi.model.pretrained",
    "dvi.model.devices",
    "dvi.model.conversion",
    "dvi.model.published_models",
    "dvi.model.views_path dvi.model.llama_path dvi.model.split dvi.model.drafter trainers.learning.replay "
    "trainers.learning.losses trainers.learning.loss_schedule",
    "dvi.draft.companions dvi.draft.agreement",
    "dvi.draft.length_policies dvi.draft.companion_model",
    "dvi.draft.companion_length",
    "dvi.model.adapter_store dvi.inspect.memory_plan",
    "dvi.decode.round dvi.model.exact dvi.draft.measure_costs dvi.decode.text",
    "dvi.model.starting_drafter",
    "dvi.decode.precision",
    "dvi.decode.speculator",
    "trainers.learning.recordings",
    "dvi.planning.plans dvi.planning.profile dvi.planning.workload dvi.planning.drift",
    "dvi.planning.steps",
    "dvi.planning.limits",
    "dvi.planning.simulator dvi.planning.search",
    "dvi.planning.frontier dvi.planning.replan",
    "trainers.learning.zero3",
    "dvi.serving.request dvi.serving.metrics.figures dvi.serving.aggregation dvi.serving.protocol "
    "dvi.serving.sockets dvi.serving.connections dvi.serving.model_names dvi.serving.turns",
    "dvi.serving.replicas",
    "dvi.serving.scheduler dvi.serving.prefix_cache dvi.serving.access dvi.serving.api_schema",
    "dvi.bench.guarded",
    "dvi.serving.engine dvi.serving.metrics.prometheus dvi.serving.metrics.monitor",
    "dvi.serving.metrics.headline dvi.serving.loop dvi.serving.metrics.terminal_view dvi.serving.client "
    "dvi.serving.body_reading dvi.serving.prompts dvi.serving.token_texts dvi.serving.replies dvi.serving.door",
    "dvi.serving.metrics.dashboard dvi.serving.admin_api",
    "dvi.serving.http_api",
    "dvi.serving.server dvi.serving.relay dvi.serving.front_page",
    "dvi.serving.front_door dvi.serving.place",
    "dvi.planning.measurement",
    "dvi.planning.controller dvi.planning.tune",
    "dvi.inspect.audit dvi.inspect.machine trainers.learning.acceptance_trend trainers.learning.budget "
    "trainers.jobs.traffic_counts trainers.learning.versions trainers.learning.checkpoint "
    "trainers.learning.rank_report trainers.ranks.channel",
    "trainers.learning.student trainers.ranks.shards trainers.ranks.messages",
    "trainers.learning.zero_student",
    "trainers.learning.online",
    "trainers.ranks.shipping",
    "trainers.ranks.dedicated trainers.learning.memory",
    "trainers.jobs.evaluation trainers.jobs.progress trainers.jobs.picture trainers.jobs.held_out_curve "
    "trainers.ranks.launch trainers.jobs.traffic_cursor",
    "trainers.ranks.roles",
    "trainers.jobs.train",
    "trainers.jobs.serving_learner trainers.jobs.warmup trainers.jobs.paper_run",
    "trainers.jobs.replica_learner",
    "trainers.jobs.serve",
    "dvi.bench.records dvi.bench.statistics dvi.bench.questions",
    "dvi.bench.answers dvi.bench.arms dvi.bench.random_rounds",
    "dvi.bench.interview dvi.bench.rivals dvi.bench.figures dvi.bench.margin_quality",
    "dvi.bench.spec_bench dvi.bench.harness dvi.bench.charts dvi.bench.tables",
    "dvi.bench.report dvi.bench.length_report dvi.bench.margin_report",
    "dvi.bench.session dvi.bench.length_policies dvi.bench.margin",
    "trainers.experiments.cell_folder trainers.experiments.streams trainers.experiments.ablation_figures",
    "trainers.experiments.ablation_report trainers.experiments.domain_shift_report "
    "trainers.experiments.sweep_report",
    "trainers.experiments.domain_shift trainers.experiments.sweep",
    "trainers.experiments.ablation_cells",
    "trainers.experiments.ablation",
    "dvi.cli.bench dvi.cli.model",
    "dvi.cli.main",
    "dvi.__main__ dvi.cli.__main__",
)
LEVELS = {module: level for level, row in enumerate(ROWS) for module in row.split()}
# The only places where the library may reach up, and only when a verb runs.
REACHES_UP = {"dvi.cli.main", "dvi.cli.bench"}


def modules() -> dict[str, ast.Module]:
    """Every module but the packages' own __init__, which only pass names on."""
    paths = [path for folder in ("dvi", "trainers") for path in (ROOT / folder).rglob("*.py")]
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name: ast.parse(path.read_text()) for name, path in named.items() if not name.endswith("__init__")}


def imported(tree: ast.AST) -> set[str]:
    """Modules of ours that an import statement below this node names."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from trainers import OnlineTrainer` names a package, `from dvi import audit` a module in one.
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name in LEVELS or name == "trainers"}


def test_every_import_points_down_or_sideways():
    """Catches serving that needs training, maths that needs models, and cycles between rows."""
    found = modules()
    assert set(found) == set(LEVELS), "a new module takes a row in this table and in docs/architecture.md"
    for name, tree in found.items():
        for target in imported(tree):
            assert LEVELS.get(target, LEVELS["trainers.learning.online"]) <= LEVELS[name], f"{name} imports {target}"


class WithoutFunctions(ast.NodeTransformer):
    """What is left of a module runs when it is imported."""

    def visit_FunctionDef(self, _node: ast.FunctionDef) -> None:
        return None


def test_the_library_imports_training_only_inside_functions_of_the_command_line():
    """Serving must run with training absent."""
    for name, tree in modules().items():
        if name.startswith("dvi."):
            seen = imported(WithoutFunctions().visit(tree) if name in REACHES_UP else tree)
            assert not [target for target in seen if target.startswith("trainers")], name


def test_help_and_config_do_not_import_torch():
    """`dvi --help` is instant."""
    code = "import sys, dvi.cli.main, dvi.config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


def test_a_front_door_does_not_import_torch():
    """`dvi serve` on several ranks opens one, and clients wait for it."""
    code = "import sys, dvi.serving.front_door; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"
