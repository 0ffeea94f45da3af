"""The command line: what it prints where, how it fails, and that asking for help costs nothing."""

import io
import json
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dvi import __version__
from dvi.cli.main import app
from dvi.model.native import library
from tests.support.paths import ROOT

STORIES = str(ROOT / "tests/stories260k")
VERBS = (
    "init", "generate", "train", "warmup", "serve", "route", "tune", "top", "audit", "export", "inspect", "doctor",
    "bench", "model",
)  # fmt: skip
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %} Once upon a"
FAST = ("--policy", "fixed", "--max-new-tokens", "12")


def dvi_command(*arguments):
    """(exit code, the JSON of the last line or None, stdout before it, stderr)."""
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    *before, last = result.stdout.splitlines() or [""]
    facts = json.loads(last) if last.startswith("{") else None
    return result.exit_code, facts, "\n".join(before), result.stderr


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A short `dvi train` of a lora_head drafter, and its JSON."""
    folder = tmp_path_factory.mktemp("cli")
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once upon a time"}\n{"prompt": "The dog", "split": "eval"}\n', encoding="utf-8")
    (folder / "job.yaml").write_text(f"model: {{path: {STORIES}, split_layer: 2}}\n", encoding="utf-8")
    code, facts, _, stderr = dvi_command(
        "train", folder / "job.yaml", f"data.prompts={prompts}", f"output.folder={folder / 'run'}",
        "output.tensorboard=false", "drafter.kind=lora_head", "drafter.lora_rank=2", "sampling.max_new_tokens=16",
        "eval.max_new_tokens=8", "draft.policy=fixed", "train.budget=1", "train.blocks_per_step=4",
        "train.rounds_per_step=2", "train.steps_per_publish=1",
    )  # fmt: skip
    assert code == 0, stderr
    assert "mean accepted tokens" in stderr and facts["command"] == "train" and facts["status"] == "done"
    return folder / "run"


def test_importing_the_command_line_imports_no_heavy_library():
    """Catches an import that makes `dvi --help` wait for torch."""
    code = (
        "import sys, dvi.cli.main\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'datasets', 'trainers', 'rich.console'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_help_of_the_program_and_of_every_verb_imports_no_heavy_library():
    """Catches a verb whose help imports what only its work needs, and a verb that is missing."""
    code = (
        "import sys; from typer.testing import CliRunner; from dvi.cli.main import app\n"
        f"for verb in {('',) + VERBS}:\n"
        "    result = CliRunner().invoke(app, [*verb.split(), '--help'])\n"
        "    assert result.exit_code == 0 and 'Usage' in result.stdout, verb\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'trainers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_one_prompt_is_printed_as_text_and_then_counted_in_one_json_line():
    """Catches text that is lost between pieces, and counts that do not add up."""
    code, facts, text, _ = dvi_command("generate", STORIES, "Once upon a time", *FAST)
    assert code == 0 and text.startswith(", there was a little girl")
    assert facts["command"] == "generate" and facts["new_tokens"] == 12 and facts["prompts"] == 1
    assert 0 < facts["drafted"] <= 4 * facts["rounds"] and facts["rounds"] + facts["accepted"] == 12
    assert facts["level"] == "fast" and facts["drafter_version"] == 0
    assert facts["finish_reasons"] == ["length"]


def test_generate_with_lookups_says_the_same_words_and_needs_no_drafter():
    prompt = "Tom ran. Tom ran. Tom ran."
    _, plain, text, _ = dvi_command("generate", STORIES, prompt, *FAST, "--num-draft-tokens", 0)
    code, facts, same, _ = dvi_command("generate", STORIES, prompt, *FAST, "--source", "lookup")
    assert code == 0 and same == text and facts["new_tokens"] == plain["new_tokens"] and facts["drafted"] > 0


def test_a_stop_text_ends_the_answer_before_it():
    """Catches --stop that is ignored, or printed."""
    code, facts, text, _ = dvi_command("generate", STORIES, "Once upon a time", *FAST, "--stop", " was")
    assert (code, text, facts["finish_reasons"]) == (0, ", there", ["stop"])


def test_several_prompts_are_decoded_as_they_are_alone(tmp_path):
    """Catches answers under the wrong number, and prompts of a file that are left out."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "The dog"}\n', encoding="utf-8")
    code, facts, text, _ = dvi_command("generate", STORIES, "Once upon a time", "--prompts-file", rows, *FAST)
    assert code == 0 and facts["prompts"] == 2 and facts["new_tokens"] == 24
    for index, prompt in enumerate(("Once upon a time", "The dog")):
        _, _, alone, _ = dvi_command("generate", STORIES, prompt, *FAST)
        assert f"[{index}] {alone}" in text


