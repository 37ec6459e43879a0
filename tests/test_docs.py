"""The documentation against the repository: links, file map, command lines, flags.

Elsewhere: the configuration page (config/test_flags.py), the examples of docs/data.md (data/test_docs.py). Not covered:
whether the prose is true.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest

from megatron_gkd.cli import COMMANDS
from megatron_gkd.commands.convert import ConvertConfig
from megatron_gkd.config.checks import CheckConfig, CheckDataConfig, CheckTrainConfig
from megatron_gkd.config.plan import PlanConfig
from megatron_gkd.config.run import flags, flags_of
from megatron_gkd.config.sample import SampleConfig
from tests.support import metrics_page

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
CONVERT_FLAGS = flags_of(ConvertConfig, "convert")
SAMPLE_FLAGS = flags_of(SampleConfig, "sample")
CHECK_FLAGS = (
    flags_of(CheckConfig, "check")
    | flags_of(CheckDataConfig, "check_data")
    | flags_of(CheckTrainConfig, "check_train")
    | flags_of(PlanConfig, "plan")
    | flags()
)
OTHER_PROGRAMS = {
    "torchrun": {"--nproc-per-node", "--nnodes"},
    "sbatch": {"--nodes", "--time"},
    "launch/rollout_server.sh": {  # vLLM's
        *("--enable-scale-out", "--limit-mm-per-prompt", "--mm-processor-kwargs", "--no-mm-device-do-normalize"),
    },
    "swift deploy": {
        *("--api_key", "--host", "--max_logprobs", "--model_type", "--port", "--template", "--torch_dtype"),
        *("--use_chat_template", "--vllm_enforce_eager", "--vllm_engine_kwargs", "--infer_backend"),
    },
}
DIRECTORIES = ("launch", "megatron_gkd", "tests", "docs", "benchmarks", "examples", "requirements", "tools")
HISTORY = ("CHANGELOG.md", "LOG.md")  # what they name may have gone
NO_METRICS = {"retry_s", "timeout_s", "bucket_bytes", "convert.memory_bound_bytes", "memory_bound_bytes"}
REPORT_OPTIONS = {"--num_answers", "--max_new_tokens", "--compare", "--out", "--watch", "--watch_s"}
SCRIPT_OPTIONS = {"--offline", "--steps", "--out", "--fresh", "--dry-run", "--gpu", "--help", "--layers"}
SCRIPT_OPTIONS |= {"--setting", "--page"}  # of examples/skill


def ids(path: Path) -> str:
    return path.name


def words(page: Path) -> str:
    """Without changes that the page shows (```diff): what they name is not there before they are applied.
    test_extending.py applies them."""
    return re.sub(r"^```diff\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def prose(page: Path) -> str:
    """Without code blocks and code spans, where brackets and parentheses mean other things."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """Command lines in code blocks, fenced or indented, continuation lines joined."""
    text = words(page).replace("\\\n", " ")
    lines = [line.strip() for line in re.findall(r"^ {4}\S.*$", text, flags=re.M)]
    lines += [
        line.strip()
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S)
        for line in block.split("\n")
    ]
    starts = ("bash ", "python ", "torchrun ", "megatron-gkd ", "make ", "GKD_", ".venv/")
    return [line for line in lines if line.startswith(starts)]


def command_of(words: list[str]) -> str:
    """`train` in `torchrun ... -m megatron_gkd train --model S`; empty without one."""
    programs = [i for i, word in enumerate(words) if word in ("megatron-gkd", "megatron_gkd")]
    return words[programs[0] + 1] if programs and programs[0] + 1 < len(words) else ""


ALL_COMMANDS = [pytest.param(page, line, id=f"{page.name}: {line[:60]}") for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_resolve(page: Path):
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert file.is_relative_to(ROOT), f"{page.name} links out of the repository: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}, which has no such heading"


def test_every_page_is_reached_from_the_index():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES if page.parent == ROOT / "docs" and page.name not in index + "index.md"]
    assert not missing, f"docs/index.md does not link to {missing}"


def test_the_tests_that_the_page_about_tests_names_exist():
    text = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
    files = set(re.findall(r"\btests/[\w/]+(?:\.\w+)?", text))
    assert {name for name in files if not (ROOT / name).exists()} == set()
    defined = {
        name
        for file in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), flags=re.M)
    }
    assert set(re.findall(r"`(test_\w+)`", text)) <= defined


def file_map() -> list[str]:
    """Paths of the README's file map, by its indentation."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"FILE MAP: begin.*?```\n(.*?)```\n<!-- FILE MAP: end", text, flags=re.S)
    assert block, "README.md has no file map between its markers"
    paths, directory = [], ""
    for line in block[1].splitlines():
        name, _, words = line.strip().partition(" ")
        if not line.startswith(" ") and not words:
            directory = name
            continue
        assert 2 <= len(words.split()) <= 6, f"README file map: about five words for {name}, not {words!r}"
        paths.append((directory if line.startswith(" ") else "") + name)
    return paths


def test_file_map_names_exist():
    missing = [path for path in file_map() if not (ROOT / path).exists()]
    assert not missing, f"the README's file map names {missing}"


def test_file_map_is_complete():
    named = {path.rstrip("/") for path in file_map()}
    for directory in ("megatron_gkd", "launch", "examples/quickstart", "examples/skill"):
        there = {
            f"{directory}/{path.name}"
            for path in (ROOT / directory).iterdir()
            if not path.name.startswith(("__", ".", "py.typed"))
        }
        assert not there - named, f"the README's file map lacks {sorted(there - named)}"


@pytest.mark.parametrize(("page", "line"), ALL_COMMANDS)
def test_command_lines_name_what_exists(page: Path, line: str):
    words = shlex.split(line, comments=True)
    words = [word for word in words if not re.match(r"^[A-Z_]+=", word)]
    if words[0] in ("bash", "python") and not words[1].startswith("-"):
        assert (ROOT / words[1]).is_file(), f"{page.name}: {line}"
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
        assert set(words[1:]) <= targets, f"{page.name}: {line}"
    for program in ("megatron-gkd", "megatron_gkd"):
        if program in words and words.index(program) + 1 < len(words):
            command = words[words.index(program) + 1]
            assert command in COMMANDS or command.startswith("-"), f"{page.name}: {line}"
    if "megatron-gkd" in words or "megatron_gkd" in words or "launch/quickstart.sh" in words:
        used = {word.split("=")[0] for word in words if word.startswith("--")} - {"--nproc-per-node", "--nnodes"}
        report = REPORT_OPTIONS if "report" in words else set()
        of_command = {"convert": CONVERT_FLAGS, "sample": SAMPLE_FLAGS, "check": CHECK_FLAGS, "plan": CHECK_FLAGS}
        known = of_command.get(command_of(words), flags())
        unknown = {flag for flag in used - SCRIPT_OPTIONS - report if flag.removeprefix("--") not in known}
        assert not unknown - {"--markdown"}, f"{page.name}: {sorted(unknown)} in {line}"


def unknown_flags(text: str) -> set[str]:
    """Every `--name` that is no flag of ours, of a script, or of a benchmark or other program that the text names."""
    used = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))
    known = {f"--{name}" for name in flags() | CONVERT_FLAGS | SAMPLE_FLAGS | CHECK_FLAGS} | SCRIPT_OPTIONS
    known |= {"--config", "--rlhf_type", "--markdown", "--version"} | REPORT_OPTIONS
    for program, its in OTHER_PROGRAMS.items():
        known |= its if program in text else set()
    for script in set(re.findall(r"benchmarks\.(bench_\w+)", text)):
        source = (ROOT / f"benchmarks/{script}.py").read_text(encoding="utf-8")
        known |= set(re.findall(r'"(--[\w-]+)"', source + (ROOT / "benchmarks/measure.py").read_text(encoding="utf-8")))
    return used - known


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_flags_exist(page: Path):
    """In prose, tables and code alike."""
    assert unknown_flags(words(page)) == set()


