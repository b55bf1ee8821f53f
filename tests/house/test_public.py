"""What the repository shows the public: workflows, issue forms, and what SECURITY.md promises."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
FORMS = [GITHUB / "ISSUE_TEMPLATE" / name for name in ("bug.yml", "question.yml")]
PINNED = re.compile(r"uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+\s*")


def parsed(path: Path):
    """A YAML file with all scalars as they stand: `on` is no truth value, 3.10 no number."""
    return yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)


def steps(job):
    return job.get("steps", [])


def commands(job) -> str:
    return "\n".join(step.get("run", "") for step in steps(job))


def unpinned(workflow: str) -> list[str]:
    """Lines with an action that is neither this repository's nor a full commit with its version."""
    lines = (line.strip().removeprefix("- ") for line in workflow.splitlines())
    used = [line for line in lines if line.startswith("uses:")]
    return [u for u in used if not (u.startswith("uses: ./") or PINNED.fullmatch(u))]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_takes_pinned_actions_and_few_rights(path):
    assert unpinned(path.read_text(encoding="utf-8")) == []
    workflow = parsed(path)
    assert workflow["permissions"] == {}
    assert workflow["concurrency"]["group"]
    for name, job in workflow["jobs"].items():
        rights = {"id-token": "write"} if name == "publish" else {"contents": "read"}
        assert job["permissions"] == rights
        assert "uses" in job or int(job["timeout-minutes"]) <= 180
        for step in steps(job):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] == "false"


COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("used", "is_refused"),
    [
        (f"actions/checkout@{COMMIT} # v6.0.3", False),
        ("./.github/workflows/ci.yml", False),
        (f"actions/checkout@{COMMIT}", True),
        (f"actions/checkout@{COMMIT[:7]} # v6.0.3", True),
        ("actions/checkout@v6", True),
        ("docker://alpine:3", True),
    ],
)
def test_an_action_that_can_move_is_seen(used, is_refused):
    """Negative control."""
    refused = [f"uses: {used}"] if is_refused else []
    assert unpinned(f"    steps:\n      - uses: {used}\n") == refused