def test_a_chat_template_is_used_unless_the_prompt_is_raw(tmp_path):
    """Catches a chat model that is asked without its template, and --raw that is ignored."""
    model = tmp_path / "chat"
    shutil.copytree(STORIES, model)
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    prompt_tokens = {
        flags: dvi_command("generate", model, "Lily", *FAST, *flags)[1]["prompt_tokens"]
        for flags in ((), ("--chat",), ("--raw",))
    }
    assert prompt_tokens[()] == prompt_tokens["--chat",] != prompt_tokens["--raw",]
    code, _, _, stderr = dvi_command("generate", STORIES, "Lily", "--chat")
    assert code == 2 and "no chat template" in stderr


def test_a_trained_adapter_is_served_inspected_and_exported(run_folder, tmp_path):
    """Catches an adapter that is saved but not loaded, and an export that is not the same drafter."""
    adapter = run_folder / "drafter"
    _, facts, _, _ = dvi_command("generate", STORIES, "Once upon a time", *FAST, "--adapter", adapter)
    _, manifest, _, _ = dvi_command("inspect", adapter)
    assert facts["drafter_version"] == manifest["drafter_version"] > 0
    assert manifest["split_layer"] == 2 and manifest["drafter"]["kind"] == "lora_head"
    for option, source in (("--run", run_folder), ("--adapter", adapter)):
        code, facts, _, _ = dvi_command("export", tmp_path / option, option, source)
        assert code == 0 and facts["drafter_version"] == manifest["drafter_version"]
        for name in ("adapter_model.safetensors", "drafter_extra.safetensors"):
            assert (tmp_path / option / name).read_bytes() == (adapter / name).read_bytes()


def test_a_warm_up_leaves_an_adapter_that_generate_takes(tmp_path):
    """Catches a verb that reads another verb's settings, and JSON that does not say where the drafter is."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Once upon a time", "answer": ", there was a little girl."}\n' * 2, encoding="utf-8")
    (tmp_path / "job.yaml").write_text(f"model: {{path: {STORIES}, split_layer: 1}}\n", encoding="utf-8")
    code, facts, _, stderr = dvi_command(
        "warmup", tmp_path / "job.yaml", f"data.prompts={rows}", f"output.folder={tmp_path / 'run'}",
        "output.tensorboard=false", "warmup.source=texts", "warmup.positions_per_step=2", "train.blocks_per_step=2",
        "drafter.anchor_hidden=16", "drafter.draft_vocab_size=0", "eval.limit=0",
    )  # fmt: skip
    assert code == 0, stderr
    assert (facts["command"], facts["status"], facts["texts"]) == ("warmup", "done", 2)
    assert "reloaded, it drafts the same" in stderr
    _, generated, _, _ = dvi_command("generate", STORIES, "Once upon a time", *FAST, "--adapter", facts["drafter"])
    assert generated["drafter_version"] == facts["drafter_version"] > 0
    code, _, _, stderr = dvi_command("warmup", tmp_path / "job.yaml", f"data.prompts={rows}", "sampling.seed=1")
    assert code == 2 and "unknown key 'sampling" in stderr


def test_a_lora_head_drafter_is_exported_as_a_model_of_its_own(run_folder, tmp_path):
    """Catches an export that needs this library to be loaded."""
    from transformers import AutoModelForCausalLM

    code, facts, _, _ = dvi_command("export", tmp_path / "draft", "--run", run_folder, "--standalone")
    assert code == 0 and facts["standalone"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "draft").config.num_hidden_layers == 2


@pytest.mark.parametrize("kind", [(), ("--standalone",)], ids=["adapter", "standalone"])
def test_an_export_takes_the_place_of_another_only_by_force(run_folder, tmp_path, kind):
    """Catches a drafter lost to a name used twice, a --force that is ignored, and one that deletes other files."""
    place, source = tmp_path / "out", ("--run", run_folder, *kind)
    place.mkdir()
    assert dvi_command("export", place, *source)[0] == 0  # an empty folder holds nothing to lose
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    code, _, _, stderr = dvi_command("export", place, *source)
    assert code == 2 and f"{place} is there already; --force" in stderr
    assert before == {path.name: path.read_bytes() for path in place.iterdir()}
    code, facts, _, stderr = dvi_command("export", place, *source, "--force")
    assert code == 0 and facts["folder"] == str(place) and f"wrote {place}" in stderr
    (place / "thesis.tex").write_text("")
    code, _, _, stderr = dvi_command("export", place, *source, "--force")
    assert code == 2 and "thesis.tex" in stderr and set(before) < {path.name for path in place.iterdir()}


def test_audit_reports_matches_and_fails_where_a_difference_has_no_explanation(monkeypatch):
    """Catches an audit whose finding does not reach the exit code."""
    import dvi.inspect.audit

    arguments = ("audit", STORIES, "--limit", 2, "--max-new-tokens", 12)
    code, facts, _, stderr = dvi_command(*arguments)
    assert code == 0 and facts["num_matches"] == facts["num_prompts"] == 2 and "2 of 2 prompts match" in stderr
    decode = dvi.inspect.audit._decode

    def other_token_when_drafting(*args, num_draft_tokens):
        ids, stats = decode(*args, num_draft_tokens=num_draft_tokens)
        return [*ids[:-1], ids[-1] ^ (num_draft_tokens > 0)], stats

    monkeypatch.setattr(dvi.inspect.audit, "_decode", other_token_when_drafting)
    code, facts, _, stderr = dvi_command(*arguments)
    assert (code, facts["num_unexplained"], facts["num_matches"]) == (1, 2, 0) and stderr.count(" NO ") == 2


def test_verify_is_the_old_name_of_audit_and_says_so_in_one_line():
    """Catches a script of yesterday's that fails, that misses its verb in the JSON line, or that is told nothing."""
    arguments = (STORIES, "--limit", 1, "--max-new-tokens", 8)
    (code, facts, stdout, stderr), new = (dvi_command(verb, *arguments) for verb in ("verify", "audit"))
    notice = "dvi verify is now called dvi audit; the old name goes on working\n"
    assert (code, stdout) == (new[0], new[2]) == (0, "") and stderr == notice + new[3]
    assert (facts.pop("command"), new[1].pop("command")) == ("verify", "audit") and facts == new[1]
    assert "verify" not in CliRunner().invoke(app, ["--help"]).stdout
    result = CliRunner().invoke(app, ["verify"])
    assert result.exit_code == 2 and "Missing argument 'MODEL'" in result.stderr