def unknown_metrics(text: str) -> set[str]:
    """Names in code spans that look like those of a step's row, and are not on the page about metrics."""
    spans = re.findall(r"`((?:rollout|teacher_samples|source|push)[/_]\w+(?:/\w+)?|\w+_(?:s|bytes|kl|mass))`", text)
    spelt = {name.replace("/S/", "/student/") for name in spans}
    return spelt - metrics_page.names_under(*metrics_page.EVERYTHING) - NO_METRICS


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_metrics_exist(page: Path):
    assert unknown_metrics(words(page)) == set()


def test_the_package_writes_every_metric_of_the_page():
    """The way back: tests/train holds the rows of real runs against the page."""
    literals = {
        node.value
        for file in (ROOT / "megatron_gkd").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    for name in metrics_page.names_under(*metrics_page.EVERYTHING):
        parts = {name.removesuffix("L")} if not name.startswith("source/") else {"source/", name.split("/")[2]}
        assert parts <= literals or name.removesuffix("_s") in literals, f"docs/metrics.md: nothing writes {name}"


def missing_paths(text: str) -> set[str]:
    """Files that are named by a path from the root, or by one within the package, and are not there."""
    rooted = set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(DIRECTORIES)})/[\w./*-]*\w", text))
    within = set(re.findall(r"`([\w/]+\.py)`", text)) - rooted
    package = ROOT / "megatron_gkd"
    missing = {path for path in rooted if not list(ROOT.glob(path))}
    return missing | {path for path in within if not (package / path).exists() and not list(package.rglob(path))}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=ids)
def test_paths_exist(page: Path):
    assert missing_paths(words(page)) == set()


def too_long(text: str) -> list[str]:
    """Lines over 120 characters. A row of a table or of a data file is one line, whatever it says."""
    return [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "    {"))]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_lines_are_short(page: Path):
    assert too_long(words(page)) == []


def test_planted_faults_are_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("See `none.py`.\n\n```diff\n+see `new.py`, --no_such_flag\n```\n\n```bash\nmake nothing\n```\n")
    assert missing_paths(words(page)) == {"none.py"}
    assert unknown_flags(words(page)) == set()
    assert commands(page) == ["make nothing"]
    text = "Give `--no_such_flag 1` to `launch/none.sh`; then `rollout/shortened` and `wait_s` in `nowhere.py` fall.\n"
    assert unknown_flags(text) == {"--no_such_flag"}
    assert unknown_flags("`sbatch --nodes=3`, and --nproc-per-node") == {"--nproc-per-node"}
    assert unknown_metrics(text) == {"rollout/shortened", "wait_s"}
    assert missing_paths(text) == {"launch/none.sh", "nowhere.py"}
    assert too_long("x" * 121 + "\n| " + "y" * 121) == ["x" * 121]


def test_changelog_and_version_agree():
    import megatron_gkd

    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{megatron_gkd.__version__}"' in pyproject
    assert megatron_gkd.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_pages_are_ascii_and_end_with_a_line(page: Path):
    text = page.read_text(encoding="utf-8")
    assert text.isascii()
    assert text.endswith("\n")
    assert not re.search(r"[ \t]+$", text, flags=re.M), "trailing blanks"