def test_ci_is_the_whole_check_and_the_quick_suite_on_each_python():
    jobs = parsed(GITHUB / "workflows/ci.yml")["jobs"]
    assert [name for name, job in jobs.items() if ".ci/run" in commands(job)] == ["whole"]
    assert jobs["quick"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert "python -m pytest -n 2\n" in commands(jobs["quick"]) + "\n"
    assert {"ruff check . && ruff format --check .", "pyright"} <= {
        step.get("run") for step in steps(jobs["lint"])
    }


def test_the_night_has_everything_on_every_line():
    night = parsed(GITHUB / "workflows/nightly.yml")["jobs"]["exhaustive"]
    lines = [row["line"] for row in night["strategy"]["matrix"]["include"]]
    assert lines == ["2.18", "3.9", "4.3"]
    assert "--whole --each-class" in commands(night)
    assert "--random-order" in commands(night)
    assert int(night["env"]["LENS_LORA_CASES"]) > 1


def test_only_a_tag_that_passed_is_published():
    release = parsed(GITHUB / "workflows/release.yml")
    assert release["on"] == {"push": {"tags": ["v*"]}}
    ci, build, publish = (release["jobs"][name] for name in ("ci", "build", "publish"))
    assert ci["uses"] == "./.github/workflows/ci.yml"
    assert publish["needs"] == ["ci", "build"]
    assert publish["environment"] == "pypi"
    assert "twine check --strict" in commands(build)
    assert "lens-lora --version" in commands(build)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_form_asks_for_the_versions(path):
    fields = {field.get("id"): field for field in parsed(path)["body"]}
    assert fields["versions"]["validations"]["required"] == "true"
    assert "`lens-lora --version`" in fields["versions"]["attributes"]["description"]


def test_no_issue_goes_without_a_form():
    folder = GITHUB / "ISSUE_TEMPLATE"
    assert sorted(folder.iterdir()) == [FORMS[0], folder / "config.yml", FORMS[1]]
    assert parsed(folder / "config.yml")["blank_issues_enabled"] == "false"


def test_a_commit_is_seen_by_ruff_of_one_version():
    (repository,) = parsed(ROOT / ".pre-commit-config.yaml")["repos"]
    versions = {tool for hook in repository["hooks"] for tool in hook["additional_dependencies"]}
    assert len(versions) == 1
    assert re.fullmatch(r"ruff==\d+\.\d+\.\d+", versions.pop())


def test_no_index_is_said_to_have_the_package():
    """CONTRIBUTING.md says what will be written once one has."""
    public = [*GITHUB.rglob("*.*"), ROOT / "SECURITY.md", ROOT / "README.md"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in public)
    assert not re.search(r"(pip|pipx|uv)\b[^\n]* install [^\n./]*\blens[-_]lora", text)


# --- SECURITY.md

UNPICKLING = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "torch.load", "np.load"}
EXECUTING = {"__import__", "compile", "eval", "exec", "os.popen", "os.system", "subprocess"}
FETCHING = {"aiohttp", "ftplib", "http", "httpx", "requests", "urllib", "urllib3"}
HUB = {"hf_hub_download", "list_repo_files", "snapshot_download"}
ARGUMENTS = {"allow_pickle", "trust_remote_code"}
RISKS = UNPICKLING | EXECUTING | FETCHING | HUB | ARGUMENTS
# SECURITY.md names them: an adapter and a base model, by name.
FETCHED = {
    "formats/hub.py": {"list_repo_files", "snapshot_download"},
    "loading.py": {"snapshot_download"},
    "hosts/given_base.py": {"snapshot_download"},  # of what is on this machine already
    "hosts/unloaded.py": {"trust_remote_code"},  # as False
    "cli/finished.py": {"hf_hub_download"},  # the base's configuration, for its newest commit
    "ship/merged_tokenizer.py": {"trust_remote_code"},  # as False
    "formats/gguf_layout.py": {"trust_remote_code"},  # as False
    "ship/server.py": {"http", "urllib"},  # of the server that the user names
}


def risks(source: str) -> set[str]:
    """What a module imports, calls or passes that could unpickle, execute or fetch."""
    seen = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            seen |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            seen.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            seen |= {name, *({name.rpartition(".")[2]} & HUB)}
            seen |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return seen & RISKS


def test_what_is_never_unpickled_executed_or_fetched():
    sources = {
        path.relative_to(ROOT / "lens_lora").as_posix(): path.read_text(encoding="utf-8")
        for path in ROOT.glob("lens_lora/**/*.py")
    }
    assert {name: seen for name, text in sources.items() if (seen := risks(text))} == FETCHED


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import pickle",
        "from urllib.request import urlopen",
        "import subprocess as s",
        "torch.load(file)",
        "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(file, allow_pickle=True)",
        "huggingface_hub.hf_hub_download(name)",
    ],
)
def test_a_risk_is_seen(source):
    """Negative control."""
    assert risks(source)
    assert not risks("model.eval()\nre.compile(text)\nfrom .http import page")


@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.parametrize("background", ["true", "sleep 60"], ids=["ended", "at work"])
def test_the_whole_check_ends_with_the_code_of_its_tests(tmp_path, background: str, code: int):
    """Not with that of its clean-up, which also runs under `set -e`; and it prints the summary."""
    (on_exit,) = re.findall(r"^trap .* EXIT$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    work = tmp_path / "work"
    work.mkdir()
    (work / "summary").write_text("2 failed\n")
    waits = 'wait "$maker"' if background == "true" else ":"
    lines = [
        "set -euo pipefail",
        f"work={work}",
        "set -m",
        f"{background} &",
        "maker=$!",
        "set +m",
        waits,
        on_exit,
        f"exit {code}",
    ]
    command = ["bash", "-c", "\n".join(lines)]
    # A session of its own: job control would stop this process, where it runs in the background.
    options = {"capture_output": True, "text": True, "timeout": 30, "start_new_session": True}
    done = subprocess.run(command, **options)
    assert (done.returncode, done.stdout) == (code, "2 failed\n")
    assert not work.exists()