def test_inspect_shows_how_a_model_would_be_split(tmp_path):
    """Catches counts of the wrong layers, and a refusal without its reason."""
    code, facts, _, _ = dvi_command("inspect", STORIES, "--split-layer", 2)
    parameters = facts["parameters"]
    assert code == 0 and facts["is_splittable"] and facts["is_tied"] and facts["path"] == "direct"
    assert parameters["deep"] * 2 == parameters["shallow"] * 3 and parameters["head"] == 512 * 64
    assert facts["cache_bytes_per_position"] == 5 * 2 * 4 * 8 * 4
    assert 0.4 < facts["draft_step_share"] < 0.5 and set(facts["drafter_parameters"]) >= {"anchored", "lora_head"}

    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=512, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(STORIES) / name, tmp_path)
    code, facts, _, _ = dvi_command("inspect", tmp_path)
    assert code == 0 and not facts["is_splittable"] and "cannot be split" in facts["reason"]


def test_doctor_finds_this_machine_sound():
    """Catches a check that fails where the tests pass, and versions that are not found.

    Whether exact mode is possible is for the processor to say; that it is not is no problem of the installation.
    """
    code, facts, _, stderr = dvi_command("doctor")
    assert code == 0, facts["problems"]
    assert facts["versions"]["torch"] and "torch" in stderr
    assert {type(is_possible) for is_possible in facts["exact_mode"].values()} == {bool}
    assert facts["compiled_kernels"] == (library.load() is not None)


def test_doctor_says_why_there_are_no_compiled_kernels(monkeypatch):
    monkeypatch.setenv(library.SWITCH, "off")
    code, facts, _, _ = dvi_command("doctor")
    assert code == 0 and not facts["compiled_kernels"] and any("DVI_NATIVE=off" in note for note in facts["notes"])


def test_printed_settings_are_a_configuration_file_without_running_anything(tmp_path):
    """Catches --print-config that starts the job, or that prints what cannot be read back."""
    from dvi.config import load_config

    result = CliRunner().invoke(
        app, ["train", str(ROOT / "configs/demo/demo.yaml"), "train.lr=1e-5", "--print-config"]
    )
    (tmp_path / "printed.yaml").write_text(result.stdout, encoding="utf-8")
    assert load_config(tmp_path / "printed.yaml") == load_config(ROOT / "configs/demo/demo.yaml", ["train.lr=1e-5"])


@pytest.mark.parametrize("name", ["demo", "bundled"])
def test_the_demo_runs_on_files_that_exist_and_learns_on_traffic_alone(name):
    """Catches a demo that names a moved file or a model that nobody gets, or trains on what it is measured on."""
    from dvi.config import load_config
    from dvi.model.published_models import MODELS

    config = load_config(ROOT / f"configs/demo/{name}.yaml")
    folder = Path(config.model.path)
    is_there = folder.name in MODELS if name == "demo" else (ROOT / folder / "config.json").is_file()
    assert config.data.split == "traffic" and folder.parent == Path("checkpoints") and is_there
    assert all((ROOT / path).is_file() for path in config.data.prompts)


def test_a_server_answers_exports_and_ends_in_order(tmp_path):
    """Catches a server that loses what it learnt at SIGTERM, or ends like a crash, and an export that is lost."""
    command = [
        sys.executable, "-m", "dvi", "serve", "configs/online/serve.yaml", f"model.path={STORIES}", "serve.port=0",
        f"output.folder={tmp_path / 'run'}", f"serve.adapters_folder={tmp_path / 'adapters'}", "draft.policy=fixed",
        "drafter.draft_vocab_size=0", "drafter.anchor_hidden=16",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        announced = next(line for line in process.stderr if line.startswith("serving"))
        url = announced.partition(" at ")[2].partition(",")[0]
        body = json.dumps({"prompt": "Once upon a time", "max_tokens": 12}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            assert json.load(response)["choices"][0]["text"].startswith(", there was a little girl")
        code, facts, _, _ = dvi_command("export", "first", "--server", url)
        assert code == 0 and facts["folder"] == str(tmp_path / "adapters/first")
        code, _, _, stderr = dvi_command("export", "../first", "--server", url)
        assert code == 2 and "answers 400" in stderr
        code, _, _, stderr = dvi_command("export", "first", "--server", url)
        assert code == 2 and "answers 409" in stderr and "--force" in stderr
        assert dvi_command("export", "first", "--server", url, "--force")[0] == 0
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in stderr, stderr
    assert json.loads(stdout.splitlines()[-1])["command"] == "serve"
    assert list((tmp_path / "run/checkpoints").glob("step-*"))
    _, manifest, _, _ = dvi_command("inspect", tmp_path / "adapters/first")
    assert manifest["split_layer"] == 0


def test_a_frozen_server_imports_nothing_of_the_trainers():
    """Catches serving that needs what only learning needs."""
    code = (
        "import sys; from tests.support.serving_doubles import *\n"
        "with stories_loop(stories_config()) as loop, listening(loop, stories_config()): pass\n"
        "print(sorted(name for name in sys.modules if name.startswith('trainers')))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "./absent", "hi"], "there is no model at ./absent"),
        (["generate", STORIES], "there must be a prompt, got none"),
        (["generate", STORIES, "hi", "--temperature", "-1"], "temperature must be >= 0"),
        (["generate", STORIES, "hi", "--split-layer", "9"], "split_layer must be in 0..4"),
        (["generate", STORIES, "hi", "--adapter", "./absent"], "there is no adapter folder"),
        (["generate", STORIES, "hi", "--mode", "exact", "--dtype", "bfloat16"], "the direct path; use dtype float32"),
        (["train", "./absent.yaml"], "config must be a readable YAML file"),
        (["train", "configs/demo/demo.yaml", "train.lrr=1"], "did you mean 'train.lr'?"),
        (["train", "configs/demo/demo.yaml", "train.lr=-1", "train.budget=2"], "train.lr must be greater than 0"),
        (["train", "configs/demo/demo.yaml", "data.prompts=./absent.jsonl"], "no prompts file absent.jsonl"),
        (["warmup", "configs/warmup/reference.yaml", "train.schedule=pg_only"], "train.schedule must be kl_only or lk"),
        (["export", "out"], "one of --run, --server and --adapter must be given, got none"),
        (["export", "out", "--run", "a", "--server", "b"], "must be given, got 2"),
        (["export", "out", "--server", "b"], "must begin with http:// or https://, got 'b'"),
        (["export", "out", "--server", "http://127.0.0.1:1"], "must be the address of a running server"),
        (["export", "out", "--server", "http://127.0.0.1:1", "--standalone"], "a server saves an adapter as it is"),
        (["top", "http://127.0.0.1:1"], "no server answers at http://127.0.0.1:1"),
        (["top", "localhost"], "must begin with http:// or https://, got 'localhost'"),
        (["serve", "configs/online/serve.yaml", "data.prompts=a"], "unknown key 'data"),
        (["serve", "./absent"], "there is no model at ./absent"),
        (["serve", STORIES, "--adapter", "./absent"], "there is no adapter folder"),
        (["tune", "./absent", "--max-token-latency-ms", "9"], "there is no model at ./absent"),
        (["train", STORIES, "absent.jsonl"], "no prompts file absent.jsonl"),
        (["train", STORIES], "data.prompts or data.dataset must name the traffic"),
        (["warmup", "absent.gguf"], "there is no model at absent.gguf"),
        (["init", "configs/online/serve.yaml"], "is there already; --force overwrites it"),
        (["serve", "configs/online/serve.yaml", "serve.host=0.0.0.0"], "there is no API key"),
        (["serve", "configs/online/serve.yaml", "serve.keys_file=./absent"], "serve.keys_file must be a readable file"),
        (["serve", "configs/online/serve.yaml", "serve.host=192.0.2.1", "serve.keys_file=KEYS"], "cannot listen on"),
        (["export", "out", "--run", "./absent"], "config must be a readable YAML file"),
    ],
)
def test_a_users_error_is_one_line_on_stderr_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    """Catches tracebacks for typing errors, errors on stdout, and success codes for failures."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "keys.yaml").write_text("- {name: a, key: 0123456789abcdef}")
    (tmp_path / "keys.yaml").chmod(0o600)
    arguments = [argument.replace("KEYS", str(tmp_path / "keys.yaml")) for argument in arguments]
    if arguments[0] in ("train", "serve"):
        arguments = [*arguments, f"output.folder={tmp_path}"]
    code, facts, stdout, stderr = dvi_command(*arguments)
    assert (code, facts, stdout) == (2, None, "")
    (line,) = stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_bad_prompt_row_is_named_by_file_and_line(tmp_path):
    """Catches a job that dies without saying which row it could not read."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": 3}\n', encoding="utf-8")
    code, _, _, stderr = dvi_command("audit", STORIES, "--prompts", path)
    assert code == 2 and stderr.startswith(f"error: {path}, line 2: prompt must be a text, got 3")


def test_an_adapter_of_another_model_is_refused(run_folder):
    """Catches a drafter that drafts nonsense beside a backbone it never saw."""
    code, _, _, stderr = dvi_command(
        "generate", ROOT / "checkpoints/reference-11m", "hi", "--adapter", run_folder / "drafter"
    )
    assert code == 2 and "was trained with" in stderr


def test_debug_shows_the_traceback_of_a_users_error_wherever_it_stands():
    """Catches --debug that hides where an error came from, or that is known before the verb only."""
    for arguments in (("--debug", "generate", "./absent", "hi"), ("generate", "./absent", "hi", "--debug")):
        with pytest.raises(ValueError, match="there is no model"):
            dvi_command(*arguments)


def test_a_terminated_job_saves_a_checkpoint_and_says_so(tmp_path):
    """Catches a job that dies at SIGTERM with its work, and an exit code that hides the signal."""
    command = [
        sys.executable, "-m", "dvi", "train", "configs/demo/bundled.yaml", f"model.path={STORIES}",
        f"output.folder={tmp_path}", "eval.limit=1", "output.tensorboard=false", "drafter.anchor_hidden=16",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert any("held-out" in line for line in process.stderr)  # from here on signals are the job's
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    facts = json.loads(stdout.splitlines()[-1])
    assert facts["status"] == "interrupted" and Path(facts["checkpoint"]).is_dir()
    assert "output.resume=true goes on" in stderr


def test_the_version_is_printed_alone():
    """Catches a version that needs a verb, or that comes with a JSON line."""
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"dvi {__version__}\n")


@pytest.mark.parametrize("verb", ["", *VERBS, "bench spec-bench", "bench report"])
def test_h_is_help(verb):
    """Catches a verb that does not inherit the short form."""
    short, long = (CliRunner().invoke(app, [*verb.split(), option]) for option in ("-h", "--help"))
    assert short.exit_code == 0 and short.stdout == long.stdout


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch):
    """Catches a traceback for a server without its packages, and another bug's traceback swallowed."""
    import dvi.serving.front_door

    for module, message in (("fastapi", "pip install 'draft-verify-improve[serve]'"), ("elsewhere", None)):
        def fail(*_arguments, module=module, **_options):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

        monkeypatch.setattr(dvi.serving.front_door, "run_front_door", fail)
        if message is None:
            with pytest.raises(ModuleNotFoundError):
                dvi_command("route", "http://127.0.0.1:1")
        else:
            code, _, _, stderr = dvi_command("route", "http://127.0.0.1:1")
            assert code == 2 and stderr == f"error: this needs {module}, which is not installed: {message}\n"


def test_a_server_takes_a_model_and_its_commonest_settings_as_options():
    """Catches an option that does not reach the settings, and a command that needs a file."""
    options = ("--port", "8001", "--host", "localhost", "--adapter", "some/drafter")
    result = CliRunner().invoke(app, ["serve", STORIES, "train.enabled=false", *options, "--print-config"])
    settings = yaml.safe_load(result.stdout)
    assert settings["model"]["path"] == STORIES and settings["drafter"]["adapter"] == "some/drafter"
    assert (settings["serve"]["host"], settings["serve"]["port"]) == ("localhost", 8001)
    assert settings["train"]["enabled"] is False


def test_a_run_takes_a_model_and_a_file_of_prompts(tmp_path):
    """Catches prompts behind a model that are not learnt from, and a folder that is not the model's."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Once upon a time"}\n{"prompt": "The dog", "split": "eval"}\n', encoding="utf-8")
    code, facts, _, stderr = dvi_command(
        "train", STORIES, rows, f"output.folder={tmp_path / 'run'}", "output.tensorboard=false",
        "sampling.max_new_tokens=8", "eval.max_new_tokens=8", "drafter.anchor_hidden=16", "draft.policy=fixed",
    )  # fmt: skip
    assert code == 0, stderr
    assert facts["status"] == "done" and facts["requests"] == 1


def test_init_writes_a_file_that_its_verb_reads(tmp_path):
    """Catches a starting file that the verb it is for refuses."""
    for verb in ("serve", "train"):
        code, facts, _, stderr = dvi_command("init", tmp_path, "--for", verb, "--model", STORIES)
        assert code == 0 and facts["file"] == str(tmp_path / f"{verb}.yaml") and f"dvi {verb} {facts['file']}" in stderr
        result = CliRunner().invoke(app, [verb, facts["file"], "--print-config"])
        assert yaml.safe_load(result.stdout)["model"]["path"] == STORIES


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("arguments", "is_shown"),
    [(["a.yaml"], False), (["a.yaml", "--json"], True), (["--json", "a.yaml"], True), (["--", "--json"], False)],
)
def test_the_json_line_is_for_pipes_and_for_terminals_that_ask(arguments, is_shown, tmp_path, monkeypatch):
    """Catches a terminal that ends in a line for programs, --json that is ignored, and text taken for the option."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    with pytest.raises(SystemExit) as ended:
        app(["init", *arguments])
    assert ended.value.code == 0 and ('"command": "init"' in terminal.getvalue()) == is_shown
    assert (tmp_path / "a.yaml").is_file() != (tmp_path / "--json/serve.yaml").is_file()


@pytest.mark.parametrize("group", ["", "bench", "model"])
def test_the_list_of_verbs_is_whole_at_80_columns(group, monkeypatch):
    """Catches a verb whose line ends in dots, and a page wider than a terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    help_text = CliRunner().invoke(app, [*group.split(), "-h"]).stdout
    assert "..." not in help_text.partition("Commands:")[2] and max(map(len, help_text.splitlines())) <= 80


@pytest.mark.parametrize("verb", [*VERBS, "bench spec-bench", "bench paper", "model get"])
def test_no_help_is_wider_than_80_columns(verb, monkeypatch):
    """Catches a default or a list of choices that is wrapped by the terminal in the middle of a word."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = CliRunner().invoke(app, [*verb.split(), "-h"]).stdout.splitlines()
    assert max(map(len, lines)) <= 80


def test_a_line_for_people_is_broken_between_words_on_a_terminal_alone(monkeypatch):
    """Catches a path that is torn apart, and a line for a log that is broken."""
    from dvi.terminal import say

    text = f"error: {'/a-long-folder' * 6} must be there; " + "try again " * 9
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    say(text)
    lines = terminal.getvalue().splitlines()
    assert " ".join(lines) == text.strip() and "/a-long-folder" * 6 in lines and all(len(line) <= 90 for line in lines)
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    say(text)
    assert pipe.getvalue() == text + "\n"
